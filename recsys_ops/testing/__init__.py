"""The correctness suite as a library: describe an operator once, check every backend of it.

``recsys_ops.testing.verify`` runs it on this machine; ``recsys_ops/<op>/cases.py``
describes an operator; ``candidate`` puts kernels that are not a backend yet to the test.
"""

from recsys_ops.testing.checks import (
    check_bad_input,
    check_determinism,
    check_forward_backward,
    check_gradcheck,
    check_inputs_untouched,
    check_isolation,
    check_partial_gradients,
    check_strided,
)
from recsys_ops.testing.contract import BadInput, Case, Isolation, Mutant, OperatorSpec
from recsys_ops.testing.execution import Target, candidate, overridden, targets
from recsys_ops.testing.inputs import AWKWARD_LENGTHS, AWKWARD_WIDTHS, Inputs, with_layout
from recsys_ops.testing.mutants import check_mutant
from recsys_ops.testing.poison import Guard, poisoned_memory
from recsys_ops.testing.registry import CHECKS, Check, Example, Result, examples
from recsys_ops.testing.streams import check_graph, check_stream
from recsys_ops.testing.tolerances import Comparison, compare
from recsys_ops.testing.tracing import (
    check_autocast,
    check_compile,
    check_functional,
    check_meta,
    check_opcheck,
)

__all__ = [
    "AWKWARD_LENGTHS",
    "AWKWARD_WIDTHS",
    "CHECKS",
    "BadInput",
    "Case",
    "Check",
    "Comparison",
    "Example",
    "Guard",
    "Inputs",
    "Isolation",
    "Mutant",
    "OperatorSpec",
    "Result",
    "Target",
    "candidate",
    "check_autocast",
    "check_bad_input",
    "check_compile",
    "check_determinism",
    "check_forward_backward",
    "check_functional",
    "check_gradcheck",
    "check_graph",
    "check_inputs_untouched",
    "check_isolation",
    "check_meta",
    "check_mutant",
    "check_opcheck",
    "check_partial_gradients",
    "check_stream",
    "check_strided",
    "compare",
    "examples",
    "overridden",
    "poisoned_memory",
    "targets",
    "with_layout",
]

"""How an operator describes itself to the correctness suite: everything else is the suite's."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recsys_ops.backends import Operator
from recsys_ops.testing.inputs import Inputs

if TYPE_CHECKING:
    from typing_extensions import Self

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem for an operator. Each operator derives a frozen dataclass whose fields have defaults.

    The fields that differ from their defaults are the case's name, and a name gives the
    case back: so every example, drawn ones too, is reproduced by one line.

    Example:
        >>> @dataclass(frozen=True)
        ... class Scaling(Case):
        ...     rows: int = 3
        ...     def build(self, draw):
        ...         return {"x": draw.normal(self.rows), "factor": 2.0}
        >>> Scaling(rows=5).name
        'rows=5'
        >>> Scaling.from_name("rows=5") == Scaling(rows=5)
        True
    """

    def build(self, draw: Inputs) -> dict[str, Any]:
        """The arguments of the public function, scaled so that results are of order one."""
        raise NotImplementedError

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Arguments that get a gradient."""
        return ()

    @property
    def mutates(self) -> tuple[str, ...]:
        """Arguments that the operator is documented to change."""
        return ()

    @property
    def signed(self) -> tuple[str, ...]:
        """Arguments whose sign decides which terms are summed: they keep it where magnitudes are computed."""
        return ()

    @property
    def name(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed) or "default"

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The case of this name; raises ValueError for text that is not a name."""
        try:
            call = ast.parse(f"f({'' if name == 'default' else name})", mode="eval").body
            return cls(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})  # type: ignore[attr-defined]
        except (SyntaxError, TypeError) as error:
            raise ValueError(
                f"expected 'field=value, ...' with fields of {cls.__name__}, got {name!r}"
            ) from error


@dataclass(frozen=True)
class Isolation:
    """Values that must not leak: ``poison`` puts NaN into the arguments and cotangents of a case.

    ``poison(arguments, cotangents)`` changes the tensors in place and tells where the NaN may
    arrive: for each result ("output", "gradient of weight") a mask. Nothing else may change by a bit.
    """

    name: str
    case: Case
    poison: Callable[[dict[str, Any], tuple[Tensor | None, ...]], dict[str, Tensor]]
    quick: bool = True  # whether interpreted kernels run it, too


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused, on every backend alike."""

    name: str
    build: Callable[[Inputs], dict[str, Any]]
    error: type[Exception]
    message: str  # a regular expression


@dataclass(frozen=True)
class Mutant:
    """Kernels that are wrong on purpose: ``override`` takes the right ones and gives wrong ones by name."""

    name: str
    caught_by: str  # the check that must reject it
    override: Callable[[Any], dict[str, Callable[..., Any]]]


@dataclass(frozen=True, eq=False)
class OperatorSpec:
    """All that the suite needs to know about an operator; ``recsys_ops/<op>/cases.py`` holds it as ``SPEC``.

    Args:
        operator: its implementations.
        function: the public function, taking the arguments that cases build, and ``backend``;
            gives a tensor or a tuple of tensors.
        kernels: the registered kernels of each backend, under their names in the ``reference`` module.
        registered_call: the differentiable registered operator and its arguments, for the arguments
            that a case builds and a backend's name.
        case: its class of cases.
        quick: the fewest cases that reach every branch; all that interpreted kernels run.
        typical: a handful that call every kernel, for checks that run a case many times.
        mutating: cases that call the kernels which write to their arguments and give no gradients.
        cases: further cases, for compiled kernels.
        large: cases large enough for several threads.
        small: cases small enough for finite differences.
        asynchronous: cases in which nobody needs to wait for a GPU.
        isolations, bad_inputs, mutants: see their classes.
        exhaustive: every combination worth hours of a machine's time.
        dtypes: of the floating-point arguments.
        eager_depends_on_threads: whether the reference's bits depend on their number, as those of
            PyTorch's products of matrices do.
        casts_under_autocast: whether floating-point arguments are cast to the dtype of autocast.
    """

    operator: Operator
    function: Callable[..., Any]
    kernels: dict[str, SimpleNamespace]
    registered_call: Callable[[dict[str, Any], str], tuple[Any, tuple[Any, ...]]]
    case: type[Case]
    quick: tuple[Case, ...]
    typical: tuple[Case, ...]
    mutating: tuple[Case, ...] = ()
    cases: tuple[Case, ...] = ()
    large: tuple[Case, ...] = ()
    small: tuple[Case, ...] = ()
    asynchronous: tuple[Case, ...] = ()
    isolations: tuple[Isolation, ...] = ()
    bad_inputs: tuple[BadInput, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    exhaustive: Callable[[], Iterable[Case]] = tuple
    dtypes: tuple[torch.dtype, ...] = FLOATS
    eager_depends_on_threads: bool = False
    casts_under_autocast: bool = False

    @property
    def name(self) -> str:
        return self.operator.name

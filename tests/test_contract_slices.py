"""Every operator is a whole vertical slice: no file is missing, and what describes it agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from recsys_ops import _extension
from recsys_ops.backends import operators
from recsys_ops.testing import CHECKS
from recsys_ops.testing.execution import expected
from recsys_ops.testing.verify import spec_of

ROOT = Path(__file__).parents[1]
OPERATORS = sorted(operators())
PARTS = ("api", "reference", "autograd", "cost", "modules", "cases", "variants")
FILES = (
    *(f"recsys_ops/{{op}}/{part}.py" for part in PARTS),
    "csrc/{op}/{op}.h",
    "csrc/{op}/{op}_cpu.cpp",
    "csrc/{op}/{op}_cuda.cpp",
    "csrc/{op}/{op}_forward.cu",
    "csrc/{op}/{op}_backward.cu",
    "triton_kernels/{op}.py",
    "tests/{op}/test_contract.py",
    "tests/{op}/test_cuda_on_cpu.py",
)
# What kernels alone can get wrong; the other checks are of what surrounds them.
CHECKS_OF_KERNELS = {
    "forward_backward",
    "inputs_untouched",
    "strided",
    "determinism",
    "isolation",
    "gradcheck",
    "bad_input",
}


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("file", FILES)
def test_slice_has_file(op: str, file: str) -> None:
    assert (ROOT / file.format(op=op)).is_file()


def test_every_slice_is_an_operator() -> None:
    slices = {path.parent.name for path in ROOT.glob("csrc/*/*_cpu.cpp")}
    assert slices == set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_schemas_equal_those_of_the_reference(op: str) -> None:
    if reason := _extension.missing():
        pytest.skip(reason)
    spec = spec_of(op)
    reference = spec.operator.implementations["reference"].kernels
    assert vars(spec.kernels["native"]).keys() == vars(spec.kernels["reference"]).keys()
    for name, kernel in vars(spec.kernels["native"]).items():
        changed = getattr(reference, "MUTATES", {}).get(name, ())
        inferred = torch.library.infer_schema(getattr(reference, name), mutates_args=changed)
        assert str(kernel._schema) == f"recsys_ops::{name}{inferred}"


def test_registration_defines_the_kernels_and_nothing_else() -> None:
    source = (ROOT / "csrc/registration.cpp").read_text()
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', source)
    kernels = [name for op in OPERATORS for name in vars(spec_of(op).kernels["reference"])]
    assert sorted(defined) == sorted(kernels)


@pytest.mark.parametrize("op", OPERATORS)
def test_reference_and_backends_have_every_kernel(op: str) -> None:
    spec = spec_of(op)
    reference = spec.operator.implementations["reference"].kernels
    for name in vars(spec.kernels["reference"]):
        assert getattr(reference, name).__doc__, f"{name} of {op}/reference.py has no docstring"


@pytest.mark.parametrize("op", OPERATORS)
def test_suite_has_something_to_check(op: str) -> None:
    spec = spec_of(op)
    for name, check in CHECKS.items():
        for quick in (True, False):
            assert check.subjects(spec, quick), f"{name} has no subjects"
            assert check.dtypes(spec, quick), f"{name} has no dtypes"


@pytest.mark.parametrize("op", OPERATORS)
def test_every_check_of_kernels_rejects_a_mutant(op: str) -> None:
    assert {mutant.caught_by for mutant in spec_of(op).mutants} == CHECKS_OF_KERNELS


@pytest.mark.parametrize("op", OPERATORS)
def test_names_are_unique_and_give_the_case_back(op: str) -> None:
    spec = spec_of(op)
    for case in {*spec.quick, *spec.cases, *spec.large, *spec.small, *spec.typical}:
        assert spec.case.from_name(case.name) == case
    for subjects in (spec.isolations, spec.bad_inputs, spec.mutants):
        names = [subject.name for subject in subjects]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_are_of_order_one(op: str) -> None:
    """Else a budget relative to them, or to their largest terms, means nothing."""
    spec = spec_of(op)
    for case in dict.fromkeys((*spec.quick, *spec.cases, *spec.large)):
        output = expected(spec, case, torch.float32).exact.get("output")
        if output is not None and output.count_nonzero() > 100:
            size = float(output[output != 0].square().mean().sqrt())
            assert 0.1 < size < 10, f"outputs of {case.name} are about {size:.3g}"

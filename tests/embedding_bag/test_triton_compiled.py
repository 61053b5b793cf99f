"""The Triton kernels compiled for GPUs that are not here: registers, spills, load widths, atomics.

Kernels that were imported under TRITON_INTERPRET cannot be compiled, so a process of
its own compiles them all once, and the tests look at what it reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch

from recsys_ops.testing.compiled import TARGETS, CompiledKernel, compile_kernel

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}

# Of a thread on NVIDIA, with a little room for other compilers. An SM has 64 Ki registers and takes
# 32 blocks, so at 64 one-warp blocks fill it and at 80 four fifths of them do.
REGISTERS = {
    "forward": 72,
    "max_forward": 64,
    "entries": 72,
    "backward": 80,
    "backward_of_maximum": 72,
    "backward_of_pieces": 72,
    "backward_per_sample_weights": 80,
}
# Kernels that gather rows, and how many 16-byte loads of them are in flight at least.
GATHERS = {
    "forward": 5,
    "max_forward": 5,
    "backward": 6,
    "backward_of_maximum": 8,
    "backward_of_pieces": 6,
    "backward_per_sample_weights": 8,
}

ABSENT = {
    "backward": ("argmax_ptr",),
    "backward_of_maximum": ("factors_ptr",),
    "backward_of_pieces": ("order_ptr", "bags_ptr", "factors_ptr", "argmax_ptr", "offsets_ptr"),
}


class Case(NamedTuple):
    """One kernel, compiled for one kind of table and one GPU."""

    kernel: str
    target: str
    dtype: str = "fp32"
    dim: int = 128
    column_stride: int = 1
    sizes: str = "i32"


EVERY_KERNEL = [Case(kernel, target) for target in TARGETS for kernel in REGISTERS]
HALF = [Case(kernel, target, "fp16", 256) for target in ("sm_90", "gfx942") for kernel in GATHERS]
SHORT_ROWS = [Case(kernel, "sm_90", "fp32", 16) for kernel in ("forward", "backward")]
SHORTEST = [Case(kernel, target, "fp16", 8) for target in ("sm_90", "gfx942") for kernel in GATHERS]
DOUBLE = [Case("forward", "sm_90", "fp64", 64)]
SEVERAL_BLOCKS = [Case(kernel, "sm_90", "fp32", 384) for kernel in GATHERS]
SEVERAL_BLOCKS += [Case("backward_per_sample_weights", "gfx942", "fp64", 1000)]
PAST_2_TO_THE_31 = [Case(kernel, "sm_90", sizes="i64") for kernel in REGISTERS]
NOT_A_POWER_OF_TWO = [Case("forward", "sm_90", "fp32", 100)]
UNALIGNED = [Case("forward", "sm_90", "fp32", 101), Case("forward", "sm_90", column_stride=1000)]
GATHERING = [case for case in EVERY_KERNEL + PAST_2_TO_THE_31 if case.kernel in GATHERS]
GATHERING += HALF + SHORT_ROWS + DOUBLE + SEVERAL_BLOCKS + NOT_A_POWER_OF_TWO
CASES = list(dict.fromkeys([*EVERY_KERNEL, *PAST_2_TO_THE_31, *GATHERING, *SHORTEST, *UNALIGNED]))


def compile_case(case: Case) -> CompiledKernel:
    """Compile the kernel as the host functions launch it."""
    import triton.language as tl

    from recsys_ops.triton_kernels import embedding_bag as host
    from recsys_ops.triton_kernels import embedding_bag_kernels

    name, _, terms = case.kernel.partition("_of_")
    kernel = getattr(embedding_bag_kernels, f"embedding_bag_{name}_kernel")
    dtype = DTYPES[case.dtype]
    sums = "fp64" if case.dtype == "fp64" else "fp32"
    lanes = TARGETS[case.target][2]
    forward = host.EmbeddingBagForwardConfig.default(case.dim, dtype, lanes)
    backward = host.EmbeddingBagBackwardConfig.default(case.dim, dtype, terms == "maximum", lanes)

    constants: dict[str, Any] = {
        "D": case.dim,
        "ROW_STRIDE": case.dim if case.column_stride == 1 else 1,
        "COLUMN_STRIDE": case.column_stride,
        "MEAN": True,
        "DROP_INVALID": False,
        "ACCUMULATE": getattr(tl, sums.replace("fp", "float")),
        "BLOCK_D": forward.block_d,
        "BAGS": forward.bags_per_program,
        "ROWS": (backward if name == "backward" else forward).rows_in_flight,
        "CHUNK": backward.chunk,
        "CHUNKS": backward.chunks_per_program,
        "ENTRIES": forward.bags_per_program * forward.rows_in_flight,
    }
    options: dict[str, Any] = {"num_warps": forward.num_warps}
    if case.kernel == "entries":
        constants |= {"BAGS": host.BAGS, "ENTRIES": host.ENTRIES}
        options = {}
    if case.kernel in ("forward", "max_forward", "entries") and case.target != "gfx942":
        options |= host.ASSERTING  # on AMD an assertion prints, which takes atomics and registers
    constants |= dict.fromkeys(ABSENT.get(case.kernel, ()))

    pointers = dict.fromkeys(("indices_ptr", "offsets_ptr", "order_ptr"), "*i64") | {"argmax_ptr": "*i32"}
    pointers |= dict.fromkeys(("keys_ptr", "rows_ptr", "bags_ptr", "targets_ptr"), f"*{case.sizes}")
    pointers |= dict.fromkeys(("pieces_ptr", "factors_ptr"), f"*{sums}")
    if terms == "pieces":
        pointers["terms_ptr"] = f"*{sums}"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: pointers.get(name, f"*{case.dtype}" if name.endswith("_ptr") else case.sizes)
        for name in kernel.arg_names
        if name not in constants
    }
    return compile_kernel(kernel, signature, constants, case.target, **options)


@pytest.fixture(scope="module")
def compiled() -> dict[Case, CompiledKernel]:
    """All cases, compiled by a process in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    kernels = [CompiledKernel(**_with_integer_keys(kernel)) for kernel in json.loads(found.stdout)]
    return dict(zip(CASES, kernels, strict=True))


def _with_integer_keys(kernel: dict[str, Any]) -> dict[str, Any]:
    return kernel | {name: {int(w): n for w, n in kernel[name].items()} for name in ("loads", "stores")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_neither_spills_nor_atomics(compiled: dict[Case, CompiledKernel], case: Case) -> None:
    assert compiled[case].spilled_bytes == 0
    assert compiled[case].atomics == 0


@pytest.mark.parametrize("case", EVERY_KERNEL, ids=lambda case: "-".join(map(str, case)))
def test_registers(compiled: dict[Case, CompiledKernel], case: Case) -> None:
    if case.target == "gfx942":
        assert compiled[case].registers <= 256  # two waves on each SIMD
    else:
        assert compiled[case].registers <= REGISTERS[case.kernel]


@pytest.mark.parametrize(
    "case",
    [case for case in EVERY_KERNEL if case.kernel in GATHERS],
    ids=lambda case: "-".join(map(str, case)),
)
def test_rows_do_not_pass_through_shared_memory(compiled: dict[Case, CompiledKernel], case: Case) -> None:
    assert compiled[case].shared_bytes <= (32 * 4 if case.kernel == "backward_per_sample_weights" else 0)


@pytest.mark.parametrize(
    "case",
    GATHERING,
    ids=lambda case: "-".join(map(str, case)),
)
def test_rows_are_gathered_by_16_bytes(compiled: dict[Case, CompiledKernel], case: Case) -> None:
    kernel = compiled[case]
    assert kernel.loads[16] >= 8
    if kernel.loads_in_flight is not None:
        assert kernel.loads_in_flight >= GATHERS[case.kernel]


@pytest.mark.parametrize("case", UNALIGNED, ids=lambda case: "-".join(map(str, case)))
def test_unaligned_rows_are_gathered_by_element(compiled: dict[Case, CompiledKernel], case: Case) -> None:
    assert 16 not in compiled[case].loads


if __name__ == "__main__":
    print(json.dumps([asdict(compile_case(case)) for case in CASES]))

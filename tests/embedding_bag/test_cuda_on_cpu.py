"""The CUDA kernels pass the correctness suite on the CPU, under sanitizers, and planted faults do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host.build import ROOT, build_operator, environment
from cuda_host.suite import (
    CHECKED,
    NEEDS_COMPILER,
    PARTS,
    Fault,
    Outcomes,
    check_outcome,
    outcomes_of,
    what_is_said_of,
)

from recsys_ops import _extension
from recsys_ops.embedding_bag.cost import backward_cost, forward_cost

pytestmark = NEEDS_COMPILER

OP = "embedding_bag"
# So few blocks that groups take several tasks, for one of the builds.
DEFINES = {"address": (), "races": ("RECSYS_OPS_MOST_BLOCKS=3",)}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes_of(OP, DEFINES, tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize("check", CHECKED)
@pytest.mark.parametrize("sanitizer", DEFINES)
def test_contract(suite: Outcomes, sanitizer: str, check: str) -> None:
    check_outcome(suite(sanitizer, "quick")[check])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sanitizer", DEFINES)
def test_whole_contract(suite: Outcomes, sanitizer: str, part: str) -> None:
    for outcome in suite(sanitizer, part).values():
        check_outcome(outcome)


EAGER = """
import ctypes, sys
import torch
from recsys_ops import _extension, embedding_bag

torch.ops.load_library(sys.argv[1])
forward = ctypes.CDLL(sys.argv[1]).embedding_bag_eager_forward
forward.restype = ctypes.c_void_p
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
name = ctypes.create_string_buffer(b"recsys_ops.embedding_bag.EagerForward")

weight = torch.randn(9, 40)
ids, offsets, factors = torch.tensor([1, 8, 3, 3, 0]), torch.tensor([0, 2, 2]), torch.randn(5)

def results():
    for mode in ("sum", "mean"):
        yield embedding_bag(ids, weight, offsets, mode=mode)
        yield embedding_bag(ids, weight, offsets, mode=mode, per_sample_weights=factors, padding_idx=3)

wanted = list(results())
_extension.module().bind_eager_device(1, new_capsule(forward(), name, None))
for found, expected in zip(results(), wanted, strict=True):
    torch.testing.assert_close(found, expected)
try:
    embedding_bag(torch.tensor([9]), weight, torch.tensor([0]))
except RuntimeError as error:
    print(error)
"""


def test_eager_calls_past_the_dispatcher() -> None:
    if reason := _extension.missing():
        pytest.skip(reason)
    library = build_operator(OP, "address", DEFINES["address"])
    done = subprocess.run(
        [sys.executable, "-c", EAGER, str(library)],
        env=environment("address"),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "CUDA: embedding_bag: expected offsets from 0" in done.stdout


TRAFFIC = """
import ctypes, json, sys
import torch
from cuda_host.contract import load_kernels

library = ctypes.CDLL(sys.argv[1])
kernels = load_kernels(sys.argv[1], "embedding_bag")
B, L, R, D = 64, 20, 2000, 128
generator = torch.Generator().manual_seed(0)
weight, grad = (torch.randn(n, D, generator=generator) for n in (R, B))
ids, offsets = torch.randint(R, (B * L,), generator=generator), torch.arange(0, B * L + 1, L)

def traffic(call):
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    call()
    library.cuda_host_take_traffic(ctypes.byref(read), ctypes.byref(written))
    return read.value, written.value

print(json.dumps({
    "unique": len(ids.unique()),
    "forward": traffic(
        lambda: kernels.embedding_bag_forward(weight, ids, offsets, None, False, -1, True, False)
    ),
    "backward": traffic(lambda: kernels.embedding_bag_backward_sparse(
        grad, ids, offsets, None, R, False, -1, True, False, False)),
}))
"""


def test_no_byte_is_moved_twice() -> None:
    """By one launch, between memory and the caches: what the limit of a kernel is reckoned from."""
    library = build_operator(OP, "races")
    command = [sys.executable, "-c", TRAFFIC, str(library)]
    paths = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bags, ids, rows, dim = 64, 64 * 20, found["unique"], 128
    arguments = 256  # of a launch
    forward = forward_cost(bags, ids, rows, dim).bytes
    assert forward <= sum(found["forward"]) < forward + arguments

    least = backward_cost(bags, ids, rows, dim).bytes
    keys = 5 * 8 * ids  # written, read by two launches that number the runs, written anew, read by the sums
    pieces = 2 * ids // 32 * (8 + 4 * dim)  # of runs that cross chunks, where all do
    counts = 3 * 8 * ids // 32
    assert least <= sum(found["backward"]) < least + keys + 2.2 * pieces + counts + 8 * arguments
    sort = 5 * 8 * ids  # counted, then two passes, since the rows have eleven bits
    assert least / (sum(found["backward"]) + sort) > 0.7


FAULTS = {
    "off by one at the end of a bag": Fault(
        f"{OP}/bag_reader.cuh",
        "entry >= end",
        "entry > end",
        "address",
        r"forward_backward \[|AddressSanitizer",
    ),
    "a mask that leaves a lane out": Fault(
        "common/cuda/group.cuh",
        "whole_warp = 0xffffffff;",
        "whole_warp = 0x7fffffff;",
        "address",
        "lane outside of its own mask",
    ),
    "votes of other groups counted": Fault(
        "common/cuda/group.cuh",
        " >> first_lane & whole_warp >> (warp_lanes - lanes)",
        " >> first_lane",
        "address",
        r"forward_backward \[.*mean",
    ),
    "columns past the end of a row": Fault(
        f"{OP}/bag_pooling.cuh",
        "row[u] >= 0 && place_column < table.dim",
        "row[u] >= 0",
        "address",
        r"forward_backward \[|AddressSanitizer: heap-buffer-overflow",
    ),
    "a shuffle that not all lanes reach": Fault(
        f"{OP}/bag_pooling.cuh",
        "const auto gradient = gradient_at(place);",
        "if (place.column >= table.dim) continue;\nconst auto gradient = gradient_at(place);",
        "address",
        "divergent warp operation",
    ),
    "the next level not told of a piece": Fault(
        f"{OP}/run_sums.cuh",
        "= goes_on ? last_target : -1",
        "= -1",
        "address",
        r"forward_backward \[.*gradient of weight",
    ),
    "all groups of a row write the same": Fault(
        f"{OP}/run_sums.cuh",
        "if (writes_targets && inside) {",
        "if (inside) {",
        "races",
        "race: writes a byte of global memory that was written",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    said = what_is_said_of(OP, FAULTS[fault], DEFINES[FAULTS[fault].build], tmp_path)
    assert re.search(FAULTS[fault].message, said, re.DOTALL), said[-3000:]

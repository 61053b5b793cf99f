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

pytestmark = NEEDS_COMPILER

OP = "embedding_bag_collection"
# So few blocks that warps take several tasks, and so few lookups that several launches share them, for
# one of the builds.
DEFINES = {"address": (), "races": ("RECSYS_OPS_MOST_BLOCKS=3", "RECSYS_OPS_MOST_LOOKUPS=2")}


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


UNUSUAL = """
import json, sys
import torch
from cuda_host.contract import load_kernels
from recsys_ops.embedding_bag_collection import reference
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES

kernels = load_kernels(sys.argv[1], "embedding_bag_collection")
generator = torch.Generator().manual_seed(0)

def normal(*shape):
    return torch.randn(*shape, generator=generator)

# Tables of different widths with the same bags, bags without a lookup, bags in two lookups of a table,
# and bags of one that share entries with others.
offsets = torch.tensor([0, 3, 3, 7, 9, 12, 14, 3, 4, 5, 6, 7])
values = torch.randint(11, (14,), generator=generator)
factors = normal(14)
lookups = torch.tensor([
    [0, 0, 0, 2, 0, 9], [1, 1, 0, 2, 4, 9], [0, 0, 4, 2, 20, 9], [1, 1, 4, 2, 24, 9],
    [2, 0, 2, 2, 40, 4], [2, 0, 2, 2, 50, 4], [3, 0, 7, 4, 60, 4], [4, 2, 3, 2, 80, 5],
])
shapes = [(11, 4), (11, 5), (11, 4), (11, 4), (12, 5)]
weights = [normal(*shape) for shape in shapes]
weights[2] = normal(4, 11).t()
bags = (values, offsets, factors, lookups, False)
results = {}

def both(name, *args):
    return [getattr(k, f"embedding_bag_collection_{name}")(*args) for k in (kernels, reference)]

def differ(a, b):
    return not torch.allclose(a, b, rtol=1e-5, atol=1e-5)

outputs, winners = torch.zeros(2, 100), torch.full((2, 100), -7, dtype=torch.int32)
for k, output, argmax in zip((kernels, reference), outputs, winners):
    k.embedding_bag_collection_forward(output, argmax, weights, *bags)
results["forward"] = differ(*outputs) or not torch.equal(*winners)

gradient = (normal(100), winners[1].clone())
for name in ("backward", "backward_sparse"):
    found, expected = both(name, *gradient, weights, *bags)
    results[name] = any(differ(a.double(), b.double()) for a, b in zip(found, expected, strict=True))
found, expected = both("backward_per_sample_weights", gradient[0], weights, values, offsets, lookups, False)
results["backward_per_sample_weights"] = differ(found, expected)

for number, optimizer in enumerate(OPTIMIZERS):
    hyperparameters = torch.tensor([0.1, 1e-3, 0.9, 0.99, 0.1, 0.2, 1.5, 2.0], dtype=torch.float64)
    states = [
        torch.rand(shape[:1] if rowwise else shape, generator=generator) + 1
        for shape in shapes for rowwise in STATES[number].values()
    ]
    after = []
    for k in (kernels, reference):
        copies = [w.clone(memory_format=torch.preserve_format) for w in weights], [s.clone() for s in states]
        step = torch.tensor(2)
        k.embedding_bag_collection_update(
            *copies, step, *gradient, *bags, number, hyperparameters, 7, False
        )
        after.append([*copies[0], *copies[1], step])
    results[optimizer] = any(differ(a.double(), b.double()) for a, b in zip(*after, strict=True))

# Rounding of halves: the same bits wherever the sums before it are exact, and rows beyond 2^32 aside.
table = normal(6, 40).bfloat16()
after = []
for k in (kernels, reference):
    weight = table.clone()
    k.embedding_bag_collection_update(
        [weight], [], torch.tensor(0), torch.ones(80), None, torch.tensor([1, 4]), torch.tensor([0, 1, 2]),
        None, torch.tensor([[0, 0, 0, 2, 0, 40]]), False, 0,
        torch.tensor([2.0**-9, 0, 0, 0, 0, 0, float("inf"), float("inf")], dtype=torch.float64),
        123456789, True,
    )
    after.append(weight)
results["stochastic rounding"] = not torch.equal(*after) or torch.equal(after[0], table)
print(json.dumps(results))
"""


@pytest.mark.parametrize("sanitizer", DEFINES)
def test_lookups_that_no_layout_makes(sanitizer: str) -> None:
    library = build_operator(OP, sanitizer, DEFINES[sanitizer])
    paths = environment(sanitizer) | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", UNUSUAL, str(library)]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    differs = json.loads(done.stdout)
    assert not [name for name, different in differs.items() if different]


TRAFFIC = """
import ctypes, json, sys
import torch
from cuda_host.contract import load_kernels

library = ctypes.CDLL(sys.argv[1])
kernels = load_kernels(sys.argv[1], "embedding_bag_collection")
T, B, L, R, D = 3, 32, 10, 1000, 64
generator = torch.Generator().manual_seed(0)
weights = [torch.randn(R, D, generator=generator) for _ in range(T)]
values, offsets = torch.randint(R, (T * B * L,), generator=generator), torch.arange(0, T * B * L + 1, L)
lookups = torch.tensor([[t, 0, t * B, B, t * D, T * D] for t in range(T)])

def traffic(call):
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    library.cuda_host_take_traffic(ctypes.byref(read), ctypes.byref(written))
    call()
    library.cuda_host_take_traffic(ctypes.byref(read), ctypes.byref(written))
    return read.value + written.value

rows = sum(len(v.unique()) for v in values.view(T, -1))
output = torch.empty(B * T * D)
print(json.dumps({
    "rows": rows,
    "forward": traffic(lambda: kernels.embedding_bag_collection_forward(
        output, None, weights, values, offsets, None, lookups, False)),
    "update": traffic(lambda: kernels.embedding_bag_collection_update(
        weights, [], torch.tensor(0), output, None, values, offsets, None, lookups, False, 0,
        torch.tensor([0.1, 0, 0, 0, 0, 0, float("inf"), float("inf")], dtype=torch.float64), 0, False)),
}))
"""


def test_no_row_is_moved_twice() -> None:
    """By one launch, between memory and the caches; an update writes and reads the sums between."""
    library = build_operator(OP, "races", DEFINES["races"])
    command = [sys.executable, "-c", TRAFFIC, str(library)]
    paths = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bags, ids, dim, row_bytes = 3 * 32, 3 * 32 * 10, 64, 4 * 64
    least = found["rows"] * row_bytes + bags * row_bytes + 8 * (ids + bags)
    assert least <= found["forward"] < 1.02 * least + 4096
    update = 4 * found["rows"] * row_bytes + bags * row_bytes + 8 * (ids + bags)
    keys = 10 * 8 * ids
    pieces = 2 * ids // 32 * (8 + 4 * dim)
    assert update <= found["update"] < update + keys + 2.2 * pieces + 16384


FAULTS = {
    "warps of the next lookup": Fault(
        f"{OP}/lookups.cuh",
        "if (end_of(middle) <= number) {",
        "if (end_of(middle) < number) {",
        "races",
        r"forward_backward \[|race|runtime error|AddressSanitizer",
    ),
    "cells beyond a range": Fault(
        f"{OP}/embedding_bag_collection_backward.cu",
        "|| cell >= ranges[near + 1].first_cell",
        "",
        "races",
        r"forward_backward \[.*gradient of weight",
    ),
    "bags that share entries in one layer": Fault(
        f"{OP}/gradient_plan.h",
        "if (range->first_bag > end_of_touching) {",
        "if (false) {",
        "races",
        r"forward_backward \[.*none.*gradient of weight|race",
    ),
    "state of a row read by all lanes": Fault(
        f"{OP}/embedding_bag_collection_update.cu",
        "const bool has_state = exists && group.lane == 0;",
        "const bool has_state = exists;",
        "races",
        "race",
    ),
    "epsilon under the root": Fault(
        f"{OP}/embedding_bag_collection_update.cu",
        "/ (std::sqrt(c.second[k]) + step.eps)",
        "/ std::sqrt(c.second[k] + step.eps)",
        "races",
        r"forward_backward \[.*adagrad",
    ),
    "halves of a byte swapped": Fault(
        f"{OP}/embedding_bag_collection_quantized.cu",
        "k % 2 * 4",
        "(k + 1) % 2 * 4",
        "races",
        r"forward_backward \[.*int4",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    said = what_is_said_of(OP, FAULTS[fault], DEFINES[FAULTS[fault].build], tmp_path)
    assert re.search(FAULTS[fault].message, said, re.DOTALL), said[-3000:]

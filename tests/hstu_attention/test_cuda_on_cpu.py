"""The CUDA kernels pass the correctness suite on the CPU, under sanitizers, and planted faults do not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host.build import HERE, ROOT, build_operator, environment
from cuda_host.suite import (
    NEEDS_COMPILER,
    PARTS,
    Fault,
    Outcomes,
    check_outcome,
    checks_of,
    outcomes_of,
    what_is_said_of,
)

pytestmark = NEEDS_COMPILER

OP = "hstu_attention"
# One build as on a GPU; one of small blocks, so few that each takes several, and with no room for a
# histogram of each thread.
SMALL = (
    "RECSYS_OPS_MOST_BLOCKS=6",
    "RECSYS_OPS_ATTENTION_WARPS=2",
    "RECSYS_OPS_ATTENTION_TILE=16",
    "RECSYS_OPS_ATTENTION_HISTOGRAM_BYTES=400",
)
# Warpgroups as on sm_90a, also where rows are so short that others are faster.
WARPGROUPS = ("RECSYS_OPS_SM90A", "RECSYS_OPS_ATTENTION_WARPGROUP_COLUMNS=1")
DEFINES: dict[str, tuple[str, ...]] = {
    "address": (),
    "races": SMALL,
    "address warpgroups": WARPGROUPS,
    "races warpgroups": (*WARPGROUPS, *SMALL, "RECSYS_OPS_ATTENTION_WARPGROUP_TILE=16"),
}
DTYPES = {name: "float16,bfloat16" for name in DEFINES if "warpgroups" in name}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes_of(OP, DEFINES, tmp_path_factory.mktemp("outcomes"), DTYPES)


@pytest.mark.parametrize(
    ("build", "check"), [(build, check) for build in DEFINES for check in checks_of(build, DTYPES)]
)
def test_contract(suite: Outcomes, build: str, check: str) -> None:
    check_outcome(suite(build, "quick")[check])


BAD_VALUES = """
import sys
import torch
from cuda_host.contract import candidate, load_kernels
from recsys_ops import HSTUMask, hstu_attention
from recsys_ops.hstu_attention.cases import SPEC

q = torch.randn(9, 2, 64, dtype=torch.float16)
good, few = torch.tensor([0, 4, 9]), torch.tensor([3, 6])
with candidate(SPEC, load_kernels(sys.argv[1], "hstu_attention"), "cuda_host"):
    hstu_attention(q, q, q, good, scale=1.0, backend="cuda_host")
    for offsets, mask in ((torch.tensor([0, 4, 10]), HSTUMask()), (good, HSTUMask(num_targets=few))):
        try:
            hstu_attention(q, q, q, offsets, scale=1.0, mask=mask, backend="cuda_host")
        except RuntimeError as error:
            print(error)
"""


def test_warpgroups_assert_values() -> None:
    library = build_operator(OP, "address", DEFINES["address warpgroups"])
    done = subprocess.run(
        [sys.executable, "-c", BAD_VALUES, str(library)],
        env=environment("address") | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("CUDA: hstu_attention: expected offsets from 0") == 2


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("build", DEFINES)
def test_whole_contract(suite: Outcomes, build: str, part: str) -> None:
    for outcome in suite(build, part).values():
        check_outcome(outcome)


WRONG = r"forward_backward \["
FAULTS = {
    "a row after the end of a sequence": Fault(
        f"{OP}/tiles.cuh",
        "first + row < end);",
        "first + row <= end);",
        "address",
        rf"{WRONG}|AddressSanitizer: heap-buffer-overflow",
    ),
    "a window that is too long": Fault(
        f"{OP}/sequences.cuh", "place - mask.window : 0", "place - mask.window - 1 : 0", "address", WRONG
    ),
    "rows past a window left out": Fault(
        f"{OP}/sequences.cuh",
        "prefix) + mask.window",
        "prefix) + mask.window - 16",
        "address",
        f"{WRONG}.*gradient of",
    ),
    "the same word of dropout for all keys": Fault(
        f"{OP}/scores.cuh", "first_key / 16 % 4 + n", "first_key / 16 % 4", "address", f"{WRONG}.*dropout"
    ),
    "products of other columns": Fault(
        f"{OP}/tiles.cuh", "lane / 8 % 2 * 8;", "lane / 16 * 8;", "address", WRONG
    ),
    "a cached row of the next page": Fault(
        f"{OP}/cached_rows.cuh", "entry = i / size", "entry = (i + 1) / size", "address", f"{WRONG}.*cached"
    ),
    "a tile that is overwritten while it is used": Fault(
        f"{OP}/{OP}_forward.cu", "fetch(following, stage ^ 1);", "fetch(following, stage);", "races", "race: "
    ),
    "a tile that is used before it has arrived": Fault(
        f"{OP}/{OP}_forward.cu",
        "      __pipeline_wait_prior(0);",
        "      __pipeline_wait_prior(1);",
        "races",
        "race: |nobody wrote",
    ),
    "threads that share a histogram": Fault(
        f"{OP}/histograms.cuh", "* copies + copy] += ", "* copies] += ", "races", "race: "
    ),
    "distances with two owners": Fault(
        f"{OP}/histograms.cuh",
        "+ Team::index();\n",
        "+ Team::index() / 2;\n",
        "races",
        "race: ",
    ),
    "a tile that is overwritten while warpgroups multiply it": Fault(
        f"{OP}/warpgroups.cuh",
        "arrivals.empty[stage].wait(turns.parity() ^ 1);",
        "",
        "races warpgroups",
        "race: |more threads arrive",
    ),
    "a tile that warpgroups multiply before it has arrived": Fault(
        f"{OP}/{OP}_forward_warpgroups.cu",
        "memory.arrivals.full[stage].wait(turns.parity());",
        "",
        "races warpgroups",
        "race: |nobody wrote|nobody waited",
    ),
    "a tile given back before its values were multiplied": Fault(
        f"{OP}/{OP}_forward_warpgroups.cu",
        "recsys_ops::cuda::wait_for_all_products_but<1>();",
        "recsys_ops::cuda::wait_for_all_products_but<2>();",
        "races warpgroups",
        "race: ",
    ),
    "zeros that tiles are multiplied without": Fault(
        f"{OP}/warpgroups.cuh",
        "        recsys_ops::cuda::fence_tiles();\n        __syncwarp",
        "        __syncwarp",
        "races warpgroups",
        "no fence.proxy.async",
    ),
    "the next sequence's rows in a sequence's last tile": Fault(
        f"{OP}/warpgroups.cuh",
        "second.of(stage).clear(left);",
        "",
        "address warpgroups",
        r"isolation \[",
        "isolation",
        "quick:float16",
    ),
    "a table that learns from the next sequence's rows": Fault(
        f"{OP}/{OP}_backward_warpgroups.cu",
        "item.first + block_of_warpgroups <= sequence.rows && ",
        "",
        "address warpgroups",
        f"{WRONG}.*gradient of",
    ),
    "rows of the other warpgroup": Fault(
        f"{OP}/{OP}_backward_warpgroups.cu",
        "lane.warp / 4 * warpgroup_rows",
        "0",
        "address warpgroups",
        WRONG,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    said = what_is_said_of(OP, FAULTS[fault], DEFINES[FAULTS[fault].build], tmp_path)
    assert re.search(FAULTS[fault].message, said, re.DOTALL), said[-3000:]

"""The CUDA kernels pass the correctness suite on the CPU, under sanitizers, and planted faults do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
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

OP = "hstu_attention"
# One build as on a GPU; one of small blocks, so few that each takes several, and with no room for a
# histogram of each thread.
SMALL = (
    "RECSYS_OPS_MOST_BLOCKS=6",
    "RECSYS_OPS_ATTENTION_WARPS=2",
    "RECSYS_OPS_ATTENTION_TILE=16",
    "RECSYS_OPS_ATTENTION_HISTOGRAM_BYTES=400",
)
DEFINES: dict[str, tuple[str, ...]] = {"address": (), "races": SMALL}


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
        "static_cast<int>(threadIdx.x);\n",
        "static_cast<int>(threadIdx.x) / 2;\n",
        "races",
        "race: ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    sanitizer = FAULTS[fault].sanitizer
    said = what_is_said_of(OP, FAULTS[fault], DEFINES[sanitizer], tmp_path)
    assert re.search(FAULTS[fault].message, said, re.DOTALL), said[-3000:]

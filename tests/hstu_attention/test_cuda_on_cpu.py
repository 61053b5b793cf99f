"""The CUDA kernels pass the correctness suite on the CPU, under sanitizers, and planted faults do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_host.suite import (
    CHECKED,
    NEEDS_COMPILER,
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

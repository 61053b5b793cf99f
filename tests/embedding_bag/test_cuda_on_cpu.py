"""The CUDA kernels pass the correctness suite on the CPU, under sanitizers, and planted faults do not."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_host.build import COMPILER, HERE, ROOT, build_operator, environment

from recsys_ops.testing import CHECKS

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")

OP = "embedding_bag"
# So few blocks that groups take several tasks, for one of the builds.
DEFINES = {"address": (), "races": ("RECSYS_OPS_MOST_BLOCKS=3",)}
CHECKED = [name for name, check in CHECKS.items() if not check.only_reference]


def run_suite(
    library: Path, sanitizer: str, results: Path, extent: str, *checks: str
) -> subprocess.CompletedProcess[str]:
    """Outcomes of checks go to ``results``, unless the process is ended for a fault."""
    return subprocess.run(
        [sys.executable, str(HERE / "contract.py"), str(library), OP, str(results), extent, *checks],
        env=environment(sanitizer),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``suite(sanitizer, extent)``: outcomes of all checks."""

    @functools.cache
    def outcomes(sanitizer: str, extent: str) -> dict[str, Any]:
        results = tmp_path_factory.mktemp(sanitizer) / "results.json"
        library = build_operator(OP, sanitizer, DEFINES[sanitizer])
        done = run_suite(library, sanitizer, results, extent, *CHECKED)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    return outcomes


def check_outcome(outcome: dict[str, Any]) -> None:
    assert not outcome["failures"], "\n".join(outcome["failures"])
    assert outcome["passed"] > 0


@pytest.mark.parametrize("check", CHECKED)
@pytest.mark.parametrize("sanitizer", DEFINES)
def test_contract(suite: Any, sanitizer: str, check: str) -> None:
    check_outcome(suite(sanitizer, "quick")[check])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", DEFINES)
def test_whole_contract(suite: Any, sanitizer: str) -> None:
    for outcome in suite(sanitizer, "all").values():
        check_outcome(outcome)


# File, what stands there, what is planted in its place, who finds it, and what is said.
FAULTS = {
    "off by one at the end of a bag": (
        f"{OP}/bag_reader.cuh",
        ("entry >= end", "entry > end"),
        "address",
        r"forward_backward \[|AddressSanitizer",
    ),
    "a mask for the first lanes only": (
        "common/cuda/group.cuh",
        (" << first_lane)", ")"),
        "address",
        "lane outside of its own mask",
    ),
    "columns past the end of a row": (
        f"{OP}/embedding_bag_forward.cu",
        ("row[u] >= 0 && place.column < table.dim", "row[u] >= 0"),
        "address",
        r"forward_backward \[|AddressSanitizer: heap-buffer-overflow",
    ),
    "a shuffle that not all lanes reach": (
        f"{OP}/embedding_bag_forward.cu",
        ("Raw<T, N> raw = {};", "if (place.column >= table.dim) continue; Raw<T, N> raw = {};"),
        "address",
        "divergent warp operation",
    ),
    "the next level not told of a piece": (
        f"{OP}/embedding_bag_backward.cu",
        ("= goes_on ? last_target : -1", "= -1"),
        "address",
        r"forward_backward \[.*gradient of weight",
    ),
    "all groups of a row write the same": (
        f"{OP}/embedding_bag_backward.cu",
        ("if (writes_targets) {", "if (true) {"),
        "races",
        "race: writes a byte of global memory that was written",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    file, (right, wrong), sanitizer, message = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / file).read_text()
    assert right in source
    (csrc / file).write_text(source.replace(right, wrong))
    library = build_operator(OP, sanitizer, DEFINES[sanitizer], csrc)
    try:
        results = tmp_path / "results.json"
        done = run_suite(library, sanitizer, results, "quick", "forward_backward")
        failures = json.loads(results.read_text())["forward_backward"]["failures"] if results.exists() else []
        said = "\n".join([*failures, done.stdout, done.stderr])
        assert re.search(message, said, re.DOTALL), said[-3000:]
    finally:
        library.unlink()

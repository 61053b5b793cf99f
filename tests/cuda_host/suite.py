"""The correctness suite of an operator's CUDA kernels on the CPU, as the tests of operators run it."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cuda_host.build import COMPILER, HERE, ROOT, build_operator, environment

from recsys_ops.testing import CHECKS, Target

NEEDS_COMPILER = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")
CHECKED = [name for name, check in CHECKS.items() if check.serves(Target("cuda_host"))]

PARTS = [f"{part}of8" for part in range(1, 9)]  # of the whole contract, which takes a quarter of an hour

NO_DTYPES: Mapping[str, str] = {}

Outcomes = Callable[[str, str], dict[str, Any]]


def run_suite(
    operator: str, library: Path, sanitizer: str, results: Path, extent: str, *checks: str
) -> subprocess.CompletedProcess[str]:
    """Outcomes of checks go to ``results``, unless the process is ended for a fault."""
    return subprocess.run(
        [sys.executable, str(HERE / "contract.py"), str(library), operator, str(results), extent, *checks],
        env=environment(sanitizer),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def checks_of(name: str, dtypes: Mapping[str, str] = NO_DTYPES) -> list[str]:
    """Those of a build; what is called and said in two of them is that of an operator's first dtype."""
    return [check for check in CHECKED if check not in ("opcheck", "bad_input") or name not in dtypes]


def outcomes_of(
    operator: str, defines: dict[str, tuple[str, ...]], folder: Path, dtypes: Mapping[str, str] = NO_DTYPES
) -> Outcomes:
    """``outcomes(build, extent)`` of all checks, of builds whose names begin with their sanitizers'.

    ``dtypes`` has those of builds that have kernels of their own for some, such as "float16,bfloat16".
    """

    @functools.cache
    def outcomes(name: str, extent: str) -> dict[str, Any]:
        results = folder / f"{name}-{extent}.json"
        sanitizer = name.split()[0]
        library = build_operator(operator, sanitizer, defines[name])
        of_build = f"{extent}:{dtypes[name]}" if name in dtypes else extent
        done = run_suite(operator, library, sanitizer, results, of_build, *checks_of(name, dtypes))
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    return outcomes


def check_outcome(outcome: dict[str, Any]) -> None:
    assert not outcome["failures"], "\n".join(outcome["failures"])
    assert outcome["passed"] > 0


class Fault(NamedTuple):
    """What stands in a file of ``csrc``, what is planted in its place, who finds it, and what is said."""

    file: str
    right: str
    wrong: str
    build: str
    message: str
    check: str = "forward_backward"
    extent: str = "quick"

    @property
    def sanitizer(self) -> str:
        return self.build.split()[0]


def what_is_said_of(operator: str, fault: Fault, defines: tuple[str, ...], folder: Path) -> str:
    """By the quick suite, of kernels with a fault in them."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / fault.file).read_text()
    assert fault.right in source
    (csrc / fault.file).write_text(source.replace(fault.right, fault.wrong))
    library = build_operator(operator, fault.sanitizer, defines, csrc)
    try:
        results = folder / "results.json"
        done = run_suite(operator, library, fault.sanitizer, results, fault.extent, fault.check)
        failures = json.loads(results.read_text())[fault.check]["failures"] if results.exists() else []
        return "\n".join([*failures, done.stdout, done.stderr])
    finally:
        library.unlink()

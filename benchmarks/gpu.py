"""``make gpu``: build, verify, sanitize and measure on this machine's GPU, and report it.

Nothing is downloaded, and the Python that runs this runs all of it. Each part leaves a log and its
results in one folder, and is not repeated there as long as the sources stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recsys_ops import _nvcc
from recsys_ops._output import INTERRUPTED, write_json

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "triton_kernels", "recsys_ops", "benchmarks")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh")
PASSED, FAILED, OUT_OF_TIME, ABSENT, NOT_RUN = "passed", "failed", "out of time", "absent", "not run"
GRACE = 15.0  # seconds that an interrupted command has to write down what it has finished
_RESERVE = 10.0  # seconds for the report
_LAST_LINES = 15
_RECSYS_OPS = (sys.executable, "-m", "recsys_ops")


@dataclass(frozen=True)
class Step:
    """One command of a part, run in the root of the repository."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a part ended, and for which sources."""

    outcome: str
    seconds: float
    sources: str
    detail: str = ""
    steps: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Commands that are run one after the other; ``steps`` takes the folder for results."""

    share: float  # of the time that is left when it starts
    steps: Callable[[Path], Sequence[Step]]
    absent: Callable[[], str | None] = lambda: None  # why it cannot run here, which is no failure
    needs: str | None = None  # a part that must not have failed
    present: Callable[[], bool] = lambda: True  # whether what it made is still there
    results: str | None = None  # a file in the folder


def _build(folder: Path) -> Sequence[Step]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    environment = {"RECSYS_OPS_BUILD": "cuda", _nvcc.ENVIRONMENT_VARIABLE: architecture}
    return [Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), environment)]


def _verify(folder: Path) -> Sequence[Step]:
    # Triton compiles some thousand variants of its kernels, one after the other in each process.
    jobs = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    return [Step("verify", (*_RECSYS_OPS, "verify", "--jobs", jobs, "--json", str(folder / "verify.json")))]


def _sanitize(folder: Path) -> Sequence[Step]:
    run = (*_RECSYS_OPS, "verify", "--quick", "--backend", "cuda")
    options = "--error-exitcode 86 --target-processes application-only --tool"
    sanitizer = (_sanitizer() or "", *options.split())
    # A call that fails is one that PyTorch tries on purpose, or raises in Python.
    of_tool = {"memcheck": ("--report-api-errors", "no")}
    # In PyTorch's cache, what lies past the end of a tensor is some other tensor's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(tool, (*sanitizer, tool, *of_tool.get(tool, ()), *run), environment)
        for tool in ("memcheck", "racecheck", "initcheck")
    ]


def _bench(folder: Path) -> Sequence[Step]:
    options = ("--device", "cuda", "--check-targets", "--json", str(folder / "bench.json"))
    return [Step("bench", (*_RECSYS_OPS, "bench", *options))]


def _sanitizer_missing() -> str | None:
    return None if _sanitizer() else "compute-sanitizer is not on this machine"


COMMANDS = {
    "build": Part(0.7, _build, present=lambda: any((ROOT / "recsys_ops").glob("_C_cuda*"))),
    "verify": Part(0.5, _verify, results="verify.json"),
    "sanitize": Part(0.4, _sanitize, absent=_sanitizer_missing, needs="build"),
    "bench": Part(1.0, _bench, results="bench.json"),
}
PARTS = (*COMMANDS, "report")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where a part failed or there is no GPU, 2 for wrong usage, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="by default $OUT, else gpu-report")
    parser.add_argument("--minutes", type=float, default=9.5, help="that all of it may take")
    parser.add_argument("--again", action="store_true", help="also what has passed for these sources")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts to be some of {', '.join(PARTS)}, got {unknown[0]!r}")
    parts = [part for part in PARTS if part in (options.parts or PARTS)]
    if reason := missing(parts):
        print(f"make gpu: {reason}")
        return 1
    deadline = time.monotonic() + 60 * options.minutes
    folder = (options.output or Path(os.environ.get("OUT") or "gpu-report")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return run_parts(parts, folder, deadline, options.again)
    except KeyboardInterrupt:
        return INTERRUPTED


def missing(parts: Sequence[str]) -> str | None:
    """What a machine lacks to run these parts, or None."""
    try:
        import torch
    except ImportError:
        return f"PyTorch is not installed for {sys.executable}"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return "there is no GPU that PyTorch can use"
    return _nvcc.missing() if "build" in parts else None


def run_parts(parts: Sequence[str], folder: Path, deadline: float, again: bool = False) -> int:
    """Run parts in their order until a moment of ``time.monotonic``; what ends is recorded at once."""
    state, sources = folder / "state.json", sources_hash()
    record: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    outcomes = {name: Outcome(**o) for name, o in record.items() if o["sources"] == sources}
    for name in (name for name in parts if name in COMMANDS):
        before = outcomes.get(name)
        if before and before.outcome == PASSED and COMMANDS[name].present() and not again:
            print(f"{name}: passed before", flush=True)
            continue
        print(f"{name} ...", flush=True)
        outcome = outcomes[name] = _run_part(name, folder, sources, outcomes, deadline - _RESERVE)
        write_json(state, {name: asdict(outcome) for name, outcome in outcomes.items()})
        print(f"{name}: {outcome.outcome}, {outcome.seconds:.0f} s {outcome.detail}".rstrip(), flush=True)
        if outcome.outcome == FAILED:
            print(_end_of(folder / f"{name}.log"), flush=True)
    if "report" in parts:
        from recsys_ops.benchmarks.gpu_report import write_report

        write_report(folder, {name: asdict(outcomes[name]) for name in COMMANDS if name in outcomes})
    return int(any(outcomes[name].outcome in (FAILED, NOT_RUN) for name in parts if name in outcomes))


def _run_part(
    name: str, folder: Path, sources: str, outcomes: dict[str, Outcome], deadline: float
) -> Outcome:
    part, start = COMMANDS[name], time.monotonic()
    if part.needs:
        before = outcomes.get(part.needs)
        if (before and before.outcome != PASSED) or not COMMANDS[part.needs].present():
            return Outcome(NOT_RUN, 0.0, sources, f"it needs the {part.needs}")
    if reason := part.absent():
        return Outcome(ABSENT, 0.0, sources, reason)
    log = folder / f"{name}.log"
    for old in (log, *([folder / part.results] if part.results else [])):
        old.unlink(missing_ok=True)
    end = start + part.share * (deadline - start)
    ended = {step.name: _run(step, log, end - GRACE) for step in part.steps(folder)}
    worst = next(o for o in (FAILED, OUT_OF_TIME, PASSED) if o in ended.values())
    detail = ", ".join(f"{step} {outcome}" for step, outcome in ended.items()) if len(ended) > 1 else ""
    if name == "build" and worst == OUT_OF_TIME:
        worst, detail = FAILED, OUT_OF_TIME
    return Outcome(worst, time.monotonic() - start, sources, detail, ended)


def _run(step: Step, log: Path, end: float) -> str:
    """How a command ends whose output goes to a log, and which is interrupted at the end of its time."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        return OUT_OF_TIME
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("a") as output:
        output.write(f"$ {shlex.join(step.command)}\n")
        output.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Who runs this in a shell's background ignores interrupts, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return PASSED if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and all that it has started, wait for what it still writes, then kill the rest."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sources_hash() -> str:
    """Of everything that decides what is built and measured."""
    digest = hashlib.sha256()
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted([*files, ROOT / "setup.py"]):
        if path.name != "_build_info.py":  # which the build writes
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _sanitizer() -> str | None:
    """Where compute-sanitizer is, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    folders = (os.environ.get("PATH", ""), os.path.join(home, "bin"), "/usr/local/cuda/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  | {line}" for line in lines[-_LAST_LINES:])


if __name__ == "__main__":
    sys.exit(main())

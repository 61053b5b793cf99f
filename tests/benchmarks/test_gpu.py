"""``make gpu`` with commands that only pretend: order, what is not repeated, time, and the record."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_ops.benchmarks import gpu, gpu_report
from recsys_ops.benchmarks.gpu import ABSENT, FAILED, NOT_RUN, OUT_OF_TIME, PARTS, PASSED, Part, Step

DEVICE = {"name": "NVIDIA H200", "driver": "580.159.04", "cuda": "13.0"}
VERIFIED = {
    "complete": True,
    "operators": [
        {
            "operator": "embedding_bag",
            "counts": [
                {"check": "strided", "target": "cuda/cuda", "passed": 3, "failed": 0},
                {"check": "isolation", "target": "cuda/cuda", "passed": 4, "failed": 1},
                {"check": "strided", "target": "native/avx2", "passed": 5, "failed": 0},
            ],
        }
    ],
    "failures": [{"reproduce": "python -m recsys_ops.testing embedding_bag isolation x"}],
}


def bench_row(candidate: str, speedup: float | None, seconds: float | None = 1e-3) -> dict[str, Any]:
    figures = seconds and {
        "seconds": seconds,
        "of_limit": 0.87,
        "bound_by": "memory",
        "samples": [seconds] * 9,
    }
    return {
        "workload": "cold/uniform/D64",
        "candidate": candidate,
        "status": "ok" if seconds else "unavailable",
        "figures": figures or None,
        "ours_speedup": speedup and {"value": speedup, "low": speedup, "high": speedup},
    }


BENCHED = {
    "complete": True,
    "operators": {"embedding_bag": "cuda"},
    "ceilings": {"copy": 4.3e12},
    "rows": [
        bench_row("recsys_ops", None),
        bench_row("recsys_ops triton", 1.25),
        bench_row("torch", 2.5),
        bench_row("FBGEMM TBE", None, None),
    ],
    "verdicts": [
        {
            "workload": "cold/uniform/D64",
            "peer": "the limit",
            "minimum": 0.9,
            "verdict": "missed",
            "ratio": {"value": 0.87},
        }
    ],
}


class Fake:
    """Parts whose commands write down that they ran; what each does can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts: dict[str, str | None] = {
            "build": "",
            "verify": self.writes("verify.json", VERIFIED),
            "sanitize": "",
            "bench": self.writes("bench.json", BENCHED),
        }

    def writes(self, name: str, content: Any) -> str:
        return f"open({str(self.folder / name)!r}, 'w').write({json.dumps(content)!r})"

    def steps(self, name: str) -> Callable[[Path], list[Step]]:
        def steps(folder: Path) -> list[Step]:
            assert folder == self.folder
            said = f"open({str(self.folder / 'ran')!r}, 'a').write({name + ' '!r})"
            return [Step(name, (sys.executable, "-c", f"{said}\n{self.scripts[name]}"))]

        return steps

    @property
    def ran(self) -> list[str]:
        """What has run since it was last asked."""
        path = self.folder / "ran"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    @property
    def outcomes(self) -> dict[str, str]:
        state = json.loads((self.folder / "state.json").read_text())
        return {name: part["outcome"] for name, part in state.items()}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake(tmp_path / "out")
    parts = {
        name: Part(
            share=1.0,
            steps=fake.steps(name),
            absent=lambda name=name: None if fake.scripts[name] is not None else "not on this machine",
            needs=part.needs,
            results=part.results,
        )
        for name, part in gpu.COMMANDS.items()
    }
    monkeypatch.setattr(gpu, "COMMANDS", parts)
    monkeypatch.setattr(gpu, "missing", lambda parts: None)
    monkeypatch.setattr(gpu, "sources_hash", lambda: "as they are")
    monkeypatch.setattr(gpu_report, "describe_gpu", lambda: DEVICE)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    yield fake


def run(fake: Fake, *arguments: str) -> int:
    return gpu.main([*arguments, "--output", str(fake.folder)])


def test_all_parts_run_in_order_and_leave_logs(fake: Fake) -> None:
    assert run(fake) == 0
    assert fake.ran == list(gpu.COMMANDS)
    assert {path.name for path in fake.folder.glob("*.log")} == {f"{name}.log" for name in gpu.COMMANDS}
    assert set(fake.outcomes.values()) == {PASSED}


def test_some_parts_run_in_the_order_of_all(fake: Fake) -> None:
    assert run(fake, "bench", "verify") == 0
    assert fake.ran == ["verify", "bench"]
    assert not list(fake.folder.glob("nvidia*"))


def test_the_folder_is_that_of_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(fake.folder))
    assert gpu.main(["build"]) == 0 and fake.ran == ["build"]


def test_what_passed_is_not_repeated(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.scripts["bench"] = "raise SystemExit(1)"
    assert run(fake) == 1
    assert fake.ran == list(gpu.COMMANDS)
    assert run(fake) == 1
    assert fake.ran == ["bench"]
    assert "verify: passed before" in capsys.readouterr().out
    assert run(fake, "verify", "--again") == 0
    assert fake.ran == ["verify"]
    monkeypatch.setattr(gpu, "sources_hash", lambda: "changed")
    assert run(fake, "verify") == 0
    assert fake.ran == ["verify"] and fake.outcomes == {"verify": PASSED}


def test_a_failure_stops_only_what_needs_the_part(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.scripts["build"] = "print('nvcc: no such option'); raise SystemExit(1)"
    assert run(fake) == 1
    assert fake.ran == ["build", "verify", "bench"]
    assert fake.outcomes == {"build": FAILED, "verify": PASSED, "sanitize": NOT_RUN, "bench": PASSED}
    assert "  | nvcc: no such option" in capsys.readouterr().out


def test_what_a_part_needs_must_be_there(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.COMMANDS, "build", replace(gpu.COMMANDS["build"], present=lambda: False))
    assert run(fake, "sanitize") == 1
    assert fake.outcomes == {"sanitize": NOT_RUN} and fake.ran == []


def test_what_is_absent_is_no_failure(fake: Fake) -> None:
    fake.scripts["sanitize"] = None
    assert run(fake) == 0
    assert fake.outcomes["sanitize"] == ABSENT


INTERRUPTIBLE = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    {finish}
    raise SystemExit(130)
"""


@pytest.fixture
def ignoring_interrupts() -> Iterator[None]:
    """As in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ignoring_interrupts")
def test_a_part_out_of_time_keeps_what_it_finished(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_RESERVE", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 3.0)
    unfinished = {**BENCHED, "complete": False}
    fake.scripts["bench"] = INTERRUPTIBLE.format(finish=fake.writes("bench.json", unfinished))
    start = time.monotonic()
    assert run(fake, "bench", "report", "--minutes", str(4.5 / 60)) == 0
    assert time.monotonic() - start < 30
    assert fake.outcomes == {"bench": OUT_OF_TIME}
    (record,) = fake.folder.glob("nvidia-h200-*.json")
    assert json.loads(record.read_text())["bench"]["complete"] is False
    fake.scripts["bench"] = ""
    fake.ran  # noqa: B018
    assert run(fake, "bench") == 0 and fake.ran == ["bench"]


def test_what_does_not_end_when_interrupted_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_RESERVE", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    fake.scripts["build"] = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run(fake, "build", "sanitize", "--minutes", str(2 / 60)) == 1
    assert time.monotonic() - start < 10
    assert fake.outcomes == {"build": FAILED, "sanitize": NOT_RUN}


def test_without_time_left_nothing_starts(fake: Fake) -> None:
    assert run(fake, "verify", "--minutes", "0") == 0
    assert fake.ran == [] and fake.outcomes == {"verify": OUT_OF_TIME}


def test_steps_that_time_does_not_allow_are_recorded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_RESERVE", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    commands = {"memcheck": "", "racecheck": "import time; time.sleep(60)", "initcheck": ""}
    steps = [Step(name, (sys.executable, "-c", script)) for name, script in commands.items()]
    monkeypatch.setitem(gpu.COMMANDS, "sanitize", Part(1.0, lambda folder: steps))
    assert run(fake, "sanitize", "report", "--minutes", str(2 / 60)) == 0
    (record,) = fake.folder.glob("nvidia-h200-*.json")
    assert json.loads(record.read_text())["sanitizer"] == {
        "memcheck": PASSED,
        "racecheck": OUT_OF_TIME,
        "initcheck": OUT_OF_TIME,
    }


def test_the_report_is_a_short_table_and_a_file(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.strip().startswith("cold/uniform/D64"))
    assert line.split() == ["cold/uniform/D64", "1.00", "ms", "87%", "memory", "1.25x", "2.50x"]
    assert "missed: cold/uniform/D64 against the limit: 0.87x of 0.9x" in text
    (copy,) = fake.folder.glob("nvidia-h200-*.json")
    record = json.loads((tmp_path / "benchmarks" / "results" / copy.name).read_text())
    assert record == json.loads(copy.read_text())
    assert copy.name == f"nvidia-h200-{record['date'][:10]}.json"
    assert record["device"] == DEVICE
    assert {"python", "torch", "triton", "cuda", "recsys_ops"} <= set(record["versions"])
    assert record["commit"] is None  # tmp_path is no checkout
    assert set(record["parts"]) == set(gpu.COMMANDS)
    assert record["verify"] == {
        "complete": True,
        "counts": {
            "embedding_bag": {
                "cuda/cuda": {"passed": 7, "failed": 1},
                "native/avx2": {"passed": 5, "failed": 0},
            }
        },
        "failures": ["python -m recsys_ops.testing embedding_bag isolation x"],
    }
    rows = record["bench"]["rows"]
    assert [row["candidate"] for row in rows] == [row["candidate"] for row in BENCHED["rows"]]  # type: ignore[index]
    assert all("samples" not in (row["figures"] or {}) for row in rows)


def test_results_of_other_sources_are_not_reported(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(fake) == 0
    monkeypatch.setattr(gpu, "sources_hash", lambda: "changed")
    assert run(fake, "verify", "report") == 0
    (record,) = (json.loads(path.read_text()) for path in fake.folder.glob("nvidia-h200-*.json"))
    assert set(record["parts"]) == {"verify"} and record["bench"]["rows"] == []


@pytest.mark.parametrize(
    ("cuda", "available", "said"),
    [
        (None, False, f"PyTorch {torch.__version__} is built without CUDA"),
        ("13.0", False, "there is no GPU that PyTorch can use"),
        ("13.0", True, "nvcc was not found"),
    ],
)
def test_a_machine_without_a_usable_gpu_gets_one_line(
    cuda: str | None,
    available: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(gpu._nvcc, "missing", lambda: "nvcc was not found")
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == (f"make gpu: {said}\n", "")
    assert not (tmp_path / "out").exists()


def test_only_the_build_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu._nvcc, "missing", lambda: "nvcc was not found")
    assert gpu.missing(["verify", "bench", "report"]) is None
    assert gpu.missing(PARTS) is not None


def test_an_unknown_part_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["verfy"])
    assert ended.value.code == 2


@pytest.mark.parametrize(("capability", "architecture"), [((9, 0), "sm_90a"), ((8, 0), "sm_80")])
def test_the_build_is_for_this_gpu(
    capability: tuple[int, int], architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (step,) = gpu.COMMANDS["build"].steps(tmp_path)
    assert step.command[1:] == ("setup.py", "build_ext", "--inplace")
    assert step.environment == {"RECSYS_OPS_BUILD": "cuda", "RECSYS_OPS_CUDA_ARCHS": architecture}


def test_the_sanitizer_runs_tool_by_tool_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    with monkeypatch.context() as nowhere:
        nowhere.setattr("shutil.which", lambda name, path: None)
        assert gpu.COMMANDS["sanitize"].absent()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(0o755)
    assert gpu.COMMANDS["sanitize"].absent() is None
    steps = gpu.COMMANDS["sanitize"].steps(tmp_path)
    assert [step.name for step in steps] == ["memcheck", "racecheck", "initcheck"]
    for step in steps:
        assert step.command[0] == str(program)
        assert step.command[step.command.index("--tool") + 1] == step.name
        assert step.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        assert step.command[-4:] == ("verify", "--quick", "--backend", "cuda")


def test_the_commands_write_where_they_are_read(tmp_path: Path) -> None:
    for name in ("verify", "bench"):
        (step,) = gpu.COMMANDS[name].steps(tmp_path)
        assert step.command[-2:] == ("--json", str(tmp_path / f"{name}.json"))
        assert gpu.COMMANDS[name].results == f"{name}.json"


def test_verify_shares_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cores, jobs in ((16, "12"), (8, "6"), (1, "1"), (None, "1")):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        (step,) = gpu.COMMANDS["verify"].steps(tmp_path)
        assert step.command[step.command.index("--jobs") + 1] == jobs


def test_sources_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "recsys_ops").mkdir()
    (tmp_path / "setup.py").write_text("")
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.write_text("one")
    first = gpu.sources_hash()
    (tmp_path / "recsys_ops" / "_build_info.py").write_text("written by a build")
    assert gpu.sources_hash() == first
    kernel.write_text("two")
    assert gpu.sources_hash() != first

"""The doctor: what it says here, where PyTorch is missing or broken, and what it finds."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_ops import __version__, backends, doctor

SCRIPT = Path(doctor.__file__)

HEALTHY: dict[str, Any] = {
    "tools": {"compiler": "g++ 12.2.0", "nvcc": "release 13.0", "gpus": []},
    "packages": {**dict.fromkeys(doctor.PACKAGES, "1.0"), "torch": "2.13.0"},
    "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": []},
    "recsys_ops": {"extension": "loads", "cuda_kernels": "load", "build": None},
}


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECSYS_OPS_", "PYTHON", "TRITON_"))}
    return subprocess.run(
        command, env={**kept, **environment}, cwd=SCRIPT.parents[1], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter without a single package."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    return str(folder / "bin" / "python")


def _problems(report: dict[str, Any], environment: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return list(doctor._findings(report, environment or {}))


def test_run_as_a_file_it_describes_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = _run(sys.executable, SCRIPT, "--json", path, RECSYS_OPS_BACKEND="no-such")
    report = json.loads(path.read_text())
    assert done.returncode == 1, done.stderr
    assert done.stdout == doctor.render(report) + "\n"

    assert report["system"]["python"].startswith(sys.version.split()[0])
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["gpus"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert report["environment"] == {"RECSYS_OPS_BACKEND": "no-such"}
    package = report["recsys_ops"]
    assert (package["version"], package["folder"]) == (__version__, str(SCRIPT.parent))
    expected = backends.survey(backends.Call("cpu", torch.float32))["embedding_bag"]
    assert set(package["serves"]["embedding_bag on cpu"]) == set(expected)
    assert package["serves"]["embedding_bag on cpu"]["reference"] == "can serve"
    finding = {"problem": "RECSYS_OPS_BACKEND=no-such: no such backend", "remedy": "unset RECSYS_OPS_BACKEND"}
    assert finding in report["findings"]


def test_without_pytorch_it_says_what_to_install(empty_python: str) -> None:
    done = _run(empty_python, SCRIPT, "--json", "-")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"][0] == {
        "problem": "PyTorch is not installed",
        "remedy": "pip install torch",
    }
    assert report["findings"][1]["remedy"] == "pip install " + " ".join(doctor.REQUIRED)
    assert report["packages"]["torch"] is None
    assert report["system"]["cores"]


def test_the_program_reaches_the_doctor_without_pytorch(empty_python: str) -> None:
    done = _run(empty_python, "-m", "recsys_ops", "doctor")
    assert done.returncode == 1, done.stderr
    assert "finding 1: PyTorch is not installed\n  mend it with: pip install torch\n" in done.stdout


def _install_torch(folder: Path, source: str) -> str:
    """Put a package named torch in a folder; returns the folder, for PYTHONPATH."""
    for name, text in {
        "torch/__init__.py": source,
        "torch-2.13.0.dist-info/METADATA": "Version: 2.13.0\n",
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return str(folder)


def test_a_crash_of_pytorch_is_a_finding(empty_python: str, tmp_path: Path) -> None:
    path = _install_torch(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    report = json.loads(_run(empty_python, SCRIPT, "--json", "-", PYTHONPATH=path).stdout)
    assert report["findings"][0] == {
        "problem": "PyTorch does not import: the process that imports it ended by signal 11",
        "remedy": "pip install --force-reinstall torch",
    }


def test_a_broken_pytorch_is_a_finding(empty_python: str, tmp_path: Path) -> None:
    path = _install_torch(tmp_path, "raise OSError('libcudart.so.13: no such file')")
    report = json.loads(_run(empty_python, SCRIPT, "--json", "-", PYTHONPATH=path).stdout)
    assert "OSError: libcudart.so.13: no such file" in report["findings"][0]["problem"]


def test_a_broken_package_is_a_finding(empty_python: str, tmp_path: Path) -> None:
    package = tmp_path / "recsys_ops"
    package.mkdir()
    (package / "doctor.py").write_text(SCRIPT.read_text())
    (package / "__init__.py").write_text("raise SyntaxError('half a file')")
    (tmp_path / "torch.py").write_text(
        "from types import SimpleNamespace as N\n"
        "__version__ = '2.13.0'; version = N(cuda=None, hip=None); get_num_threads = lambda: 1\n"
        "backends = N(cpu=N(get_cpu_capability=lambda: 'AVX2')); cuda = N(device_count=lambda: 0)\n"
    )
    done = _run(empty_python, package / "doctor.py", "--json", "-")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["torch"]["version"] == "2.13.0"
    assert report["findings"][-1]["problem"] == "recsys_ops does not import: SyntaxError: half a file"


def test_a_healthy_machine_has_no_findings() -> None:
    assert _problems(HEALTHY) == []


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"torch": {"version": "2.4.1"}}, "PyTorch 2.4.1 is older than 2.10", "pip install --upgrade torch"),
        (
            {"packages": {"rich": None, "jinja2": None}},
            "not installed: rich, jinja2",
            "pip install rich jinja2",
        ),
        (
            {"packages": {"torchrec": "1.8.0", "fbgemm-gpu-cpu": None, "fbgemm-gpu": None}},
            "torchrec is installed, but not FBGEMM",
            "pip install fbgemm-gpu-cpu==1.8.0",
        ),
        (
            {"tools": {"gpus": ["H100"]}},
            "there is a GPU, but PyTorch is built without CUDA",
            "pip install --force-reinstall torch",
        ),
        (
            {"tools": {"gpus": ["H100"]}, "torch": {"cuda": "13.0"}},
            "there is a GPU, but PyTorch does not reach its driver",
            "pip install --force-reinstall torch",
        ),
        (
            {"torch": {"cuda": "13.0", "gpus": ["H100"]}, "packages": {"triton": None}},
            "there is a GPU, but triton is not installed",
            "pip install triton",
        ),
        (
            {
                "torch": {"cuda": "13.0", "gpus": ["H100"]},
                "recsys_ops": {"cuda_kernels": "the CUDA kernels are not in this installation"},
            },
            "there is a GPU, but the CUDA kernels are not in this installation",
            f"RECSYS_OPS_BUILD=cuda pip install --no-build-isolation -e {SCRIPT.parents[1]}",
        ),
    ],
)
def test_each_problem_has_its_remedy(changes: dict[str, dict[str, Any]], problem: str, remedy: str) -> None:
    report = copy.deepcopy(HEALTHY)
    for section, entries in changes.items():
        report[section].update(entries)
    assert _problems(report) == [(problem, remedy)]


@pytest.mark.parametrize(
    ("setup_py", "compiler", "remedy"),
    [
        (True, "g++", "pip install --no-build-isolation -e {}"),
        (True, None, "install a C++17 compiler, then pip install --no-build-isolation -e {}"),
        (False, "g++", "pip install --force-reinstall --no-deps --no-build-isolation recsys-ops"),
    ],
)
def test_a_missing_extension_is_built_as_the_package_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup_py: bool, compiler: str | None, remedy: str
) -> None:
    monkeypatch.setattr(doctor, "FOLDER", tmp_path / "recsys_ops")
    if setup_py:
        (tmp_path / "setup.py").touch()
    report = copy.deepcopy(HEALTHY)
    report["tools"]["compiler"] = compiler
    report["recsys_ops"] = {"extension": "some reason", "build": {"reason": "no headers"}}
    problem = (
        "the compiled extension is not in this installation, so operators run on `reference` "
        "(its build failed: no headers)"
    )
    assert _problems(report) == [(problem, remedy.format(tmp_path))]


def test_an_extension_that_does_not_load_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FOLDER", tmp_path)
    (tmp_path / "_C.abi3.so").touch()
    report = copy.deepcopy(HEALTHY)
    report["recsys_ops"] = {"extension": "does not load: file too short", "build": None}
    assert _problems(report)[0][0] == "does not load: file too short"


def test_a_variable_that_slows_the_package_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ops._extension.module", lambda: _FakeExtension())
    monkeypatch.setenv("RECSYS_OPS_SIMD", "scalar")
    problems = doctor._probe_environment()
    assert problems == {"RECSYS_OPS_SIMD": "RECSYS_OPS_SIMD=scalar is slower than this machine's avx2"}
    assert (
        "RECSYS_OPS_SIMD=scalar is slower than this machine's avx2",
        "unset RECSYS_OPS_SIMD",
    ) in _problems(HEALTHY, problems)


class _FakeExtension:
    def simd_levels(self) -> list[str]:
        return ["avx2", "scalar"]

    def simd_level(self) -> str:
        return os.environ["RECSYS_OPS_SIMD"]


def test_a_probe_that_fails_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError("not allowed")

    for probe in ("cpu_model", "memory", "_gpus", "_installed", "_build_info"):
        monkeypatch.setattr(doctor, probe, fail)
    monkeypatch.setattr(doctor, "_probe_in_a_process", lambda: {"error": "gone"})
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert printed.count("PermissionError: not allowed") == 4 + len(doctor.PACKAGES)
    assert "finding 1: PyTorch does not import: gone" in printed


def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: {"torch": {"version": "2.13.0"}, "findings": []})
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "torch\n  version  2.13.0\n\nnothing to mend\n"
    for wrong in (["--no-such"], ["--json", str(tmp_path / "absent" / "file")]):
        with pytest.raises(SystemExit) as ended:
            doctor.main(wrong)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0
    assert "recsys-ops doctor --json report.json" in capsys.readouterr().out

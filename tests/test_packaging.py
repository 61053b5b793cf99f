"""Wheel and sdist, built from a clean copy and installed where the checkout cannot be imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recsys_ops import __version__, _nvcc
from recsys_ops.embedding_bag.cases import SPEC

ROOT = Path(__file__).parents[1]
LINKED = ("autotune", "benchmarks", "triton_kernels")

TRY_THE_LOOKUP = """
import json, torch, recsys_ops
weight = torch.arange(6.0).reshape(3, 2).requires_grad_()
output = recsys_ops.embedding_bag(torch.tensor([[0, 2], [1, 1]]), weight, mode="sum")
output.sum().backward()
explanation = recsys_ops.explain("embedding_bag", torch.tensor([[0]]), weight)
print(json.dumps({
    "file": recsys_ops.__file__,
    "output": output.tolist(),
    "gradient": weight.grad.tolist(),
    "chosen": explanation.chosen,
    "rejected": explanation.rejected,
}))
"""


# Functions that PyTorch lacks are looked for when they are called, by this way to load.
LOAD_WITHOUT_CUDA = """
import importlib.util, json, os, sys
import torch, recsys_ops
from recsys_ops.embedding_bag.cases import SPEC
sys.setdlopenflags(os.RTLD_LAZY)
spec = importlib.util.spec_from_file_location("recsys_ops._C_cuda", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    name: has_kernel(f"recsys_ops::{name}", "CUDA") for name in vars(SPEC.kernels["reference"])
}))
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECSYS_OPS_", "PYTHON", "TRITON_"))}
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)


def _copy_checkout(to: Path) -> Path:
    """What a commit of the working tree would hold."""
    listing = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in sorted(set(_run(*listing, cwd=ROOT).stdout.split("\0")) - {""}):
        if os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    return to


def _build(source: Path, build: str, *kinds: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build without isolation into ``source/dist``."""
    command = (sys.executable, "-m", "build", "--no-isolation", *kinds)
    return _run(*command, cwd=source, RECSYS_OPS_BUILD=build, **environment)


def _built(source: Path, pattern: str) -> Path:
    (found,) = (source / "dist").glob(pattern)
    return found


def _install(wheel: Path, folder: Path) -> Path:
    """Install a wheel beside this environment's other packages; returns the new interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    done = _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    # Python does not follow the .pth files of a folder that a .pth file names, so
    # an editable installation of the checkout stays out.
    _site_packages(folder).joinpath("others.pth").write_text(sysconfig.get_path("platlib") + "\n")
    return python


def _site_packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python*/site-packages")
    return found


def _lookup(python: Path) -> tuple[dict[str, Any], str]:
    """What the lookup gives in an installation, and what it says on standard error."""
    done = _run(python, "-c", TRY_THE_LOOKUP, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert Path(said["file"]).is_relative_to(_site_packages(python.parents[1]))
    assert said["output"] == [[4.0, 6.0], [4.0, 6.0]]
    assert said["gradient"] == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    return said, done.stderr


def _doctor(python: Path) -> dict[str, Any]:
    done = _run(python.parent / "recsys-ops", "doctor", "--json", "-", cwd=python.parent)
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["findings"] else 0)
    return report


def _package_files(source: Path) -> set[str]:
    """What an installation of a checkout must hold, its three links followed."""
    folders = ["recsys_ops", *(f"recsys_ops/{name}" for name in LINKED)]
    return {
        file.relative_to(source).as_posix()
        for folder in folders
        for file in (source / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != "_build_info.py"
    }


def _assert_only_the_package(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {
        "recsys_ops",
        f"recsys_ops-{__version__}.dist-info",
    }


@pytest.fixture(scope="module")
def python_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the checkout and its wheel, built without compiled kernels."""
    source = _copy_checkout(tmp_path_factory.mktemp("python_only"))
    done = _build(source, "none", "--wheel")
    assert done.returncode == 0, done.stderr
    return source, _built(source, "*.whl")


def test_a_wheel_holds_the_package_and_nothing_else(python_only: tuple[Path, Path]) -> None:
    source, wheel = python_only
    names = set(zipfile.ZipFile(wheel).namelist())
    _assert_only_the_package(names)
    packaged = {name for name in names if name.startswith("recsys_ops/")}
    assert packaged == _package_files(source)
    for name in LINKED:
        assert f"recsys_ops/{name}/__init__.py" in packaged
    assert {"recsys_ops/py.typed", "recsys_ops/demo/online_retail.npz"} <= packaged


def test_a_wheel_without_kernels_falls_back_to_the_reference_and_says_so(
    python_only: tuple[Path, Path], tmp_path: Path
) -> None:
    _, wheel = python_only
    assert wheel.name.endswith("-py3-none-any.whl")
    python = _install(wheel, tmp_path)
    said, log = _lookup(python)
    assert said["chosen"] == "reference"
    assert "extension is not in this installation" in said["rejected"]["native"]
    assert log.count("embedding_bag: reference serves float32 calls on cpu; not native: ") == 1


def test_a_build_that_is_not_there_is_an_error(python_only: tuple[Path, Path]) -> None:
    source, _ = python_only
    done = _run(sys.executable, "setup.py", "--name", cwd=source, RECSYS_OPS_BUILD="everything")
    assert done.returncode != 0
    assert "expected RECSYS_OPS_BUILD to be auto, cpu, cuda or none, got 'everything'" in done.stderr


CHECK_CUDA = (sys.executable, "setup.py", "-q", "check_cuda")


@pytest.mark.skipif(_nvcc.find_nvcc() is None, reason="needs nvcc")
def test_cuda_kernels_compile_without_a_pytorch_with_cuda(
    python_only: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = python_only
    done = _run(*CHECK_CUDA, cwd=source, RECSYS_OPS_CUDA_ARCHS="sm_80")
    assert done.returncode == 0, done.stderr
    assert "for sm_80: " in done.stdout
    (module,) = source.glob("build/check_cuda/_C_cuda*.so")
    loaded = _run(sys.executable, "-c", LOAD_WITHOUT_CUDA, module, cwd=ROOT)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == dict.fromkeys(vars(SPEC.kernels["reference"]), True)


def test_an_unknown_gpu_is_an_error(python_only: tuple[Path, Path]) -> None:
    if _nvcc.find_nvcc() is None:
        pytest.skip("needs nvcc")
    done = _run(*CHECK_CUDA, cwd=python_only[0], RECSYS_OPS_CUDA_ARCHS="sm_90a sm_35")
    assert done.returncode == 1
    assert re.search(r"expected RECSYS_OPS_CUDA_ARCHS to name what .*, got 'sm_35'", done.stderr)


def test_cuda_asked_for_without_nvcc_is_an_error(python_only: tuple[Path, Path]) -> None:
    done = _run(*CHECK_CUDA, cwd=python_only[0], CUDACXX="/none")
    assert done.returncode == 1
    assert "nvcc was not found" in done.stderr


@pytest.mark.slow
def test_without_a_compiler_auto_goes_on_and_cpu_fails(tmp_path: Path) -> None:
    source = _copy_checkout(tmp_path / "source")
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    assert _build(source, "cpu", "--wheel", **no_compiler).returncode != 0
    done = _build(source, "auto", "--wheel", **no_compiler)
    assert done.returncode == 0, done.stderr
    assert "built without compiled kernels" in done.stdout + done.stderr
    wheel = _built(source, "*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name]
    python = _install(wheel, tmp_path / "installed")
    (finding,) = (f for f in _doctor(python)["findings"] if "extension" in f["problem"])
    assert "its build failed" in finding["problem"]


@pytest.mark.slow
def test_sdist_and_the_wheel_built_from_it(tmp_path: Path) -> None:
    source = _copy_checkout(tmp_path / "source")
    done = _build(source, "cpu")
    assert done.returncode == 0, done.stderr

    with tarfile.open(_built(source, "*.tar.gz")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {f.relative_to(source).as_posix() for f in (source / "csrc").rglob("*") if f.is_file()}
    assert any(name.endswith(".h") for name in kernels)
    assert kernels | _package_files(source) | {"setup.py", "pyproject.toml"} <= inside

    wheel = _built(source, "*.whl")
    assert f"-{__version__}-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    _assert_only_the_package(names)
    compiled = {name for name in names if name.startswith("recsys_ops/")} - _package_files(source)
    assert compiled == {"recsys_ops/_C.abi3.so", "recsys_ops/_build_info.py"}

    python = _install(wheel, tmp_path / "installed")
    said, log = _lookup(python)
    assert (said["chosen"], log) == ("native", "")
    package = _doctor(python)["recsys_ops"]
    assert package["extension"] == "loads"
    assert package["build"]["requested"] == "cpu"
    assert set(package["simd_levels"]) <= set(package["build"]["simd_levels"])

"""Finding nvcc, and saying what it is to compile for."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_ops import _nvcc

HOPPER = "sm_80 sm_86 sm_90 compute_80 compute_86 compute_90"
BLACKWELL = f"{HOPPER} sm_100 compute_100"


def fake_nvcc(folder: Path, release: str, known: str) -> str:
    """A program that says what nvcc of a release would."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        f'#!/bin/sh\ncase $1 in --version) echo "Cuda compilation tools, release {release}, V{release}.1";; '
        f'*) printf "%s\\n" {known};; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", _nvcc.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("release", "known", "wanted"),
    [
        ("12.4", HOPPER, ["sm_80", "sm_90a", "compute_90"]),
        ("12.8", BLACKWELL, ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("13.0", BLACKWELL, ["sm_80", "sm_90a", "sm_100", "compute_100"]),
    ],
)
def test_it_compiles_for_what_the_release_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, known: str, wanted: list[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    path = fake_nvcc(tmp_path, release, known)
    nvcc = _nvcc.find_nvcc()
    assert nvcc is not None
    assert (nvcc.path, nvcc.version) == (path, release)
    assert nvcc.architectures() == wanted
    assert _nvcc.missing() is None
    monkeypatch.setenv(_nvcc.ENVIRONMENT_VARIABLE, "sm_90a, compute_80")
    assert nvcc.architectures() == ["sm_90a", "compute_80"]


@pytest.mark.parametrize("name", ["sm_100", "hopper", "90", "sm_90a sm_35"])
def test_an_unknown_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CUDACXX", fake_nvcc(tmp_path, "12.4", HOPPER))
    nvcc = _nvcc.find_nvcc()
    assert nvcc is not None
    with pytest.raises(
        ValueError, match=rf"to name what nvcc 12.4 compiles for, .*, got '{name.split()[-1]}'"
    ):
        nvcc.architectures(name)


def test_an_old_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", fake_nvcc(tmp_path, "11.8", HOPPER))
    reason = _nvcc.missing()
    assert reason is not None
    assert "nvcc 11.8 at" in reason
    assert "too old: expected 12.0 or later" in reason


def test_the_compiler_that_is_named_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert _nvcc.find_nvcc() is None
    assert _nvcc.missing() == "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder"


def test_options_for_each_architecture() -> None:
    assert _nvcc.generate(["sm_90a", "compute_90"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_jobs_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _nvcc.jobs() >= 1
    monkeypatch.setattr(_nvcc, "_JOB_BYTES", 2**60)
    assert _nvcc.jobs() == 1

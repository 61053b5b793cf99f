"""Kernels of SIMD levels that this machine may lack, built otherwise and compared with scalar ones."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-fno-wrapv", "-w"]


def build_and_run(
    comparison: Path,
    sources: list[str],
    tmp_path: Path,
    compiler: str,
    level: str,
    width: int,
    flags: list[str],
    run: list[str],
) -> None:
    """Build a level's kernels and the scalar ones, and run a program that compares them."""
    target = "-DRECSYS_OPS_ARM" if level == "neon" else "-DRECSYS_OPS_X86"
    lanes = {"scalar": (1, []), level: (width, flags)}
    objects = []
    for name, (bytes_, extra) in lanes.items():
        for source in sources:
            objects.append(str(tmp_path / f"{name}-{Path(source).stem}.o"))
            defines = [target, f"-DRECSYS_OPS_SIMD_LEVEL={name}", f"-DRECSYS_OPS_VECTOR_BYTES={bytes_}"]
            subprocess.run(
                [compiler, *FLAGS, *extra, *defines, "-c", source, "-o", objects[-1]], cwd=ROOT, check=True
            )
    program = tmp_path / "compare"
    subprocess.run(
        [
            compiler,
            *FLAGS,
            target,
            f"-DLEVEL={level}",
            "-DRECSYS_OPS_SIMD_LEVEL=scalar",
            "-DRECSYS_OPS_VECTOR_BYTES=1",
            str(comparison),
            "csrc/common/simd_level.cpp",
            *objects,
            # The program names the levels of its target; those that were not built stay unused.
            "-Wl,--unresolved-symbols=ignore-all",
            "-static",
            "-o",
            str(program),
        ],
        cwd=ROOT,
        check=True,
    )
    result = subprocess.run([*run, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


lacks_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the lanes are split into AVX2 registers"
)
lacks_emulation = pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs a cross compiler for aarch64 and qemu-user",
)
WIDTHS = [16, 32, 64]  # AVX-512's 16 lanes and NEON's 4, on whatever the compiler makes of them for AVX2
AVX2 = ["-mavx2", "-mfma", "-mf16c"]

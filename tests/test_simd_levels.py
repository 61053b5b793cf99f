"""Kernels of every width of vector agree with scalar ones, those of levels that this machine may lack too."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-fno-wrapv", "-w"]

# What is compiled for each level; tests/<op>/simd_levels.cpp compares.
SOURCES = {
    "embedding_bag": ["bag_pooling.cpp", "gradient_pooling.cpp"],
    "embedding_bag_collection": ["quantized_pooling.cpp", "row_update.cpp"],
    "hstu_attention": ["attention_tasks.cpp"],
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lanes are split into AVX2 registers")
@pytest.mark.parametrize("op", SOURCES)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_every_width_of_vector(op: str, tmp_path: Path, width: int) -> None:
    """AVX-512's 16 lanes and NEON's 4, on whatever the compiler makes of them for AVX2."""
    build_and_run(op, tmp_path, "g++", "avx2", width, ["-mavx2", "-mfma", "-mf16c"], [])


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs a cross compiler for aarch64 and qemu-user",
)
@pytest.mark.parametrize("op", SOURCES)
def test_neon_under_emulation(op: str, tmp_path: Path) -> None:
    build_and_run(op, tmp_path, "aarch64-linux-gnu-g++", "neon", 16, [], ["qemu-aarch64"])


def build_and_run(
    op: str, tmp_path: Path, compiler: str, level: str, width: int, flags: list[str], run: list[str]
) -> None:
    """Build a level's kernels and the scalar ones, and run the program that compares them."""
    target = "-DRECSYS_OPS_ARM" if level == "neon" else "-DRECSYS_OPS_X86"
    lanes = {"scalar": (1, []), level: (width, flags)}
    objects = []
    for name, (bytes_, extra) in lanes.items():
        for file in SOURCES[op]:
            source = f"csrc/{op}/{file}"
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
            f"tests/{op}/simd_levels.cpp",
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

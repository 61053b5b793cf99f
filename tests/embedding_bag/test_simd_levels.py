"""Kernels of every width of vector agree with scalar ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from simd_levels import AVX2, WIDTHS, build_and_run, lacks_emulation, lacks_x86

COMPARISON = Path(__file__).parent / "simd_levels.cpp"
SOURCES = ["csrc/embedding_bag/bag_pooling.cpp", "csrc/embedding_bag/gradient_pooling.cpp"]


@pytest.mark.slow
@lacks_x86
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_vector(tmp_path: Path, width: int) -> None:
    build_and_run(COMPARISON, SOURCES, tmp_path, "g++", "avx2", width, AVX2, [])


@pytest.mark.slow
@lacks_emulation
def test_neon_under_emulation(tmp_path: Path) -> None:
    build_and_run(COMPARISON, SOURCES, tmp_path, "aarch64-linux-gnu-g++", "neon", 16, [], ["qemu-aarch64"])

"""Occupancy against values calculated by hand, and against what NVIDIA's and LLVM's calculators say."""

from __future__ import annotations

import pytest

from recsys_ops.inspection import TARGETS
from recsys_ops.inspection.occupancy import LIMITS, occupancy

KIB = 1024


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "warps"),
    [
        # Full, then by registers: 65536 / (32 x 64) = 32 warps; 65536 / (32 x 72) = 28.
        ("sm_80", 128, 32, 0, 64),
        ("sm_90", 128, 64, 0, 32),
        ("sm_90", 128, 65, 0, 28),
        ("sm_90", 128, 72, 0, 28),
        # A scheduler has room for two warps of 255 registers, so a block of 8 warps fits once, of 16 never.
        ("sm_90a", 256, 255, 0, 8),
        ("sm_90a", 512, 255, 0, 0),
        # One warp in a block, 32 blocks: half of the warps.
        ("sm_100", 32, 32, 0, 32),
        ("sm_100", 32, 80, 0, 24),
        # Three warps in a block: 21 blocks make 63.
        ("sm_80", 96, 32, 0, 63),
        # By shared memory, 1 KiB of each block taken by the system: 164 / 41, 228 / 41, 228 / 115.
        ("sm_80", 128, 32, 40 * KIB, 16),
        ("sm_90", 128, 32, 40 * KIB, 20),
        ("sm_100", 128, 32, 114 * KIB, 4),
        ("sm_80", 1024, 32, 163 * KIB, 32),
        ("sm_80", 1024, 32, 164 * KIB, 0),
        # 8 waves of each SIMD, 512 / 104 = 4, and 64 KiB of local memory in units of 512 bytes.
        ("gfx942", 64, 64, 0, 32),
        ("gfx942", 64, 65, 0, 28),
        ("gfx942", 64, 104, 0, 16),
        ("gfx942", 64, 186, 0, 8),
        ("gfx942", 256, 24, 64 * KIB, 4),
        ("gfx942", 256, 24, 32 * KIB + 1, 4),
    ],
)
def test_warps_of_a_multiprocessor(
    target: str, threads: int, registers: int, shared: int, warps: int
) -> None:
    assert occupancy(target, threads, registers, shared) == warps / LIMITS[target].warps


def test_every_target_has_limits() -> None:
    assert {target for targets in TARGETS.values() for target in targets} == set(LIMITS)
    assert {limits.registers for limits in LIMITS.values()} == {65536, 131072}

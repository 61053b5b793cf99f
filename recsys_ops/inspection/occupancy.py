"""How many warps of a kernel a multiprocessor holds at once, from what each of them takes."""

from __future__ import annotations

from dataclasses import dataclass

# A lane of each of the four schedulers of a multiprocessor has 512 registers of 32 bits, which warps
# get by 8. That is so for all of these GPUs, whatever the width of their warps.
SCHEDULERS = 4
REGISTERS = 512
REGISTER_UNIT = 8


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor, which on AMD is a compute unit."""

    lanes: int  # of a warp
    warps: int
    blocks: int
    shared_bytes: int
    shared_unit: int
    shared_reserved: int  # bytes of each block that the system takes

    @property
    def registers(self) -> int:
        return SCHEDULERS * REGISTERS * self.lanes


LIMITS = {
    "sm_80": Limits(32, 64, 32, 164 * 1024, 128, 1024),
    "sm_90": Limits(32, 64, 32, 228 * 1024, 128, 1024),
    "sm_90a": Limits(32, 64, 32, 228 * 1024, 128, 1024),
    "sm_100": Limits(32, 64, 32, 228 * 1024, 128, 1024),
    "gfx942": Limits(64, 32, 32, 64 * 1024, 512, 0),
}


def occupancy(target: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Warps that a multiprocessor holds of those that it could, from 0 to 1.

    Args:
        target: a key of ``LIMITS``.
        threads: of a block.
        registers: of a thread; on AMD vector registers, those that accumulate included.
        shared_bytes: of a block.

    The formula is that of NVIDIA's occupancy calculator; AMD's differs only in its constants.

    Example:
        >>> occupancy("sm_90", threads=128, registers=64, shared_bytes=0)
        0.5
    """
    limits = LIMITS[target]
    warps = -(-threads // limits.lanes)
    per_scheduler = REGISTERS // _round_up(max(registers, 1), REGISTER_UNIT)
    blocks = min(limits.blocks, limits.warps // warps, SCHEDULERS * per_scheduler // warps)
    if shared := _round_up(shared_bytes + limits.shared_reserved, limits.shared_unit):
        blocks = min(blocks, limits.shared_bytes // shared)
    return blocks * warps / limits.warps


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

"""Tiles of HSTU attention's kernels, and how programs share blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import triton

from recsys_ops.triton_kernels.embedding_bag import LANES

PROCESSORS = 4  # of a machine without a GPU, where the interpreter runs


@dataclass(frozen=True)
class HSTUAttentionConfig:
    """A tile of one kernel, and how programs share the blocks.

    Args:
        block_m: rows of q.
        block_n: keys.
        num_warps: of a program.
        num_stages: tiles in flight.
        programs: of each multiprocessor, which take blocks in turns; 0: a program for each block.
        longest_first: start the blocks that see most first, which sorts them.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 0
    longest_first: bool = False

    @property
    def is_valid(self) -> bool:
        sizes = (self.block_m, self.block_n, self.num_warps)
        return (
            all(n > 0 and n & (n - 1) == 0 for n in sizes)
            and min(self.block_m, self.block_n) >= 16
            and self.block_m * self.block_n <= 128 * LANES * self.num_warps
            and self.num_warps * LANES <= 1024
            and self.num_stages >= 1
            and self.programs >= 0
        )

    @classmethod
    @cache
    def default(
        cls, kernel: str, dim: int, value_dim: int, dtype: torch.dtype, work: int = 0, target: str = "sm_80"
    ) -> HSTUAttentionConfig:
        """The largest tile, of those that were tried, that spills no registers.

        Args:
            kernel: "forward", "queries" or "keys".
            dim: columns of q and k.
            value_dim: columns of v.
            dtype: of q.
            work: 0 for masks alone, 1 with a bias or a cache, 2 with intervals or dropout, too.
            target: a GPU as ``recsys-ops inspect`` names it; any other is taken for sm_80.
        """
        if dtype.itemsize == 8:
            return cls(16, 16, 4, 1)
        tiles = _HALF if dtype.itemsize == 2 else _FULL
        columns = min(max(64, padded(max(dim, value_dim))), 256)
        of_kernel = {**tiles["sm_80"], **tiles.get(target, {})}
        return cls(*of_kernel[kernel, columns][work if dtype.itemsize == 2 else 0])


@dataclass(frozen=True)
class HSTUAttentionBackwardConfig:
    """Of the kernel that owns rows and of the one that owns keys."""

    queries: HSTUAttentionConfig
    keys: HSTUAttentionConfig

    @property
    def is_valid(self) -> bool:
        return self.queries.is_valid and self.keys.is_valid

    @classmethod
    @cache
    def default(
        cls, dim: int, value_dim: int, dtype: torch.dtype, work: int = 0, target: str = "sm_80"
    ) -> HSTUAttentionBackwardConfig:
        """The tiles of either kernel."""
        kind = (dim, value_dim, dtype, work, target)
        return cls(*(HSTUAttentionConfig.default(kernel, *kind) for kernel in ("queries", "keys")))


_Tile = tuple[int, int, int, int]  # the first four numbers of a configuration
_Tiles = dict[tuple[str, int], tuple[_Tile, ...]]  # by kernel and padded columns, for each amount of work

_HALF: dict[str, _Tiles] = {
    "sm_80": {
        ("forward", 64): ((128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
        ("forward", 128): ((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2)),
        ("forward", 256): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        ("queries", 64): ((64, 64, 4, 2), (64, 16, 8, 2), (32, 32, 8, 2)),
        ("queries", 128): ((64, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        ("queries", 256): ((32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
        ("keys", 64): ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
        ("keys", 128): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        ("keys", 256): ((32, 32, 8, 2), (32, 16, 8, 1), (32, 16, 8, 1)),
    },
    "sm_90": {
        ("forward", 128): ((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        ("queries", 128): ((64, 64, 4, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        ("queries", 256): ((64, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        ("forward", 64): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        ("forward", 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        ("forward", 256): ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        ("queries", 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        ("queries", 128): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        ("queries", 256): ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        ("keys", 64): ((32, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2)),
        ("keys", 128): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
        ("keys", 256): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    },
}

# Products of fp32 as it is: without tensor cores on NVIDIA, where operands take registers.
_FULL: dict[str, _Tiles] = {
    "sm_80": {
        ("forward", 64): ((32, 32, 8, 1),),
        ("forward", 128): ((32, 16, 8, 1),),
        ("forward", 256): ((32, 16, 8, 1),),
        ("queries", 64): ((32, 32, 8, 1),),
        ("queries", 128): ((32, 16, 8, 1),),
        ("queries", 256): ((32, 16, 8, 1),),
        ("keys", 64): ((32, 32, 8, 1),),
        ("keys", 128): ((32, 32, 8, 1),),
        ("keys", 256): ((16, 16, 8, 1),),
    },
    "gfx942": {
        ("forward", 64): ((64, 32, 8, 1),),
        ("forward", 128): ((64, 32, 8, 1),),
        ("forward", 256): ((32, 32, 4, 1),),
        ("queries", 64): ((64, 32, 8, 1),),
        ("queries", 128): ((32, 32, 4, 1),),
        ("queries", 256): ((16, 16, 4, 1),),
        ("keys", 64): ((32, 32, 8, 1),),
        ("keys", 128): ((32, 32, 4, 1),),
        ("keys", 256): ((16, 16, 4, 1),),
    },
}

_Config = TypeVar("_Config", HSTUAttentionConfig, HSTUAttentionBackwardConfig)


def checked(config: _Config | None) -> _Config | None:
    if config is not None and not config.is_valid:
        raise ValueError(f"hstu_attention: expected a valid configuration, got {config}")
    return config


def padded(dim: int) -> int:
    """Columns of a tile: a power of two, and as many as a tensor core takes."""
    return max(16, triton.next_power_of_2(dim))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def target_of(device: torch.device) -> str:
    """The GPU as configurations name it."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))

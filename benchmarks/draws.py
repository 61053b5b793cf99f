"""Ids, bags and tables as workloads draw them: the same in every run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Literal["zipf", "uniform", "equal"]

ZIPF_EXPONENT = 1.05
_IDS_IN_POOL = 400_000


def ids_of(kind: Ids, rows: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Draws so many row numbers: Zipf's few rows often, all rows alike, or one and the same."""
    if kind == "uniform":
        return lambda count: torch.randint(rows, (count,), generator=generator)
    if kind == "equal":
        return lambda count: torch.full((count,), rows // 3)
    ranks = torch.arange(1, rows + 1, dtype=torch.float64)
    cumulated = ranks.pow(-ZIPF_EXPONENT).cumsum(0)
    row_of_rank = torch.randperm(rows, generator=generator)

    def draw(count: int) -> Tensor:
        points = torch.rand(count, generator=generator, dtype=torch.float64) * cumulated[-1]
        return row_of_rank[torch.searchsorted(cumulated, points).clamp(max=rows - 1)]

    return draw


def offsets_of(bags: int, lengths: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Where bags of a shortest and a longest length start, and where the last ends: [bags + 1]."""
    shortest, longest = lengths
    return F.pad(torch.randint(shortest, longest + 1, (bags,), generator=generator).cumsum(0), (1, 0))


def number_of_batches(ids: int) -> int:
    """How many batches of so many ids take turns."""
    return max(4, min(64, _IDS_IN_POOL // max(ids, 1)))


@functools.lru_cache(maxsize=1)
def tables(count: int, rows: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Tables uniform in [-1, 1]; kept, because successive workloads often have the same."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.empty(rows, dim).uniform_(-1, 1, generator=generator).to(device, dtype) for _ in range(count)
    )


def ids_in_words(kind: Ids) -> str:
    """For the conditions of a workload."""
    return f"Zipf({ZIPF_EXPONENT}) ids" if kind == "zipf" else f"{kind} ids"

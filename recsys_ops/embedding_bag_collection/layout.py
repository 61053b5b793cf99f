"""Where the bags of a collection's input are, and where their pooled rows go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection.reference import MAX, MEAN, SUM

POOLINGS = ("sum", "mean", "max", "none")
_MODES = {"sum": SUM, "mean": MEAN, "max": MAX, "none": SUM}  # a sequence is the sums of bags of one


class Block(NamedTuple):
    """The cells of one lookup in the output: row b is ``output[start + b * stride :][:dim]``."""

    start: int
    rows: int
    dim: int
    stride: int

    def of(self, output: Tensor) -> Tensor:
        """A view, [rows, dim]."""
        return output.as_strided(
            (self.rows, self.dim), (self.stride, 1), output.storage_offset() + self.start
        )


class Placement(NamedTuple):
    """What the kernels are told: ``lookups`` as in ``reference.py``, and the elements of the output."""

    lookups: Tensor
    size: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Layout:
    """The lookups of a collection in order: those of the first table, feature after feature, and so on.

    Args:
        features: for each table the numbers of the features that look it up.
        pooling: of each table.
        dims: of each table.
    """

    features: tuple[tuple[int, ...], ...]
    pooling: tuple[str, ...]
    dims: tuple[int, ...]

    num_features: int = field(init=False)
    pooled_dim: int = field(init=False)  # columns of all pooled lookups together
    sequences: tuple[int, ...] = field(init=False)  # the features that some table gives back unpooled
    has_max: bool = field(init=False)

    def __post_init__(self) -> None:
        lookups = [
            (f, pooling, dim)
            for features, pooling, dim in zip(self.features, self.pooling, self.dims, strict=True)
            for f in features
        ]
        derived = {
            "num_features": 1 + max([-1, *(f for f, _, _ in lookups)]),
            "pooled_dim": sum(dim for _, pooling, dim in lookups if pooling != "none"),
            "sequences": tuple(sorted({f for f, pooling, _ in lookups if pooling == "none"})),
            "has_max": "max" in self.pooling,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def place(
        self,
        bags: Sequence[tuple[int, int]],
        lengths: Mapping[int, int] = MappingProxyType({}),
        num_bags: int = 0,
        *,
        apart: bool = False,
    ) -> Placement:
        """The placement for an input whose feature f has the bags [first, first + count) = ``bags[f]``.

        Args:
            bags: of each feature.
            lengths: how many entries each feature of ``sequences`` has; their bags of one follow
                the ``num_bags`` bags of the input, see ``with_bags_of_one``.
            num_bags: of the input.
            apart: whether each pooled lookup has a block [B, D] of its own, as different batch sizes
                ask for; otherwise those of one sample are side by side, [B, pooled_dim].
        """
        of_one, first = {}, num_bags + 1
        for f, length in lengths.items():
            of_one[f] = (first, length)
            first += length + 1
        lookups, blocks = [], []
        column, size = 0, 0 if apart else self.pooled_dim * max([0, *(count for _, count in bags)])
        for table, features in enumerate(self.features):
            pooling, dim = self.pooling[table], self.dims[table]
            for f in features:
                first_bag, rows = of_one[f] if pooling == "none" else bags[f]
                if apart or pooling == "none":
                    block = Block(size, rows, dim, dim)
                    size += rows * dim
                else:
                    block = Block(column, rows, dim, self.pooled_dim)
                    column += dim
                blocks.append(block)
                lookups.append([table, _MODES[pooling], first_bag, rows, block.start, block.stride])
        return Placement(torch.tensor(lookups, dtype=torch.int64).view(-1, 6), size, tuple(blocks))

    def side_by_side(self, batch_size: int) -> Placement:
        """The placement for features that follow one another with one batch size, none a sequence."""
        return self.place([(f * batch_size, batch_size) for f in range(self.num_features)])


def with_bags_of_one(offsets: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Offsets followed, for each range of entries, by where each of its entries starts and the last ends."""
    numbers = [
        torch.arange(first, end + 1, dtype=offsets.dtype, device=offsets.device) for first, end in ranges
    ]
    return torch.cat([offsets, *numbers])

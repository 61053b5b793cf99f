"""Bytes and floating-point operations that an embedding bag needs at least.

With N ids in B bags naming U distinct rows of a table [R, D], elements of s bytes and
ids and offsets of i bytes:

    forward           rows at random addresses   U D s once each, N D s looked up
                      streamed                   N i + (B + 1) i + B D s, weighted N s more
                      operations                 N D, weighted 2 N D; mean B D more
    backward          rows at random addresses   B D s (of the output's gradient) once each, N D s looked up
                      streamed                   N i + (B + 1) i, weighted N s more
                      sparse, streamed           U D s + 8 U, the gradient's values and row numbers
                      dense, zeroed              R D s, the whole gradient, touched rows included
                      operations                 N D, weighted 2 N D; mean B D more
    of the weights    rows at random addresses   U D s once each, N D s looked up
                      streamed                   N s
                      operations                 2 N D

The maximum compares instead of adding; its backward adds B D elements and looks up none twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Cost:
    """What a call needs at least. Bytes are exact for the call's shapes and ids, before any cache."""

    flops: int
    row_bytes: int  # one row, or their mean
    unique_row_bytes: int  # rows at random addresses, each distinct one once: what memory must deliver
    lookup_row_bytes: int  # the same with every lookup counted: what caches and memory deliver together
    streamed_bytes: int  # ids, offsets, weights, outputs: read or written in order
    zeroed_bytes: int = 0  # a fresh dense gradient, written in order

    @property
    def bytes(self) -> int:
        """The least traffic: every distinct byte once."""
        return self.unique_row_bytes + self.streamed_bytes + self.zeroed_bytes

    @property
    def effective_bytes(self) -> int:
        """The traffic that a machine without caches would have: every lookup counted."""
        return self.lookup_row_bytes + self.streamed_bytes + self.zeroed_bytes

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other. Of rows of two sizes the mean over lookups is kept."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        row = self.row_bytes
        if row != other.row_bytes:
            lookups = sum(c.lookup_row_bytes / max(1, c.row_bytes) for c in (self, other))
            row = round(sums["lookup_row_bytes"] / lookups) if lookups else max(row, other.row_bytes)
        return Cost(**{**sums, "row_bytes": row})


def forward_cost(
    num_bags: int,
    num_ids: int,
    num_unique: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    mode: str = "sum",
    weighted: bool = False,
    index_bytes: int = 8,
) -> Cost:
    """Cost of pooling; the formula is in the module's docstring.

    Args:
        num_bags: B.
        num_ids: N, those that contribute.
        num_unique: U, distinct rows among them.
        dim: D.
        dtype: of the table and the output.
        mode: "sum", "mean" or "max".
        weighted: whether there are per-sample weights.
        index_bytes: of one id and one offset, 4 or 8.

    Example:
        >>> cost = forward_cost(num_bags=2, num_ids=6, num_unique=5, dim=4)
        >>> cost.unique_row_bytes, cost.lookup_row_bytes, cost.streamed_bytes, cost.flops
        (80, 96, 104, 24)
    """
    row = dim * dtype.itemsize
    return Cost(
        flops=pooling_flops(num_bags, num_ids, dim, mode, weighted),
        row_bytes=row,
        unique_row_bytes=num_unique * row,
        lookup_row_bytes=num_ids * row,
        streamed_bytes=_bag_bytes(num_bags, num_ids, dtype, weighted, index_bytes) + num_bags * row,
    )


def backward_cost(
    num_bags: int,
    num_ids: int,
    num_unique: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_embeddings: int | None = None,
    mode: str = "sum",
    weighted: bool = False,
    weights_gradient: bool = False,
    index_bytes: int = 8,
) -> Cost:
    """Cost of the gradient; the formula is in the module's docstring.

    Args:
        num_bags, num_ids, num_unique, dim, dtype, mode, weighted, index_bytes: as in ``forward_cost``.
        num_embeddings: R for a dense gradient, None for a sparse one, coalesced.
        weights_gradient: whether the per-sample weights get a gradient too.

    Example:
        >>> sparse = backward_cost(num_bags=2, num_ids=6, num_unique=5, dim=4)
        >>> dense = backward_cost(num_bags=2, num_ids=6, num_unique=5, dim=4, num_embeddings=1000)
        >>> sparse.streamed_bytes, sparse.zeroed_bytes, dense.zeroed_bytes
        (192, 0, 16000)
    """
    row = dim * dtype.itemsize
    gathered = num_bags if mode == "max" else num_ids
    streamed = _bag_bytes(num_bags, num_ids, dtype, weighted, index_bytes)
    cost = Cost(
        flops=pooling_flops(num_bags, gathered, dim, mode, weighted),
        row_bytes=row,
        unique_row_bytes=num_bags * row,
        lookup_row_bytes=gathered * row,
        streamed_bytes=streamed + (num_unique * (row + 8) if num_embeddings is None else 0),
        zeroed_bytes=(num_embeddings or 0) * row,
    )
    if not weights_gradient:
        return cost
    return cost + Cost(
        flops=2 * num_ids * dim,
        row_bytes=row,
        unique_row_bytes=num_unique * row,
        lookup_row_bytes=num_ids * row,
        streamed_bytes=num_ids * dtype.itemsize,
    )


def _bag_bytes(num_bags: int, num_ids: int, dtype: torch.dtype, weighted: bool, index_bytes: int) -> int:
    return (num_ids + num_bags + 1) * index_bytes + (num_ids * dtype.itemsize if weighted else 0)


def pooling_flops(num_bags: int, num_ids: int, dim: int, mode: str, weighted: bool) -> int:
    """Operations that add rows up to bags, or gradients of bags up to rows."""
    return num_ids * dim * (2 if weighted else 1) + (num_bags * dim if mode == "mean" else 0)

"""Bytes and floating-point operations that HSTU attention needs at least.

With P pairs of a row and a key that it sees, H heads of D columns of q and k and V of v, elements of s
bytes, M rows of q and L of k and v:

    forward   operations   2 P H (D + V), of the two products
              streamed     (M (D + V) + L (D + V)) H s
    backward  operations   2 P H (3 D + 2 V): the scores once more, and four products
              streamed     (M (2 D + V) + L (2 D + 2 V)) H s

What lies between the products, some twenty operations for each pair and head, is not counted, as the
field does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.hstu_attention.masks import HSTUMask


def forward_cost(
    num_pairs: int,
    num_rows: int,
    num_keys: int,
    num_heads: int,
    dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Cost of attention; the formula is in the module's docstring.

    Args:
        num_pairs: P, see ``count_pairs``.
        num_rows: M.
        num_keys: L.
        num_heads: H.
        dim: D.
        value_dim: V; D if None.
        dtype: of q, k and v.

    Example:
        >>> forward_cost(num_pairs=10, num_rows=4, num_keys=4, num_heads=2, dim=8).flops
        640
    """
    value_dim = dim if value_dim is None else value_dim
    columns = num_rows * (dim + value_dim) + num_keys * (dim + value_dim)
    return _cost(2 * num_pairs * num_heads * (dim + value_dim), columns * num_heads * dtype.itemsize)


def backward_cost(
    num_pairs: int,
    num_rows: int,
    num_keys: int,
    num_heads: int,
    dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Cost of the gradients of q, k and v; the arguments are those of ``forward_cost``.

    Example:
        >>> backward_cost(num_pairs=10, num_rows=4, num_keys=4, num_heads=2, dim=8).flops
        1600
    """
    value_dim = dim if value_dim is None else value_dim
    columns = num_rows * (2 * dim + value_dim) + num_keys * (2 * dim + 2 * value_dim)
    return _cost(2 * num_pairs * num_heads * (3 * dim + 2 * value_dim), columns * num_heads * dtype.itemsize)


def count_pairs(lengths: Tensor, mask: HSTUMask = HSTUMask()) -> int:  # noqa: B008  frozen
    """How many pairs of a row and a key a mask lets see each other, in sequences of these lengths.

    Args:
        lengths: [B] integers.
        mask: without intervals.

    Raises:
        ValueError: the mask has intervals.

    Example:
        >>> count_pairs(torch.tensor([3, 4])), count_pairs(torch.tensor([3]), HSTUMask(causal=False))
        (16, 9)
    """
    if mask.intervals is not None:
        raise ValueError("count_pairs: expected a mask without intervals, got some")
    lengths = lengths.cpu().long()

    def per_sequence(value: int | Tensor | None) -> Tensor:
        return torch.as_tensor(0 if value is None else value).cpu().expand_as(lengths).long()

    targets = per_sequence(mask.num_targets)
    prefix = torch.minimum(per_sequence(mask.num_contextual), lengths - targets)
    n, t, c = (x.repeat_interleave(lengths) for x in (lengths, targets, prefix))
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(len(n)) - starts.repeat_interleave(lengths)
    end = n - t
    is_target = position >= end
    place = torch.minimum(position, end)
    window = n
    if mask.window is not None:
        is_free = (place >= end - mask.full_window_tail) & (mask.full_window_tail > 0)
        window = torch.where(is_free, n, mask.window)
    first = (place - window).clamp(min=0)
    first = torch.where(first < c, 0, first)
    last = torch.minimum(position + 1 if mask.causal else place + window + 1, end)
    seen = torch.where(is_target, end, last) - first
    seen = torch.where(position < c, end, seen)
    in_group = (position - end) % mask.target_group_size
    group = torch.minimum(position - in_group + mask.target_group_size, n) - (position - in_group)
    return int((seen + torch.where(is_target, in_group + 1 if mask.causal else group, 0)).sum())


def _cost(flops: int, streamed: int) -> Cost:
    # No row is looked up; a row of some size keeps rates of rows defined.
    return Cost(flops=flops, row_bytes=1, unique_row_bytes=0, lookup_row_bytes=0, streamed_bytes=streamed)

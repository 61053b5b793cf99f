"""Embedding bag in eager PyTorch, forward and explicit backward: the oracle for every other backend.

Each function here is one kernel of the contract: every backend implements these
names with these arguments, and the registered operators carry these schemas.

    weight              [R, D]  fp16, bf16, fp32 or fp64; any strides
    indices             [N]     int32 or int64, contiguous
    offsets             [B], or [B + 1] with include_last_offset; int32 or int64, contiguous
    per_sample_weights  [N]     dtype of weight, contiguous
    padding_idx         a row that contributes nothing, or -1
    drop_invalid        an index outside [0, R) contributes nothing; otherwise it is an error

A bag pools its *live* entries: valid, not padding, and before the end of the
last bag. fp16 and bf16 accumulate in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def embedding_bag_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> Tensor:
    """Sum or mean of each bag, [B, D]."""
    live = _live_entries(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    return pool(weight, live, per_sample_weights, mean).to(weight.dtype)


def embedding_bag_max_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> tuple[Tensor, Tensor]:
    """Maximum of each bag, [B, D], and where it is: the position within the bag, int32 [B, D].

    The first occurrence wins a tie; an empty bag gives 0 and position -1. A
    NaN wins only as the first entry, as in ``torch.nn.functional.embedding_bag``.
    """
    live = _live_entries(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    return pool_maximum(weight, live, offsets)


def embedding_bag_backward(
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    num_embeddings: int,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Gradient of the weight, [R, D] dense; with ``argmax`` that of the maximum."""
    live = _live_entries(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    rows = row_gradients(grad_output, live, per_sample_weights, mean, scale_grad_by_freq)
    if argmax is not None:
        in_bag = live.positions - offsets[live.bags]
        rows = rows * (argmax[live.bags] == in_bag[:, None])
    grad = rows.new_zeros(num_embeddings, grad_output.shape[1])
    return grad.index_add_(0, live.rows, rows).to(grad_output.dtype)


def embedding_bag_backward_sparse(
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight as its U touched rows in ascending order: int64 [U] and [U, D]."""
    live = _live_entries(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    rows = row_gradients(grad_output, live, per_sample_weights, mean, scale_grad_by_freq)
    touched, slot = torch.unique(live.rows, return_inverse=True)
    values = rows.new_zeros(len(touched), grad_output.shape[1]).index_add_(0, slot, rows)
    return touched, values.to(grad_output.dtype)


def embedding_bag_backward_per_sample_weights(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> Tensor:
    """Gradient of the per-sample weights, [N]; 0 where an entry is not live."""
    live = _live_entries(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    dots = dot_products(grad_output, weight, live, mean)
    grad = dots.new_zeros(len(indices))
    grad[live.positions] = dots
    return grad.to(weight.dtype)


def check_values(
    indices: Tensor, offsets: Tensor, num_embeddings: int, include_last_offset: bool, drop_invalid: bool
) -> None:
    """Raise RuntimeError for offsets that do not describe bags of ``indices``, or an index that is refused.

    Reads the values, so on a GPU it waits for them.
    """
    _check_offsets(indices, offsets)
    if drop_invalid:
        return
    used = indices[: int(offsets[-1])] if include_last_offset else indices
    if len(offsets) == include_last_offset:
        used = indices[:0]
    invalid = (used < 0) | (used >= num_embeddings)
    if invalid.any():
        position = int(invalid.nonzero()[0])
        raise RuntimeError(
            f"embedding_bag: expected indices in [0, {num_embeddings}), "
            f"got indices[{position}] = {int(indices[position])}"
        )


def _check_offsets(indices: Tensor, offsets: Tensor) -> None:
    """Raise RuntimeError unless offsets start at 0, never decrease and end within ``indices``."""
    if len(offsets) == 0:
        return
    if (start := int(offsets[0])) != 0:
        raise RuntimeError(f"embedding_bag: expected offsets[0] = 0, got {start}")
    decreasing = offsets[1:] < offsets[:-1]
    if decreasing.any():
        i = int(decreasing.nonzero()[0])
        raise RuntimeError(
            "embedding_bag: expected offsets that never decrease, "
            f"got offsets[{i}] = {int(offsets[i])}, offsets[{i + 1}] = {int(offsets[i + 1])}"
        )
    if (end := int(offsets[-1])) > len(indices):
        raise RuntimeError(
            f"embedding_bag: expected offsets within the {len(indices)} indices, got offsets[-1] = {end}"
        )


class LiveEntries(NamedTuple):
    """The M entries that contribute, in order of position."""

    positions: Tensor  # [M] where in indices
    rows: Tensor  # [M] int64
    bags: Tensor  # [M] int64
    num_bags: int

    def bag_sizes(self, dtype: torch.dtype) -> Tensor:
        """Live entries of each bag, at least 1: [B]."""
        return torch.bincount(self.bags, minlength=self.num_bags).clamp(min=1).to(dtype)


def _live_entries(
    indices: Tensor,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> LiveEntries:
    check_values(indices, offsets, num_embeddings, include_last_offset, drop_invalid)
    return find_live_entries(indices, offsets, num_embeddings, padding_idx, include_last_offset)


def find_live_entries(
    indices: Tensor, offsets: Tensor, num_embeddings: int, padding_idx: int, include_last_offset: bool
) -> LiveEntries:
    """The entries that contribute, of offsets that are known to be good."""
    num_bags = len(offsets) - include_last_offset
    positions = torch.arange(len(indices), device=indices.device)
    bags = torch.searchsorted(offsets.long(), positions, right=True) - 1
    valid = (indices >= 0) & (indices < num_embeddings)
    live = valid & (indices != padding_idx) & (bags >= 0) & (bags < num_bags)
    positions = live.nonzero().squeeze(1)
    return LiveEntries(positions, indices[positions].long(), bags[positions], num_bags)


def pool(weight: Tensor, live: LiveEntries, per_sample_weights: Tensor | None, mean: bool) -> Tensor:
    """Sum or mean of each bag in the type that sums are formed in, [B, D]."""
    rows = weight[live.rows].to(accumulate_type(weight.dtype))  # [M, D]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[live.positions, None]
    output = rows.new_zeros(live.num_bags, weight.shape[1]).index_add_(0, live.bags, rows)
    return output / live.bag_sizes(rows.dtype)[:, None] if mean else output


def pool_maximum(weight: Tensor, live: LiveEntries, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each bag, and the position within the bag of its first occurrence: both [B, D]."""
    rows = weight[live.rows]  # [M, D]
    first = torch.ones_like(live.bags, dtype=torch.bool)
    first[1:] = live.bags[1:] != live.bags[:-1]
    ranks = torch.where(rows.isnan(), torch.where(first, torch.inf, -torch.inf)[:, None], rows)
    bag_of = live.bags[:, None].expand_as(rows)  # [M, D]
    shape = (live.num_bags, weight.shape[1])
    highest = ranks.new_full(shape, -torch.inf).scatter_reduce_(0, bag_of, ranks, "amax")
    entries = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
    candidates = torch.where(ranks == highest[live.bags], entries, len(rows))
    winner = entries.new_full(shape, len(rows)).scatter_reduce_(0, bag_of, candidates, "amin")  # [B, D]

    occupied = winner < len(rows)
    winner = winner.clamp(max=max(len(rows) - 1, 0))
    if len(rows) == 0:
        return rows.new_zeros(shape), torch.full(shape, -1, dtype=torch.int32, device=rows.device)
    output = torch.where(occupied, rows.gather(0, winner), 0)
    in_bag = live.positions[winner] - offsets[: live.num_bags, None]
    return output, torch.where(occupied, in_bag, -1).to(torch.int32)


def dot_products(grad_output: Tensor, weight: Tensor, live: LiveEntries, mean: bool) -> Tensor:
    """The gradient of each live entry's weight, in the type that sums are formed in: [M]."""
    accumulate = accumulate_type(weight.dtype)
    dots = (grad_output[live.bags].to(accumulate) * weight[live.rows].to(accumulate)).sum(1)
    return dots / live.bag_sizes(accumulate)[live.bags] if mean else dots


def row_gradients(
    grad_output: Tensor,
    live: LiveEntries,
    per_sample_weights: Tensor | None,
    mean: bool,
    scale_grad_by_freq: bool,
) -> Tensor:
    """What each live entry adds to the gradient of its row: [M, D]."""
    rows = grad_output[live.bags].to(accumulate_type(grad_output.dtype))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[live.positions, None]
    if mean:
        rows = rows / live.bag_sizes(rows.dtype)[live.bags, None]
    if scale_grad_by_freq:
        _, inverse, counts = torch.unique(live.rows, return_inverse=True, return_counts=True)
        rows = rows / counts[inverse, None]
    return rows


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""HSTU attention in eager PyTorch, forward and explicit backward: the oracle for every other backend.

Each function here is one kernel of the contract: every backend implements these
names with these arguments, and the registered operators carry these schemas.

    q                [M, H, D]   fp32, fp16, bf16 or fp64; any strides
    k                [L, H, D]   dtype of q; any strides
    v                [L, H, V]   dtype of q; any strides
    query_offsets    [B + 1]     int32 or int64, contiguous: where each sequence starts in q; None: as in k
    offsets          [B + 1]     int32 or int64, contiguous: the same in k and v
    row_scale        [M]         fp32 (fp64 with fp64), contiguous, or None
    num_contextual   [B]         int32 or int64, contiguous, or None for 0
    num_targets      [B]         likewise
    intervals        [M, R, 2]   int32 or int64, contiguous, or None for all keys
    position_weight  [1 or H, P] fp32 (fp64 with fp64), P odd, contiguous, or None
    time_weight      [1 or H, T] likewise; together with
    timestamps       [L]         int64, contiguous, and
    boundaries       [T - 1]     int64, ascending, contiguous
    dropout_seed     [1]         int64, or None for no dropout
    window           the most distant key seen, or 0 for all

    key_cache        [R, H, D]   rows of all sequences, or with page_table [pages, page_size, H, D]; dtype
                                 of q, or int8 or float8_e4m3fn codes; any strides
    value_cache      [R, H, V]   or [pages, page_size, H, V], likewise
    key_scales       [R, H]      or [pages, page_size, H]; fp32 (fp64 with fp64), contiguous: what rows of
                                 the cache are multiplied by, or None
    value_scales     [R, H]      likewise
    cache_starts     [B]         int32 or int64, contiguous: where each sequence starts in the cache; or
    page_table       [B, P]      int32 or int64, contiguous: of each sequence, the pages that follow each
                                 other; entries past those that it needs may be anything

A sequence has n tokens, of which q holds the last m <= n. Row i of a sequence gets, for each head,

    O_i = scale_i * sum over seen j of dropped(silu(alpha * q_i . k_j + bias_ij)) * v_j

with ``scale_i = scale * row_scale[i]``. ``seen`` is told in masks.py and the bias in bias.py; in a
sequence of T targets the prefix has ``min(num_contextual, n - T)`` tokens. Products are summed in fp32
(fp64 in fp64). In fp16 and bf16, silu(...) and, backward, the gradient of the score are rounded to
that type before they are multiplied by rows, as tensor cores have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_ops.embedding_bag.reference import accumulate_type
from recsys_ops.hstu_attention import philox

# The arguments that a kernel changes.
MUTATES = {"hstu_attention_backward": ("grad_q", "grad_k", "grad_v")}


def hstu_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor | None,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
    dropout: float,
) -> Tensor:
    """Attention of every row, [M, H, V], contiguous."""
    mask = Mask(causal, window, target_group_size, full_window_tail, intervals)
    bias = Bias(position_weight, time_weight, timestamps, boundaries, next_timestamps, target_group_size)
    output = q.new_empty(*q.shape[:2], v.shape[2])
    for sequence in sequences(query_offsets, offsets, len(q), len(k), num_contextual, num_targets):
        rows, keys = sequence.rows, sequence.keys
        scores = Scores(q[rows], k[keys], sequence, alpha, mask, bias, dropout_seed, dropout)
        sums = torch.einsum("hmn,nhv->mhv", scores.rounded_weights, wide(v[keys]))
        output[rows] = (sums * row_scales(scale, row_scale, rows)).to(q.dtype)
    return output


def hstu_attention_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor | None,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q, k and v, of any strides; return those of the weights of the bias.

    Gradients of weights that are None are empty, [0, 0].
    """
    mask = Mask(causal, window, target_group_size, full_window_tail, intervals)
    bias = Bias(position_weight, time_weight, timestamps, boundaries, next_timestamps, target_group_size)
    grad_position, grad_time = (_zeros_like(w, q) for w in (position_weight, time_weight))
    for sequence in sequences(query_offsets, offsets, len(q), len(k), num_contextual, num_targets):
        rows, keys = sequence.rows, sequence.keys
        scores = Scores(q[rows], k[keys], sequence, alpha, mask, bias, dropout_seed, dropout)
        grad = wide(grad_output[rows]) * row_scales(scale, row_scale, rows)  # [m, H, V]
        grad_v[keys] = torch.einsum("hmn,mhv->nhv", scores.rounded_weights, grad).to(q.dtype)
        grad_weights = torch.einsum("mhv,nhv->hmn", grad, wide(v[keys]))
        grad_scores = scores.backward(grad_weights)  # [H, m, n]
        rounded = wide(grad_scores.to(q.dtype))
        grad_q[rows] = (alpha * torch.einsum("hmn,nhd->mhd", rounded, wide(k[keys]))).to(q.dtype)
        grad_k[keys] = (alpha * torch.einsum("hmn,mhd->nhd", rounded, wide(q[rows]))).to(q.dtype)
        if position_weight is not None:
            add_to_buckets(grad_position, bias.distances(sequence, q.device), grad_scores)
        if time_weight is not None:
            add_to_buckets(grad_time, bias.times(sequence), grad_scores)
    return grad_position, grad_time


def hstu_attention_cached_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    cache_starts: Tensor | None,
    page_table: Tensor | None,
    query_offsets: Tensor,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
) -> Tensor:
    """Attention of new tokens to those in a cache and to each other, [M, H, V], contiguous.

    k and v have the new tokens, [M, H, ...], which are the last of each sequence; ``offsets`` and
    ``timestamps`` are those of all its tokens, the cached ones first. The same bits come out as from
    the forward of all tokens, whose products have the same shapes.
    """
    check_offsets("offsets", query_offsets, len(q))
    starts, ends = query_offsets.tolist(), offsets.tolist()
    page_size = 1
    if page_table is not None:
        page_size = key_cache.shape[1]
        key_cache, value_cache = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
        key_scales, value_scales = (s if s is None else s.flatten(0, 1) for s in (key_scales, value_scales))
    rows = torch.empty(ends[-1], dtype=torch.int64, device=q.device)  # of the cache, or R + of the new
    is_new = torch.zeros(ends[-1], dtype=torch.bool, device=q.device)
    for b, cached in enumerate(cached_lengths(query_offsets, offsets)):
        place = torch.arange(cached, device=q.device)
        if page_table is not None:
            pages = check_pages(page_table[b], b, cached, page_size, len(key_cache))
            place = pages[place // page_size] * page_size + place % page_size
        elif cache_starts is not None:
            place = place + check_start(int(cache_starts[b]), b, cached, len(key_cache))
        rows[ends[b] : ends[b] + cached] = place
        rows[ends[b] + cached : ends[b + 1]] = torch.arange(
            len(key_cache) + starts[b], len(key_cache) + starts[b + 1], device=q.device
        )
        is_new[ends[b] + cached : ends[b + 1]] = True
    output = hstu_attention_forward(
        _spread(q, is_new),
        torch.cat([dequantize(key_cache, key_scales, q.dtype), k])[rows],
        torch.cat([dequantize(value_cache, value_scales, q.dtype), v])[rows],
        None,
        offsets,
        None if row_scale is None else _spread(row_scale, is_new),
        num_contextual,
        num_targets,
        None if intervals is None else _spread(intervals, is_new),
        position_weight,
        time_weight,
        timestamps,
        boundaries,
        None,
        scale,
        alpha,
        causal,
        window,
        target_group_size,
        full_window_tail,
        next_timestamps,
        0.0,
    )
    return output[is_new]


def cached_lengths(query_offsets: Tensor, offsets: Tensor) -> list[int]:
    """How many tokens of each sequence are cached; raises RuntimeError where that is negative."""
    lengths: list[int] = (offsets.diff() - query_offsets.diff()).tolist()
    for b, cached in enumerate(lengths):
        if cached < 0:
            raise RuntimeError(
                "hstu_attention_cached: expected cache_lengths of at least 0, "
                f"got cache_lengths[{b}] = {cached}"
            )
    return lengths


def dequantize(cache: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of a cache, in the dtype of q, to which products of codes and scales are rounded."""
    if scales is None:
        return cache.to(dtype)
    return (cache.to(scales.dtype) * scales[:, :, None]).to(dtype)


def check_pages(pages: Tensor, sequence: int, cached: int, page_size: int, num_rows: int) -> Tensor:
    """The pages of a sequence, int64; raises RuntimeError unless they are there."""
    wanted = -(-cached // page_size)
    if wanted > len(pages):
        raise RuntimeError(
            f"hstu_attention_cached: expected at most {len(pages) * page_size} cached tokens, as many as "
            f"page_table has room for, got {cached} in sequence {sequence}"
        )
    for i, page in enumerate(pages[:wanted].tolist()):
        if not 0 <= page < num_rows // page_size:
            raise RuntimeError(
                f"hstu_attention_cached: expected page_table[{sequence}, {i}] in "
                f"[0, {num_rows // page_size}), got {page}"
            )
    return pages.long()


def check_start(start: int, sequence: int, cached: int, num_rows: int) -> int:
    """Where the rows of a sequence start; raises RuntimeError unless all are there."""
    if start < 0 or start + cached > num_rows:
        raise RuntimeError(
            f"hstu_attention_cached: expected the {cached} cached tokens of sequence {sequence} within the "
            f"{num_rows} rows of the cache, got cache_starts[{sequence}] = {start}"
        )
    return start


def _spread(tensor: Tensor, is_new: Tensor) -> Tensor:
    """What is given of new tokens, at their places among all; 0 elsewhere."""
    return tensor.new_zeros(len(is_new), *tensor.shape[1:]).index_put_((is_new,), tensor)


class Sequence(NamedTuple):
    """One sequence: what it has of q, of k and v, and how its n tokens are divided."""

    rows: slice
    keys: slice
    contextual: int
    targets: int

    @property
    def length(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def row_positions(self) -> slice:
        """Where its rows of q are among its tokens."""
        return slice(self.length - (self.rows.stop - self.rows.start), self.length)


def sequences(
    query_offsets: Tensor | None,
    offsets: Tensor,
    num_rows: int,
    num_keys: int,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
) -> Iterator[Sequence]:
    """Every sequence of a batch; raises RuntimeError where the values cannot be right."""
    check_offsets("offsets", offsets, num_keys)
    if query_offsets is None:
        query_offsets = offsets
    check_offsets("query_offsets", query_offsets, num_rows)
    starts, ends = query_offsets.tolist(), offsets.tolist()
    contextual = [0] * (len(ends) - 1) if num_contextual is None else num_contextual.tolist()
    targets = [0] * (len(ends) - 1) if num_targets is None else num_targets.tolist()
    found = []
    for b, (prefix, count) in enumerate(zip(contextual, targets, strict=True)):
        rows, keys = slice(*starts[b : b + 2]), slice(*ends[b : b + 2])
        length = keys.stop - keys.start
        if rows.stop - rows.start > length:
            raise RuntimeError(
                f"hstu_attention: expected no more queries than keys, got {rows.stop - rows.start} queries "
                f"and {length} keys in sequence {b}"
            )
        if not 0 <= count <= length:
            raise RuntimeError(
                f"hstu_attention: expected num_targets in [0, {length}] for sequence {b}, got {count}"
            )
        if prefix < 0:
            raise RuntimeError(
                f"hstu_attention: expected num_contextual of at least 0 for sequence {b}, got {prefix}"
            )
        found.append(Sequence(rows, keys, min(prefix, length - count), count))
    return iter(found)


def check_offsets(name: str, offsets: Tensor, total: int) -> None:
    """Raise RuntimeError unless offsets start at 0, never decrease and end at ``total``."""
    if (start := int(offsets[0])) != 0:
        raise RuntimeError(f"hstu_attention: expected {name}[0] = 0, got {start}")
    decreasing = offsets[1:] < offsets[:-1]
    if decreasing.any():
        i = int(decreasing.nonzero()[0])
        raise RuntimeError(
            f"hstu_attention: expected {name} that never decrease, "
            f"got {name}[{i}] = {int(offsets[i])}, {name}[{i + 1}] = {int(offsets[i + 1])}"
        )
    if (end := int(offsets[-1])) != total:
        raise RuntimeError(f"hstu_attention: expected {name}[-1] = {total}, the number of rows, got {end}")


class Mask(NamedTuple):
    """Which keys a row sees, see masks.py."""

    causal: bool
    window: int
    target_group_size: int
    full_window_tail: int
    intervals: Tensor | None

    def seen(self, sequence: Sequence, device: torch.device) -> Tensor:
        """Whether each row of q sees each key, [m, n]."""
        length, contextual, targets = sequence.length, sequence.contextual, sequence.targets
        position = torch.arange(length, device=device)
        is_target = position >= length - targets
        number = (position - contextual + 1).clamp(min=0) if contextual else position
        last = length - contextual + 1 - targets if contextual else length - targets
        number = number.clamp(max=last)  # [n]
        row, column = position[:, None], position[None, :]
        distance = number[:, None] - number[None, :]
        seen = (row == column) | ((distance > 0) if self.causal else (distance != 0))
        if self.window:
            near = distance.abs() <= self.window
            if self.full_window_tail:
                near |= (number >= last - self.full_window_tail)[:, None]
            seen &= near
        group = (position - (length - targets)) // self.target_group_size
        same_group = (group[:, None] == group[None, :]) & ((row >= column) if self.causal else True)
        both = is_target[:, None] & is_target[None, :]
        seen = torch.where(both, same_group, seen) & (is_target[:, None] | ~is_target[None, :])
        if contextual:
            seen |= (row < contextual) & ~is_target[None, :]
        seen = seen[sequence.row_positions]
        if self.intervals is not None:
            begin, end = self.intervals[sequence.rows].unbind(2)  # [m, R]
            seen &= ((begin[:, :, None] <= position) & (position < end[:, :, None])).any(1)
        return seen


class Bias(NamedTuple):
    """The weights of the relative bias, see bias.py."""

    position_weight: Tensor | None
    time_weight: Tensor | None
    timestamps: Tensor | None
    boundaries: Tensor | None
    next_timestamps: bool
    target_group_size: int

    def of(self, sequence: Sequence, device: torch.device) -> Tensor | float:
        """What is added to each score, [1 or H, m, n]."""
        bias: Tensor | float = 0.0
        if self.position_weight is not None:
            bias = bias + self.position_weight[:, self.distances(sequence, device)]
        if self.time_weight is not None:
            bias = bias + self.time_weight[:, self.times(sequence)]
        return bias

    def distances(self, sequence: Sequence, device: torch.device) -> Tensor:
        """The position weight of each row and key, [m, n]."""
        assert self.position_weight is not None
        position = torch.arange(sequence.length, device=device)
        first = sequence.length - sequence.targets
        placed = torch.where(position < first, position, first + (position - first) % self.target_group_size)
        distance = placed[None, :] - placed[sequence.row_positions, None]
        last = self.position_weight.shape[1] - 1
        return (distance + last // 2).clamp(0, last)

    def times(self, sequence: Sequence) -> Tensor:
        """The time weight of each row and key, [m, n]."""
        assert self.timestamps is not None and self.boundaries is not None
        times = self.timestamps[sequence.keys]
        asked = times
        if self.next_timestamps:
            followed = min(sequence.length - sequence.targets, sequence.length - 1)
            asked = torch.cat([times[1 : followed + 1], times[max(followed, 0) :]])
        difference = (asked[sequence.row_positions, None] - times[None, :]).abs()
        return torch.searchsorted(self.boundaries, difference, right=True)


class Scores:
    """The scores of one sequence and what becomes of them, each [H, m, n]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        sequence: Sequence,
        alpha: float,
        mask: Mask,
        bias: Bias,
        dropout_seed: Tensor | None,
        dropout: float,
    ) -> None:
        self.dtype = q.dtype
        self.seen = mask.seen(sequence, q.device)
        self.scores = alpha * torch.einsum("mhd,nhd->hmn", wide(q), wide(k)) + bias.of(sequence, q.device)
        self.sigmoid = torch.sigmoid(self.scores)
        self.factor: Tensor | float = 1.0  # by dropout
        if dropout_seed is not None:
            rows = torch.arange(sequence.rows.start, sequence.rows.stop, device=q.device)
            kept = philox.kept(dropout_seed, dropout, rows, q.shape[1], len(k))
            self.factor = kept.to(self.scores.dtype) / (1 - dropout)

    @property
    def rounded_weights(self) -> Tensor:
        """What rows of v are multiplied by, as precise as they are."""
        weights = torch.where(self.seen, self.scores * self.sigmoid * self.factor, 0.0)
        return wide(weights.to(self.dtype))

    def backward(self, grad_weights: Tensor) -> Tensor:
        """The gradient of the scores, for that of the weights."""
        slope = self.sigmoid * (1 + self.scores * (1 - self.sigmoid))
        return torch.where(self.seen, grad_weights * self.factor * slope, 0.0)


def row_scales(scale: float, row_scale: Tensor | None, rows: slice) -> Tensor | float:
    """The scale of each row, [m, 1, 1]."""
    return scale if row_scale is None else scale * row_scale[rows, None, None]


def add_to_buckets(grad: Tensor, buckets: Tensor, grad_scores: Tensor) -> None:
    """Add the gradients of scores [H, m, n] to those of the weights of their buckets: [1 or H, T]."""
    terms = grad_scores.flatten(1)
    grad.index_add_(1, buckets.flatten(), terms if len(grad) == len(terms) else terms.sum(0, keepdim=True))


def wide(tensor: Tensor) -> Tensor:
    """In the type that sums are formed in."""
    return tensor.to(accumulate_type(tensor.dtype))


def _zeros_like(weight: Tensor | None, q: Tensor) -> Tensor:
    return q.new_zeros((0, 0) if weight is None else weight.shape, dtype=accumulate_type(q.dtype))

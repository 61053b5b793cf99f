"""Stand-ins for the layers of Meta's Generative Recommenders: their names and formulas, sequence by sequence.

Each attends densely, with a mask as a matrix, and knows nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(*shape))


def padded(rows: Tensor, offsets: Tensor, size: int) -> Tensor:
    """[B, size, ...], zeros after the end of each sequence."""
    parts = rows.split(offsets.diff().tolist())
    return torch.stack([torch.cat([p, p.new_zeros(size - len(p), *p.shape[1:])]) for p in parts])


def jagged(dense: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([dense[b, :n] for b, n in enumerate(offsets.diff().tolist())])


class STULayer(nn.Module):
    """[U, V, Q, K] = LN(x) W + b; A = attention; x + dropout([silu(U), A, silu(U) * LN(A)]) W."""

    def __init__(
        self,
        embedding_dim: int = 6,
        num_heads: int = 2,
        hidden_dim: int = 4,
        attention_dim: int = 3,
        output_dropout_ratio: float = 0.0,
        target_aware: bool = True,
        max_attn_len: int = 0,
        attn_alpha: float | None = None,
        use_group_norm: bool = False,
        contextual_seq_len: int = 0,
    ) -> None:
        super().__init__()
        self._num_heads, self._embedding_dim = num_heads, embedding_dim
        self._hidden_dim, self._attention_dim = hidden_dim, attention_dim
        self._output_dropout_ratio, self._target_aware, self._causal = (
            output_dropout_ratio,
            target_aware,
            True,
        )
        self._max_attn_len, self._contextual_seq_len = max_attn_len, contextual_seq_len
        self._attn_alpha = attn_alpha or attention_dim**-0.5
        self._use_group_norm = use_group_norm
        self._recompute_normed_x = self._recompute_uvqk = self._recompute_y = True
        hidden, attention = num_heads * hidden_dim, num_heads * attention_dim
        norms = num_heads if use_group_norm else hidden
        self._uvqk_weight = weight(embedding_dim, 2 * hidden + 2 * attention)
        self._uvqk_beta = weight(2 * hidden + 2 * attention)
        self._input_norm_weight, self._input_norm_bias = weight(embedding_dim), weight(embedding_dim)
        self._output_weight = weight(3 * hidden, embedding_dim)
        self._output_norm_weight, self._output_norm_bias = weight(norms), weight(norms)

    def forward(
        self,
        x: Tensor,
        x_lengths: Tensor,
        x_offsets: Tensor,
        max_seq_len: int,
        num_targets: Tensor | None,
        max_kv_caching_len: int = 0,
        kv_caching_lengths: Tensor | None = None,
    ) -> Tensor:
        heads, hidden, attention = self._num_heads, self._hidden_dim, self._attention_dim
        normed = _norm(x, self._input_norm_weight, self._input_norm_bias, 1)
        projected = normed @ self._uvqk_weight + self._uvqk_beta
        sizes = [heads * hidden, heads * hidden, heads * attention, heads * attention]
        u, v, q, k = projected.split(sizes, dim=1)
        u = u * torch.sigmoid(u)
        q, k, v = (padded(p.unflatten(1, (heads, -1)), x_offsets, max_seq_len) for p in (q, k, v))
        scores = self._attn_alpha * torch.einsum("bihd,bjhd->bhij", q, k)
        weights = scores * torch.sigmoid(scores) / max_seq_len
        seen = torch.stack(
            [
                self._seen(n, max_seq_len, None if num_targets is None else int(num_targets[b]))
                for b, n in enumerate(x_offsets.diff().tolist())
            ]
        )
        attended = torch.einsum("bhij,bjhd->bihd", weights * seen[:, None].to(weights), v)
        attended = jagged(attended, x_offsets).flatten(1)
        groups = heads if self._use_group_norm else 1
        gated = u * _norm(attended, self._output_norm_weight, self._output_norm_bias, groups)
        joined = torch.cat([u, attended, gated], dim=1)
        joined = F.dropout(joined, self._output_dropout_ratio, self.training)
        return x + joined @ self._output_weight

    def _seen(self, length: int, size: int, targets: int | None) -> Tensor:
        """Which tokens each token of a sequence sees, from the definition of each token's number."""
        prefix, targets = self._contextual_seq_len, targets if self._target_aware else None
        numbers = [max(p - prefix + 1, 0) if prefix else p for p in range(size)]
        last = length - prefix + 1 if prefix else length
        if targets is not None:
            last -= targets
            numbers = [min(number, last) for number in numbers]
        seen = torch.zeros(size, size)
        for i, row in enumerate(numbers):
            for j, column in enumerate(numbers):
                sees = i == j or row > column
                if self._max_attn_len:
                    sees = sees and row - column <= self._max_attn_len
                if prefix:
                    sees = sees or (row == 0 and column < last)
                seen[i, j] = float(sees)
        return seen


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> Tensor:
    """Each row, or each group of its columns, less its mean and by its standard deviation."""
    grouped = x.unflatten(1, (groups, -1))
    centred = grouped - grouped.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    if weight is None or bias is None:
        return normed.flatten(1)
    if groups > 1:
        return (normed * weight[:, None] + bias[:, None]).flatten(1)
    return normed.flatten(1) * weight + bias


def log_buckets(dt: Tensor) -> Tensor:
    return (torch.log(torch.abs(dt).clamp(min=1)) / 0.301).long()


class RelativeBucketedTimeAndPositionBasedBias(nn.Module):
    """pos_w[N - 1 + j - i] + ts_w[bucket(t_(i + 1) - t_j)]."""

    def __init__(
        self, max_seq_len: int, num_buckets: int, bucketization_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self._max_seq_len, self._num_buckets = max_seq_len, num_buckets
        self._ts_w, self._pos_w = weight(num_buckets + 1), weight(2 * max_seq_len - 1)
        self._bucketization_fn = bucketization_fn

    def forward(self, all_timestamps: Tensor) -> Tensor:
        size = self._max_seq_len
        place = torch.arange(size)
        following = torch.cat([all_timestamps[:, 1:], all_timestamps[:, -1:]], 1)
        difference = following[:, :, None] - all_timestamps[:, None, :]
        buckets = self._bucketization_fn(difference).clamp(0, self._num_buckets)
        return self._pos_w[size - 1 + place[None, :] - place[:, None]] + self._ts_w[buckets]


class SequentialTransductionUnitJagged(nn.Module):
    """[U, V, Q, K] = silu(LN(x) W); A = attention with a bias; x + dropout(U * LN(A)) W + b."""

    def __init__(
        self,
        embedding_dim: int = 6,
        linear_hidden_dim: int = 4,
        attention_dim: int = 3,
        dropout_ratio: float = 0.0,
        num_heads: int = 2,
        relative_attention_bias_module: nn.Module | None = None,
        concat_ua: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self._embedding_dim, self._linear_dim = embedding_dim, linear_hidden_dim
        self._attention_dim, self._num_heads = attention_dim, num_heads
        self._dropout_ratio, self._concat_ua, self._eps = dropout_ratio, concat_ua, epsilon
        self._rel_attn_bias = relative_attention_bias_module
        self._normalization, self._linear_config, self._linear_activation = "rel_bias", "uvqk", "silu"
        self._uvqk = weight(embedding_dim, 2 * num_heads * (linear_hidden_dim + attention_dim))
        hidden = num_heads * linear_hidden_dim
        self._o = nn.Linear(hidden * (3 if concat_ua else 1), embedding_dim)

    def forward(
        self,
        x: Tensor,
        x_offsets: Tensor,
        all_timestamps: Tensor | None,
        invalid_attn_mask: Tensor,
        delta_x_offsets: Any = None,
        cache: Any = None,
        return_cache_states: bool = False,
    ) -> Any:
        size, heads = invalid_attn_mask.shape[-1], self._num_heads
        projected = _norm(x, None, None, 1) @ self._uvqk
        projected = projected * torch.sigmoid(projected)
        hidden, attention = heads * self._linear_dim, heads * self._attention_dim
        u, v, q, k = projected.split([hidden, hidden, attention, attention], dim=1)
        values = v
        q, k, v = (padded(p.unflatten(1, (heads, -1)), x_offsets, size) for p in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        if all_timestamps is not None:
            assert self._rel_attn_bias is not None
            scores = scores + self._rel_attn_bias(all_timestamps)[:, None]
        weights = scores * torch.sigmoid(scores) / size * invalid_attn_mask
        attended = jagged(torch.einsum("bhij,bjhd->bihd", weights, v), x_offsets).flatten(1)
        normed = _norm(attended, None, None, 1)
        gated = u * normed
        joined = torch.cat([u, normed, gated], dim=1) if self._concat_ua else gated
        output = self._o(F.dropout(joined, self._dropout_ratio, self.training)) + x
        return output, (values, q, k, output)


def unit_with_bias(size: int = 8, num_buckets: int = 9, **options: Any) -> SequentialTransductionUnitJagged:
    bias = RelativeBucketedTimeAndPositionBasedBias(size, num_buckets, log_buckets)
    return SequentialTransductionUnitJagged(relative_attention_bias_module=bias, **options)


def sqrt_buckets(dt: Tensor) -> Tensor:
    return (dt.abs().sqrt() / math.pi).long()

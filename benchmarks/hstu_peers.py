"""HSTU attention as it is written without this package: padded, compiled, or sequence by sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ops.benchmarks.cases.hstu_attention import Batch, Case, Tables
from recsys_ops.benchmarks.registry import Unsupported

_MOST_BYTES = 6 * 2**30


def refuse_what_does_not_fit(case: Case) -> None:
    """Raise Unsupported where scores [B, H, N, N], twice or for a step four times, do not fit."""
    elements = len(case.lengths) * case.heads * case.longest**2
    needed = elements * case.dtype.itemsize * (4 if case.step else 2)
    if needed > _MOST_BYTES:
        raise Unsupported(f"its scores [B, H, N, N] take {needed / 2**30:.0f} GiB")


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, case: Case, tables: Tables | None
) -> Tensor:
    """The published eager formula: pad, einsum, SiLU, mask, einsum, and take the rows back."""
    n, lengths = case.longest, batch.offsets.diff()
    positions = torch.arange(n, device=q.device)
    there = positions < lengths[:, None]  # [B, N]

    def pad(rows: Tensor) -> Tensor:
        return torch.zeros(*there.shape, *rows.shape[1:], dtype=rows.dtype, device=rows.device).index_put(
            there.nonzero(as_tuple=True), rows
        )

    scores = torch.einsum("bmhd,bnhd->bhmn", pad(q), pad(k)) / math.sqrt(case.dim)
    weights = F.silu(scores) * case.scale
    weights = weights * torch.ones(n, n, dtype=weights.dtype, device=q.device).tril()
    return torch.einsum("bhmn,bnhd->bmhd", weights, pad(v))[there.nonzero(as_tuple=True)]


def attention_of_each(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, case: Case, tables: Tables | None
) -> Tensor:
    """One sequence after the other."""
    outputs = []
    for of_q, of_k, of_v in zip(*(t.split(case.lengths) for t in (q, k, v)), strict=True):
        scores = F.silu(torch.einsum("mhd,nhd->hmn", of_q, of_k) / math.sqrt(case.dim)).tril()
        outputs.append(torch.einsum("hmn,nhd->mhd", scores, of_v) * case.scale)
    return torch.cat(outputs)


def sdpa_of_each(q: Tensor, k: Tensor, v: Tensor, batch: Batch, case: Case, tables: Tables | None) -> Tensor:
    """PyTorch's fused softmax attention, one sequence after the other: other results, the same FLOPs."""
    outputs = []
    for rows in zip(*(t.split(case.lengths) for t in (q, k, v)), strict=True):
        of_q, of_k, of_v = (t.transpose(0, 1)[None] for t in rows)
        outputs.append(F.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outputs)

"""HSTU attention of new tokens to cached keys and values, for inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recsys_ops._arguments import refuse_shape
from recsys_ops._library import names_of
from recsys_ops.embedding_bag.reference import accumulate_type
from recsys_ops.hstu_attention.api import choose
from recsys_ops.hstu_attention.arguments import (
    autocast_dtype,
    bias_tensors,
    cast,
    check_device,
    check_integers,
    check_tensors,
    checked_intervals,
    per_sequence,
    split_scale,
)
from recsys_ops.hstu_attention.autograd import KERNELS
from recsys_ops.hstu_attention.bias import RelativeBias
from recsys_ops.hstu_attention.masks import HSTUMask

NAME = "hstu_attention_cached"
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    cache_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    scale: float | Tensor,
    alpha: float | None = None,
    mask: HSTUMask = HSTUMask(),  # noqa: B008  frozen
    bias: RelativeBias | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The last rows of ``recsys_ops.hstu_attention``, where earlier keys and values are in a cache.

    A sequence is its cached tokens and then its new ones, targets last. The new tokens see the
    cached ones and each other as the mask has it; nothing is written to the cache.

    Args:
        q: [M, H, Dqk], the new tokens of all sequences; fp32, fp16, bf16 or fp64, any strides.
        k: [M, H, Dqk], like q.
        v: [M, H, Dv], like q.
        offsets: int32 or int64 [B + 1], where the new tokens of each sequence start, the last being M.
        key_cache: [R, H, Dqk], rows of all sequences, or, with ``page_table``, [pages, page_size, H, Dqk];
            of the dtype of q, or codes of int8 or float8_e4m3fn with ``key_scales``. Any strides.
        value_cache: [R, H, Dv] or [pages, page_size, H, Dv], likewise.
        cache_lengths: int32 or int64 [B], how many tokens of each sequence are cached.
        cache_starts: int32 or int64 [B], the row of each sequence's first cached token. If neither it
            nor ``page_table`` is given, the sequences lie one after the other.
        page_table: int32 or int64 [B, P], the pages of each sequence in their order; entries after the
            last one that is needed may be anything.
        key_scales: [R, H] or [pages, page_size, H], floating-point: a cached row is its codes times this.
        value_scales: likewise.
        scale, alpha, mask, bias, backend: as in ``recsys_ops.hstu_attention``. A scale [M] and
            ``mask.intervals`` [M, R, 2] are of the new rows, positions those in the whole sequence;
            ``bias.timestamps`` are of all tokens of all sequences, the cached ones of each first.

    Returns:
        [M, H, Dv], contiguous, in the dtype of q.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or combination is not as above.
        RuntimeError: offsets, lengths, starts or pages are not those of q or the cache, or the backend
            asked for cannot serve the call.

    There are no gradients. Nothing waits for a GPU, so that calls can be captured in a CUDA graph.

    Example:
        >>> import torch, recsys_ops
        >>> q, k, v = torch.randn(3, 7, 1, 4).unbind()
        >>> whole = recsys_ops.hstu_attention(q, k, v, torch.tensor([0, 7]), scale=0.1)
        >>> new, length = torch.tensor([0, 2]), torch.tensor([5])
        >>> last = recsys_ops.hstu_attention_cached(q[5:], k[5:], v[5:], new, k[:5], v[:5], length, scale=0.1)
        >>> torch.testing.assert_close(last, whole[5:])
    """
    autocast = autocast_dtype(q.device.type)
    if autocast is not None:
        q, k, v = (cast(t, autocast) for t in (q, k, v))
    check_tensors(NAME, q, k, v, offsets, None)
    if k.shape[0] != q.shape[0]:
        raise refuse_shape(NAME, "k", f"[{q.shape[0]}, {q.shape[1]}, {q.shape[2]}]", k)
    num_sequences = offsets.shape[0] - 1
    if cache_lengths.shape != (num_sequences,):
        raise refuse_shape(NAME, "cache_lengths", f"[{num_sequences}]", cache_lengths)
    check_integers(NAME, "cache_lengths", cache_lengths, q)
    if page_table is not None:
        if cache_starts is not None:
            raise ValueError(f"{NAME}: expected cache_starts or page_table, got both")
        if page_table.dim() != 2 or page_table.shape[0] != num_sequences:
            raise refuse_shape(NAME, "page_table", f"[{num_sequences}, P]", page_table)
        check_integers(NAME, "page_table", page_table, q)
        page_table = page_table.contiguous()
    key_scales = _check_cache("key", key_cache, key_scales, k, page_table is not None)
    value_scales = _check_cache("value", value_cache, value_scales, v, page_table is not None)
    if key_cache.shape[:-1] != value_cache.shape[:-1]:
        raise refuse_shape(NAME, "value_cache", f"{list(key_cache.shape[:-1])} and Dv", value_cache)
    if cache_starts is not None:
        if cache_starts.shape != (num_sequences,):
            raise refuse_shape(NAME, "cache_starts", f"[{num_sequences}]", cache_starts)
        check_integers(NAME, "cache_starts", cache_starts, q)
        cache_starts = cache_starts.contiguous()
    ends = torch.nn.functional.pad(cache_lengths.long().cumsum(0), (1, 0))  # [B + 1]
    if page_table is None and cache_starts is None:
        cache_starts = ends[:-1]
    common, row_scale = split_scale(NAME, scale, q)
    with torch.no_grad():
        biases = bias_tensors(NAME, bias, q, None, autocast)
    return KERNELS[choose(q, backend)].hstu_attention_cached_forward(
        q.detach(),
        k.detach(),
        v.detach(),
        key_cache.detach(),
        value_cache.detach(),
        key_scales,
        value_scales,
        cache_starts,
        page_table,
        offsets.contiguous(),
        offsets + ends,
        row_scale,
        per_sequence(NAME, "num_contextual", mask.num_contextual, offsets),
        per_sequence(NAME, "num_targets", mask.num_targets, offsets),
        checked_intervals(NAME, mask.intervals, q),
        *biases,
        common,
        1 / math.sqrt(q.shape[2]) if alpha is None else float(alpha),
        mask.causal,
        mask.window or 0,
        mask.target_group_size,
        mask.full_window_tail,
        bias is None or bias.next_timestamps,
    )


def quantize_cache(rows: Tensor, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """Codes and scales of keys or values, for the caches of ``hstu_attention_cached``.

    The largest magnitude of each row of a head becomes the largest code, and elements are rounded to
    the nearest: in int8 each is off by at most 1/254 of that magnitude, in fp8 (float8_e4m3fn) by
    1/16 of itself, or 2**-10 of a unit where that is more, the largest magnitude being 448 units.

    Args:
        rows: [..., H, D], floating-point.
        dtype: ``"int8"`` or ``"fp8"``.

    Returns:
        Codes [..., H, D] and scales [..., H] in fp32 (fp64 of fp64).

    Raises:
        ValueError: another dtype.

    Example:
        >>> import torch
        >>> codes, scales = quantize_cache(torch.tensor([[[0.5, -1.0]]]))
        >>> codes, scales
        (tensor([[[  64, -127]]], dtype=torch.int8), tensor([[0.0079]]))
    """
    if dtype not in CODES:
        raise ValueError(f"quantize_cache: expected dtype to be one of {tuple(CODES)}, got {dtype!r}")
    wide = rows.to(accumulate_type(rows.dtype))
    largest = 127.0 if dtype == "int8" else torch.finfo(CODES[dtype]).max
    scales = wide.abs().amax(-1) / largest
    codes = wide / torch.where(scales > 0, scales, 1.0)[..., None]
    return (codes.round() if dtype == "int8" else codes).to(CODES[dtype]), scales


def _check_cache(name: str, cache: Tensor, scales: Tensor | None, new: Tensor, paged: bool) -> Tensor | None:
    """The scales as kernels take them, once they and the cache are known to be good."""
    argument, (heads, dim) = f"{name}_cache", new.shape[1:]
    if (
        cache.dim() != (4 if paged else 3)
        or cache.shape[-2:] != new.shape[1:]
        or (paged and cache.shape[1] == 0)
    ):
        leading = "pages, page_size" if paged else "R"
        raise refuse_shape(NAME, argument, f"[{leading}, {heads}, {dim}]", cache)
    check_device(NAME, argument, cache, new)
    if cache.dtype in CODES.values():
        if scales is None:
            raise ValueError(
                f"{NAME}: expected {name}_scales with a {argument} of {names_of([cache.dtype])}, got None"
            )
    elif cache.dtype != new.dtype:
        raise TypeError(
            f"{NAME}: expected {argument} of dtype {names_of([new.dtype, *CODES.values()])}, "
            f"got {names_of([cache.dtype])}"
        )
    if scales is None:
        return None
    if scales.shape != cache.shape[:-1]:
        raise refuse_shape(NAME, f"{name}_scales", str(list(cache.shape[:-1])), scales)
    if not scales.is_floating_point():
        raise TypeError(
            f"{NAME}: expected {name}_scales of a floating-point dtype, got {names_of([scales.dtype])}"
        )
    check_device(NAME, f"{name}_scales", scales, new)
    return scales.detach().to(accumulate_type(new.dtype)).contiguous()

"""Checks of the arguments of HSTU attention, and the tensors that its kernels take for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recsys_ops._arguments import check_integer_dtype, refuse_shape
from recsys_ops._library import names_of
from recsys_ops.embedding_bag.reference import accumulate_type
from recsys_ops.hstu_attention.bias import RelativeBias, boundaries_of
from recsys_ops.hstu_attention.masks import HSTUMask

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on a type of device, or None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def check_device(op: str, argument: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{op}: expected {argument} on the device of q, {q.device}, got {tensor.device}")


def check_integers(op: str, argument: str, tensor: Tensor, q: Tensor) -> None:
    check_integer_dtype(op, argument, tensor)
    check_device(op, argument, tensor, q)


def check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, query_offsets: Tensor | None
) -> None:
    if q.dim() != 3:
        raise refuse_shape(op, "q", "[L, H, Dqk]", q)
    if q.dtype not in FLOATS:
        raise TypeError(f"{op}: expected q of dtype {names_of(FLOATS)}, got {names_of([q.dtype])}")
    if k.dim() != 3 or k.shape[1:] != q.shape[1:]:
        raise refuse_shape(op, "k", f"[L, {q.shape[1]}, {q.shape[2]}]", k)
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise refuse_shape(op, "v", f"[{k.shape[0]}, {q.shape[1]}, Dv]", v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{op}: expected {name} of the dtype of q, {names_of([q.dtype])}, "
                f"got {names_of([tensor.dtype])}"
            )
        check_device(op, name, tensor, q)
    for name, size in (("q", q.shape[2]), ("v", v.shape[2])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: expected {name} with 1 to {MAX_HEAD_DIM} columns for each head, got {size}"
            )
    check_offsets(op, offsets, query_offsets, q)


def check_offsets(op: str, offsets: Tensor, query_offsets: Tensor | None, q: Tensor) -> None:
    for name, given in (("offsets", offsets), ("query_offsets", query_offsets)):
        if given is None:
            continue
        if given.dim() != 1 or given.shape[0] == 0 or given.shape != offsets.shape:
            expected = "[B + 1]" if given is offsets else str(list(offsets.shape))
            raise refuse_shape(op, name, expected, given)
        check_integers(op, name, given, q)


def attention_arguments(
    op: str,
    q: Tensor,
    num_keys: int,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float | Tensor,
    alpha: float | None,
    mask: HSTUMask,
    bias: RelativeBias | None,
    dropout: float,
    dropout_seed: int | Tensor | None,
    autocast: torch.dtype | None,
) -> tuple[Any, ...]:
    """What kernels take after q, k and v, checked; of q only what it is like matters, not its values."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: expected dropout in [0, 1), got {dropout}")
    scale, row_scale = split_scale(op, scale, q)
    return (
        None if query_offsets is None else query_offsets.contiguous(),
        offsets.contiguous(),
        row_scale,
        per_sequence(op, "num_contextual", mask.num_contextual, offsets),
        per_sequence(op, "num_targets", mask.num_targets, offsets),
        checked_intervals(op, mask.intervals, q),
        *bias_tensors(op, bias, q, num_keys, autocast),
        seed_of(op, dropout, dropout_seed, q),
        scale,
        1 / math.sqrt(q.shape[2]) if alpha is None else float(alpha),
        mask.causal,
        mask.window or 0,
        mask.target_group_size,
        mask.full_window_tail,
        bias is None or bias.next_timestamps,
        float(dropout),
    )


def split_scale(op: str, scale: float | Tensor, q: Tensor) -> tuple[float, Tensor | None]:
    """The factor of all rows, and that of each."""
    if not isinstance(scale, Tensor):
        return float(scale), None
    if scale.shape != q.shape[:1]:
        raise refuse_shape(op, "scale", f"[{q.shape[0]}], if not a number", scale)
    if not scale.is_floating_point():
        raise TypeError(f"{op}: expected scale of a floating-point dtype, got {names_of([scale.dtype])}")
    if scale.requires_grad:
        raise ValueError(f"{op}: expected scale without a gradient, got requires_grad=True")
    check_device(op, "scale", scale, q)
    return 1.0, scale.to(accumulate_type(q.dtype)).contiguous()


def per_sequence(op: str, argument: str, value: int | Tensor | None, offsets: Tensor) -> Tensor | None:
    """A number for each sequence, [B]."""
    if value is None or (isinstance(value, int) and value == 0):
        return None
    num_sequences = offsets.shape[0] - 1
    if not isinstance(value, Tensor):
        return offsets.new_full((num_sequences,), value)
    if value.shape != (num_sequences,):
        raise refuse_shape(op, f"mask.{argument}", f"[{num_sequences}]", value)
    check_integers(op, f"mask.{argument}", value, offsets)
    return value.contiguous()


def checked_intervals(op: str, intervals: Tensor | None, q: Tensor) -> Tensor | None:
    if intervals is None:
        return None
    if intervals.dim() != 3 or intervals.shape[::2] != (q.shape[0], 2) or intervals.shape[1] == 0:
        raise refuse_shape(op, "mask.intervals", f"[{q.shape[0]}, R, 2] with R of at least 1", intervals)
    check_integers(op, "mask.intervals", intervals, q)
    return intervals.contiguous()


def bias_tensors(
    op: str, bias: RelativeBias | None, q: Tensor, num_keys: int | None, autocast: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The weights [1 or H, P] and [1 or H, T], timestamps [num_keys, if known], and boundaries of buckets."""
    if bias is None:
        return None, None, None, None
    position = weights_of(op, "position_weight", bias.position_weight, q, autocast)
    if position is not None and position.shape[1] % 2 == 0:
        raise ValueError(
            f"{op}: expected bias.position_weight with an odd number of distances, got {position.shape[1]}"
        )
    time = weights_of(op, "time_weight", bias.time_weight, q, autocast)
    if time is None or bias.timestamps is None:
        return position, None, None, None
    if bias.timestamps.dim() != 1 or num_keys not in (None, bias.timestamps.shape[0]):
        raise refuse_shape(op, "bias.timestamps", f"[{num_keys or 'tokens'}]", bias.timestamps)
    check_integers(op, "bias.timestamps", bias.timestamps, q)
    boundaries = boundaries_of(bias.bucketing, time.shape[1], q.device)
    if boundaries.shape != (time.shape[1] - 1,):
        raise refuse_shape(op, "bias.bucketing", f"[{time.shape[1] - 1}]", boundaries)
    check_device(op, "bias.bucketing", boundaries, q)
    return position, time, bias.timestamps.long().contiguous(), boundaries


def weights_of(
    op: str, argument: str, weight: Tensor | None, q: Tensor, autocast: torch.dtype | None
) -> Tensor | None:
    if weight is None:
        return None
    heads = q.shape[1]
    if (
        weight.dim() not in (1, 2)
        or (weight.dim() == 2 and weight.shape[0] != heads)
        or weight.shape[-1] == 0
    ):
        raise refuse_shape(op, f"bias.{argument}", f"[buckets] or [{heads}, buckets]", weight)
    if not weight.is_floating_point():
        raise TypeError(
            f"{op}: expected bias.{argument} of a floating-point dtype, got {names_of([weight.dtype])}"
        )
    check_device(op, f"bias.{argument}", weight, q)
    if autocast is not None:
        weight = cast(weight, autocast)
    weight = weight if weight.dim() == 2 else weight[None]
    return weight.to(accumulate_type(q.dtype)).contiguous()


def seed_of(op: str, dropout: float, seed: int | Tensor | None, q: Tensor) -> Tensor | None:
    if dropout == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if not isinstance(seed, Tensor):
        return torch.tensor([seed], dtype=torch.int64, device=q.device)
    if seed.shape != (1,):
        raise refuse_shape(op, "dropout_seed", "[1]", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: expected dropout_seed of dtype int64, got {names_of([seed.dtype])}")
    check_device(op, "dropout_seed", seed, q)
    return seed

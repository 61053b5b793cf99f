"""The public HSTU attention: validation, choice of a backend, dispatch."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from recsys_ops._library import names_of, register_kernels
from recsys_ops.backends import (
    Call,
    Implementation,
    Operator,
    choose_while_tracing,
    cuda_rejects,
    native_rejects,
    triton_rejects_device,
)
from recsys_ops.hstu_attention import autograd, reference
from recsys_ops.hstu_attention.autograd import FAKES, HSTUAttentionFunction
from recsys_ops.hstu_attention.bias import RelativeBias, boundaries_of
from recsys_ops.hstu_attention.masks import HSTUMask
from recsys_ops.hstu_attention.reference import accumulate_type

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
MAX_HEAD_DIM = 256


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | Tensor,
    alpha: float | None = None,
    mask: HSTUMask = HSTUMask(),  # noqa: B008  frozen
    bias: RelativeBias | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    query_offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of HSTU over jagged sequences: SiLU of each score in place of the softmax.

    For row i of a sequence, and each head, ``O_i = scale_i * sum_j silu(alpha * q_i . k_j + bias_ij) * v_j``
    over the keys j that ``mask`` lets it see (Zhai et al., "Actions Speak Louder than Words", 2024). Nothing
    of size [N, N] is made; a batch takes memory in proportion to its tokens.

    Args:
        q: [L, H, Dqk], the tokens of all sequences one after the other; fp32, fp16, bf16 or fp64, any
            strides (views of one packed projection). fp16 and bf16 accumulate in fp32.
        k: [L, H, Dqk], like q.
        v: [L, H, Dv], like q. Dqk and Dv are from 1 to 256.
        offsets: int32 or int64 [B + 1], where each sequence starts, the last being L.
        scale: the factor of each row, the 1/N of the papers: a number, or a tensor [L] (of the rows of q)
            without gradient. Choose it independent of the batch, and a user's output is, too.
        alpha: the factor of q . k; 1 / sqrt(Dqk) if None.
        mask: which keys a row sees, see ``HSTUMask``; causal by default.
        bias: added to each score, see ``RelativeBias``.
        dropout: the probability with which silu(...) is replaced by 0, else multiplied by
            1 / (1 - dropout). In [0, 1). What is dropped depends on the seed, the head, and the place of
            row and key only, not on the backend.
        dropout_seed: an int, or an int64 tensor [1] on the device of q. If None, drawn by PyTorch's
            generator of that device.
        query_offsets: where each sequence starts in q, if q has only the last tokens of each, at most as
            many as k: q is [M, H, Dqk], the output [M, H, Dv], and row i of m stands for token n - m + i.
        backend: a backend's name, or None to choose; see ``recsys_ops.explain``.

    Returns:
        [L, H, Dv], contiguous, in the dtype of q. A row that sees nothing is 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or combination is not as above.
        RuntimeError: offsets are not those of q or k, a sequence has fewer tokens than queries or
            targets, or the backend asked for cannot serve the call.

    Gradients reach q, k, v and the weights of the bias; they are summed in fp32, dq included, and are the
    same bits in every run, on the CPU for any number of threads.

    Example:
        >>> import torch, recsys_ops
        >>> q, k, v = torch.ones(3, 5, 1, 4).unbind()
        >>> recsys_ops.hstu_attention(q, k, v, torch.tensor([0, 2, 5]), scale=1.0)[:, 0, 0]
        tensor([1.7616, 3.5232, 1.7616, 3.5232, 5.2848])
    """
    autocast = autocast_dtype(q.device.type)
    if autocast is not None:
        q, k, v = (cast(t, autocast) for t in (q, k, v))
    _check_tensors(q, k, v, offsets, query_offsets)
    if query_offsets is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"hstu_attention: expected as many rows of q as of k, {k.shape[0]}, without query_offsets, "
            f"got {q.shape[0]}"
        )
    if query_offsets is not None:
        query_offsets = query_offsets.contiguous()
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"hstu_attention: expected dropout in [0, 1), got {dropout}")
    scale, row_scale = _split_scale(scale, q)
    arguments = (
        q,
        k,
        v,
        query_offsets,
        offsets.contiguous(),
        row_scale,
        _per_sequence("num_contextual", mask.num_contextual, offsets),
        _per_sequence("num_targets", mask.num_targets, offsets),
        _checked_intervals(mask.intervals, q),
        *_bias_tensors(bias, q, k, autocast),
        _seed(dropout, dropout_seed, q),
        scale,
        1 / math.sqrt(q.shape[2]) if alpha is None else float(alpha),
        mask.causal,
        mask.window or 0,
        mask.target_group_size,
        mask.full_window_tail,
        bias is None or bias.next_timestamps,
        float(dropout),
    )
    if torch.compiler.is_compiling():
        backend = choose_while_tracing("hstu_attention", backend, q.device.type, q.dtype)
    else:
        backend = OPERATOR.choose(Call(q.device.type, q.dtype), backend).backend
    return HSTUAttentionFunction.apply(*arguments, backend)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on a type of device, or None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _refuse_shape(argument: str, expected: str, tensor: Tensor) -> ValueError:
    return ValueError(f"hstu_attention: expected {argument} of shape {expected}, got {list(tensor.shape)}")


def _check_device(argument: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(
            f"hstu_attention: expected {argument} on the device of q, {q.device}, got {tensor.device}"
        )


def _check_integers(argument: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype not in _INTEGERS:
        raise TypeError(
            f"hstu_attention: expected {argument} of dtype {names_of(_INTEGERS)}, "
            f"got {names_of([tensor.dtype])}"
        )
    _check_device(argument, tensor, q)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, query_offsets: Tensor | None) -> None:
    if q.dim() != 3:
        raise _refuse_shape("q", "[L, H, Dqk]", q)
    if q.dtype not in _FLOATS:
        raise TypeError(f"hstu_attention: expected q of dtype {names_of(_FLOATS)}, got {names_of([q.dtype])}")
    if k.dim() != 3 or k.shape[1:] != q.shape[1:]:
        raise _refuse_shape("k", f"[L, {q.shape[1]}, {q.shape[2]}]", k)
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise _refuse_shape("v", f"[{k.shape[0]}, {q.shape[1]}, Dv]", v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"hstu_attention: expected {name} of the dtype of q, {names_of([q.dtype])}, "
                f"got {names_of([tensor.dtype])}"
            )
        _check_device(name, tensor, q)
    for name, size in (("q", q.shape[2]), ("v", v.shape[2])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"hstu_attention: expected {name} with 1 to {MAX_HEAD_DIM} columns for each head, got {size}"
            )
    for name, given in (("offsets", offsets), ("query_offsets", query_offsets)):
        if given is None:
            continue
        if given.dim() != 1 or given.shape[0] == 0 or given.shape != offsets.shape:
            expected = "[B + 1]" if given is offsets else str(list(offsets.shape))
            raise _refuse_shape(name, expected, given)
        _check_integers(name, given, q)


def _split_scale(scale: float | Tensor, q: Tensor) -> tuple[float, Tensor | None]:
    """The factor of all rows, and that of each."""
    if not isinstance(scale, Tensor):
        return float(scale), None
    if scale.shape != q.shape[:1]:
        raise _refuse_shape("scale", f"[{q.shape[0]}], if not a number", scale)
    if not scale.is_floating_point():
        raise TypeError(
            f"hstu_attention: expected scale of a floating-point dtype, got {names_of([scale.dtype])}"
        )
    if scale.requires_grad:
        raise ValueError("hstu_attention: expected scale without a gradient, got requires_grad=True")
    _check_device("scale", scale, q)
    return 1.0, scale.to(accumulate_type(q.dtype)).contiguous()


def _per_sequence(argument: str, value: int | Tensor | None, offsets: Tensor) -> Tensor | None:
    """A number for each sequence, [B]."""
    if value is None or (isinstance(value, int) and value == 0):
        return None
    num_sequences = offsets.shape[0] - 1
    if not isinstance(value, Tensor):
        return offsets.new_full((num_sequences,), value)
    if value.shape != (num_sequences,):
        raise _refuse_shape(f"mask.{argument}", f"[{num_sequences}]", value)
    _check_integers(f"mask.{argument}", value, offsets)
    return value.contiguous()


def _checked_intervals(intervals: Tensor | None, q: Tensor) -> Tensor | None:
    if intervals is None:
        return None
    if intervals.dim() != 3 or intervals.shape[0] != q.shape[0] or intervals.shape[2] != 2:
        raise _refuse_shape("mask.intervals", f"[{q.shape[0]}, R, 2]", intervals)
    _check_integers("mask.intervals", intervals, q)
    return intervals.contiguous()


def _bias_tensors(
    bias: RelativeBias | None, q: Tensor, k: Tensor, autocast: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The weights [1 or H, P] and [1 or H, T], timestamps, and boundaries of buckets."""
    if bias is None:
        return None, None, None, None
    position = _weights("position_weight", bias.position_weight, q, autocast)
    if position is not None and position.shape[1] % 2 == 0:
        raise ValueError(
            "hstu_attention: expected bias.position_weight with an odd number of distances, "
            f"got {position.shape[1]}"
        )
    time = _weights("time_weight", bias.time_weight, q, autocast)
    if time is None or bias.timestamps is None:
        return position, None, None, None
    if bias.timestamps.shape != k.shape[:1]:
        raise _refuse_shape("bias.timestamps", f"[{k.shape[0]}]", bias.timestamps)
    _check_integers("bias.timestamps", bias.timestamps, q)
    boundaries = boundaries_of(bias.bucketing, time.shape[1], q.device)
    if boundaries.shape != (time.shape[1] - 1,):
        raise _refuse_shape("bias.bucketing", f"[{time.shape[1] - 1}]", boundaries)
    _check_device("bias.bucketing", boundaries, q)
    return position, time, bias.timestamps.long().contiguous(), boundaries


def _weights(argument: str, weight: Tensor | None, q: Tensor, autocast: torch.dtype | None) -> Tensor | None:
    if weight is None:
        return None
    heads = q.shape[1]
    if (
        weight.dim() not in (1, 2)
        or (weight.dim() == 2 and weight.shape[0] != heads)
        or weight.shape[-1] == 0
    ):
        raise _refuse_shape(f"bias.{argument}", f"[buckets] or [{heads}, buckets]", weight)
    if not weight.is_floating_point():
        raise TypeError(
            f"hstu_attention: expected bias.{argument} of a floating-point dtype, "
            f"got {names_of([weight.dtype])}"
        )
    _check_device(f"bias.{argument}", weight, q)
    if autocast is not None:
        weight = cast(weight, autocast)
    weight = weight if weight.dim() == 2 else weight[None]
    return weight.to(accumulate_type(q.dtype)).contiguous()


def _seed(dropout: float, seed: int | Tensor | None, q: Tensor) -> Tensor | None:
    if dropout == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if not isinstance(seed, Tensor):
        return torch.tensor([seed], dtype=torch.int64, device=q.device)
    if seed.shape != (1,):
        raise _refuse_shape("dropout_seed", "[1]", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"hstu_attention: expected dropout_seed of dtype int64, got {names_of([seed.dtype])}")
    _check_device("dropout_seed", seed, q)
    return seed


def _describe(q: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(q.device.type, q.dtype)


def _triton_rejects(call: Call) -> str | None:
    return triton_rejects_device(call.device)


OPERATOR = Operator(
    "hstu_attention",
    [
        Implementation("reference", lambda: reference, lambda call: None),
        Implementation("native", lambda: autograd.KERNELS["native"], native_rejects("q is")),
        Implementation("cuda", lambda: autograd.KERNELS["cuda"], cuda_rejects("q is")),
        Implementation(
            "triton",
            lambda: importlib.import_module("recsys_ops.triton_kernels.hstu_attention"),
            _triton_rejects,
        ),
    ],
    _describe,
)

for _backend, _implementation in OPERATOR.implementations.items():
    _kernels = register_kernels(
        _implementation, [getattr(reference, name) for name in FAKES], FAKES, reference.MUTATES
    )
    if _kernels is not None:
        autograd.KERNELS[_backend] = _kernels

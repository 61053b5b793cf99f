"""A call of an HSTU layer: checks, dtypes, and which rows get an output."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from recsys_ops._arguments import refuse_shape
from recsys_ops._library import names_of
from recsys_ops.hstu_attention.api import choose
from recsys_ops.hstu_attention.arguments import (
    FLOATS,
    attention_arguments,
    autocast_dtype,
    cast,
    check_integers,
    check_offsets,
)
from recsys_ops.hstu_attention.bias import RelativeBias
from recsys_ops.hstu_attention.layer_autograd import (
    ATTENTION_TENSORS,
    HSTULayerFunction,
    LayerConfig,
    LayerWeights,
)
from recsys_ops.hstu_attention.masks import HSTUMask
from recsys_ops.jagged import jagged_concat, jagged_last_rows, jagged_split

NAME = "HSTULayer"


def layer_config(
    variant: str,
    *,
    num_heads: int,
    linear_hidden_dim: int,
    attention_dim: int,
    concat_ua: bool,
    group_norm: bool,
    eps: float,
    output_dropout: float,
    recompute: tuple[str, ...],
) -> LayerConfig:
    """What a variant computes."""
    is_stu = variant == "stu"
    return LayerConfig(
        num_heads,
        linear_hidden_dim,
        attention_dim,
        "u" if is_stu else "uvqk",
        "attention" if is_stu else "normed_attention" if concat_ua else None,
        group_norm,
        eps,
        output_dropout,
        recompute,
    )


def hstu_layer(
    x: Tensor,
    offsets: Tensor,
    weights: LayerWeights,
    config: LayerConfig,
    *,
    scale: float | Tensor,
    alpha: float | None,
    mask: HSTUMask,
    bias: RelativeBias | None,
    attention_dropout: float = 0.0,
    targets_only: bool = False,
    total_targets: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """What ``HSTULayer`` computes, for weights of any floating-point dtype, which follow x or autocast."""
    if x.dim() != 2 or x.shape[1] != weights.uvqk_weight.shape[0]:
        raise refuse_shape(NAME, "x", f"[L, {weights.uvqk_weight.shape[0]}]", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{NAME}: expected x of dtype {names_of(FLOATS)}, got {names_of([x.dtype])}")
    if x.device != weights.uvqk_weight.device:
        raise ValueError(f"{NAME}: expected x on {weights.uvqk_weight.device}, got {x.device}")
    check_offsets(NAME, offsets, None, x)
    autocast = autocast_dtype(x.device.type)
    dtype = x.dtype if autocast is None else cast(x[:0], autocast).dtype
    rows = query_offsets = None
    if targets_only:
        if mask.num_targets is None:
            raise ValueError(f"{NAME}: expected mask.num_targets with targets_only=True, got None")
        rows, query_offsets = jagged_last_rows(offsets, mask.num_targets, total=total_targets)
        if isinstance(scale, Tensor):
            _check_rows("scale", scale, x)
            scale = scale[rows]
        if mask.intervals is not None:
            _check_rows("mask.intervals", mask.intervals, x)
            mask = dataclasses.replace(mask, intervals=mask.intervals[rows])
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    # No q exists yet: this is like it, and has one element.
    q = x.new_empty(1, dtype=dtype).expand(num_rows, config.num_heads, config.attention_dim)
    attention = attention_arguments(
        NAME,
        q,
        x.shape[0],
        offsets,
        query_offsets,
        scale,
        alpha,
        mask,
        bias,
        attention_dropout,
        None,
        autocast,
    )
    count = len(ATTENTION_TENSORS)
    arguments = (rows, x, *_in_dtype(weights, x, dtype, config), *attention[:count])
    # All is in the dtype that it shall have.
    off = contextlib.nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False)
    with off:
        return HSTULayerFunction.apply(config, attention[count:], choose(q, backend), *arguments)


def with_requests(
    x: Tensor,
    offsets: Tensor,
    timestamps: Tensor | None,
    request_timestamps: Tensor,
    mask: HSTUMask,
    scale: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append to each sequence a token that nothing sees, whose time is that of the request."""
    batch = len(offsets) - 1
    if request_timestamps.shape != (batch,):
        raise refuse_shape(NAME, "request_timestamps", f"[{batch}]", request_timestamps)
    check_integers(NAME, "request_timestamps", request_timestamps, x)
    if timestamps is None:
        raise ValueError(f"{NAME}: expected timestamps with request_timestamps, got None")
    given = (mask.num_contextual, mask.num_targets, mask.intervals)
    if not mask.causal or any(g is not None for g in given) or isinstance(scale, Tensor):
        raise ValueError(
            f"{NAME}: expected a causal mask without prefix, targets or intervals, and a number as scale, "
            f"with request_timestamps, got {mask} and scale={scale}"
        )
    ends = torch.arange(batch + 1, device=offsets.device, dtype=offsets.dtype)
    times, longer = jagged_concat(timestamps, offsets, request_timestamps.to(timestamps.dtype), ends)
    return jagged_concat(x, offsets, x.new_zeros(batch, x.shape[1]), ends)[0], longer, times


def without_requests(output: Tensor, longer: Tensor, offsets: Tensor) -> Tensor:
    """Undo ``with_requests``."""
    return jagged_split(output, longer, offsets, total=output.shape[0] - len(offsets) + 1)[0]


def norm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights of a norm: on the CPU its statistics are kept in that, too."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


def _in_dtype(weights: LayerWeights, x: Tensor, dtype: torch.dtype, config: LayerConfig) -> LayerWeights:
    def norm(weight: Tensor | None, bias: Tensor | None, normed: torch.dtype, size: int) -> tuple[Any, Any]:
        wanted = norm_dtype(x.device, normed)
        if weight is None:
            return (None if wanted == normed else x.new_ones(size, dtype=wanted)), None
        return weight.to(wanted), None if bias is None else bias.to(wanted)

    def product(weight: Tensor | None) -> Any:
        return None if weight is None else weight.to(dtype)

    input_norm = norm(weights.input_norm_weight, weights.input_norm_bias, x.dtype, x.shape[1])
    output_norm = norm(weights.output_norm_weight, weights.output_norm_bias, dtype, config.hidden)
    return LayerWeights(
        *input_norm,
        product(weights.uvqk_weight),
        product(weights.uvqk_bias),
        *output_norm,
        product(weights.output_weight),
        product(weights.output_bias),
    )


def _check_rows(argument: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dim() == 0 or tensor.shape[0] != x.shape[0]:
        raise refuse_shape(NAME, argument, f"[{x.shape[0]}, ...]", tensor)

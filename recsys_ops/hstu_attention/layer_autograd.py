"""A whole HSTU layer as one differentiable function: what its backward keeps, redoes and writes where."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys_ops.hstu_attention import reference
from recsys_ops.hstu_attention.autograd import KERNELS

RECOMPUTABLE = ("normed_x", "uvqk", "y")

_aten = torch.ops.aten
_NAMES = tuple(inspect.signature(reference.hstu_attention_forward).parameters)
# The tensors that kernels take after q, k and v; the rest are options.
ATTENTION_TENSORS = _NAMES[3 : _NAMES.index("scale")]


class LayerConfig(NamedTuple):
    """What a layer computes, besides its weights.

    ``activated`` is what SiLU is applied to, ``"u"`` or ``"uvqk"``. ``concat`` is what the output
    projection reads besides U * norm(A): U and A with ``"attention"``, U and norm(A) with
    ``"normed_attention"``, nothing with None. ``recompute`` names what the backward computes
    again instead of keeping it.
    """

    num_heads: int
    linear_hidden_dim: int
    attention_dim: int
    activated: str
    concat: str | None
    group_norm: bool
    eps: float
    output_dropout: float
    recompute: tuple[str, ...]

    @property
    def hidden(self) -> int:
        """Columns of U, V and A."""
        return self.num_heads * self.linear_hidden_dim

    @property
    def widths(self) -> list[int]:
        """Columns of U, V, Q and K."""
        attention = self.num_heads * self.attention_dim
        return [self.hidden, self.hidden, attention, attention]


class LayerWeights(NamedTuple):
    """The weights of a layer: in the dtype of its products, those of norms in what statistics are kept in."""

    input_norm_weight: Tensor | None  # [E]
    input_norm_bias: Tensor | None  # [E]
    uvqk_weight: Tensor  # [E, 2H(Dv + Dqk)], the columns of U, V, Q and K, each head after head
    uvqk_bias: Tensor | None  # [2H(Dv + Dqk)]
    output_norm_weight: Tensor | None  # [H * Dv], or [H] of groups
    output_norm_bias: Tensor | None  # likewise
    output_weight: Tensor  # [H * Dv, or three times that, E]
    output_bias: Tensor | None  # [E]


class _Kept(NamedTuple):
    """What a forward keeps for the backward; None where that is computed again."""

    attended: Tensor  # [M, H * Dv]
    survivors: Tensor | None  # of dropout, bool like y
    normed_x: Tensor | None
    x_mean: Tensor | None
    x_rstd: Tensor | None
    y: Tensor | None  # what the output projection reads
    normed_attended: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    packed: Tensor | None  # U, V, Q and K; or those of which each row has its own, U and Q
    packed_vk: Tensor | None


class HSTULayerFunction(torch.autograd.Function):
    """``x + dropout([U, A,] U * norm(A)) @ W_output``, where A is the attention of ``norm(x) @ W_uvqk``.

    With ``rows``, int64 [M], only these rows of x get an output, [M, E]: they are the queries of the
    attention, whose ``query_offsets`` say where each sequence starts among them. ``tensors`` are
    ``LayerWeights`` and then ``ATTENTION_TENSORS``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: LayerConfig,
        options: tuple[Any, ...],
        backend: str,
        rows: Tensor | None,
        x: Tensor,
        *tensors: Any,
    ) -> Tensor:
        weights = LayerWeights(*tensors[: len(LayerWeights._fields)])
        attention = tensors[len(LayerWeights._fields) :]
        normed_x = _input_norm(x, weights, config)
        packed = _project(normed_x[0], rows, weights, config)
        raw_u, v, q, k = _parts(_activated(packed, config), config)
        attended = KERNELS[backend].hstu_attention_forward(q, k, v, *attention, *options).flatten(1)
        y, _, normed = _gate(raw_u, attended, weights, config)
        survivors = None
        if config.output_dropout:
            y, survivors = torch.native_dropout(y, config.output_dropout, True)
        kept = _Kept(
            attended,
            survivors,
            *((None,) * 3 if "normed_x" in config.recompute else normed_x),
            *((None,) * 4 if "y" in config.recompute else (y, *normed)),
            *((None,) * 2 if "uvqk" in config.recompute else (*packed, None)[:2]),
        )
        ctx.save_for_backward(rows, x, *tensors, *kept)
        ctx.config, ctx.options, ctx.backend = config, options, backend
        return _add_output(x if rows is None else x[rows], y, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        config: LayerConfig = ctx.config
        num_weights, num_kept = len(LayerWeights._fields), len(_Kept._fields)
        rows, x, *saved = ctx.saved_tensors
        weights = LayerWeights(*saved[:num_weights])
        attention = saved[num_weights:-num_kept]
        kept = _Kept(*saved[-num_kept:])
        needed = LayerWeights(*ctx.needs_input_grad[5 : 5 + num_weights])

        normed_x = None if kept.normed_x is None else (kept.normed_x, kept.x_mean, kept.x_rstd)
        packed = [part for part in (kept.packed, kept.packed_vk) if part is not None]
        if not packed:
            normed_x = normed_x or _input_norm(x, weights, config)
            packed = _project(normed_x[0], rows, weights, config)
        raw_u, v, q, k = _parts(_activated(packed, config), config)
        grad_packed = [torch.empty_like(part) for part in packed]
        grad_u, grad_v, grad_q, grad_k = _parts(grad_packed, config)

        grad_output = grads[0].to(weights.output_weight.dtype)
        grad_attended, *grads_output = _output_backward(
            grad_output, grad_u, raw_u, kept, weights, needed, config
        )
        if config.activated == "u":
            _write(grad_u, _aten.silu_backward, grad_u, raw_u)
        grads_bias = KERNELS[ctx.backend].hstu_attention_backward(
            grad_q, grad_k, grad_v, grad_attended.unflatten(1, v.shape[1:]), q, k, v, *attention, *ctx.options
        )
        if config.activated == "uvqk":
            for grad, part in zip(grad_packed, packed, strict=True):
                _write(grad, _aten.silu_backward, grad, part)

        normed_x = normed_x or _input_norm(x, weights, config)
        grad_x, *grads_input = _input_backward(grad_packed, normed_x, rows, x, weights, needed, config)
        if rows is None:
            grad_x.add_(grads[0])
        else:
            grad_x.index_add_(0, rows, grads[0])
        of_bias = dict(zip(("position_weight", "time_weight"), grads_bias, strict=True))
        grads_attention = [
            None if tensor is None else of_bias.get(name)
            for name, tensor in zip(ATTENTION_TENSORS, attention, strict=True)
        ]
        return None, None, None, None, grad_x, *grads_input, *grads_output, *grads_attention


def _input_norm(x: Tensor, weights: LayerWeights, config: LayerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) in the dtype of the products, mean and 1 / standard deviation."""
    normed, mean, rstd = torch.native_layer_norm(
        x, x.shape[1:], weights.input_norm_weight, weights.input_norm_bias, config.eps
    )
    return normed.to(weights.uvqk_weight.dtype), mean, rstd


def _project(normed: Tensor, rows: Tensor | None, weights: LayerWeights, config: LayerConfig) -> list[Tensor]:
    """U, V, Q and K of all rows side by side; or U and Q of ``rows``, and V and K of all."""
    weight, bias = weights.uvqk_weight, weights.uvqk_bias
    if rows is None:
        return [_linear(normed, weight, bias)]
    biases = (None, None) if bias is None else _halves(bias, config)
    inputs = (normed[rows], normed)
    return [_linear(*each) for each in zip(inputs, _halves(weight, config), biases, strict=True)]


def _input_backward(
    grads: list[Tensor],
    normed_x: tuple[Tensor, Any, Any],
    rows: Tensor | None,
    x: Tensor,
    weights: LayerWeights,
    needed: LayerWeights,
    config: LayerConfig,
) -> list[Tensor | Any]:
    """The gradients of x, and of the weights of the input's norm and projection."""
    normed, mean, rstd = normed_x
    grad_weight = grad_bias = None
    if needed.uvqk_bias:
        sums = [grad.sum(0) for grad in grads]
        grad_bias = sums[0] if rows is None else _whole(sums[0], sums[1], config)
    if rows is None:
        grad_normed = grads[0] @ weights.uvqk_weight.t()
        if needed.uvqk_weight:
            grad_weight = normed.t() @ grads[0]
    else:
        weight_uq, weight_vk = _halves(weights.uvqk_weight, config)
        grad_normed = (grads[1] @ weight_vk.t()).index_add_(0, rows, grads[0] @ weight_uq.t())
        if needed.uvqk_weight:
            grad_weight = _whole(normed[rows].t() @ grads[0], normed.t() @ grads[1], config)
    grad_x, grad_norm_weight, grad_norm_bias = _aten.native_layer_norm_backward(
        grad_normed.to(x.dtype),
        x,
        x.shape[1:],
        mean,
        rstd,
        weights.input_norm_weight,
        weights.input_norm_bias,
        [True, needed.input_norm_weight, needed.input_norm_bias],
    )
    return [grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias]


def _halves(columns: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Of the columns of U, V, Q and K those of U and Q, and those of V and K."""
    u, v, q, k = columns.split(config.widths, -1)
    return torch.cat([u, q], -1), torch.cat([v, k], -1)


def _whole(columns_uq: Tensor, columns_vk: Tensor, config: LayerConfig) -> Tensor:
    """Undoes ``_halves``."""
    (u, q), (v, k) = (columns.split(config.widths[1:3], -1) for columns in (columns_uq, columns_vk))
    return torch.cat([u, v, q, k], -1)


def _activated(packed: list[Tensor], config: LayerConfig) -> list[Tensor]:
    return packed if config.activated == "u" else [torch.nn.functional.silu(part) for part in packed]


def _parts(packed: Sequence[Tensor], config: LayerConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [M, H * Dv], V [L, H, Dv], Q [M, H, Dqk] and K [L, H, Dqk], views of what ``_project`` gives."""
    if len(packed) == 1:
        u, v, q, k = packed[0].split(config.widths, 1)
    else:
        (u, q), (v, k) = (part.split(config.widths[1:3], 1) for part in packed)
    v, q, k = (part.unflatten(1, (config.num_heads, -1)) for part in (v, q, k))
    return u, v, q, k


def _gate(
    raw_u: Tensor, attended: Tensor, weights: LayerWeights, config: LayerConfig
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What the output projection reads, before dropout; U; and norm(A) with its statistics."""
    normed = _output_norm(attended, weights, config)
    middle = attended if config.concat == "attention" else normed[0]
    if config.concat is None or torch.compiler.is_compiling():
        u = _activated_u(raw_u, config)
        product = u * normed[0]
        return product if config.concat is None else torch.cat([u, middle, product], 1), u, normed
    y = raw_u.new_empty(len(raw_u), 3 * config.hidden)
    u, beside, product = y.split(config.hidden, 1)
    if config.activated == "u":
        _write(u, _aten.silu, raw_u)
    else:
        u.copy_(raw_u)
    beside.copy_(middle)
    _write(product, _aten.mul, u, normed[0])
    return y, u, normed


def _activated_u(raw_u: Tensor, config: LayerConfig) -> Tensor:
    return torch.nn.functional.silu(raw_u) if config.activated == "u" else raw_u


def _output_backward(
    grad_output: Tensor,
    grad_u: Tensor,
    raw_u: Tensor,
    kept: _Kept,
    weights: LayerWeights,
    needed: LayerWeights,
    config: LayerConfig,
) -> list[Tensor | Any]:
    """The gradients of A and of the weights of the output's norm and projection; writes that of U."""
    attended, y, keeps = kept.attended, kept.y, 1 / (1 - config.output_dropout)
    normed: Any = (kept.normed_attended, kept.mean, kept.rstd)
    if y is not None:
        u = _activated_u(raw_u, config)
    else:
        y, u, normed = _gate(raw_u, attended, weights, config)
        if kept.survivors is not None:
            y = _aten.native_dropout_backward(y, kept.survivors, keeps)
    grad_weight = y.t() @ grad_output if needed.output_weight else None
    grad_bias = grad_output.sum(0) if needed.output_bias else None
    del y
    grad_y = grad_output @ weights.output_weight.t()
    if kept.survivors is not None:
        grad_y = _aten.native_dropout_backward(grad_y, kept.survivors, keeps)
    *beside, grad_product = grad_y.split(config.hidden, 1)
    grad_normed = grad_product * u
    if beside:
        _write(grad_u, _aten.addcmul, beside[0], grad_product, normed[0])
    else:
        _write(grad_u, _aten.mul, grad_product, normed[0])
    if config.concat == "normed_attention":
        grad_normed.add_(beside[1])
    grad_attended, *grads_norm = _output_norm_backward(grad_normed, attended, normed, weights, needed, config)
    if config.concat == "attention":
        grad_attended.add_(beside[1])
    return [grad_attended, *grads_norm, grad_weight, grad_bias]


def _output_norm(
    attended: Tensor, weights: LayerWeights, config: LayerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(A) [M, H * Dv], mean and 1 / standard deviation, of all heads or of each."""
    weight, bias = weights.output_norm_weight, weights.output_norm_bias
    if not config.group_norm:
        return torch.native_layer_norm(attended, attended.shape[1:], weight, bias, config.eps)
    heads, dim = config.num_heads, config.linear_hidden_dim
    rows = attended.shape[0]
    normed, mean, rstd = torch.native_group_norm(
        attended.view(rows, heads, dim), weight, bias, rows, heads, dim, heads, config.eps
    )
    return normed.flatten(1), mean, rstd


def _output_norm_backward(
    grad: Tensor,
    attended: Tensor,
    normed: tuple[Any, Tensor, Tensor],
    weights: LayerWeights,
    needed: LayerWeights,
    config: LayerConfig,
) -> Any:
    _, mean, rstd = normed
    weight, bias = weights.output_norm_weight, weights.output_norm_bias
    mask = [True, needed.output_norm_weight, needed.output_norm_bias]
    if not config.group_norm:
        return _aten.native_layer_norm_backward(
            grad, attended, attended.shape[1:], mean, rstd, weight, bias, mask
        )
    heads, dim = config.num_heads, config.linear_hidden_dim
    rows = attended.shape[0]
    grad_attended, *grads = _aten.native_group_norm_backward(
        grad.view(rows, heads, dim),
        attended.view(rows, heads, dim),
        mean,
        rstd,
        weight,
        rows,
        heads,
        dim,
        heads,
        mask,
    )
    return grad_attended.flatten(1), *grads


def _write(out: Tensor, function: Any, *arguments: Tensor) -> None:
    """Let a function write its result to a view; a compiler refuses that, and fuses the copy."""
    if torch.compiler.is_compiling():
        out.copy_(function(*arguments))
    else:
        function(*arguments, **{"grad_input" if function is _aten.silu_backward else "out": out})


def _add_output(x: Tensor, y: Tensor, weights: LayerWeights) -> Tensor:
    """x + y @ W_output + b_output, in the dtype of x."""
    if x.dtype != y.dtype:
        return x + _linear(y, weights.output_weight, weights.output_bias)
    output = torch.addmm(x, y, weights.output_weight)
    return output if weights.output_bias is None else output.add_(weights.output_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)

"""Gradients and fake kernels of HSTU attention, the same for every backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys_ops._library import LIBRARY
from recsys_ops.hstu_attention import reference
from recsys_ops.hstu_attention.reference import accumulate_type

# The registered kernels of each backend, filled by api.py.
KERNELS: dict[str, SimpleNamespace] = {}

_NAMES = tuple(inspect.signature(reference.hstu_attention_forward).parameters)
_SAVED = _NAMES[: _NAMES.index("scale")]  # the tensors
_DIFFERENTIABLE = ("q", "k", "v", "position_weight", "time_weight")


def _attend(
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
    backend: str,
) -> Tensor:
    return KERNELS[backend].hstu_attention_forward(
        q,
        k,
        v,
        query_offsets,
        offsets,
        row_scale,
        num_contextual,
        num_targets,
        intervals,
        position_weight,
        time_weight,
        timestamps,
        boundaries,
        dropout_seed,
        scale,
        alpha,
        causal,
        window,
        target_group_size,
        full_window_tail,
        next_timestamps,
        dropout,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(_SAVED)])
    ctx.options = inputs[len(_SAVED) :]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors, (*options, backend) = ctx.saved_tensors, ctx.options
    gradients = dict(zip(_DIFFERENTIABLE, backward(backend, grad_output, *tensors, *options), strict=True))
    needed = ctx.needs_input_grad
    return tuple(
        gradients[name] if name in gradients and needed[i] else None
        for i, name in enumerate((*_NAMES, "backend"))
    )


def backward(backend: str, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and the weights of the bias, for the arguments of the forward."""
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in arguments[:3]]
    bias = KERNELS[backend].hstu_attention_backward(*grads, grad_output, *arguments)
    return *grads, *bias


class HSTUAttentionFunction(torch.autograd.Function):
    """The differentiable attention that ``recsys_ops.hstu_attention`` calls, torch.func included."""

    forward = staticmethod(_attend)
    setup_context = staticmethod(_setup)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _backward(ctx, *grad_outputs)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _fake_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights = (rest[_NAMES.index(name) + 1] for name in ("position_weight", "time_weight"))
    dtype = accumulate_type(grad_q.dtype)
    position, time = (grad_q.new_empty((0, 0) if w is None else w.shape, dtype=dtype) for w in weights)
    return position, time


FAKES: dict[str, Callable[..., Any]] = {
    "hstu_attention_forward": _fake_forward,
    "hstu_attention_backward": _fake_backward,
    "hstu_attention_cached_forward": _fake_forward,
}

# The attention as one differentiable operator, for callers of torch.ops. Its arguments are those of
# the kernels, checked.
LIBRARY.define("hstu_attention" + torch.library.infer_schema(_attend, mutates_args=()))
LIBRARY.impl("hstu_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("recsys_ops::hstu_attention", _attend)
torch.library.register_autograd("recsys_ops::hstu_attention", _backward, setup_context=_setup)

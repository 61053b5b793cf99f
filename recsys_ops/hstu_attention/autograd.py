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
from recsys_ops.embedding_bag.reference import accumulate_type
from recsys_ops.hstu_attention import reference

# The registered kernels of each backend, filled by api.py.
KERNELS: dict[str, SimpleNamespace] = {}

_NAMES = tuple(inspect.signature(reference.hstu_attention_forward).parameters)
_SAVED = _NAMES[: _NAMES.index("scale")]  # the tensors
_DIFFERENTIABLE = ("q", "k", "v", "position_weight", "time_weight")


def _attend(*arguments: Any) -> Tensor:
    """What the kernel of the backend computes that is named after the kernel's own arguments."""
    *given, backend = arguments
    output: Tensor = KERNELS[backend].hstu_attention_forward(*given)
    return output


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
_SCHEMA = torch.library.infer_schema(reference.hstu_attention_forward, mutates_args=())
LIBRARY.define("hstu_attention" + _SCHEMA.replace(") ->", ", str backend) ->"))
LIBRARY.impl("hstu_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("recsys_ops::hstu_attention", _attend)
torch.library.register_autograd("recsys_ops::hstu_attention", _backward, setup_context=_setup)

"""Gradients and fake kernels of the embedding bag, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys_ops._library import LIBRARY

# The registered kernels of each backend, filled by api.py.
KERNELS: dict[str, SimpleNamespace] = {}


class EmbeddingBagFunction(torch.autograd.Function):
    """The differentiable lookup that ``recsys_ops.embedding_bag`` calls.

    ``options`` are the arguments of the registered ``embedding_bag`` from ``mode`` on;
    ``computed`` holds the output where it is there already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        indices: Tensor,
        offsets: Tensor,
        options: tuple[Any, ...],
        computed: tuple[Tensor, ...] = (),
    ) -> Tensor:
        if computed:
            output, argmax = computed[0], None
        else:
            output, argmax = lookup(weight, indices, offsets, per_sample_weights, *options)
        _save(ctx, weight, indices, offsets, per_sample_weights, argmax, options)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needs_weight, needs_per_sample_weights, *rest = ctx.needs_input_grad
        gradients = _gradients(ctx, grad_output, needs_weight, needs_per_sample_weights)
        return *gradients, *(None for _ in rest)


# ``apply`` without its look for torch.func, which has been done; it is a third of a small call.
apply_eagerly = super(torch.autograd.Function, EmbeddingBagFunction).apply


def lookup(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The pooled rows, and for the maximum where they came from, without gradients."""
    kernels = KERNELS[backend]
    if mode == "max":
        return kernels.embedding_bag_max_forward(
            weight, indices, offsets, padding_idx, include_last_offset, drop_invalid
        )
    return kernels.embedding_bag_forward(
        weight,
        indices,
        offsets,
        per_sample_weights,
        mode == "mean",
        padding_idx,
        include_last_offset,
        drop_invalid,
    ), None


def _save(
    ctx: Any,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    options: tuple[Any, ...],
) -> None:
    # The weight's values only matter to the gradient of the per-sample weights;
    # not saving it otherwise lets an optimizer update it before the backward.
    weighted = per_sample_weights is not None and per_sample_weights.requires_grad
    ctx.save_for_backward(weight if weighted else None, indices, offsets, per_sample_weights, argmax)
    ctx.num_embeddings = weight.shape[0]
    ctx.options = options


def _gradients(
    ctx: Any, grad_output: Tensor, needs_weight: bool, needs_per_sample_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    weight, indices, offsets, per_sample_weights, argmax = ctx.saved_tensors
    mode, *bags, scale_grad_by_freq, sparse, backend = ctx.options
    kernels, mean = KERNELS[backend], mode == "mean"
    grad_output = grad_output.contiguous()
    grad_weight = grad_per_sample_weights = None
    if needs_weight and sparse:
        rows, values = kernels.embedding_bag_backward_sparse(
            grad_output,
            indices,
            offsets,
            per_sample_weights,
            ctx.num_embeddings,
            mean,
            *bags,
            scale_grad_by_freq,
        )
        grad_weight = coalesced(rows, values, ctx.num_embeddings)
        keep_coalesced(ctx.next_functions[0][0], grad_weight)
    elif needs_weight:
        grad_weight = kernels.embedding_bag_backward(
            grad_output,
            indices,
            offsets,
            per_sample_weights,
            argmax,
            ctx.num_embeddings,
            mean,
            *bags,
            scale_grad_by_freq,
        )
    if needs_per_sample_weights:
        grad_per_sample_weights = kernels.embedding_bag_backward_per_sample_weights(
            grad_output, weight, indices, offsets, mean, *bags
        )
    return grad_weight, grad_per_sample_weights


def coalesced(rows: Tensor, values: Tensor, num_embeddings: int) -> Tensor:
    shape = (num_embeddings, values.shape[1])
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


def keep_coalesced(receiver: Any, gradient: Tensor) -> None:
    """Lets a leaf's ``grad`` be coalesced as the ``gradient`` that the leaf is about to receive.

    AccumulateGrad takes over the memory of a gradient that nobody else holds, and forgets that it
    is coalesced, which is said again at the end of the backward pass. It copies one that is held:
    dearer, but what the leaf's own hooks see is coalesced at once.
    """
    leaf = getattr(receiver, "variable", None)
    if leaf is None:
        return
    at_end = torch.autograd.Variable._execution_engine.queue_callback
    if leaf._post_accumulate_grad_hooks:
        at_end([gradient].clear)
        return
    # Of the same memory, so that no other gradient can be at its address before the end.
    same_values = gradient._values().detach()

    def restore() -> None:
        grad = leaf.grad
        if grad is not None and grad.is_sparse and grad._values().data_ptr() == same_values.data_ptr():
            grad._coalesced_(True)

    at_end(restore)


def _fake_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> Tensor:
    return weight.new_empty(offsets.shape[0] - int(include_last_offset), weight.shape[1])


def _fake_max_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> tuple[Tensor, Tensor]:
    output = weight.new_empty(offsets.shape[0] - int(include_last_offset), weight.shape[1])
    return output, torch.empty_like(output, dtype=torch.int32)


def _fake_backward(
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    num_embeddings: int,
    *options: Any,
) -> Tensor:
    return grad_output.new_empty(num_embeddings, grad_output.shape[1])


def _fake_backward_sparse(grad_output: Tensor, indices: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    return (
        indices.new_empty(touched, dtype=torch.int64),
        grad_output.new_empty(touched, grad_output.shape[1]),
    )


def _fake_backward_per_sample_weights(
    grad_output: Tensor, weight: Tensor, indices: Tensor, *options: Any
) -> Tensor:
    return weight.new_empty(indices.shape[0])


FAKES: dict[str, Callable[..., Any]] = {
    "embedding_bag_forward": _fake_forward,
    "embedding_bag_max_forward": _fake_max_forward,
    "embedding_bag_backward": _fake_backward,
    "embedding_bag_backward_sparse": _fake_backward_sparse,
    "embedding_bag_backward_per_sample_weights": _fake_backward_per_sample_weights,
}


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    output, argmax = lookup(
        weight,
        indices,
        offsets,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        drop_invalid,
        scale_grad_by_freq,
        sparse,
        backend,
    )
    return output, indices.new_empty(0, dtype=torch.int32) if argmax is None else argmax


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, indices, offsets, per_sample_weights, *options = inputs
    ctx.mark_non_differentiable(output[1])
    argmax = output[1] if options[0] == "max" else None
    _save(ctx, weight, indices, offsets, per_sample_weights, argmax, tuple(options))


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> Any:
    needs_weight, _, _, needs_per_sample_weights, *rest = ctx.needs_input_grad
    weight, per_sample_weights = _gradients(ctx, grad_output, needs_weight, needs_per_sample_weights)
    return weight, None, None, per_sample_weights, *(None for _ in rest)


class TransformableEmbeddingBag(torch.autograd.Function):
    """The differentiable lookup for torch.func, in the form that it asks for."""

    forward = staticmethod(_embedding_bag)
    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


# The lookup as one differentiable operator, for callers of torch.ops. Its arguments are those of
# the kernels, checked.
LIBRARY.define("embedding_bag" + torch.library.infer_schema(_embedding_bag, mutates_args=()))
LIBRARY.impl("embedding_bag", _embedding_bag, "CompositeExplicitAutograd")
torch.library.register_fake("recsys_ops::embedding_bag", _embedding_bag)
torch.library.register_autograd("recsys_ops::embedding_bag", _backward, setup_context=_setup)

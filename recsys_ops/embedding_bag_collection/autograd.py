"""Gradients, fused updates and fake kernels of embedding bag collections, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys_ops._library import LIBRARY
from recsys_ops.embedding_bag.autograd import coalesced, keep_coalesced

# The registered kernels of each backend, filled by api.py.
KERNELS: dict[str, SimpleNamespace] = {}


@dataclass(frozen=True)
class FusedUpdate:
    """What the backward does to weights in place of giving them gradients.

    The fields are the arguments of ``embedding_bag_collection_update``.
    """

    states: Sequence[Tensor]
    step: Tensor
    optimizer: int
    hyperparameters: Tensor
    seed: int
    stochastic_rounding: bool


def lookup(
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    size: int,
    dtype: torch.dtype,
    drop_invalid: bool,
    has_max: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The pooled rows of all lookups [size], and where maxima came from, or an empty tensor."""
    output = values.new_empty(size, dtype=dtype)
    argmax = values.new_zeros(size if has_max else 0, dtype=torch.int32)
    KERNELS[backend].embedding_bag_collection_forward(
        output,
        argmax if has_max else None,
        weights,
        values,
        offsets,
        per_sample_weights,
        lookups,
        drop_invalid,
    )
    return output, argmax


class CollectionFunction(torch.autograd.Function):
    """The differentiable lookup, with the maxima's origins as a second output.

    ``trigger`` is a tensor that requires a gradient where only an update is to be made. ``options``
    are the arguments of ``lookup`` from ``size`` on; ``computed`` holds its results where they
    are there already.
    """

    @staticmethod
    def forward(
        trigger: Tensor | None,
        per_sample_weights: Tensor | None,
        values: Tensor,
        offsets: Tensor,
        lookups: Tensor,
        options: tuple[Any, ...],
        sparse: bool,
        update: FusedUpdate | None,
        computed: tuple[Tensor, Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return computed or lookup(weights, values, offsets, per_sample_weights, lookups, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, per_sample_weights, values, offsets, lookups, options, sparse, update, _, *weights = inputs
        _save(ctx, weights, values, offsets, per_sample_weights, lookups, output[1], options, sparse, update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> Any:
        needs = ctx.needs_input_grad
        receivers = [function for function, _ in ctx.next_functions[-len(ctx.weights) :]]
        of_weights, of_per_sample_weights = _gradients(ctx, grad_output, needs[9:], needs[1], receivers)
        return None, of_per_sample_weights, *(None,) * 7, *of_weights


# ``apply`` without its look for torch.func, and at the signature of ``forward``.
apply_eagerly = super(torch.autograd.Function, CollectionFunction).apply


def _save(
    ctx: Any,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    argmax: Tensor,
    options: tuple[Any, ...],
    sparse: bool,
    update: FusedUpdate | None = None,
) -> None:
    ctx.mark_non_differentiable(argmax)
    # Values of the weights only matter to the gradient of the per-sample weights; not saving
    # them otherwise lets an optimizer update them before the backward.
    weighted = per_sample_weights is not None and per_sample_weights.requires_grad
    ctx.save_for_backward(
        values, offsets, per_sample_weights, lookups, argmax, *(weights if weighted else ())
    )
    ctx.weights = list(weights)
    ctx.options, ctx.sparse, ctx.update = options, sparse, update


def _gradients(
    ctx: Any,
    grad_output: Tensor,
    needs_weights: Sequence[bool],
    needs_per_sample_weights: bool,
    receivers: Sequence[Any],
) -> tuple[list[Tensor | None], Tensor | None]:
    values, offsets, per_sample_weights, lookups, argmax, *_ = ctx.saved_tensors
    _, _, drop_invalid, has_max, backend = ctx.options
    kernels, weights = KERNELS[backend], ctx.weights
    grad_output = grad_output.contiguous()
    winners = argmax if has_max else None
    bags = (values, offsets, per_sample_weights, lookups, drop_invalid)
    of_per_sample_weights = None
    of_weights: list[Tensor | None] = [None] * len(needs_weights)
    if needs_per_sample_weights:
        of_per_sample_weights = kernels.embedding_bag_collection_backward_per_sample_weights(
            grad_output, weights, values, offsets, lookups, drop_invalid
        )
    if ctx.update is not None:
        fused = ctx.update
        kernels.embedding_bag_collection_update(
            weights,
            fused.states,
            fused.step,
            grad_output,
            winners,
            *bags,
            fused.optimizer,
            fused.hyperparameters,
            fused.seed,
            fused.stochastic_rounding,
        )
    elif any(needs_weights) and ctx.sparse:
        parts = kernels.embedding_bag_collection_backward_sparse(grad_output, winners, weights, *bags)
        for table, needed in enumerate(needs_weights):
            if needed:
                gradient = coalesced(parts[2 * table], parts[2 * table + 1], weights[table].shape[0])
                keep_coalesced(receivers[table], gradient)
                of_weights[table] = gradient
                del gradient  # whoever holds it keeps the leaf from taking it over
    elif any(needs_weights):
        dense = kernels.embedding_bag_collection_backward(grad_output, winners, weights, *bags)
        of_weights = [g if needed else None for g, needed in zip(dense, needs_weights, strict=True)]
    return of_weights, of_per_sample_weights


def _collection(
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    size: int,
    dtype: torch.dtype,
    drop_invalid: bool,
    has_max: bool,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return lookup(
        weights, values, offsets, per_sample_weights, lookups, size, dtype, drop_invalid, has_max, backend
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, values, offsets, per_sample_weights, lookups, *options, sparse, backend = inputs
    _save(ctx, weights, values, offsets, per_sample_weights, lookups, output[1], (*options, backend), sparse)


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> Any:
    needs_weights, _, _, needs_per_sample_weights, *rest = ctx.needs_input_grad
    nobody = [None] * len(ctx.weights)
    of_weights, of_per_sample_weights = _gradients(
        ctx, grad_output, needs_weights, needs_per_sample_weights, nobody
    )
    return of_weights, None, None, of_per_sample_weights, *(None for _ in rest)


# The lookup as one differentiable operator, for callers of torch.ops and in compiled graphs. Its
# arguments are those of the kernels, checked.
LIBRARY.define("embedding_bag_collection" + torch.library.infer_schema(_collection, mutates_args=()))
LIBRARY.impl("embedding_bag_collection", _collection, "CompositeExplicitAutograd")
torch.library.register_fake("recsys_ops::embedding_bag_collection", _collection)
torch.library.register_autograd("recsys_ops::embedding_bag_collection", _backward, setup_context=_setup)


def _fake_nothing(*args: Any) -> None:
    """Kernels that write to their arguments make no tensors."""


def _fake_backward(
    grad_output: Tensor, argmax: Tensor | None, weights: Sequence[Tensor], *bags: Any
) -> list[Tensor]:
    return [w.new_empty(w.shape) for w in weights]


def _fake_backward_sparse(
    grad_output: Tensor, argmax: Tensor | None, weights: Sequence[Tensor], values: Tensor, *bags: Any
) -> list[Tensor]:
    result = []
    for weight in weights:
        touched = torch.library.get_ctx().new_dynamic_size()
        result += [
            values.new_empty(touched, dtype=torch.int64),
            weight.new_empty(touched, weight.shape[1]),
        ]
    return result


def _fake_backward_per_sample_weights(
    grad_output: Tensor, weights: Sequence[Tensor], values: Tensor, *bags: Any
) -> Tensor:
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.new_empty(values.shape[0], dtype=wide)


FAKES: dict[str, Callable[..., Any]] = {
    "embedding_bag_collection_forward": _fake_nothing,
    "embedding_bag_collection_quantized_forward": _fake_nothing,
    "embedding_bag_collection_backward": _fake_backward,
    "embedding_bag_collection_backward_sparse": _fake_backward_sparse,
    "embedding_bag_collection_backward_per_sample_weights": _fake_backward_per_sample_weights,
    "embedding_bag_collection_update": _fake_nothing,
}

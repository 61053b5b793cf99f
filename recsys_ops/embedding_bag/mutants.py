"""Embedding bags that are wrong on purpose; the correctness suite must reject every one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag import reference
from recsys_ops.testing import Mutant

Override = Callable[[Any], dict[str, Callable[..., Any]]]

FORWARD = "embedding_bag_forward"
MAX_FORWARD = "embedding_bag_max_forward"
BACKWARD = "embedding_bag_backward"
BACKWARD_SPARSE = "embedding_bag_backward_sparse"
BACKWARD_WEIGHTS = "embedding_bag_backward_per_sample_weights"


def _called(kernel: str, body: Callable[[Callable[..., Any], SimpleNamespace], Any]) -> Override:
    """Replace a kernel by ``body(right, arguments)``; ``right`` takes them back as keywords."""
    signature = inspect.signature(getattr(reference, kernel))

    def override(kernels: Any) -> dict[str, Callable[..., Any]]:
        right = getattr(kernels, kernel)

        def wrong(*args: Any) -> Any:
            return body(right, SimpleNamespace(**signature.bind(*args).arguments))

        return {kernel: wrong}

    return override


def _given(kernel: str, **changes: Callable[[SimpleNamespace], Any]) -> Override:
    """Give the right kernel other arguments, computed from the right ones."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        return right(**{**vars(a), **{name: change(a) for name, change in changes.items()}})

    return _called(kernel, body)


def _returning(kernel: str, change: Callable[[Any, SimpleNamespace], Any]) -> Override:
    """Give back something else than the right kernel does."""
    return _called(kernel, lambda right, a: change(right(**vars(a)), a))


def _bag_of(a: SimpleNamespace) -> Tensor:
    positions = torch.arange(len(a.indices))
    return torch.searchsorted(a.offsets.long(), positions, right=True) - 1


def _sizes(a: SimpleNamespace, but_padding: bool) -> Tensor:
    """Entries of each bag: [B, 1]."""
    counted = _bag_of(a)[a.indices != a.padding_idx] if but_padding else _bag_of(a)
    num_bags = len(a.offsets) - a.include_last_offset
    return torch.bincount(counted, minlength=num_bags)[:num_bags, None]


def _mean_over(count: Callable[[SimpleNamespace], Any]) -> Override:
    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        if not a.mean:
            return right(**vars(a))
        return right(**{**vars(a), "mean": False}) / count(a)

    return _called(FORWARD, body)


def _without_last_entry(right: Callable[..., Any], a: SimpleNamespace) -> Any:
    if len(a.indices) == 0:
        return right(**vars(a))
    weights = None if a.per_sample_weights is None else a.per_sample_weights[:-1]
    shorter = {"indices": a.indices[:-1], "offsets": a.offsets.clamp(max=len(a.indices) - 1)}
    return right(**{**vars(a), **shorter, "per_sample_weights": weights})


def _first_256(a: SimpleNamespace) -> Tensor:
    """Indices, those past the 256th of a bag invalid."""
    in_bag = torch.arange(len(a.indices)) - a.offsets[_bag_of(a)] if len(a.offsets) else a.indices
    return a.indices.masked_fill(in_bag >= 256, -1)


def _without_repeats(a: SimpleNamespace) -> Tensor:
    """Indices, invalid where a row was named before."""
    repeated = (a.indices[:, None] == a.indices).tril(-1).any(1)
    return a.indices.masked_fill(repeated, -1)


def _last_tie(result: tuple[Tensor, Tensor], a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    output, argmax = result
    argmax = argmax.clone()
    bags = _bag_of(a)
    for i in range(int(a.offsets[-1]) if a.include_last_offset else len(bags)):
        row = int(a.indices[i])
        if 0 <= row < len(a.weight) and row != a.padding_idx:
            highest = a.weight[row] == output[bags[i]]
            argmax[bags[i]] = torch.where(highest, int(i - a.offsets[bags[i]]), argmax[bags[i]])
    return output, argmax


def _unwritten_where_empty(output: Tensor, a: SimpleNamespace) -> Tensor:
    return torch.where(_sizes(a, False) == 0, torch.empty_like(output), output)


def _summed_in_half(right: Callable[..., Any], a: SimpleNamespace) -> Any:
    if a.weight.dtype not in (torch.float16, torch.bfloat16) or a.drop_invalid or a.include_last_offset:
        return right(**vars(a))
    rows = a.weight[a.indices] * (a.indices != a.padding_idx)[:, None]
    if a.per_sample_weights is not None:
        rows = rows * a.per_sample_weights[:, None]
    output = rows.new_zeros(len(a.offsets), rows.shape[1])
    for row, bag in zip(rows, _bag_of(a).tolist(), strict=True):
        output[bag] += row
    return output / _sizes(a, True).clamp(min=1) if a.mean else output


def _through_single(right: Callable[..., Any], a: SimpleNamespace) -> Any:
    weights = None if a.per_sample_weights is None else a.per_sample_weights.float()
    return right(**{**vars(a), "weight": a.weight.float(), "per_sample_weights": weights}).to(a.weight.dtype)


def _times_zero(output: Tensor, a: SimpleNamespace) -> Tensor:
    return output + 0 * a.weight[a.padding_idx] if a.padding_idx >= 0 else output


def _past_the_end(output: Tensor, a: SimpleNamespace) -> Tensor:
    written = torch.empty(output.shape, dtype=output.dtype).copy_(output)
    if written.untyped_storage().nbytes() > written.nbytes:
        written.as_strided((1,), (1,), written.storage_offset() + written.numel()).zero_()
    return written


def _reversing_indices(output: Tensor, a: SimpleNamespace) -> Tensor:
    a.indices.copy_(a.indices.flip(0))
    return output


def _one_thread_differs(output: Tensor, a: SimpleNamespace) -> Tensor:
    return (
        output.nextafter(output + 1) if torch.get_num_threads() == 1 and output.dtype.itemsize > 2 else output
    )


def _trains_row_0(a: SimpleNamespace) -> Tensor:
    return a.indices.masked_fill((a.indices < 0) | (a.indices >= a.num_embeddings), 0)


def _open_ended(a: SimpleNamespace) -> Tensor:
    if not a.include_last_offset:
        return a.offsets
    return torch.cat([a.offsets[:-1], torch.full_like(a.offsets[-1:], len(a.indices))])


def _unstrided(a: SimpleNamespace) -> Tensor:
    return a.weight.as_strided(a.weight.shape, (a.weight.shape[1], 1))


MUTANTS = (
    Mutant("zeros", "forward_backward", _returning(FORWARD, lambda out, a: out * 0)),
    Mutant("last entry dropped", "forward_backward", _called(FORWARD, _without_last_entry)),
    Mutant(
        "bags cut at 256",
        "forward_backward",
        _given(FORWARD, indices=_first_256, drop_invalid=lambda a: True),
    ),
    Mutant(
        "last column missed",
        "forward_backward",
        _returning(FORWARD, lambda out, a: torch.cat([out[:, :-1], out[:, -1:] * 0], 1)),
    ),
    Mutant("mean over the batch", "forward_backward", _mean_over(lambda a: max(1, len(a.offsets)))),
    Mutant("mean over one too many", "forward_backward", _mean_over(lambda a: _sizes(a, True) + 1)),
    Mutant("mean over padding", "forward_backward", _mean_over(lambda a: _sizes(a, False).clamp(min=1))),
    Mutant("padding not seen", "forward_backward", _given(FORWARD, padding_idx=lambda a: -1)),
    Mutant("padding trained", "forward_backward", _given(BACKWARD, padding_idx=lambda a: -1)),
    Mutant("padding not seen by max", "forward_backward", _given(MAX_FORWARD, padding_idx=lambda a: -1)),
    Mutant("ties to the last", "forward_backward", _returning(MAX_FORWARD, _last_tie)),
    Mutant(
        "repeated ids trained once",
        "forward_backward",
        _given(BACKWARD, indices=_without_repeats, drop_invalid=lambda a: True),
    ),
    Mutant("weights ignored", "forward_backward", _given(FORWARD, per_sample_weights=lambda a: None)),
    Mutant("weights ignored in training", "gradcheck", _given(BACKWARD, per_sample_weights=lambda a: None)),
    Mutant("gradient of mean undivided", "gradcheck", _given(BACKWARD, mean=lambda a: False)),
    Mutant("gradient of weights undivided", "gradcheck", _given(BACKWARD_WEIGHTS, mean=lambda a: False)),
    Mutant("frequency ignored", "forward_backward", _given(BACKWARD, scale_grad_by_freq=lambda a: False)),
    Mutant("empty bags unwritten", "forward_backward", _returning(FORWARD, _unwritten_where_empty)),
    Mutant("last bag to the end", "forward_backward", _given(FORWARD, offsets=_open_ended)),
    Mutant("sums in half precision", "forward_backward", _called(FORWARD, _summed_in_half)),
    Mutant("fp64 through fp32", "forward_backward", _called(FORWARD, _through_single)),
    Mutant(
        "sparse rows out of order",
        "forward_backward",
        _returning(BACKWARD_SPARSE, lambda result, a: tuple(part.flip(0) for part in result)),
    ),
    Mutant("dropped ids train row 0", "forward_backward", _given(BACKWARD, indices=_trains_row_0)),
    Mutant("bad ids accepted", "bad_input", _given(FORWARD, drop_invalid=lambda a: True)),
    Mutant("strides ignored", "strided", _given(FORWARD, weight=_unstrided)),
    Mutant("padding times zero", "isolation", _returning(FORWARD, _times_zero)),
    Mutant("all rows read", "isolation", _returning(FORWARD, lambda out, a: out + 0 * a.weight.sum(0))),
    Mutant("written past the end", "inputs_untouched", _returning(FORWARD, _past_the_end)),
    Mutant("indices reversed in place", "inputs_untouched", _returning(FORWARD, _reversing_indices)),
    Mutant(
        "noise in the last bits",
        "determinism",
        _returning(FORWARD, lambda out, a: out * (1 + 1e-6 * torch.rand(()))),
    ),
    Mutant("one thread differs", "determinism", _returning(FORWARD, _one_thread_differs)),
)

"""The public pooled embedding lookup: validation, choice of a backend, dispatch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from recsys_ops._arguments import check_integer_dtype
from recsys_ops._library import eager_function, is_eager, names_of, register_kernels
from recsys_ops.backends import (
    Call,
    Implementation,
    Operator,
    choose_while_tracing,
    cuda_rejects,
    native_rejects,
    triton_rejects_device,
)
from recsys_ops.embedding_bag import autograd, reference
from recsys_ops.embedding_bag.autograd import (
    FAKES,
    EmbeddingBagFunction,
    TransformableEmbeddingBag,
    apply_eagerly,
    lookup,
)

_MODES = ("sum", "mean", "max")
_BOUNDS = ("error", "drop")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    bounds: str = "error",
    backend: str | None = None,
) -> Tensor:
    r"""Pool the rows of ``weight`` that each bag of indices names: sum, mean or maximum.

    A drop-in for ``torch.nn.functional.embedding_bag`` that also takes
    ``per_sample_weights`` with ``mode="mean"`` (each row times its weight, divided
    by the number of rows), gives zeros for input of shape [B, 0], and coalesces the
    gradient of ``sparse=True``.

    Args:
        input: int32 or int64 row numbers: [N] with ``offsets``, or [B, L] for B bags of L.
        weight: the table, [R, D], fp16, bf16, fp32 or fp64. fp16 and bf16 accumulate in fp32.
        offsets: int32 or int64 [B], where each bag starts in ``input``; with
            ``include_last_offset`` [B + 1], the last being where the last bag ends.
        max_norm: if given, rows looked up are first scaled down in place to this norm.
        norm_type: the p of the norm for ``max_norm``.
        scale_grad_by_freq: divide a row's gradient by how often the batch names it. Not for "max".
        mode: ``"sum"``, ``"mean"`` or ``"max"``. A tie in "max" gives the gradient to the first entry.
        sparse: give ``weight`` a sparse, coalesced gradient. Not for "max".
        per_sample_weights: a factor for each entry, shape of ``input``, dtype of ``weight``;
            differentiable. Not for "max".
        include_last_offset: see ``offsets``.
        padding_idx: a row that contributes nothing and gets no gradient; negative counts from the end.
        bounds: what an index outside [0, R) does: ``"error"`` raises, ``"drop"`` contributes
            nothing and trains nothing.
        backend: a backend's name, or None to choose; see ``recsys_ops.explain``.

    Returns:
        [B, D] in the dtype of ``weight``; a bag without entries is 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or combination is not as above.
        NotImplementedError: ``per_sample_weights`` with ``mode="max"``.
        RuntimeError: an index is out of bounds, offsets are not bags of ``input``, or the
            backend asked for cannot serve the call.

    The gradient of row r is the sum over the entries that name it of ``w_i / n_b * grad_output[b]``,
    with n_b the entries of bag b for "mean" and 1 for "sum". It is the same to the bit for any
    number of threads.

    Example:
        >>> import torch, recsys_ops
        >>> weight = torch.tensor([[1., 2.], [3., 4.], [5., 6.]])
        >>> ids, offsets = torch.tensor([0, 2, 1]), torch.tensor([0, 2])
        >>> recsys_ops.embedding_bag(ids, weight, offsets, mode="sum")
        tensor([[6., 8.],
                [3., 4.]])
    """
    drop_invalid = bounds == "drop"
    needs_grad = torch.is_grad_enabled() and (
        weight.requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
    )
    output = None
    if mode in ("sum", "mean") and bounds in _BOUNDS and max_norm is None and is_eager(backend):
        output = _eager_forward(
            weight,
            input,
            offsets,
            per_sample_weights,
            mode == "mean",
            include_last_offset,
            padding_idx,
            drop_invalid,
        )
        if output is not None and not needs_grad:
            return output
    if output is None:
        _check_options(mode, sparse, scale_grad_by_freq, bounds)
        _check_tensors(input, weight, offsets, include_last_offset, padding_idx)
        if per_sample_weights is not None:
            per_sample_weights = _check_per_sample_weights(per_sample_weights, input, weight, mode)

    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    if offsets is None:
        offsets = _offsets_of_rows(input)
        include_last_offset = False
        input = input.reshape(-1)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.reshape(-1).contiguous()
    input, offsets = input.contiguous(), offsets.contiguous()
    bags = (mode, padding_idx, include_last_offset, drop_invalid, scale_grad_by_freq, sparse)
    if output is not None:
        backend = "native" if weight.is_cpu else "cuda"
        return apply_eagerly(weight, per_sample_weights, input, offsets, (*bags, backend), (output,))

    if max_norm is not None:
        _renormalize(weight, input, offsets, max_norm, norm_type, include_last_offset, drop_invalid)
    if torch.compiler.is_compiling():
        backend = choose_while_tracing("embedding_bag", backend, weight.device.type, weight.dtype)
    else:
        backend = OPERATOR.choose(Call(weight.device.type, weight.dtype), backend).backend
    options = (*bags, backend)
    if torch._C._are_functorch_transforms_active():
        return TransformableEmbeddingBag.apply(weight, input, offsets, per_sample_weights, *options)[0]
    if sparse and torch.compiler.is_compiling():  # graphs have no sparse tensors, operators may
        return torch.ops.recsys_ops.embedding_bag(weight, input, offsets, per_sample_weights, *options)[0]
    if needs_grad:
        return EmbeddingBagFunction.apply(weight, per_sample_weights, input, offsets, options)
    return lookup(weight, input, offsets, per_sample_weights, *options)[0]


def _check_options(mode: str, sparse: bool, scale_grad_by_freq: bool, bounds: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"embedding_bag: expected mode to be one of {_MODES}, got {mode!r}")
    if bounds not in _BOUNDS:
        raise ValueError(f"embedding_bag: expected bounds to be one of {_BOUNDS}, got {bounds!r}")
    if mode == "max" and (sparse or scale_grad_by_freq):
        argument = "sparse" if sparse else "scale_grad_by_freq"
        raise ValueError(f"embedding_bag: expected {argument}=False with mode='max', got True")


def _check_tensors(
    input: Tensor, weight: Tensor, offsets: Tensor | None, include_last_offset: bool, padding_idx: int | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"embedding_bag: expected weight of shape [R, D], got {list(weight.shape)}")
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"embedding_bag: expected weight of dtype {names_of(_FLOATS)}, got {names_of([weight.dtype])}"
        )
    check_integer_dtype("embedding_bag", "input", input)
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding_bag: expected padding_idx in [{-rows}, {rows}), got {padding_idx}")
    if input.dim() not in (1, 2):
        raise ValueError(f"embedding_bag: expected input of shape [N] or [B, L], got {list(input.shape)}")
    if input.get_device() != weight.get_device():
        raise ValueError(
            f"embedding_bag: expected input on the device of weight, {weight.device}, got {input.device}"
        )
    if offsets is None:
        if input.dim() == 1:
            raise ValueError("embedding_bag: expected offsets with input of shape [N], got None")
        return
    if input.dim() == 2:
        raise ValueError(
            "embedding_bag: expected offsets=None with input of shape [B, L], "
            f"got offsets of shape {list(offsets.shape)}"
        )
    if offsets.dim() != 1 or (include_last_offset and offsets.shape[0] == 0):
        wanted = "[B + 1]" if include_last_offset else "[B]"
        raise ValueError(f"embedding_bag: expected offsets of shape {wanted}, got {list(offsets.shape)}")
    check_integer_dtype("embedding_bag", "offsets", offsets)
    if offsets.get_device() != weight.get_device():
        raise ValueError(
            f"embedding_bag: expected offsets on the device of weight, {weight.device}, got {offsets.device}"
        )


_eager_forward = eager_function("embedding_bag_eager")


def _check_per_sample_weights(per_sample_weights: Tensor, input: Tensor, weight: Tensor, mode: str) -> Tensor:
    if mode == "max":
        raise NotImplementedError(
            "embedding_bag: expected per_sample_weights=None with mode='max', got a tensor"
        )
    if per_sample_weights.shape != input.shape:
        raise ValueError(
            f"embedding_bag: expected per_sample_weights of the shape of input, {list(input.shape)}, "
            f"got {list(per_sample_weights.shape)}"
        )
    if per_sample_weights.dtype != weight.dtype:
        if not torch.is_autocast_enabled(weight.device.type):
            raise TypeError(
                "embedding_bag: expected per_sample_weights of the dtype of weight, "
                f"{names_of([weight.dtype])}, got {names_of([per_sample_weights.dtype])}"
            )
        per_sample_weights = per_sample_weights.to(weight.dtype)
    if per_sample_weights.device != weight.device:
        raise ValueError(
            f"embedding_bag: expected per_sample_weights on the device of weight, {weight.device}, "
            f"got {per_sample_weights.device}"
        )
    return per_sample_weights


def _offsets_of_rows(input: Tensor) -> Tensor:
    """Where the rows of input [B, L] start: [B]."""
    num_bags, length = input.shape
    if length == 0:
        return torch.zeros(num_bags, dtype=torch.int64, device=input.device)
    return torch.arange(0, num_bags * length, length, device=input.device)


@torch.no_grad()
def _renormalize(
    weight: Tensor,
    input: Tensor,
    offsets: Tensor,
    max_norm: float,
    norm_type: float,
    include_last_offset: bool,
    drop_invalid: bool,
) -> None:
    """Scale the rows looked up down to ``max_norm``, in place, once all values are known to be good."""
    reference.check_values(input, offsets, weight.shape[0], include_last_offset, drop_invalid)
    if drop_invalid:
        input = input[(input >= 0) & (input < weight.shape[0])]
    elif include_last_offset:
        input = input[: int(offsets[-1])]
    torch.embedding_renorm_(weight, input, max_norm, norm_type)


def _describe(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(weight.device.type, weight.dtype)


def _triton_rejects(call: Call) -> str | None:
    return triton_rejects_device(call.device)


OPERATOR = Operator(
    "embedding_bag",
    [
        Implementation("reference", lambda: reference, lambda call: None),
        Implementation("native", lambda: autograd.KERNELS["native"], native_rejects("weight is")),
        Implementation("cuda", lambda: autograd.KERNELS["cuda"], cuda_rejects("weight is")),
        Implementation(
            "triton",
            lambda: importlib.import_module("recsys_ops.triton_kernels.embedding_bag"),
            _triton_rejects,
        ),
    ],
    _describe,
)

for _backend, _implementation in OPERATOR.implementations.items():
    _kernels = register_kernels(_implementation, [getattr(reference, name) for name in FAKES], FAKES)
    if _kernels is not None:
        autograd.KERNELS[_backend] = _kernels

"""Pooled lookups in many tables as one function: validation, choice of a backend, dispatch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
from recsys_ops.embedding_bag_collection import autograd, reference
from recsys_ops.embedding_bag_collection.autograd import (
    FAKES,
    CollectionFunction,
    FusedUpdate,
    apply_eagerly,
    lookup,
)
from recsys_ops.embedding_bag_collection.layout import POOLINGS, Layout, Placement, with_bags_of_one

OP = "embedding_bag_collection"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BOUNDS = ("error", "drop")
_DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # of csrc's DType

_eager_forward = eager_function("embedding_bag_collection_eager")


def embedding_bag_collection(
    values: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    features: Sequence[Sequence[int]] | None = None,
    pooling: str | Sequence[str] = "sum",
    per_sample_weights: Tensor | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    sparse: bool = False,
    output_dtype: torch.dtype | None = None,
    bounds: str = "error",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    r"""Pool bags of ids from several tables at once.

    What ``recsys_ops.nn.EmbeddingBagCollection`` computes, as a function. The bags come feature
    after feature: with F features of B samples each, bag ``f * B + b`` holds the ids of feature f in
    sample b.

    Args:
        values: the ids of all bags, int32 or int64 [N].
        offsets: int32 or int64 [F * B + 1]: where each bag starts in ``values``, and where the last ends.
        weights: the tables, [R, D] each of its own size: fp32, fp16 and bf16 mixed, or all fp64.
        features: for each table the numbers of the features that look it up; by default table t has
            feature t. Several tables may have the same feature.
        pooling: ``"sum"``, ``"mean"``, ``"max"`` or ``"none"``, for all tables or for each.
            ``"none"`` gives back the row of every id.
        per_sample_weights: a factor for each id, [N]; differentiable. Not with "max" or "none".
        batch_sizes: bags of each feature, where features have different numbers of them.
        sparse: give tables sparse, coalesced gradients. Not for "max".
        output_dtype: of the result; by default fp32, with fp64 tables fp64.
        bounds: what an id outside [0, R) does: ``"error"`` raises, ``"drop"`` contributes
            nothing and trains nothing.
        out: where to write the result, [B, sum of D] contiguous; without gradients, and where one
            tensor is given back.
        backend: a backend's name, or None to choose; see ``recsys_ops.explain``.

    Returns:
        [B, sum of D], the lookups side by side: table after table, in each its features in order. With
        ``batch_sizes`` or "none" a list of what each lookup gives, [B_f, D] or [ids of f, D]. A bag
        without ids is 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or combination is not as above.
        RuntimeError: an id is out of bounds, offsets are not bags of ``values``, or the backend asked
            for cannot serve the call.

    Sums are formed in fp32 (fp64 of fp64 tables), and are the same to the bit for any number of threads.

    Example:
        >>> import torch, recsys_ops
        >>> users, items = torch.arange(6.).view(3, 2), torch.arange(8.).view(2, 4)
        >>> values, offsets = torch.tensor([0, 2, 1, 0, 1]), torch.tensor([0, 2, 3, 4, 5])
        >>> recsys_ops.embedding_bag_collection(values, offsets, [users, items])
        tensor([[4., 6., 0., 1., 2., 3.],
                [2., 3., 4., 5., 6., 7.]])
    """
    check_tables(weights)
    layout = _layout(weights, features, pooling)
    check_options(layout, bounds, sparse, per_sample_weights is not None)
    check_input(values, offsets, weights[0])
    dtypes = [w.dtype for w in weights]
    dtype = check_output_dtype(output_dtype or default_output_dtype(dtypes), dtypes)
    offsets, placement = place(layout, offsets, batch_sizes)
    result = collection(
        list(weights),
        values,
        offsets,
        per_sample_weights,
        placement,
        dtype,
        bounds == "drop",
        layout.has_max,
        sparse=sparse,
        out=out,
        backend=backend,
    )
    if batch_sizes is not None or layout.sequences:
        return [block.of(result) for block in placement.blocks]
    return result.view(placement.blocks[0].rows, layout.pooled_dim)


def place(layout: Layout, offsets: Tensor, batch_sizes: Sequence[int] | None) -> tuple[Tensor, Placement]:
    """Offsets as the kernels take them, and the placement of an input in order of features."""
    num_bags, num_features = offsets.shape[0] - 1, layout.num_features
    if batch_sizes is not None:
        if len(batch_sizes) < num_features or sum(batch_sizes) != num_bags or min([0, *batch_sizes]) < 0:
            raise ValueError(
                f"{OP}: expected batch_sizes of {num_features} features that add up to the "
                f"{num_bags} bags of offsets, got {list(batch_sizes)}"
            )
        ends = [0]
        for size in batch_sizes:
            ends.append(ends[-1] + size)
        bags = list(zip(ends[:-1], batch_sizes, strict=True))
    else:
        if num_bags % max(1, num_features):
            raise ValueError(
                f"{OP}: expected offsets of shape [{num_features} * B + 1], got {list(offsets.shape)}"
            )
        batch_size = num_bags // max(1, num_features)
        bags = [(f * batch_size, batch_size) for f in range(num_features)]
    return place_bags(layout, offsets, bags, apart=batch_sizes is not None)


def place_bags(
    layout: Layout, offsets: Tensor, bags: Sequence[tuple[int, int]], *, apart: bool
) -> tuple[Tensor, Placement]:
    """The same for features whose bags are anywhere. With sequences, it reads where they are."""
    if not layout.sequences:
        return offsets, layout.place(bags, apart=apart)
    at = [bag for f in layout.sequences for bag in (bags[f][0], bags[f][0] + bags[f][1])]
    found = offsets[torch.tensor(at, device=offsets.device)].tolist()
    ranges = list(zip(found[::2], found[1::2], strict=True))
    lengths = {f: end - first for f, (first, end) in zip(layout.sequences, ranges, strict=True)}
    for f, length in lengths.items():
        if length < 0:
            first, end = bags[f][0], bags[f][0] + bags[f][1]
            raise RuntimeError(
                f"{OP}: expected offsets that never decrease, got offsets[{first}] = {int(offsets[first])}, "
                f"offsets[{end}] = {int(offsets[end])}"
            )
    placement = layout.place(bags, lengths, offsets.shape[0] - 1, apart=apart)
    return with_bags_of_one(offsets, ranges), placement


def collection(
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    placement: Placement,
    dtype: torch.dtype,
    drop_invalid: bool,
    has_max: bool,
    *,
    sparse: bool = False,
    update: FusedUpdate | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The lookups of checked tables, [placement.size]: into ``out``, with gradients, or with an update."""
    needs_grad = torch.is_grad_enabled() and (
        update is not None
        or (per_sample_weights is not None and per_sample_weights.requires_grad)
        or any(w.requires_grad for w in weights)
    )
    computed, server = None, "native"
    if is_eager(backend) and not (needs_grad and (has_max or out is not None)):
        result = _eager_forward(
            weights,
            None,
            0,
            values,
            offsets,
            per_sample_weights,
            placement.lookups,
            placement.size,
            _DTYPE_NUMBERS[dtype],
            drop_invalid,
            out,
        )
        if result is not None and not needs_grad:
            return result
        if result is not None:
            computed = result, values.new_empty(0, dtype=torch.int32)
    if per_sample_weights is not None:
        per_sample_weights = _check_per_sample_weights(per_sample_weights, values, dtype)
    values, offsets = values.contiguous(), offsets.contiguous()
    if computed is None:
        server = _choose(backend, values.device.type, weights[0].dtype)
    options = (placement.size, dtype, drop_invalid, has_max, server)
    if out is not None:
        _check_out(out, placement.size, dtype, needs_grad, values)
        autograd.KERNELS[server].embedding_bag_collection_forward(
            out, None, weights, values, offsets, per_sample_weights, placement.lookups, drop_invalid
        )
        return out
    if torch.compiler.is_compiling() and update is None:
        return torch.ops.recsys_ops.embedding_bag_collection(
            weights, values, offsets, per_sample_weights, placement.lookups, *options[:-1], sparse, server
        )[0]
    if needs_grad:
        trigger = torch.empty(0, requires_grad=True) if update is not None else None
        apply = CollectionFunction.apply if computed is None else apply_eagerly
        return apply(
            trigger,
            per_sample_weights,
            values,
            offsets,
            placement.lookups,
            options,
            sparse,
            update,
            computed,
            *weights,
        )[0]
    return lookup(weights, values, offsets, per_sample_weights, placement.lookups, *options)[0]


def quantized_collection(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    placement: Placement,
    dtype: torch.dtype,
    drop_invalid: bool,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The lookups of quantised tables, [placement.size]; no gradients."""
    if is_eager(backend):
        result = _eager_forward(
            codes,
            scales,
            bits,
            values,
            offsets,
            per_sample_weights,
            placement.lookups,
            placement.size,
            _DTYPE_NUMBERS[dtype],
            drop_invalid,
            out,
        )
        if result is not None:
            return result
    if per_sample_weights is not None:
        per_sample_weights = _check_per_sample_weights(per_sample_weights, values, dtype)
    if out is not None:
        _check_out(out, placement.size, dtype, False, values)
    output = values.new_empty(placement.size, dtype=dtype) if out is None else out
    backend = _choose(backend, values.device.type, codes[0].dtype)
    autograd.KERNELS[backend].embedding_bag_collection_quantized_forward(
        output,
        codes,
        scales,
        bits,
        values.contiguous(),
        offsets.contiguous(),
        per_sample_weights,
        placement.lookups,
        drop_invalid,
    )
    return output


def _choose(backend: str | None, device: str, dtype: torch.dtype) -> str:
    if torch.compiler.is_compiling():
        return choose_while_tracing(OP, backend, device, dtype)
    return OPERATOR.choose(Call(device, dtype), backend).backend


def check_tables(weights: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError unless these can be the tables of one collection."""
    for t, weight in enumerate(weights):
        if weight.dim() != 2:
            raise ValueError(f"{OP}: expected weights[{t}] of shape [R, D], got {list(weight.shape)}")
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"{OP}: expected weights[{t}] of dtype {names_of(FLOATS)}, got {names_of([weight.dtype])}"
            )
        if (weight.dtype == torch.float64) != (weights[0].dtype == torch.float64):
            raise TypeError(
                f"{OP}: expected all weights or none to be float64, got weights[0] of "
                f"{names_of([weights[0].dtype])} and weights[{t}] of {names_of([weight.dtype])}"
            )
        if weight.device != weights[0].device:
            raise ValueError(
                f"{OP}: expected all weights on one device, got weights[0] on {weights[0].device} and "
                f"weights[{t}] on {weight.device}"
            )


def check_options(layout: Layout, bounds: str, sparse: bool, weighted: bool) -> None:
    """Raise ValueError or NotImplementedError for options that do not go together."""
    if bounds not in BOUNDS:
        raise ValueError(f"{OP}: expected bounds to be one of {BOUNDS}, got {bounds!r}")
    if sparse and layout.has_max:
        raise ValueError(f"{OP}: expected sparse=False with pooling 'max', got True")
    for pooling in ("max", "none"):
        if weighted and pooling in layout.pooling:
            raise NotImplementedError(
                f"{OP}: expected per_sample_weights=None with pooling {pooling!r}, got a tensor"
            )


def check_input(values: Tensor, offsets: Tensor, like: Tensor) -> None:
    """Raise ValueError or TypeError unless these can be bags on the device of a table."""
    for name, tensor, shape in (("values", values, "[N]"), ("offsets", offsets, "[G + 1]")):
        if tensor.dim() != 1 or (name == "offsets" and tensor.shape[0] == 0):
            raise ValueError(f"{OP}: expected {name} of shape {shape}, got {list(tensor.shape)}")
        check_integer_dtype(OP, name, tensor)
        if tensor.get_device() != like.get_device():
            raise ValueError(
                f"{OP}: expected {name} on the device of the tables, {like.device}, got {tensor.device}"
            )


def default_output_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """What tables of these dtypes are pooled to unless something else is asked for."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_output_dtype(dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Raise TypeError unless tables of these dtypes can be pooled to it; gives it back."""
    if dtype not in FLOATS or (dtype == torch.float64) != (torch.float64 in dtypes):
        raise TypeError(
            f"{OP}: expected output_dtype {names_of(FLOATS[:3])}, or float64 with float64 tables, "
            f"got {names_of([dtype])}"
        )
    return dtype


def _layout(
    weights: Sequence[Tensor], features: Sequence[Sequence[int]] | None, pooling: str | Sequence[str]
) -> Layout:
    if len(weights) == 0:
        raise ValueError(f"{OP}: expected one table or more, got none")
    each = [pooling] * len(weights) if isinstance(pooling, str) else list(pooling)
    looked_up = [[t] for t in range(len(weights))] if features is None else features
    for name, given in (("features", looked_up), ("pooling", each)):
        if len(given) != len(weights):
            raise ValueError(f"{OP}: expected {name} for {len(weights)} tables, got {len(given)}")
    for t, numbers in enumerate(looked_up):
        if len(numbers) == 0 or min(numbers) < 0:
            raise ValueError(f"{OP}: expected features[{t}] to name one feature or more, got {list(numbers)}")
    if unknown := [p for p in each if p not in POOLINGS]:
        raise ValueError(f"{OP}: expected pooling to be one of {POOLINGS}, got {unknown[0]!r}")
    return Layout(
        tuple(tuple(numbers) for numbers in looked_up), tuple(each), tuple(w.shape[-1] for w in weights)
    )


def _check_per_sample_weights(per_sample_weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    if per_sample_weights.shape != values.shape:
        raise ValueError(
            f"{OP}: expected per_sample_weights of the shape of values, {list(values.shape)}, "
            f"got {list(per_sample_weights.shape)}"
        )
    if per_sample_weights.dtype not in FLOATS:
        raise TypeError(
            f"{OP}: expected per_sample_weights of dtype {names_of(FLOATS)}, "
            f"got {names_of([per_sample_weights.dtype])}"
        )
    if per_sample_weights.get_device() != values.get_device():
        raise ValueError(
            f"{OP}: expected per_sample_weights on the device of values, {values.device}, "
            f"got {per_sample_weights.device}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return per_sample_weights.to(wide).contiguous()


def _check_out(out: Tensor, size: int, dtype: torch.dtype, needs_grad: bool, values: Tensor) -> None:
    if needs_grad:
        raise RuntimeError(
            f"{OP}: expected out=None where gradients are wanted, got a tensor: use torch.no_grad()"
        )
    if out.numel() != size or not out.is_contiguous():
        raise ValueError(f"{OP}: expected out contiguous, of {size} elements, got {list(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{OP}: expected out of dtype {names_of([dtype])}, got {names_of([out.dtype])}")
    if out.get_device() != values.get_device():
        raise ValueError(f"{OP}: expected out on the device of values, {values.device}, got {out.device}")


def _describe(values: Tensor, offsets: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> Call:
    return Call(values.device.type, weights[0].dtype)


OPERATOR = Operator(
    OP,
    [
        Implementation("reference", lambda: reference, lambda call: None),
        Implementation("native", lambda: autograd.KERNELS["native"], native_rejects("the tables are")),
        Implementation("cuda", lambda: autograd.KERNELS["cuda"], cuda_rejects("the tables are")),
        Implementation(
            "triton",
            lambda: importlib.import_module(f"recsys_ops.triton_kernels.{OP}"),
            lambda call: triton_rejects_device(call.device),
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

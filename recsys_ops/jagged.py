"""Jagged sequences: rows of all sequences one after the other, and offsets that say where each starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys_ops._arguments import check_integer_dtype, refuse_shape
from recsys_ops._library import LIBRARY, names_of

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jagged_concat(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Append to each sequence of ``a`` the same sequence of ``b``.

    Args:
        a: [La, ...], the rows of all sequences one after the other; any dtype.
        a_offsets: int32 or int64 [B + 1], where each sequence starts in ``a``, the last being La.
        b: [Lb, ...], like ``a``.
        b_offsets: [B + 1], the same of ``b``.

    Returns:
        Rows [La + Lb, ...] and their offsets [B + 1]. Gradients reach ``a`` and ``b``; a GPU is not
        waited for.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not as above.
        RuntimeError: on the CPU, outside ``torch.compile``: offsets are not those of the rows.

    Example:
        >>> import torch, recsys_ops
        >>> history, targets = torch.tensor([1, 2, 3]), torch.tensor([10, 20])
        >>> recsys_ops.jagged_concat(history, torch.tensor([0, 1, 3]), targets, torch.tensor([0, 1, 2]))
        (tensor([ 1, 10,  2,  3, 20]), tensor([0, 2, 5]))
    """
    op = "jagged_concat"
    _check_rows(op, "a", a)
    if b.shape[1:] != a.shape[1:] or b.dim() != a.dim():
        raise refuse_shape(op, "b", f"[Lb, {', '.join(map(str, a.shape[1:]))}]", b)
    if b.dtype != a.dtype:
        raise TypeError(
            f"{op}: expected b of the dtype of a, {names_of([a.dtype])}, got {names_of([b.dtype])}"
        )
    _check_device(op, "b", b, a)
    _check_offsets(op, "a_offsets", a_offsets, a, len(a))
    _check_offsets(op, "b_offsets", b_offsets, a, len(b), len(a_offsets) - 1)
    rows_of_a = _shifted(a_offsets, b_offsets[:-1], len(a))
    rows_of_b = _shifted(b_offsets, a_offsets[1:], len(b))
    return _Merge.apply(a, b, rows_of_a, rows_of_b), a_offsets + b_offsets


def jagged_split(
    values: Tensor, offsets: Tensor, lengths_or_offsets: Tensor | int, *, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Divide each sequence into its first rows and the rest, as ``jagged_concat`` had joined them.

    Args:
        values: [L, ...], the rows of all sequences one after the other; any dtype.
        offsets: int32 or int64 [B + 1], where each sequence starts, the last being L.
        lengths_or_offsets: how many rows each sequence has in the first part: one number for all, int32
            or int64 [B], or [B + 1] as offsets of the first part.
        total: rows of the first part, where that is known: else a tensor's are summed, for which a GPU
            is waited for.

    Returns:
        Rows of the first parts [total, ...], and the others [L - total, ...]. Gradients reach ``values``.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not as above.
        RuntimeError: on the CPU, outside ``torch.compile``: offsets are not those of the rows, or a
            sequence has fewer rows than its first part.

    Example:
        >>> import torch, recsys_ops
        >>> values, offsets = torch.tensor([1, 10, 2, 3, 20]), torch.tensor([0, 2, 5])
        >>> recsys_ops.jagged_split(values, offsets, torch.tensor([1, 2]))
        (tensor([1, 2, 3]), tensor([10, 20]))
    """
    op = "jagged_split"
    _check_rows(op, "values", values)
    _check_offsets(op, "offsets", offsets, values, len(values))
    first = _offsets_of(op, "lengths_or_offsets", lengths_or_offsets, offsets)
    total = _total(first, lengths_or_offsets, total)
    _check_offsets(op, "lengths_or_offsets", first, values, total)
    _check_parts(op, "lengths_or_offsets", first, offsets)
    rows_of_a = _shifted(first, (offsets - first)[:-1], total)
    rows_of_b = _shifted(offsets - first, first[1:], len(values) - total)
    return _Split.apply(values, rows_of_a, rows_of_b)


def jagged_last_rows(
    offsets: Tensor, lengths: Tensor | int, *, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Where the last rows of each sequence are, for example its targets.

    Args:
        offsets: int32 or int64 [B + 1], where each sequence starts.
        lengths: how many rows of each sequence: one number for all, or int32 or int64 [B].
        total: rows of all, where that is known: else a tensor's are summed, for which a GPU is waited
            for.

    Returns:
        The rows, int64 [total], and where each sequence starts among them, [B + 1] like ``offsets``.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not as above.
        RuntimeError: on the CPU, outside ``torch.compile``: a sequence has fewer rows.

    Example:
        >>> import torch, recsys_ops
        >>> recsys_ops.jagged_last_rows(torch.tensor([0, 2, 5]), torch.tensor([1, 2]))
        (tensor([1, 3, 4]), tensor([0, 1, 3]))
    """
    op = "jagged_last_rows"
    _check_offsets(op, "offsets", offsets, offsets, None)
    if isinstance(lengths, Tensor) and lengths.shape != (len(offsets) - 1,):
        raise refuse_shape(op, "lengths", f"[{len(offsets) - 1}]", lengths)
    last = _offsets_of(op, "lengths", lengths, offsets)
    total = _total(last, lengths, total)
    _check_parts(op, "lengths", last, offsets)
    return _shifted(last, (offsets - last)[1:], total), last


def jagged_dense_bmm(x: Tensor, offsets: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the rows of each sequence by that sequence's own matrix: ``x_i @ dense_b + bias_b``.

    Args:
        x: [L, K], the rows of all sequences one after the other; fp32, fp16, bf16 or fp64.
        offsets: int32 or int64 [B + 1], where each sequence starts, the last being L.
        dense: [B, K, N], like ``x``.
        bias: [B, N], like ``x``.

    Returns:
        [L, N]. Gradients reach ``x``, ``dense`` and ``bias``. A GPU is not waited for in fp16 and bf16
        where K and N are multiples of 8.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not as above.
        RuntimeError: on the CPU, outside ``torch.compile``: offsets are not those of the rows.

    Example:
        >>> import torch, recsys_ops
        >>> x, dense = torch.ones(3, 2), torch.tensor([1.0, 10.0])[:, None, None].expand(2, 2, 1)
        >>> recsys_ops.jagged_dense_bmm(x, torch.tensor([0, 1, 3]), dense).flatten()
        tensor([ 2., 20., 20.])
    """
    op = "jagged_dense_bmm"
    if x.dim() != 2:
        raise refuse_shape(op, "x", "[L, K]", x)
    _check_offsets(op, "offsets", offsets, x, len(x))
    batch = len(offsets) - 1
    if dense.dim() != 3 or dense.shape[:2] != (batch, x.shape[1]):
        raise refuse_shape(op, "dense", f"[{batch}, {x.shape[1]}, N]", dense)
    if bias is not None and bias.shape != (batch, dense.shape[2]):
        raise refuse_shape(op, "bias", f"[{batch}, {dense.shape[2]}]", bias)
    for name, tensor in (("dense", dense), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            got = names_of([tensor.dtype])
            raise TypeError(f"{op}: expected {name} of the dtype of x, {names_of([x.dtype])}, got {got}")
        if tensor is not None:
            _check_device(op, name, tensor, x)
    result: Tensor = torch.ops.recsys_ops.jagged_dense_bmm(x, offsets, dense)
    if bias is not None:
        result = result + _rows_of_sequences(bias, offsets, len(x))
    return result


def sequence_of_rows(offsets: Tensor, total: int) -> Tensor:
    """The sequence that each row belongs to, int64 [total]."""
    return torch.searchsorted(offsets[1:].long(), _range(total, offsets), right=True)


class _Merge(torch.autograd.Function):
    """Rows of two tensors at their places in one; what it does and undoes is ``_Split``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rows_of_a: Tensor, rows_of_b: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_a, rows_of_b)
        merged = a.new_empty(len(a) + len(b), *a.shape[1:])
        return merged.index_copy_(0, rows_of_a, a).index_copy_(0, rows_of_b, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_Split.apply(grads[0], *ctx.saved_tensors), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged: Tensor, rows_of_a: Tensor, rows_of_b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_of_a, rows_of_b)
        return merged.index_select(0, rows_of_a), merged.index_select(0, rows_of_b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Merge.apply(*grads, *ctx.saved_tensors), None, None


def _rows_of_sequences(table: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Row b of a table for every row of sequence b; its gradient is summed in the same order each time."""
    return _Expand.apply(table, offsets, total)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, offsets: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(offsets)
        return table.index_select(0, sequence_of_rows(offsets, total))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,), (grad,) = ctx.saved_tensors, grads
        ones = grad.new_ones(len(grad), 1)
        return torch.ops.recsys_ops.jagged_jagged_bmm(ones, offsets, grad).squeeze(1), None, None


def _bmm(x: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
    """x_b @ dense_b of each sequence: [L, N]."""
    if _can_group(x, dense.shape[2]):
        dense = dense if dense.mT.is_contiguous() else dense.contiguous()
        return torch.nn.functional.grouped_mm(x.contiguous(), dense, offs=offsets[1:].int())
    result = x.new_empty(len(x), dense.shape[2])
    lengths = offsets.diff().tolist()
    for rows, matrix, out in zip(x.split(lengths), dense.unbind(), result.split(lengths), strict=True):
        torch.mm(rows, matrix, out=out)
    return result


def _jagged_bmm(x: Tensor, offsets: Tensor, y: Tensor) -> Tensor:
    """x_b^T @ y_b of each sequence, [B, K, N]: the gradient of its matrix."""
    result = x.new_empty(len(offsets) - 1, x.shape[1], y.shape[1])
    if x.device.type != "cpu" and _can_group(x, y.shape[1]):
        columns = x.t().contiguous()
        products = torch.nn.functional.grouped_mm(columns, y.contiguous(), offs=offsets[1:].int())
        return products.masked_fill_((offsets.diff() == 0)[:, None, None], 0.0)
    lengths = offsets.diff().tolist()
    for left, right, out in zip(x.split(lengths), y.split(lengths), result.unbind(), strict=True):
        torch.mm(left.t(), right, out=out)
    return result


def _can_group(x: Tensor, columns: int) -> bool:
    """Whether one call of PyTorch's does all sequences, without knowing their lengths beforehand."""
    if x.dtype not in _GROUPED_DTYPES or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    aligned = all(size > 0 and size * x.element_size() % 16 == 0 for size in (x.shape[1], columns))
    return aligned and len(x) > 0 and (x.device.type == "cpu" or x.dtype != torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, dense = ctx.saved_tensors
    ops, needed = torch.ops.recsys_ops, ctx.needs_input_grad
    grad_x = ops.jagged_dense_bmm(grad, offsets, dense.transpose(1, 2)) if needed[0] else None
    return grad_x, None, ops.jagged_jagged_bmm(x, offsets, grad) if needed[2] else None


def _jagged_bmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, y = ctx.saved_tensors
    ops, needed = torch.ops.recsys_ops, ctx.needs_input_grad
    grad_x = ops.jagged_dense_bmm(y, offsets, grad.transpose(1, 2)) if needed[0] else None
    return grad_x, None, ops.jagged_dense_bmm(x, offsets, grad) if needed[2] else None


def _fake_bmm(x: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dense.shape[2])


def _fake_jagged_bmm(x: Tensor, offsets: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], y.shape[1])


for _name, _kernel, _fake, _backward in (
    ("jagged_dense_bmm", _bmm, _fake_bmm, _bmm_backward),
    ("jagged_jagged_bmm", _jagged_bmm, _fake_jagged_bmm, _jagged_bmm_backward),
):
    LIBRARY.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recsys_ops::{_name}", _fake)
    torch.library.register_autograd(f"recsys_ops::{_name}", _backward, setup_context=_setup)


def _shifted(offsets: Tensor, shift: Tensor, total: int) -> Tensor:
    """The rows of all sequences, [total], those of sequence b moved by ``shift[b]``."""
    return _range(total, offsets) + shift.index_select(0, sequence_of_rows(offsets, total))


def _range(total: int, like: Tensor) -> Tensor:
    return torch.arange(total, device=like.device)


def _offsets_of(op: str, argument: str, given: Tensor | int, offsets: Tensor) -> Tensor:
    """Lengths or offsets as offsets, in the dtype of ``offsets``."""
    batch = len(offsets) - 1
    if not isinstance(given, Tensor):
        if given < 0:
            raise ValueError(f"{op}: expected {argument} of at least 0, got {given}")
        return torch.arange(batch + 1, device=offsets.device, dtype=offsets.dtype) * given
    check_integer_dtype(op, argument, given)
    _check_device(op, argument, given, offsets)
    if given.shape == (batch + 1,):
        return given.to(offsets.dtype)
    if given.shape != (batch,):
        raise refuse_shape(op, argument, f"[{batch}] or [{batch + 1}]", given)
    return pad(given.cumsum(0, dtype=offsets.dtype), (1, 0))


def _total(offsets: Tensor, given: Tensor | int, total: int | None) -> int:
    if total is not None:
        return total
    return int(offsets[-1]) if isinstance(given, Tensor) else given * (len(offsets) - 1)


def _check_rows(op: str, argument: str, values: Tensor) -> None:
    if values.dim() == 0:
        raise refuse_shape(op, argument, "[L, ...]", values)


def _check_offsets(
    op: str, argument: str, offsets: Tensor, like: Tensor, total: int | None, batch: int | None = None
) -> None:
    """Refuse what cannot be offsets; values are looked at on the CPU, where that costs nothing."""
    if offsets.dim() != 1 or len(offsets) == 0 or batch not in (None, len(offsets) - 1):
        raise refuse_shape(op, argument, "[B + 1]" if batch is None else f"[{batch + 1}]", offsets)
    check_integer_dtype(op, argument, offsets)
    _check_device(op, argument, offsets, like)
    if _is_readable(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or total not in (None, last) or bool((offsets.diff() < 0).any()):
            end = "" if total is None else f" and end at {total}"
            raise RuntimeError(
                f"{op}: expected {argument} that start at 0, never decrease{end}, "
                f"got {first} to {last} in {len(offsets)} values"
            )


def _check_parts(op: str, argument: str, parts: Tensor, offsets: Tensor) -> None:
    """Refuse parts of sequences, given as offsets, that are longer than the sequences."""
    if _is_readable(offsets):
        excess = parts.diff() > offsets.diff()
        if bool(excess.any()):
            b = int(excess.nonzero()[0])
            raise RuntimeError(
                f"{op}: expected {argument} of at most the rows of each sequence, "
                f"got {int(parts.diff()[b])} of {int(offsets.diff()[b])} in sequence {b}"
            )


def _is_readable(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def _check_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: expected {argument} on {like.device}, got {tensor.device}")

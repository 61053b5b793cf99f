"""Jagged helpers against the same done sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import recsys_ops

LENGTHS = st.lists(st.integers(0, 5), min_size=0, max_size=6)
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=0, max_size=6)
INTEGERS = [torch.int64, torch.int32]
# One that PyTorch multiplies in groups, one whose rows are not aligned, and one that it does not know.
FLOATS = [(torch.float32, 8, 4), (torch.float32, 3, 5), (torch.float64, 8, 4), (torch.bfloat16, 8, 16)]


def offsets_of(lengths: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


def sequences(values: Tensor, offsets: Tensor) -> list[Tensor]:
    ends = offsets.tolist()
    return [values[a:b] for a, b in pairwise(ends)]


@given(PAIRS, st.sampled_from(INTEGERS))
@settings(max_examples=50, deadline=None)
def test_concat_and_split_are_those_of_each_sequence(
    pairs: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    firsts, seconds = [p[0] for p in pairs], [p[1] for p in pairs]
    a_offsets, b_offsets = offsets_of(firsts, dtype), offsets_of(seconds, dtype)
    a, b = torch.randn(sum(firsts), 3), torch.randn(sum(seconds), 3)
    values, offsets = recsys_ops.jagged_concat(a, a_offsets, b, b_offsets)
    assert offsets.dtype == dtype
    joined = zip(sequences(a, a_offsets), sequences(b, b_offsets), strict=True)
    expected = [torch.cat(pair) for pair in joined]
    assert torch.equal(values, torch.cat([*expected, a[:0]]))
    assert torch.equal(offsets, offsets_of([len(s) for s in expected], dtype))
    for parts in (a_offsets, a_offsets.diff(), torch.tensor(firsts, dtype=dtype)):
        again = recsys_ops.jagged_split(values, offsets, parts)
        assert torch.equal(again[0], a) and torch.equal(again[1], b)


@given(LENGTHS, st.sampled_from(INTEGERS), st.data())
@settings(max_examples=50, deadline=None)
def test_last_rows_are_those_of_each_sequence(lengths: list[int], dtype: torch.dtype, data: Any) -> None:
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    offsets = offsets_of(lengths, dtype)
    rows, row_offsets = recsys_ops.jagged_last_rows(offsets, torch.tensor(counts, dtype=dtype))
    values = torch.arange(sum(lengths))
    expected = [s[len(s) - n :] for s, n in zip(sequences(values, offsets), counts, strict=True)]
    assert torch.equal(values[rows], torch.cat([*expected, values[:0]]))
    assert torch.equal(row_offsets, offsets_of(counts, dtype))
    total = recsys_ops.jagged_last_rows(offsets, torch.tensor(counts, dtype=dtype), total=sum(counts))
    assert torch.equal(total[0], rows)


@pytest.mark.parametrize(("dtype", "columns", "results"), FLOATS)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [], [17]])
def test_bmm_is_that_of_each_sequence(
    dtype: torch.dtype, columns: int, results: int, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    offsets = offsets_of(lengths, torch.int32)
    x = torch.randn(sum(lengths), columns, dtype=dtype, requires_grad=True)
    dense = torch.randn(len(lengths), columns, results, dtype=dtype, requires_grad=True)
    bias = torch.randn(len(lengths), results, dtype=dtype, requires_grad=True)
    expected = torch.cat(
        [
            *(s @ m + b for s, m, b in zip(sequences(x, offsets), dense, bias, strict=True)),
            x[:0, :1].expand(0, results),
        ]
    )
    found = recsys_ops.jagged_dense_bmm(x, offsets, dense, bias)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, dense, bias), cotangent, allow_unused=True)
    got = torch.autograd.grad(found, (x, dense, bias), cotangent)
    for one, other, leaf in zip(got, wanted, (x, dense, bias), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(leaf) if other is None else other)
    without = recsys_ops.jagged_dense_bmm(x, offsets, dense.mT.contiguous().mT)
    torch.testing.assert_close(without + bias.repeat_interleave(offsets.diff(), 0), expected)


A, B = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 3, 3])


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def concat(a: Tensor, b: Tensor) -> Tensor:
    return recsys_ops.jagged_concat(a, A, b, B)[0]


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    return recsys_ops.jagged_split(values, A + B, A)


def bmm(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
    return recsys_ops.jagged_dense_bmm(x, A, dense, bias)


CALLS: list[tuple[Callable[..., Any], list[tuple[int, ...]]]] = [
    (concat, [(3, 2), (3, 2)]),
    (split, [(6, 2)]),
    (bmm, [(3, 2), (3, 2, 4), (3, 4)]),
]


@pytest.mark.parametrize(("function", "shapes"), CALLS)
def test_gradients(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    leaves = [leaf(*shape) for shape in shapes]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("function", "shapes"), CALLS)
def test_compiles_as_one_graph(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    leaves = [leaf(*shape) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = function(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    total = [sum(t.square().sum() for t in ([r] if isinstance(r, Tensor) else r)) for r in (expected, found)]
    torch.testing.assert_close(torch.autograd.grad(total[1], leaves), torch.autograd.grad(total[0], leaves))


X, O2 = torch.zeros(3, 2), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: recsys_ops.jagged_concat(X, O2, torch.zeros(3, 4), O2),
            ValueError,
            r"jagged_concat: expected b of shape \[Lb, 2\], got \[3, 4\]",
        ),
        (
            lambda: recsys_ops.jagged_concat(X, O2, X.double(), O2),
            TypeError,
            "jagged_concat: expected b of the dtype of a, float32, got float64",
        ),
        (
            lambda: recsys_ops.jagged_concat(X, O2, X, torch.tensor([0, 3])),
            ValueError,
            r"jagged_concat: expected b_offsets of shape \[3\], got \[2\]",
        ),
        (
            lambda: recsys_ops.jagged_concat(X, O2.float(), X, O2),
            TypeError,
            "jagged_concat: expected a_offsets of dtype int64 or int32, got float32",
        ),
        (
            lambda: recsys_ops.jagged_concat(X, torch.tensor([0, 1, 2]), X, O2),
            RuntimeError,
            "jagged_concat: expected a_offsets that start at 0, never decrease and end at 3, got 0 to 2",
        ),
        (
            lambda: recsys_ops.jagged_split(X, O2, torch.tensor([2, 0])),
            RuntimeError,
            "jagged_split: expected lengths_or_offsets of at most the rows of each sequence, got 2 of 1",
        ),
        (
            lambda: recsys_ops.jagged_split(X, O2, torch.zeros(5, dtype=torch.int64)),
            ValueError,
            r"jagged_split: expected lengths_or_offsets of shape \[2\] or \[3\], got \[5\]",
        ),
        (
            lambda: recsys_ops.jagged_split(X, O2, -1),
            ValueError,
            "jagged_split: expected lengths_or_offsets of at least 0, got -1",
        ),
        (
            lambda: recsys_ops.jagged_last_rows(O2, 2),
            RuntimeError,
            "jagged_last_rows: expected lengths of at most the rows of each sequence, got 2 of 1",
        ),
        (
            lambda: recsys_ops.jagged_dense_bmm(X, O2, torch.zeros(2, 3, 4)),
            ValueError,
            r"jagged_dense_bmm: expected dense of shape \[2, 2, N\], got \[2, 3, 4\]",
        ),
        (
            lambda: recsys_ops.jagged_dense_bmm(X, O2, torch.zeros(2, 2, 4), torch.zeros(4)),
            ValueError,
            r"jagged_dense_bmm: expected bias of shape \[2, 4\], got \[4\]",
        ),
        (
            lambda: recsys_ops.jagged_dense_bmm(X, O2, torch.zeros(2, 2, 4).half()),
            TypeError,
            "jagged_dense_bmm: expected dense of the dtype of x, float32, got float16",
        ),
    ],
)
def test_says_what_is_wrong(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

"""Calls of the embedding bag that must be refused, and what the message must say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_ops.testing import BadInput, Inputs


def _bad(name: str, message: str, error: type[Exception] = ValueError, **changed: Any) -> BadInput:
    """Two bags, [1, 2] and [3, 0], of a table [5, 3], but for what is changed; a callable draws its value."""

    def build(draw: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "input": torch.tensor([1, 2, 3, 0], device=draw.device),
            "weight": draw.normal(5, 3),
            "offsets": torch.tensor([0, 2], device=draw.device),
            "mode": "sum",
        }
        for argument, value in changed.items():
            value = value(draw) if callable(value) else value
            arguments[argument] = value.to(draw.device) if isinstance(value, Tensor) else value
        return arguments

    return BadInput(name, build, error, message)


def _integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


BAD_INPUTS = (
    _bad("weight of one dimension", r"weight of shape \[R, D\], got \[5\]", weight=lambda d: d.normal(5)),
    _bad("weight of integers", "weight of dtype .* got int64", TypeError, weight=torch.ones(5, 3).long()),
    _bad("input of floats", "input of dtype int64 or int32, got float32", TypeError, input=torch.ones(4)),
    _bad(
        "input of three dimensions", r"\[N\] or \[B, L\], got \[1, 2, 2\]", input=torch.ones(1, 2, 2).long()
    ),
    _bad("input without offsets", r"offsets with input of shape \[N\], got None", offsets=None),
    _bad("two-dimensional input with offsets", "offsets=None with input", input=torch.ones(2, 2).long()),
    _bad(
        "offsets of floats", "offsets of dtype int64 or int32, got float32", TypeError, offsets=torch.zeros(2)
    ),
    _bad(
        "offsets of two dimensions",
        r"offsets of shape \[B\], got \[1, 2\]",
        offsets=_integers(0, 2).view(1, 2),
    ),
    _bad(
        "no last offset",
        r"offsets of shape \[B \+ 1\], got \[0\]",
        offsets=_integers(),
        include_last_offset=True,
    ),
    _bad("offsets that start late", r"offsets\[0\] = 0, got 1", RuntimeError, offsets=_integers(1, 2)),
    _bad(
        "offsets that decrease",
        r"never decrease, got offsets\[1\] = 3, offsets\[2\] = 2",
        RuntimeError,
        offsets=_integers(0, 3, 2),
    ),
    _bad(
        "offsets past the end", r"the 4 indices, got offsets\[-1\] = 5", RuntimeError, offsets=_integers(0, 5)
    ),
    _bad("unknown mode", r"mode to be one of \('sum', 'mean', 'max'\), got 'median'", mode="median"),
    _bad("unknown bounds", r"bounds to be one of \('error', 'drop'\), got 'wrap'", bounds="wrap"),
    _bad("sparse maximum", "sparse=False with mode='max'", mode="max", sparse=True),
    _bad("scaled maximum", "scale_grad_by_freq=False with mode='max'", mode="max", scale_grad_by_freq=True),
    _bad("padding above the table", r"padding_idx in \[-5, 5\), got 5", padding_idx=5),
    _bad("padding below the table", r"padding_idx in \[-5, 5\), got -6", padding_idx=-6),
    _bad(
        "weighted maximum",
        "per_sample_weights=None with mode='max'",
        NotImplementedError,
        mode="max",
        per_sample_weights=lambda d: d.normal(4),
    ),
    _bad("too few weights", r"shape of input, \[4\], got \[3\]", per_sample_weights=lambda d: d.normal(3)),
    _bad(
        "weights of another dtype",
        "dtype of weight, float32, got float64",
        TypeError,
        per_sample_weights=torch.ones(4, dtype=torch.float64),
    ),
    *(
        _bad(f"{what}, {mode}", message, RuntimeError, mode=mode, input=ids, **renormalized)
        for mode in ("sum", "mean", "max")
        for renormalized in ({}, {"max_norm": 0.1})
        for what, ids, message in (
            (f"negative id{' with max_norm' if renormalized else ''}", _integers(1, 2, -1, 0), r"\[2\] = -1"),
            (
                f"id past the table{' with max_norm' if renormalized else ''}",
                _integers(1, 5, 3, 0),
                r"\[1\] = 5",
            ),
        )
    ),
    _bad("id in an empty table", r"in \[0, 0\), got indices\[0\] = 1", RuntimeError, weight=torch.ones(0, 3)),
)

"""Checks of arguments that several operators share, in one wording."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_ops._library import names_of

INTEGERS = (torch.int64, torch.int32)


def refuse_shape(op: str, argument: str, expected: str, tensor: Tensor) -> ValueError:
    """The error to raise for a tensor of another shape."""
    return ValueError(f"{op}: expected {argument} of shape {expected}, got {list(tensor.shape)}")


def check_integer_dtype(op: str, argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor is int64 or int32."""
    if tensor.dtype not in INTEGERS:
        raise TypeError(
            f"{op}: expected {argument} of dtype {names_of(INTEGERS)}, got {names_of([tensor.dtype])}"
        )

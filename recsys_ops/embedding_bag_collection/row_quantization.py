"""Row-wise quantisation of tables in eager PyTorch: the formats of the contract.

A row w [D] is kept as codes and two fp32 numbers, its scale and its offset:

    int8    uint8 [D]         q = round((w - offset) / scale) in [0, 255],  w' = q * scale + offset
    int4    uint8 [D / 2]     the same in [0, 15]; the low half of a byte is the even column
    fp8     float8_e4m3fn [D] q = w / scale rounded to e4m3,                w' = q * scale, offset 0

offset = min(w) and scale = (max(w) - min(w)) / 255 or / 15; for fp8 scale = max|w| / 448. Rows in
which all elements are equal (for fp8: zero) have scale 0 and codes 0. A row that holds an infinity
or NaN, or whose scale is beyond fp32, has scale NaN and codes 0: all of it becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "fp8")
FP8 = torch.float8_e4m3fn


def quantize_rows(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes, and scales and offsets [R, 2], of a table [R, D]; both contiguous.

    Raises:
        ValueError: for another format than these, or int4 where D is odd.

    Example:
        >>> import torch
        >>> codes, scales = quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 2.55]]), "int8")
        >>> codes
        tensor([[  0, 100, 200, 255]], dtype=torch.uint8)
    """
    if format not in FORMATS:
        raise ValueError(f"quantize_rows: expected format to be one of {FORMATS}, got {format!r}")
    if format == "int4" and weight.shape[1] % 2:
        raise ValueError(f"quantize_rows: expected int4 rows of even length, got {weight.shape[1]}")
    w = weight.float().contiguous()
    if format == "fp8":
        highest = torch.finfo(FP8).max
        scale = _finite_or_nan(_largest(w.abs()) / highest)
        codes = torch.where(scale > 0, w / scale, 0.0).clamp(-highest, highest).to(FP8)
        return codes, torch.cat([scale, torch.zeros_like(scale)], 1)
    levels = 255 if format == "int8" else 15
    offset = -_largest(-w)
    scale = _finite_or_nan((_largest(w) - offset) / levels)
    codes = torch.where(scale > 0, (w - offset) / scale, 0.0).round().clamp(0, levels).to(torch.uint8)
    if format == "int4":
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes, torch.cat([scale, offset], 1)


def dequantize_rows(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The table [R, D] that codes stand for, in the dtype of the scales."""
    scale, offset = scales[:, :1], scales[:, 1:]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    return codes.to(scale.dtype) * scale + offset


def _largest(w: Tensor) -> Tensor:
    """Of each row, [R, 1]; 0 in rows without columns."""
    return w.amax(1, keepdim=True) if w.shape[1] else w.new_zeros(len(w), 1)


def _finite_or_nan(scale: Tensor) -> Tensor:
    return torch.where(scale.isfinite(), scale, torch.nan)

"""Inputs that find mistakes: jagged lengths, skewed ids, awkward sizes, and odd layouts in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recsys_ops.testing.poison import poisoned

AWKWARD_LENGTHS = (0, 1, 31, 32, 33, 257)
AWKWARD_WIDTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 256, 257, 1024)


@dataclass(frozen=True)
class Inputs:
    """Draws inputs: the same ones for the same seed, on every device.

    Args:
        seed: of all that is drawn.
        dtype: of the floating-point tensors.
        device: where all tensors are.

    Example:
        >>> import torch
        >>> draw = Inputs(seed=0, dtype=torch.float16)
        >>> draw.normal(2, 3).dtype
        torch.float16
    """

    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values that fp32 can hold: in fp64 their sums hardly round, so the exact result is exact."""
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype)

    def ids(self, count: int, rows: int, law: str = "zipf", dtype: torch.dtype = torch.int64) -> Tensor:
        """Row numbers in [0, rows): ``"zipf"`` (a few very often), ``"uniform"``, or ``"equal"``."""
        if law == "equal":
            ids = torch.full((count,), rows // 2)
        elif law == "zipf" and rows > 0:
            ids = self._zipf(count, rows)
        else:
            ids = torch.randint(max(rows, 1), (count,), generator=self.generator)
        return ids.to(self.device, dtype)

    def lengths(self, count: int, mean: float, law: str = "zipf") -> list[int]:
        """Jagged lengths of about this mean, a quarter of them 0: ``"zipf"`` (few long) or ``"uniform"``."""
        longest = max(1, round(2 * mean))
        if law == "zipf":
            drawn = self._zipf(count, 2 * longest) + 1
        else:
            drawn = torch.randint(1, longest + 1, (count,), generator=self.generator)
        empty = torch.rand(count, generator=self.generator) < 0.25
        return drawn.masked_fill(empty, 0).tolist()

    def offsets(self, lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Where sequences of these lengths start, and where the last ends: [B + 1]."""
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, dtype)

    def _zipf(self, count: int, size: int) -> Tensor:
        """Integers in [0, size) of probability about 1 / (1 + i)."""
        uniform = torch.rand(count, generator=self.generator, dtype=torch.float64)
        return ((size + 1) ** uniform - 1).long().clamp(max=size - 1)


def _shifted(tensor: Tensor) -> Tensor:
    """Starts one element into its memory, where no vector load is aligned."""
    return poisoned(tensor, tensor.numel() + 1)[1:].view(tensor.shape)


def _every_second(tensor: Tensor) -> Tensor:
    """Elements with gaps between them."""
    return poisoned(tensor, *tensor.shape, 2)[..., 0]


def _columns(tensor: Tensor) -> Tensor:
    """Some of the columns of a wider tensor."""
    return poisoned(tensor, *tensor.shape[:-1], tensor.shape[-1] + 3)[..., 1:-2]


def _every_second_row(tensor: Tensor) -> Tensor:
    """Every second row of a longer tensor."""
    return poisoned(tensor, 2 * tensor.shape[0], *tensor.shape[1:])[1::2]


def _transposed(tensor: Tensor) -> Tensor:
    """Laid out with the first dimension innermost."""
    return poisoned(tensor, *reversed(tensor.shape)).permute(*reversed(range(tensor.dim())))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted,
    "every second element": _every_second,
    "columns of a wider tensor": _columns,
    "every second row": _every_second_row,
    "transposed": _transposed,
}


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values laid out otherwise in memory, NaN in the gaps (integers: a large number).

    Args:
        tensor: any shape; a scalar is given back as it is.
        layout: a key of ``LAYOUTS``.

    Example:
        >>> import torch
        >>> with_layout(torch.ones(2, 3), "transposed").stride()
        (1, 2)
    """
    if tensor.dim() == 0:
        return tensor
    return LAYOUTS[layout](tensor).copy_(tensor.detach())

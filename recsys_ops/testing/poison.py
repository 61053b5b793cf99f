"""Poisoned memory and guard bands: what is read before it is written, or out of bounds, shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recsys_ops.testing.tolerances import bits, first_difference

BAND = 256  # bytes on each side; a multiple of every alignment that kernels rely on


def poisoned(like: Tensor, *shape: int) -> Tensor:
    """New memory that holds NaN, or integers too large to be an index; dtype and device of ``like``."""
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return like.new_full(shape, torch.nan)
    return like.new_full(shape, True if like.dtype == torch.bool else torch.iinfo(like.dtype).max)


class Guard:
    """A tensor in the middle of a larger, poisoned buffer, which remembers how all of it looked.

    Args:
        tensor: copied with its strides, and with what lies in the gaps between its elements.

    Example:
        >>> import torch
        >>> guard = Guard(torch.zeros(4))
        >>> torch.as_strided(guard.tensor, (1,), (1,), 64 + 4).fill_(1.0)
        tensor([1.])
        >>> guard.violation()
        'written past its end'
    """

    def __init__(self, tensor: Tensor) -> None:
        span = _span(tensor)
        band = BAND // tensor.element_size()
        self._buffer = poisoned(tensor, span + 2 * band)
        self._buffer[band : band + span] = tensor.detach().as_strided((span,), (1,))
        self._parts = {
            "written before its start": self._buffer[:band],
            "written past its end": self._buffer[band + span :],
            "written to": self._buffer[band : band + span],
        }
        self._before = {what: bits(part).clone() for what, part in self._parts.items()}
        self.tensor = self._buffer.as_strided(tensor.shape, tensor.stride(), band)

    def violation(self, may_change: bool = False) -> str | None:
        """What happened to the buffer that should not have, if anything did."""
        for what, part in self._parts.items():
            allowed = may_change and what == "written to"
            if not allowed and first_difference(bits(part), self._before[what]):
                return what
        return None


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let PyTorch use its deterministic algorithms inside the block, where it has them."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[list[str]]:
    """Make every uninitialised tensor hold NaN (integers: their largest number) inside the block.

    That holds for tensors which kernels in C++ and CUDA allocate, too. Those that Python allocates
    with ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` also lie between
    guard bands; writes to the bands are in the list when the block ends.

    Example:
        >>> import torch
        >>> with poisoned_memory() as violations:
        ...     print(torch.empty(2))
        tensor([nan, nan])
        >>> violations
        []
    """
    violations: list[str] = []
    guards: list[Guard] = []
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory

    def guarding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.requires_grad:
                return tensor
            guards.append(Guard(tensor))
            return guards[-1].tensor

        return allocate_guarded

    settings.fill_uninitialized_memory = True
    try:
        with (
            deterministic_algorithms(),
            mock.patch.object(torch, "empty", guarding(torch.empty)),
            mock.patch.object(torch, "empty_like", guarding(torch.empty_like)),
            mock.patch.object(Tensor, "new_empty", guarding(Tensor.new_empty)),
        ):
            yield violations
    finally:
        settings.fill_uninitialized_memory = fill
    for guard in guards:
        if violation := guard.violation(may_change=True):
            violations.append(f"a fresh tensor of shape {list(guard.tensor.shape)} is {violation}")


def _span(tensor: Tensor) -> int:
    """How many elements lie from the first of a tensor to the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

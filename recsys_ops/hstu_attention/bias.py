"""The relative bias of HSTU attention: weights of buckets of distances in position and in time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FUNCTIONS = ("log", "sqrt")
_NEVER = 2**63 - 1  # no difference of times reaches it


@dataclass(frozen=True)
class TimeBucketing:
    """The bucket of a difference of times: ``trunc(f(max(|dt| / unit, 1)) / divisor)``.

    The last bucket takes all that is longer. Differences are whole numbers, so buckets are found
    by comparing with whole numbers, and are the same on every backend.

    Args:
        function: ``"log"`` (natural) or ``"sqrt"`` (of ``|dt| / unit``, without the maximum).
        unit: of time, in that of the timestamps; positive.
        divisor: width of a bucket after the function; positive.

    Raises:
        ValueError: an argument is not as above.

    The defaults are those of HSTU's paper code, seconds in 129 buckets.

    Example:
        >>> TimeBucketing().boundaries(4)
        (2, 2, 3)
        >>> TimeBucketing("sqrt", unit=60, divisor=1).boundaries(4)
        (60, 240, 540)
    """

    function: str = "log"
    unit: float = 1.0
    divisor: float = 0.301

    def __post_init__(self) -> None:
        if self.function not in _FUNCTIONS:
            raise ValueError(
                f"TimeBucketing: expected function to be one of {_FUNCTIONS}, got {self.function!r}"
            )
        for name in ("unit", "divisor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"TimeBucketing: expected {name} to be positive, got {getattr(self, name)!r}"
                )

    def boundaries(self, num_buckets: int) -> tuple[int, ...]:
        """The least |dt| of each bucket after the first, ascending: num_buckets - 1 of them."""
        return tuple(map(self._least, range(1, num_buckets)))

    def _least(self, bucket: int) -> int:
        value = bucket * self.divisor
        try:
            least = math.ceil(self.unit * (math.exp(value) if self.function == "log" else value**2))
        except OverflowError:
            return _NEVER
        # Rounding may be off by one either way: what counts is the formula itself.
        while least > 0 and self._bucket(least - 1) >= bucket:
            least -= 1
        while least < _NEVER and self._bucket(least) < bucket:
            least += 1
        return min(least, _NEVER)

    def _bucket(self, dt: int) -> int:
        scaled = dt / self.unit
        return int(
            (math.log(max(scaled, 1.0)) if self.function == "log" else math.sqrt(scaled)) / self.divisor
        )


@dataclass(frozen=True)
class RelativeBias:
    """What ``recsys_ops.hstu_attention`` adds to each score: a weight for the distance, one for the time.

    ``bias[i, j] = position_weight[c + j - i] + time_weight[bucket(t_i - t_j)]``, where c is the
    middle of ``position_weight``, whose ends take all that is further. Positions are those in the
    sequence; a target counts as if it came next after the history, plus its place in its group, so
    that a score does not depend on which candidates stand beside. t_j is the key's timestamp; t_i is
    that of the token after the row, the time at which what comes next is asked for; of targets, and
    of a sequence's last token, their own. This is the bias of HSTU's paper code, in its formula
    ``RelativeBucketedTimeAndPositionBasedBias``; alpha does not multiply it.

    Args:
        position_weight: [P] or, per head, [H, P] with odd P; 2 N - 1 covers every distance in sequences
            of N tokens. Differentiable. None for no such bias.
        time_weight: [T] or [H, T], one for each bucket; differentiable. Needs ``timestamps``.
        timestamps: int32 or int64 [L], of each key, in any unit.
        bucketing: ``"log"``, ``"sqrt"``, a ``TimeBucketing``, or an int64 tensor [T - 1]: the
            least |dt| of each bucket after the first, ascending.
        next_timestamps: False lets t_i be the row's own timestamp.

    Raises:
        ValueError: there is neither weight, or only one of ``time_weight`` and ``timestamps``.

    Example:
        >>> import torch
        >>> bias = RelativeBias(torch.zeros(2 * 50 - 1), torch.zeros(129), torch.tensor([10, 20]))
        >>> bias.bucketing
        'log'
    """

    position_weight: Tensor | None = None
    time_weight: Tensor | None = None
    timestamps: Tensor | None = None
    bucketing: str | TimeBucketing | Tensor = "log"
    next_timestamps: bool = True

    def __post_init__(self) -> None:
        if self.position_weight is None and self.time_weight is None:
            raise ValueError("RelativeBias: expected position_weight or time_weight, got neither")
        if (self.time_weight is None) != (self.timestamps is None):
            given, missing = ("time_weight", "timestamps")
            if self.time_weight is None:
                given, missing = missing, given
            raise ValueError(f"RelativeBias: expected {missing} with {given}, got None")
        if isinstance(self.bucketing, str) and self.bucketing not in _FUNCTIONS:
            raise ValueError(
                f"RelativeBias: expected bucketing to be one of {_FUNCTIONS}, a TimeBucketing or a tensor, "
                f"got {self.bucketing!r}"
            )


def boundaries_of(bucketing: str | TimeBucketing | Tensor, num_buckets: int, device: torch.device) -> Tensor:
    """The boundaries of a bias's buckets, int64 [num_buckets - 1]."""
    if isinstance(bucketing, Tensor):
        return bucketing.long().contiguous()
    if isinstance(bucketing, str):
        bucketing = TimeBucketing(bucketing)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.tensor(bucketing.boundaries(num_buckets), dtype=torch.int64, device=device)
    return _kept(bucketing, num_buckets, device)


@functools.lru_cache(maxsize=64)
def _kept(bucketing: TimeBucketing, num_buckets: int, device: torch.device) -> Tensor:
    """Kept, so that a call copies nothing to a GPU and can be captured in a CUDA graph."""
    return torch.tensor(bucketing.boundaries(num_buckets), dtype=torch.int64, device=device)

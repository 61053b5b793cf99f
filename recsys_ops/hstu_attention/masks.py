"""Which keys a row of HSTU attention sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HSTUMask:
    """The keys that each row of ``recsys_ops.hstu_attention`` sees; all of it combines, at run time.

    A sequence of n tokens is a contextual prefix of C tokens, then the history, then T targets. The
    history is numbered 1, 2, … (0, 1, … without a prefix), the prefix 0, and every target as if it
    came next after the history. With these numbers:

    - a row of the history sees itself and, causally, all smaller numbers; else all but the targets
    - a row of the prefix sees the whole prefix and the whole history
    - a target sees what a row after the history would see, and the targets of its own group up to
      itself (if not causal, all of its group); never another group
    - ``window`` hides keys whose number is further than that away, from the prefix's rows none;
      ``full_window_tail`` frees the targets and that many last rows of the history from it
    - ``intervals`` hides, of all that, what is in none of a row's ranges

    The formulas are those of ``_get_valid_attn_mask`` in Generative Recommenders, with NVIDIA's
    groups of targets. Without ``causal`` nothing but targets sees targets.

    Args:
        causal: whether a row sees no later history.
        window: most distant number seen, at least 1; None for all.
        num_contextual: tokens of the prefix: a number for all sequences, or int32 or int64 [B]. A
            sequence too short for it and its targets has a shorter one.
        num_targets: targets at the end, likewise; not more than there are tokens.
        target_group_size: targets that see each other, at least 1.
        full_window_tail: last rows of the history without a window, besides the targets; 0 for a
            window of the targets, too. Needs ``window``.
        intervals: int32 or int64 [L, R, 2], for each row of q R >= 1 ranges [begin, end) of positions
            in its sequence; they may overlap, be empty, or reach past the sequence.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> HSTUMask(window=128, num_contextual=3).causal
        True
    """

    causal: bool = True
    window: int | None = None
    num_contextual: int | Tensor | None = None
    num_targets: int | Tensor | None = None
    target_group_size: int = 1
    full_window_tail: int = 0
    intervals: Tensor | None = None

    def __post_init__(self) -> None:
        smallest = {
            "window": 1,
            "num_contextual": 0,
            "num_targets": 0,
            "target_group_size": 1,
            "full_window_tail": 0,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ValueError(f"HSTUMask: expected {name} to be at least {least}, got {value}")
        if self.full_window_tail and self.window is None:
            raise ValueError(
                "HSTUMask: expected a window with full_window_tail, "
                f"got window=None, full_window_tail={self.full_window_tail}"
            )

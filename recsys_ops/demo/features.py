"""What the models that are accelerated see of a purchase: the held-out split, and the tensors of a batch.

A purchase is a position in ``Interactions``; its history is what its customer bought
at earlier positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_ops.demo.data import MIN_HISTORY, Interactions

DENSE_FEATURES = 6
_HISTORY, _RECENT = 50, 16  # purchases back, in the long bags and in the short ones
_DECAY = 0.8  # of a weight, per purchase since
_DAY = 86_400.0


class Split(NamedTuple):
    """Positions to train on, and each customer's last purchase where it is held out."""

    train: np.ndarray  # [T] int64, every one with a history
    held_out: np.ndarray  # [H] int64


def leave_last_out(data: Interactions) -> Split:
    """Hold out the last purchase of every customer with at least ``MIN_HISTORY``.

    The others, but for the first of each customer, which has no history, are for training.
    """
    starts, lengths = data.starts[:-1], np.diff(data.starts)
    held_out = (starts + lengths - 1)[lengths >= MIN_HISTORY]
    train = np.ones(len(data.item), bool)
    train[starts] = False
    train[held_out] = False
    return Split(train.nonzero()[0], held_out)


class History(NamedTuple):
    """B customers at the moment of a purchase: the arguments of ``HistoryPooling``."""

    items: Tensor  # [N] int64, up to 50 per bag, oldest first
    offsets: Tensor  # [B] int64
    weights: Tensor  # [N] float32, of sum 1 in each bag
    pairs: Tensor  # [B, 16] int64, hashes of consecutive items, newest first, then 0
    recent: Tensor  # [B, 16] int64, 1 + item, newest first, then 0
    customer_month: Tensor  # [B, 1] int64, hash of the two


class Offers(NamedTuple):
    """B items offered to customers at the moment of a purchase: the arguments of ``DLRM``."""

    dense: Tensor  # [B, DENSE_FEATURES] float32
    customer: Tensor  # [B, 1] int64
    customer_month: Tensor  # [B, 1] int64, hash of the two
    item: Tensor  # [B, 1] int64, the one offered
    basket: Tensor  # [N] int64, items already in the invoice, up to 50 per bag
    offsets: Tensor  # [B] int64, of the baskets
    weights: Tensor  # [N] float32, of sum 1 in each basket
    crosses: Tensor  # [B, 16] int64, hashes of the item with each recent one, newest first, then 0


def history_batch(data: Interactions, positions: np.ndarray, buckets: int) -> History:
    """What is known just before the purchases at ``positions``, [B] int64."""
    first = data.starts[data.user[positions]]
    recent = _recent(data, positions, first)
    pairs = np.zeros_like(recent)
    pairs[:, :-1] = np.where(recent[:, 1:] > 0, hash_pair(recent[:, 1:], recent[:, :-1], buckets), 0)
    return History(
        *_bags(data, np.maximum(first, positions - _HISTORY), positions, _DECAY),
        torch.from_numpy(pairs),
        torch.from_numpy(recent),
        _customer_month(data, positions, buckets),
    )


def offers_batch(data: Interactions, positions: np.ndarray, items: np.ndarray, buckets: int) -> Offers:
    """``items`` [B] int64 offered just before the purchases at ``positions`` [B] int64."""
    user, time = data.user[positions], data.time[positions]
    first = data.starts[user]
    basket_start = np.maximum(data.basket_starts[positions], positions - _HISTORY)
    recent = _recent(data, positions, first)
    crosses = np.where(recent > 0, hash_pair(recent, items[:, None], buckets), 0)
    day, week = (2 * np.pi * time / period for period in (_DAY, 7 * _DAY))
    counts = [np.log1p(positions - start) / 4 for start in (first, basket_start)]
    dense = np.stack([*counts, np.sin(day), np.cos(day), np.sin(week), np.cos(week)], axis=1)
    return Offers(
        torch.from_numpy(dense.astype(np.float32)),
        torch.from_numpy(user[:, None]),
        _customer_month(data, positions, buckets),
        torch.from_numpy(items[:, None]),
        *_bags(data, basket_start, positions, decay=1.0),
        torch.from_numpy(crosses),
    )


def hash_pair(first: np.ndarray, second: np.ndarray, buckets: int) -> np.ndarray:
    """A row in [1, buckets) for each pair of whole numbers, by multiplicative hashing; row 0 is padding."""
    a, b = (numbers.astype(np.int64).astype(np.uint64) for numbers in (first, second))
    mixed = a * np.uint64(0x9E3779B97F4A7C15) + b
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(32)) % np.uint64(buckets - 1)).astype(np.int64) + 1


def _bags(
    data: Interactions, starts: np.ndarray, ends: np.ndarray, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The items from each start up to its end, where the bags start, and the weights.

    A weight is the logarithm of 1 + quantity, times ``decay`` for each purchase since,
    over the sum of those in the bag.
    """
    lengths = ends - starts
    bag = np.repeat(np.arange(len(starts)), lengths)
    offsets = np.cumsum(lengths) - lengths
    positions = np.arange(len(bag)) + (starts - offsets)[bag]
    weights = np.log1p(data.quantity[positions]) * decay ** (ends[bag] - 1 - positions)
    weights /= np.bincount(bag, weights, len(starts))[bag]
    return (
        torch.from_numpy(data.item[positions]),
        torch.from_numpy(offsets),
        torch.from_numpy(weights.astype(np.float32)),
    )


def _recent(data: Interactions, positions: np.ndarray, first: np.ndarray) -> np.ndarray:
    """1 + item of the 16 purchases before each position, newest first, then 0: int64 [B, 16]."""
    before = positions[:, None] - 1 - np.arange(_RECENT)
    return np.where(before >= first[:, None], data.item[np.maximum(before, 0)] + 1, 0)


def _customer_month(data: Interactions, positions: np.ndarray, buckets: int) -> Tensor:
    month = data.time[positions] // (30 * _DAY)
    return torch.from_numpy(hash_pair(data.user[positions], month, buckets)[:, None])

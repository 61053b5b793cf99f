"""Customers' whole histories as jagged sequences, and the loss of predicting what comes next in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_ops.demo.data import Interactions
from recsys_ops.demo.features import Split


class Sequences(NamedTuple):
    """B histories of L purchases in all, one after the other, each oldest first."""

    items: Tensor  # [L] int64
    offsets: Tensor  # [B + 1] int64
    timestamps: Tensor  # [L] int64, seconds
    request_timestamps: Tensor  # [B] int64, when what follows each history is asked for
    targets: Tensor  # [L] int64, the item bought next after each


def last_trained(data: Interactions, split: Split) -> np.ndarray:
    """The last position to train on of each customer who has one, int64 [B]."""
    customers = data.user[split.train]
    return split.train[np.diff(customers, append=-1) != 0]


def history_lengths(data: Interactions, positions: np.ndarray) -> np.ndarray:
    """How many purchases their customers had made before those at ``positions``: int64 like it."""
    return positions - data.starts[data.user[positions]]


def sequences_before(data: Interactions, positions: np.ndarray) -> Sequences:
    """All that is known just before the purchases at ``positions`` [B], but for the targets.

    Every purchase of a history predicts the next, the last that at its position.
    """
    lengths = history_lengths(data, positions)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    read = np.arange(offsets[-1]) + np.repeat(positions - offsets[1:], lengths)
    seconds = np.floor(data.time).astype(np.int64)
    return Sequences(
        *map(
            torch.from_numpy,
            (data.item[read], offsets, seconds[read], seconds[positions], data.item[read + 1]),
        )
    )


def batches_by_tokens(lengths: np.ndarray, tokens: int, order: np.ndarray) -> Iterator[np.ndarray]:
    """Indices in ``order``, as many at a time as have ``tokens`` together; one that has more alone."""
    start, total = 0, 0
    for place, length in enumerate(lengths[order]):
        if place > start and total + length > tokens:
            yield order[start:place]
            start, total = place, 0
        total += length
    if start < len(order):
        yield order[start:]


class Negatives(NamedTuple):
    """Items drawn in proportion to how often they were bought, against which a step's targets are scored."""

    items: Tensor  # [S] int64
    log_expected: Tensor  # [I], of each item the logarithm of how often it is expected among them


def draw_negatives(counts: np.ndarray, size: int, random: np.random.Generator) -> Negatives | None:
    """``size`` negatives, with replacement; None if that is no fewer than there are items.

    Args:
        counts: [I], how often each item was bought; one never bought counts as bought once.
    """
    if size >= len(counts):
        return None
    shares = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
    drawn = random.choice(len(counts), size, p=shares)
    return Negatives(torch.from_numpy(drawn), torch.from_numpy(np.log(size * shares).astype(np.float32)))


def next_item_loss(
    states: Tensor, targets: Tensor, items: Tensor, bias: Tensor, negatives: Negatives | None
) -> Tensor:
    """The mean cross-entropy of the targets by softmax over all items, or over negatives and the target.

    Sampled scores have the logarithm of their expected count taken away, so that many
    negatives teach what all items do (Bengio and Senecal, "Adaptive Importance Sampling", 2008).

    Args:
        states: [L, E].
        targets: [L] int64.
        items: [I, E], the embedding of every item.
        bias: [I].
        negatives: None for all items.
    """
    if negatives is None:
        return torch.nn.functional.cross_entropy(torch.addmm(bias, states, items.T), targets)
    drawn = negatives.items
    corrected = bias - negatives.log_expected
    own = (states * items[targets]).sum(1) + corrected[targets]  # [L]
    others = torch.addmm(corrected[drawn], states, items[drawn].T)  # [L, S]
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    return (torch.logaddexp(own, others.logsumexp(1)) - own).mean()

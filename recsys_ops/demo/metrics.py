"""Ranking metrics against all items, and the popularity baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys_ops.demo.data import Interactions
from recsys_ops.demo.features import Split

K = 10


@dataclass(frozen=True)
class Ranking:
    """How well held-out purchases were ranked among all items, averaged over customers."""

    hit_rate: float  # HR@10: the share of them among the first ten
    ndcg: float  # NDCG@10: 1 / log2(1 + rank) for those, 0 for the others
    customers: int


def ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rank of each target among all items, from 1; among equal scores it comes last.

    Args:
        scores: [B, I].
        targets: [B] int64, a column of each row.

    Example:
        >>> ranks(np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.1]]), np.array([2, 0]))
        array([2, 2])
    """
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    return (~(scores < own)).sum(axis=1)  # so that a NaN never looks like a hit


def ranking(target_ranks: np.ndarray) -> Ranking:
    """HR@10 and NDCG@10 of ranks [B], counted from 1.

    Example:
        >>> ranking(np.array([1, 3, 11, 40]))
        Ranking(hit_rate=0.5, ndcg=0.375, customers=4)
    """
    hit = target_ranks <= K
    gains = np.where(hit, 1 / np.log2(1 + target_ranks), 0)
    return Ranking(float(hit.mean()), float(gains.mean()), len(target_ranks))


def popularity(data: Interactions, split: Split, held_out: np.ndarray) -> Ranking:
    """The metrics of recommending to everybody what was bought most often, held-out purchases aside.

    Args:
        held_out: the positions to rank, [B] int64, among those of ``split.held_out``.
    """
    counts = np.bincount(np.delete(data.item, split.held_out), minlength=len(data.item_names))
    return ranking((counts >= counts[data.item[held_out], None]).sum(axis=1))

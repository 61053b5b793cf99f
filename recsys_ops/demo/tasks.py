"""The tasks of the models that are accelerated: model, batches, loss, and how it ranks held-out purchases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys_ops.demo.data import Interactions
from recsys_ops.demo.features import Split, history_batch, offers_batch
from recsys_ops.demo.metrics import Ranking, popularity, ranks
from recsys_ops.demo.models import DLRM, CollectionDLRM, HistoryPooling

Progress = Callable[[str, int, int], object]  # what is done, how much of it, of how much
Inputs = tuple[Tensor, ...]
TABLE_ACCUMULATOR = 1e-8  # what Adagrad's sums start from, of tables
_CHUNK = 512  # customers scored at once by the history model


@dataclass(frozen=True)
class Settings:
    """How large the demo is; the default takes minutes on two cores."""

    steps: int = 300
    history_batch: int = 1024  # purchases per step
    history_dim: int = 64
    dlrm_batch: int = 1024  # purchases per step, each with ``negatives`` items that were not bought
    dlrm_dim: int = 32
    negatives: int = 3
    buckets: int = 1 << 18  # rows of each table of hashed pairs
    history_customers: int = 4500  # whose held-out purchase is ranked
    dlrm_customers: int = 300
    sequence_epochs: int = 3  # of the sequence recommenders; 0 leaves them out
    sequence_purchases: int = 500_000  # of an epoch; customers are drawn where all have more
    sequence_tokens: int = 2048  # purchases per step, more only where one history has more
    sequence_dim: int = 64
    sequence_negatives: int = 512  # drawn for each step; a softmax over all items if there are no more
    sequence_short: int = 200  # purchases of the longest history that is timed padded
    rounds: int = 20  # in which a swap is timed against what it replaces
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    name: str
    description: str
    build: Callable[[], nn.Module]  # the plain model, freshly initialized
    batches: Callable[[], Iterator[tuple[Inputs, Tensor]]]  # one per step, the same in every run
    loss: Callable[[Tensor, Tensor], Tensor]
    rank: Callable[[nn.Module, Progress], np.ndarray]  # of the held-out purchases, from 1
    popularity: Ranking
    table_learning_rate: float
    settings: Settings
    # A copy with its tables in one collection; None where weights and a maximum exclude that.
    collect: Callable[[Any], nn.Module] | None = None


def history_task(data: Interactions, split: Split, settings: Settings) -> Task:
    """Which item a customer buys next, by softmax over all items."""
    held_out = sample(split.held_out, settings.history_customers, settings.seed)
    batch = min(settings.history_batch, len(split.train))

    def batches() -> Iterator[tuple[Inputs, Tensor]]:
        random = np.random.default_rng(settings.seed)
        for _ in range(settings.steps):
            positions = random.choice(split.train, batch, replace=False)
            yield history_batch(data, positions, settings.buckets), torch.from_numpy(data.item[positions])

    def rank(model: nn.Module, progress: Progress) -> np.ndarray:
        found = []
        for done in range(0, len(held_out), _CHUNK):
            progress("rank", done, len(held_out))
            chunk = held_out[done : done + _CHUNK]
            scores = model(*history_batch(data, chunk, settings.buckets))
            found.append(ranks(scores.numpy(), data.item[chunk]))
        progress("rank", len(held_out), len(held_out))
        return np.concatenate(found)

    return Task(
        "History pooling",
        f"Predicts which of {len(data.item_names):,} items a customer buys next, from up to 50 purchases "
        "before: a bag of items weighted by the logarithm of their quantities and by recency, a mean over "
        "hashed pairs of consecutive items, a maximum over recent items, and the hashed customer and month. "
        f"Softmax over all items, {batch:,} purchases per step.",
        lambda: HistoryPooling(len(data.item_names), settings.buckets, settings.history_dim),
        batches,
        nn.functional.cross_entropy,
        rank,
        popularity(data, split, held_out),
        0.05,
        settings,
    )


def dlrm_task(data: Interactions, split: Split, settings: Settings) -> Task:
    """Whether a customer buys the item offered, against items drawn at random."""
    held_out = sample(split.held_out, settings.dlrm_customers, settings.seed)
    batch = min(settings.dlrm_batch, len(split.train))
    num_items = len(data.item_names)

    def batches() -> Iterator[tuple[Inputs, Tensor]]:
        random = np.random.default_rng(settings.seed)
        for _ in range(settings.steps):
            positions = random.choice(split.train, batch, replace=False)
            negatives = random.integers(num_items, size=batch * settings.negatives)
            items = np.concatenate([data.item[positions], negatives])
            offered_at = np.tile(positions, 1 + settings.negatives)
            bought = torch.zeros(len(items))
            bought[:batch] = 1
            yield offers_batch(data, offered_at, items, settings.buckets), bought

    def rank(model: nn.Module, progress: Progress) -> np.ndarray:
        found = []
        for done, position in enumerate(held_out):
            progress("rank", done, len(held_out))
            offers = offers_batch(data, np.full(num_items, position), np.arange(num_items), settings.buckets)
            found.append(ranks(model(*offers).numpy()[None], data.item[position : position + 1]))
        progress("rank", len(held_out), len(held_out))
        return np.concatenate(found)

    return Task(
        "DLRM",
        "Predicts whether a customer buys the item offered, from dense features, the invoice so far as a bag "
        "of items weighted by the logarithm of their quantities, a mean over hashed pairs of the item with "
        "each recent one, and bags of one for the item, the customer, and the hashed customer and month; all "
        "dot products of these, and an MLP. "
        f"{batch:,} purchases per step, each with {settings.negatives} items drawn at random.",
        lambda: DLRM(len(data.user_names), num_items, settings.buckets, settings.dlrm_dim),
        batches,
        nn.functional.binary_cross_entropy_with_logits,
        rank,
        popularity(data, split, held_out),
        0.1,
        settings,
        lambda plain: CollectionDLRM(plain, 0.1, TABLE_ACCUMULATOR),
    )


def sample(positions: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the positions, in order."""
    if len(positions) <= most:
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, most, replace=False))

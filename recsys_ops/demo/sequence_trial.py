"""Trains HSTU with and without its bias and a softmax transformer on whole histories; times HSTU padded."""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass

import numpy as np
import torch

from recsys_ops.demo.data import Interactions
from recsys_ops.demo.features import Split
from recsys_ops.demo.metrics import Ranking, popularity, ranking, ranks
from recsys_ops.demo.sequence_models import HEADS, PaddedHSTU, SequenceRecommender, Transformer, hstu
from recsys_ops.demo.sequences import (
    Negatives,
    Sequences,
    batches_by_tokens,
    draw_negatives,
    history_lengths,
    last_trained,
    sequences_before,
)
from recsys_ops.demo.tasks import Progress, Settings, sample
from recsys_ops.nn import HSTU
from recsys_ops.timing import Ratio, speedup

NAME = "Sequences"
BIASED, UNBIASED, SOFTMAX = "HSTU with bias", "HSTU without bias", "transformer"
LOSS_TOLERANCE = 1e-5  # how far the losses of padded and jagged may be apart, relative
OUTPUT_TOLERANCE = 1e-4  # the same of each element of their outputs, relative to the largest
LAYERS = 2
DROPOUT = 0.1
LEARNING_RATE = 1e-2
_MOST_PLACES = 1024  # positions and distances told apart
_RANKED_TOKENS = 8192


@dataclass(frozen=True)
class Learner:
    """One model's way through the epochs, and what it learnt."""

    name: str
    parameters: int
    losses: list[float]  # by step
    epoch_seconds: list[float]  # forward, backward and optimizer of all steps
    longest_seconds: float  # of the step that has the longest history, the median over epochs
    ranking: Ranking
    ranking_seconds: float


@dataclass(frozen=True)
class PaddedEpoch:
    """One epoch of the same model over the same batches of short histories, jagged and padded in turns."""

    name: str
    jagged_seconds: float
    padded_seconds: float
    ratio: Ratio  # of the steps
    jagged_loss: float  # of the first batch, before, without dropout
    padded_loss: float
    outputs_apart: float  # the same batch; at most, relative to the largest element

    @property
    def agrees(self) -> bool:
        """Whether both give the same loss and outputs."""
        losses_apart = abs(self.jagged_loss - self.padded_loss) / abs(self.padded_loss)
        return losses_apart <= LOSS_TOLERANCE and self.outputs_apart <= OUTPUT_TOLERANCE


@dataclass(frozen=True)
class SequenceTrial:
    """A finished comparison of sequence recommenders."""

    customers: int
    customers_left_out: int  # so that an epoch is not too long
    purchases: int  # read in an epoch; each predicts the next
    longest: int  # of the histories
    epochs: int
    tokens: int  # purchases in a step, if it is not one longer history
    negatives: int | None  # None for a softmax over all items
    scale: float  # of HSTU's attention
    learners: list[Learner]
    popularity: Ranking
    short: int  # purchases of the longest history that is timed padded
    short_customers: int
    short_purchases: int
    padded: list[PaddedEpoch]  # empty if no history is that short
    padded_bytes: int  # of one tensor of scores of the trained batch that has the most, if it were padded

    @property
    def agrees(self) -> bool:
        """Whether padded and jagged give the same."""
        return all(epoch.agrees for epoch in self.padded)


@dataclass(frozen=True)
class _Histories:
    """What is trained on: the histories before these positions."""

    data: Interactions
    positions: np.ndarray  # [B] int64
    counts: np.ndarray  # [I], how often each item is bought in what is trained on
    settings: Settings

    @property
    def lengths(self) -> np.ndarray:
        return history_lengths(self.data, self.positions)

    def epoch(self, random: np.random.Generator) -> list[np.ndarray]:
        """Positions [B] for each step."""
        order = random.permutation(len(self.positions))
        batches = batches_by_tokens(self.lengths, self.settings.sequence_tokens, order)
        return [self.positions[batch] for batch in batches]

    def load(self, batch: np.ndarray, random: np.random.Generator) -> tuple[Sequences, Negatives | None]:
        """The arguments of the loss."""
        negatives = draw_negatives(self.counts, self.settings.sequence_negatives, random)
        return sequences_before(self.data, batch), negatives


def run_sequence_trial(
    data: Interactions, split: Split, settings: Settings, progress: Progress
) -> SequenceTrial:
    """Train the three in turns on the same batches, rank, then time HSTU padded.

    Args:
        data, split: what is trained on and ranked.
        settings: how large; at least one epoch.
        progress: called as the work goes on.
    """
    counts = np.bincount(data.item[split.train], minlength=len(data.item_names))
    positions = np.random.default_rng(settings.seed).permutation(last_trained(data, split))
    enough = np.cumsum(history_lengths(data, positions)) <= settings.sequence_purchases
    enough[0] = True
    histories = _Histories(data, np.sort(positions[enough]), counts, settings)
    held_out = sample(split.held_out, settings.history_customers, settings.seed)
    lengths = histories.lengths
    is_short = lengths <= settings.sequence_short
    scale = 1 / float(lengths.mean())
    epochs = [
        histories.epoch(np.random.default_rng([settings.seed, epoch]))
        for epoch in range(settings.sequence_epochs)
    ]
    with torch.random.fork_rng(devices=[]):
        batches = [batch for epoch in epochs for batch in epoch]
        models = _build(data, int(lengths.max()), scale, settings)
        trainers = [_Trainer(name, model, len(batches)) for name, model in models.items()]
        _train_in_turns(trainers, histories, batches, "train sequences", progress)
        learners = [_finish(trainer, epochs, data, held_out, progress) for trainer in trainers]
        padded = []
        if is_short.any():
            short = _Histories(data, histories.positions[is_short], counts, settings)
            padded = [
                _time_padded(trainer, short, progress)
                for trainer in trainers
                if isinstance(trainer.model.encoder, HSTU)
            ]
    return SequenceTrial(
        len(lengths),
        len(positions) - len(lengths),
        int(lengths.sum()),
        int(lengths.max()),
        settings.sequence_epochs,
        settings.sequence_tokens,
        settings.sequence_negatives if settings.sequence_negatives < len(counts) else None,
        scale,
        learners,
        popularity(data, split, held_out),
        int(lengths[is_short].max(initial=0)),
        int(is_short.sum()),
        int(lengths[is_short].sum()),
        padded,
        max(_padded_bytes(history_lengths(data, batch)) for batch in batches),
    )


def _build(
    data: Interactions, longest: int, scale: float, settings: Settings
) -> dict[str, SequenceRecommender]:
    num_items, dim, places = len(data.item_names), settings.sequence_dim, min(longest, _MOST_PLACES)
    models = {}
    for name in (BIASED, UNBIASED, SOFTMAX):
        torch.manual_seed(settings.seed)
        models[name] = SequenceRecommender(
            Transformer(num_items, dim, LAYERS, places, DROPOUT)
            if name == SOFTMAX
            else hstu(num_items, dim, LAYERS, places, scale, DROPOUT, relative_bias=name == BIASED)
        )
    return models


class _Trainer:
    def __init__(self, name: str, model: SequenceRecommender, steps: int) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, steps, pct_start=0.1, anneal_strategy="linear", div_factor=10
        )
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def step(self, sequences: Sequences, negatives: Negatives | None) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model.loss(sequences, negatives)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.step_seconds.append(time.perf_counter() - start)


def _train_in_turns(
    trainers: list[_Trainer], histories: _Histories, batches: list[np.ndarray], stage: str, progress: Progress
) -> None:
    """All on the same batches and negatives; so a busy machine slows all alike."""
    turns, order = list(trainers), random.Random(histories.settings.seed)
    draws = np.random.default_rng(histories.settings.seed)
    for done, batch in enumerate(batches):
        progress(stage, done, len(batches))
        loaded = histories.load(batch, draws)
        order.shuffle(turns)
        for trainer in turns:
            trainer.step(*loaded)
    progress(stage, len(batches), len(batches))


def _finish(
    trainer: _Trainer,
    epochs: list[list[np.ndarray]],
    data: Interactions,
    held_out: np.ndarray,
    progress: Progress,
) -> Learner:
    longest = np.array([history_lengths(data, batch).max() for batches in epochs for batch in batches])
    seconds = np.array(trainer.step_seconds)
    start = time.perf_counter()
    found = ranking(_rank(trainer.model.eval(), data, held_out, progress))
    return Learner(
        trainer.name,
        sum(parameter.numel() for parameter in trainer.model.parameters()),
        trainer.losses,
        [float(part.sum()) for part in np.split(seconds, np.cumsum([len(e) for e in epochs])[:-1])],
        float(np.median(seconds[longest == longest.max()])),
        found,
        time.perf_counter() - start,
    )


@torch.no_grad()
def _rank(
    model: SequenceRecommender, data: Interactions, held_out: np.ndarray, progress: Progress
) -> np.ndarray:
    """The rank of each held-out purchase, from 1."""
    found = np.empty(len(held_out), np.int64)
    for batch in batches_by_tokens(history_lengths(data, held_out), _RANKED_TOKENS, np.arange(len(held_out))):
        progress("rank", int(batch[0]), len(held_out))
        scores = model.scores_after(sequences_before(data, held_out[batch]))
        found[batch] = ranks(scores.numpy(), data.item[held_out[batch]])
    progress("rank", len(held_out), len(held_out))
    return found


def _time_padded(trained: _Trainer, short: _Histories, progress: Progress) -> PaddedEpoch:
    batches = short.epoch(np.random.default_rng(short.settings.seed))
    jagged, padded = copy.deepcopy(trained.model), copy.deepcopy(trained.model)
    assert isinstance(padded.encoder, HSTU)
    padded.encoder = PaddedHSTU(padded.encoder)
    with torch.no_grad():
        loaded = short.load(batches[0], np.random.default_rng(short.settings.seed))
        jagged_loss, padded_loss = (model.eval().loss(*loaded).item() for model in (jagged, padded))
        of_jagged, of_padded = (model(loaded[0]) for model in (jagged, padded))
        outputs_apart = float((of_jagged - of_padded).abs().max() / of_padded.abs().max())
    batches = [batches[0], *batches]  # once more, to warm up
    models = {"jagged": jagged.train(), "padded": padded.train()}
    trainers = [_Trainer(name, model, len(batches)) for name, model in models.items()]
    _train_in_turns(trainers, short, batches, "pad", progress)
    jagged_steps, padded_steps = (np.array(trainer.step_seconds[1:]) for trainer in trainers)
    return PaddedEpoch(
        trained.name,
        float(jagged_steps.sum()),
        float(padded_steps.sum()),
        speedup(padded_steps, jagged_steps),
        jagged_loss,
        padded_loss,
        outputs_apart,
    )


def _padded_bytes(lengths: np.ndarray) -> int:
    """Of scores [B, H, N, N] in fp32."""
    return len(lengths) * HEADS * int(lengths.max()) ** 2 * 4

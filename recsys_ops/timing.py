"""Interleaved timing: candidates take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """How many times faster a candidate is than a baseline: median and 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    round_seconds: float = 0.01,
    before_each: Callable[[], Any] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Time callables in turns of random order.

    Args:
        candidates: what to time, by name; each is called once first, untimed.
        rounds: turns per candidate.
        round_seconds: length of one turn; a fast candidate is called often enough to fill it.
        before_each: called, untimed, before every call, for example to flush the caches;
            a turn is then one call.
        seed: of the order.

    Returns:
        Seconds per call, [rounds], for each name.
    """
    calls = {}
    for name, function in candidates.items():
        if before_each:
            before_each()
        seconds = min(_seconds(function, 1), _seconds(function, 1))
        calls[name] = 1 if before_each else max(1, min(10_000, round(round_seconds / max(seconds, 1e-7))))
    order, shuffle = list(candidates), random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if before_each:
                before_each()
            samples[name].append(_seconds(candidates[name], calls[name], 3 * round_seconds))
    return {name: np.array(taken) for name, taken in samples.items()}


def speedup(baseline: np.ndarray, candidate: np.ndarray, seed: int = 0) -> Ratio:
    """How many times faster the candidate is, from samples taken in the same rounds.

    The median over the rounds of baseline / candidate, with a bootstrapped 95 % interval.
    """
    ratios = baseline / candidate
    picks = np.random.default_rng(seed).integers(len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _seconds(function: Callable[[], Any], calls: int, longest: float = float("inf")) -> float:
    """Seconds per call, over as many of the calls as start within ``longest`` seconds."""
    batch = max(1, calls // 8)
    start, done, elapsed = time.perf_counter(), 0, 0.0
    while done < calls and elapsed < longest:
        for _ in range(batch):
            function()
        done += batch
        elapsed = time.perf_counter() - start
    return elapsed / done

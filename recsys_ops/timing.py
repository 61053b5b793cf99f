"""Interleaved timing: candidates take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Clock(Protocol):
    """What tells how long calls took."""

    def start(self) -> Any:
        """A mark of this moment."""

    def seconds_since(self, mark: Any) -> float:
        """Seconds from the mark to the end of what has been called since."""


class HostClock:
    """The time that calls keep their caller; ``wait`` is called first, for work that still runs elsewhere."""

    def __init__(self, wait: Callable[[], Any] = lambda: None) -> None:
        self._wait = wait

    def start(self) -> float:
        self._wait()
        return time.perf_counter()

    def seconds_since(self, mark: float) -> float:
        return time.perf_counter() - mark


class CudaClock:
    """The time between two events on the current stream of a GPU, as ``torch.cuda`` has them.

    The host runs ahead where the GPU is kept busy before the first event; where it is not,
    the time of calls too small for the GPU is that of launching them.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def start(self) -> Any:
        return self._event()

    def seconds_since(self, mark: Any) -> float:
        end = self._event()
        end.synchronize()
        return float(mark.elapsed_time(end)) / 1e3

    def _event(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event


HOST_CLOCK = HostClock()


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
    clock: Clock = HOST_CLOCK,
) -> dict[str, np.ndarray]:
    """Time callables in turns of random order.

    Args:
        candidates: what to time, by name; each is called once first, untimed.
        rounds: turns per candidate.
        round_seconds: length of one turn; a fast candidate is called often enough to fill it.
        before_each: called, untimed, before every call, for example to flush the caches;
            a turn is then one call.
        seed: of the order.
        clock: what to time them with.

    Returns:
        Seconds per call, [rounds], for each name.
    """
    calls = {}
    for name, function in candidates.items():
        if before_each:
            before_each()
        seconds = min(seconds_per_call(function, clock=clock) for _ in range(2))
        calls[name] = 1 if before_each else max(1, min(10_000, round(round_seconds / max(seconds, 1e-7))))
    order, shuffle = list(candidates), random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if before_each:
                before_each()
            seconds = seconds_per_call(candidates[name], calls[name], 3 * round_seconds, clock)
            samples[name].append(seconds)
    return {name: np.array(taken) for name, taken in samples.items()}


def speedup(baseline: np.ndarray, candidate: np.ndarray, seed: int = 0) -> Ratio:
    """How many times faster the candidate is, from samples taken in the same rounds.

    The median over the rounds of baseline / candidate, with a bootstrapped 95 % interval.
    """
    ratios = baseline / candidate
    picks = np.random.default_rng(seed).integers(len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def seconds_per_call(
    function: Callable[[], Any], calls: int = 1, longest: float = float("inf"), clock: Clock = HOST_CLOCK
) -> float:
    """Seconds per call, over as many of the calls as start within ``longest`` seconds."""
    batch = max(1, calls // 8)
    mark, done, started = clock.start(), 0, time.perf_counter()
    while done < calls and time.perf_counter() - started < longest:
        for _ in range(batch):
            function()
        done += batch
    return clock.seconds_since(mark) / done

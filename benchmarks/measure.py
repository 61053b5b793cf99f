"""One workload: every candidate is checked, then those that are right are timed in turns."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

from recsys_ops.benchmarks.ceilings import Ceilings
from recsys_ops.benchmarks.registry import Candidate, Growth, Inputs, Run, Suite, Unsupported, Workload
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.timing import HOST_CLOCK, Clock, Ratio, seconds_per_call, speedup, time_interleaved

CHECKED_BATCHES = 2
HOST_CLOCKS: Mapping[str, Clock] = {"device": HOST_CLOCK, "host": HOST_CLOCK}
_MOST_ROUNDS = 40
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Budget:
    """How long the timing of one workload may take, roughly."""

    seconds: float
    fewest_rounds: int = 9
    round_seconds: float = 0.01  # of one candidate's turn; a slow call takes longer


@dataclass(frozen=True)
class Figures:
    """What was measured of one candidate on one workload."""

    seconds: float  # median of the samples
    samples: tuple[float, ...]
    effective_rate: float  # bytes per second, every lookup counted
    unique_rate: float  # bytes per second, every distinct row counted once
    of_limit: float  # the least possible time over the median
    bound_by: str
    intensity: float  # operations per byte of the least traffic
    flop_rate: float  # operations per second


@dataclass(frozen=True)
class Row:
    """One candidate on one workload; figures only where the check was passed."""

    workload: str
    operator: str
    pass_: str
    conditions: str
    candidate: str
    status: Literal["ok", "failed", "unavailable"]
    reason: str | None = None
    figures: Figures | None = None
    ours_speedup: Ratio | None = None  # how many times faster ours is than this peer
    growth: Growth | None = None  # of the workload


@dataclass
class _Entry:
    candidate: Candidate
    workload: Workload  # the one that the candidate computes
    run: Run
    seconds: float  # of one call, roughly


def measure(
    workload: Workload,
    suite: Suite,
    ceilings: Ceilings,
    budget: Budget,
    flush: Callable[[], Any],
    clocks: Mapping[str, Clock] = HOST_CLOCKS,
) -> list[Row]:
    """Check and time every candidate of a suite on one workload: a row for each, ours first.

    ``clocks`` tells by what to time workloads that are about the time of the device, or of the host.
    """
    inputs = workload.inputs()
    ours = suite.candidates[0]
    clock = clocks[workload.timed]
    with _quiet(), torch.set_grad_enabled(workload.pass_ == "step"):
        outcomes = [
            _prepare(candidate, workload, inputs, candidate is ours, clock)
            for candidate in suite.candidates
            if candidate.applies(workload)
        ]
        entries = [outcome for outcome in outcomes if isinstance(outcome, _Entry)]
        samples = _time(entries, inputs, budget, flush if workload.flushed else None, clock)

    def row(outcome: Row | _Entry) -> Row:
        if isinstance(outcome, Row):
            return outcome
        name = outcome.candidate.name
        compared = ours.name in samples and name != ours.name
        return _row(
            workload,
            outcome.candidate,
            "ok",
            figures=_figures(outcome.workload, inputs, ceilings, samples[name]),
            ours_speedup=speedup(samples[name], samples[ours.name]) if compared else None,
        )

    return [row(outcome) for outcome in outcomes]


def _prepare(
    candidate: Candidate, workload: Workload, inputs: Inputs, ours: bool, clock: Clock
) -> _Entry | Row:
    """The candidate ready to be timed, or the row that says why it is not."""
    reason = candidate.available()
    if reason is not None:
        return _row(workload, candidate, "unavailable", reason)
    variant = candidate.variant(workload)
    try:
        run = candidate.prepare(variant, inputs)
        results = [run(batch) for batch in inputs.batches[:CHECKED_BATCHES]]
    except Unsupported as error:
        return _row(workload, candidate, "unavailable", str(error))
    except Exception as error:
        # A peer that breaks is no finding about ours; ours that breaks is one.
        return _row(workload, candidate, "failed" if ours else "unavailable", _in_one_line(error))
    check = variant.check(inputs)
    for batch, result in zip(inputs.batches, results, strict=False):
        wrong = check(batch, result)
        if wrong is not None:
            return _row(workload, candidate, "failed", wrong)
    return _Entry(candidate, variant, run, seconds_per_call(lambda: run(inputs.batches[0]), clock=clock))


def _time(
    entries: list[_Entry],
    inputs: Inputs,
    budget: Budget,
    before_each: Callable[[], Any] | None,
    clock: Clock,
) -> dict[str, np.ndarray]:
    if not entries:
        return {}
    between = seconds_per_call(before_each, clock=clock) if before_each else 0.0
    turns = sum(between + e.seconds if before_each else max(budget.round_seconds, e.seconds) for e in entries)
    rounds = int(np.clip(budget.seconds / turns, budget.fewest_rounds, _MOST_ROUNDS))
    return time_interleaved(
        {e.candidate.name: _cycling(e.run, itertools.cycle(inputs.batches)) for e in entries},
        rounds=rounds,
        round_seconds=budget.round_seconds,
        before_each=before_each,
        clock=clock,
    )


def _cycling(run: Run, batches: Iterator[Any]) -> Callable[[], Any]:
    return lambda: run(next(batches))


def _figures(workload: Workload, inputs: Inputs, ceilings: Ceilings, samples: np.ndarray) -> Figures:
    cost = _mean([workload.cost(batch) for batch in inputs.batches])
    seconds = float(np.median(samples))
    limit, bound_by = ceilings.limit(workload, cost)
    return Figures(
        seconds=seconds,
        samples=tuple(float(sample) for sample in samples),
        effective_rate=cost.effective_bytes / seconds,
        unique_rate=cost.bytes / seconds,
        of_limit=limit / seconds,
        bound_by=bound_by,
        intensity=cost.flops / cost.bytes,
        flop_rate=cost.flops / seconds,
    )


def _mean(costs: list[Cost]) -> Cost:
    return Cost(**{f.name: sum(getattr(c, f.name) for c in costs) // len(costs) for f in fields(Cost)})


def _in_one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and logs of peers: why one drops out stands in its row."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _row(
    workload: Workload,
    candidate: Candidate,
    status: Literal["ok", "failed", "unavailable"],
    reason: str | None = None,
    **figures: Any,
) -> Row:
    return Row(
        workload.name,
        workload.operator,
        workload.pass_,
        workload.conditions,
        candidate.name,
        status,
        reason,
        growth=workload.growth,
        **figures,
    )

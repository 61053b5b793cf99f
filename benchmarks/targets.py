"""Whether the speedups and the shares of the limit that a suite aims at were reached."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recsys_ops.benchmarks.measure import Row
from recsys_ops.benchmarks.registry import LIMIT, OURS, Target
from recsys_ops.timing import Ratio, speedup


@dataclass(frozen=True)
class Verdict:
    """One target on one workload that was run."""

    workload: str
    peer: str
    minimum: float
    verdict: Literal["met", "missed", "within noise", "not measured"]
    ratio: Ratio | None = None
    reason: str | None = None


def judge(targets: Sequence[Target], rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for every target and every row that it concerns, in their order.

    Met where the median reaches the minimum, missed where the whole interval stays below it.
    """
    return [
        _judge(target, row)
        for target in targets
        for row in rows
        if row.candidate == (OURS if target.peer == LIMIT else target.peer)
        and fnmatch.fnmatch(row.workload, target.workloads)
    ]


def _judge(target: Target, row: Row) -> Verdict:
    ratio = _share_of_limit(row) if target.peer == LIMIT else row.ours_speedup
    minimum = target.minimum
    if ratio is None:
        reason = row.reason or "ours was not measured"
        return Verdict(row.workload, target.peer, minimum, "not measured", reason=reason)
    if ratio.value >= minimum:
        return Verdict(row.workload, target.peer, minimum, "met", ratio)
    return Verdict(
        row.workload, target.peer, minimum, "missed" if ratio.high < minimum else "within noise", ratio
    )


def _share_of_limit(row: Row) -> Ratio | None:
    """The least possible time over the time taken: a speedup over the limit, below 1."""
    if row.figures is None:
        return None
    least = row.figures.of_limit * row.figures.seconds
    return speedup(np.full(len(row.figures.samples), least), np.array(row.figures.samples))

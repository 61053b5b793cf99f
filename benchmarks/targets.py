"""Whether the speedups that a suite aims at were reached."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recsys_ops.benchmarks.measure import Row
from recsys_ops.benchmarks.registry import Target
from recsys_ops.timing import Ratio


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
        if row.candidate == target.peer and fnmatch.fnmatch(row.workload, target.workloads)
    ]


def _judge(target: Target, row: Row) -> Verdict:
    ratio, minimum = row.ours_speedup, target.minimum
    if ratio is None:
        reason = row.reason or "ours was not measured"
        return Verdict(row.workload, row.candidate, minimum, "not measured", reason=reason)
    if ratio.value >= minimum:
        return Verdict(row.workload, row.candidate, minimum, "met", ratio)
    return Verdict(
        row.workload, row.candidate, minimum, "missed" if ratio.high < minimum else "within noise", ratio
    )

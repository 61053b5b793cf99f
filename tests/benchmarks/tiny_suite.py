"""A suite small enough to run in a test, with limits that nobody measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from recsys_ops.benchmarks.cases.embedding_bag import Case, make_workload
from recsys_ops.benchmarks.ceilings import ROW_BYTES, Ceilings
from recsys_ops.benchmarks.measure import Budget
from recsys_ops.benchmarks.registry import Candidate, Inputs, Suite, Target, Workload
from recsys_ops.benchmarks.suites.embedding_bag import suite as real_suite

OURS, TORCH = real_suite("cpu").candidates[:2]
BUDGET = Budget(seconds=0.0, fewest_rounds=3, round_seconds=1e-4)
CEILINGS = Ceilings(
    read_one_thread=1e9,
    read=2e9,
    copy=2e9,
    zeroed={1024: 1e9},
    rows={
        place: dict.fromkeys(ROW_BYTES, rate)
        for place, rate in (("memory", 1e9), ("last-level cache", 4e9), ("cache", 8e9))
    },
    flops=1e10,
    call=1e-6,
)


def workload(name: str = "tiny/sum", **options: Any) -> Workload:
    """A lookup of a few bags in a small table."""
    return make_workload(
        name, Case(**{"dim": 8, "bags": 5, "rows": 60, "lengths": (1, 6), **options}), quick=True
    )


def suite(
    candidates: Sequence[Candidate] = (OURS, TORCH),
    workloads: Sequence[Workload] | None = None,
    targets: Sequence[Target] = (),
) -> Suite:
    """A suite of the embedding bag, on tiny workloads."""
    return Suite("embedding_bag", workloads or [workload()], candidates, targets, lambda: "reference")


def altered(name: str, change: Callable[[Any], Any]) -> Candidate:
    """Ours with its results changed."""

    def prepare(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        run = OURS.prepare(workload, inputs)
        return lambda batch: change(run(batch))

    return Candidate(name, prepare)

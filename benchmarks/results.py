"""The record of a run, as JSON and as a table on the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ops.benchmarks.ceilings import Ceilings
from recsys_ops.benchmarks.measure import Row
from recsys_ops.benchmarks.targets import Verdict

SCHEMA = 1
WIDTH = 110
HEADERS = ("workload", "candidate", "time", "GB/s", "unique", "of the limit", "ours is")
VERDICT_HEADERS = ("workload", "against", "at least", "found", "verdict")


@dataclass
class Results:
    """Everything that one run found, and what it ran on."""

    device: str
    operators: dict[str, str]  # each with the backend that served ours
    date: str  # UTC
    quick: bool
    load: float  # mean number of busy processes before the run
    machine: dict[str, Any]
    versions: dict[str, str | None]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] | None = None  # None where nobody asked
    complete: bool = False

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "failed"]

    @property
    def busy(self) -> str | None:
        """A warning where other work shared the machine."""
        if self.load <= self.machine["threads"] / 2:
            return None
        return f"the machine was busy before the run (load {self.load:.1f}): trust no figure"

    def to_json(self) -> str:
        """Rates in bytes and operations per second, times in seconds."""
        record = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for row in record["rows"]:
            row["pass"] = row.pop("pass_")
        return json.dumps(record, indent=1) + "\n"


def print_results(results: Results, console: Console) -> None:
    """The table of all rows, what is missing from it and why, and the verdicts on targets."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, WIDTH))
    if results.ceilings:
        console.print(_ceilings_table(results.ceilings))
    if results.rows:
        console.print(_rows_table(results))
    for line in missing_lines(results.rows):
        console.print(Text(line))
    if results.verdicts is not None:
        console.print(_verdicts_table(results.verdicts))
    if results.busy:
        console.print(Text(results.busy, "yellow"))
    for row in results.failed:
        console.print(Text(f"FAILED {row.workload}, {row.candidate}: {row.reason}", "red"))
    if not results.complete:
        console.print("interrupted: only what is finished stands here")


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """Why candidates are missing from workloads, in one line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.status == "unavailable":
            reasons[row.candidate, row.reason or ""].append(row.workload)
    total = len({row.workload for row in rows})
    return [
        f"{candidate}: {reason} ({'everywhere' if len(where) == total else ', '.join(where)})"
        for (candidate, reason), where in reasons.items()
    ]


def cells(row: Row) -> list[str]:
    """Time, effective and unique-row GB/s, share of the limit, ours against it: as people read them."""
    figures = row.figures
    if figures is None:
        return ["FAILED" if row.status == "failed" else "-", "", "", "", ""]
    return [
        format_seconds(figures.seconds),
        f"{figures.effective_rate / 1e9:.2f}",
        f"{figures.unique_rate / 1e9:.2f}",
        f"{figures.of_limit:.0%} {figures.bound_by}",
        str(row.ours_speedup or ""),
    ]


def format_seconds(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> format_seconds(0.00123), format_seconds(4.2e-7)
        ('1.23 ms', '0.42 us')
    """
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    value = seconds * scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def ceiling_cells(ceilings: Ceilings) -> list[tuple[str, str]]:
    """What was measured, and how much."""
    lines = []
    if ceilings.read_one_thread is not None:
        lines.append(("sequential read, one thread", f"{ceilings.read_one_thread / 1e9:.1f} GB/s"))
    lines += [
        ("sequential read, all threads", f"{ceilings.read / 1e9:.1f} GB/s"),
        ("copy, read and written", f"{ceilings.copy / 1e9:.1f} GB/s"),
        ("new blocks of zeros", _by_size(ceilings.zeroed)),
    ]
    lines += [(f"random rows in {place}", _by_size(rates)) for place, rates in ceilings.rows.items()]
    lines.append(("fp32 matrix product", f"{ceilings.flops / 1e9:.0f} GFLOP/s"))
    lines.append(("cheapest call that returns a tensor", format_seconds(ceilings.call)))
    return lines


def _by_size(rates: dict[int, float]) -> str:
    return ", ".join(f"{_size(size)} {rate / 1e9:.1f}" for size, rate in rates.items()) + " GB/s"


def _size(count: int) -> str:
    unit, scale = ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10) if count >= 2**10 else ("B", 1)
    return f"{count // scale} {unit}"


def _ceilings_table(ceilings: Ceilings) -> Table:
    table = Table("limits of this machine, measured", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for line in ceiling_cells(ceilings):
        table.add_row(*line)
    return table


def _rows_table(results: Results) -> Table:
    title = ", ".join(f"{name}, ours served by {backend}" for name, backend in results.operators.items())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for header in HEADERS:
        is_name = header in HEADERS[:2]
        table.add_column(header, no_wrap=not is_name, overflow="fold", justify="left" if is_name else "right")
    previous = None
    for row in results.rows:
        if row.status == "unavailable":
            continue
        first = row.workload != previous
        if first and previous is not None:
            table.add_section()
        style = "red" if row.status == "failed" else None
        table.add_row(row.workload if first else "", row.candidate, *map(Text, cells(row)), style=style)
        previous = row.workload
    return table


def _verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="targets", title_justify="left")
    for header in VERDICT_HEADERS:
        table.add_column(header, justify="right" if header == "at least" else "left")
    for verdict in verdicts:
        table.add_row(*map(Text, verdict_cells(verdict)))
    return table


def verdict_cells(verdict: Verdict) -> list[str]:
    """One line of the table of targets."""
    found = str(verdict.ratio or verdict.reason)
    return [verdict.workload, verdict.peer, f"{verdict.minimum:g}x", found, verdict.verdict]

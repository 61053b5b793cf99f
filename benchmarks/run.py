"""One run: the limits of the machine, every workload of the suites asked for, and the reports."""

from __future__ import annotations

import datetime
import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from recsys_ops._output import INTERRUPTED, progress_bar, write_atomically
from recsys_ops.benchmarks.ceilings import measure_ceilings
from recsys_ops.benchmarks.machine import cache_bytes, describe_machine, versions
from recsys_ops.benchmarks.measure import HOST_CLOCKS, Budget, measure
from recsys_ops.benchmarks.registry import Suite, Workload, suites
from recsys_ops.benchmarks.results import Results, print_results
from recsys_ops.benchmarks.targets import judge
from recsys_ops.timing import Clock, CudaClock, HostClock

# By device, of a whole and of a quick run. A GPU is nobody else's, so that its rounds differ little.
_BUDGETS = {
    "cpu": (Budget(seconds=4.0), Budget(seconds=1.0, fewest_rounds=7)),
    "cuda": (Budget(seconds=1.0), Budget(seconds=0.3, fewest_rounds=7)),
}


def run_bench(
    op: str | None = None,
    json_path: Path | str | None = None,
    html_path: Path | str | None = None,
    filter: str | None = None,
    quick: bool = False,
    check_targets: bool = False,
    console: Console | None = None,
    device: str = "cpu",
) -> int:
    """Measure operators against this machine's limits and against their peers; prints the result.

    Args:
        op: an operator's name; None for all.
        json_path, html_path: files to write, if any.
        filter: a glob of workload names, or a part of one; None for all.
        quick: fewer workloads and shorter timings, about a minute for an operator.
        check_targets: also tell which of the speedups aimed at were reached.
        console: where to print; the standard output by default.
        device: "cpu" or "cuda", each with workloads of its size.

    Returns:
        0; 1 where a candidate gave a wrong result, whose speed is then not told; 2 where ``op`` or
        ``filter`` matches nothing or there is no such device; 130 after Ctrl-C, with what is
        finished printed and written.

    Example:
        >>> run_bench("embedding_bag", filter="no such workload")  # doctest: +ELLIPSIS
        bench: expected filter to match a workload, got 'no such workload'; there are serve/B1/D64, ...
        2
    """
    console = console or Console()
    if device not in ("cpu", "cuda"):
        return _wrong_usage(f"expected device to be cpu or cuda, got {device!r}", console)
    if device == "cuda" and not torch.cuda.is_available():
        return _wrong_usage("expected a GPU that PyTorch can use, found none", console)
    known = suites(device)
    if op is not None and op not in known:
        return _wrong_usage(f"expected op to be one of {sorted(known)}, got {op!r}", console)
    chosen = [known[op]] if op else list(known.values())
    work = [(suite, workload) for suite in chosen for workload in select(suite, filter, quick)]
    if not work:
        names = ", ".join(w.name for suite in chosen for w in select(suite, None, quick))
        return _wrong_usage(
            f"expected filter to match a workload, got {filter!r}; there are {names}", console
        )
    results = Results(
        device=device,
        operators={suite.operator: suite.backend() for suite in chosen},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        machine=describe_machine(device),
        versions=versions(),
    )
    try:
        # Again and again: not everything that ends a process can be caught.
        _measure_all(work, results, console, lambda: _write(results, json_path, None))
    except KeyboardInterrupt:
        results.complete = False
    except Exception:
        _write(results, json_path, html_path)
        raise
    if check_targets:
        targets = [target for suite in chosen for target in suite.targets]
        results.verdicts = judge(targets, results.rows)
    print_results(results, console)
    _write(results, json_path, html_path)
    if not results.complete:
        return INTERRUPTED
    return 1 if results.failed else 0


def select(suite: Suite, filter: str | None, quick: bool) -> list[Workload]:
    """The workloads that a glob or a part of a name picks; a quick run has fewer."""
    pattern = filter if filter and any(c in filter for c in "*?[") else f"*{filter or ''}*"
    return [w for w in suite.workloads if fnmatch.fnmatch(w.name, pattern) and (w.quick or not quick)]


def _wrong_usage(problem: str, console: Console) -> int:
    console.print(f"bench: {problem}", markup=False, highlight=False, soft_wrap=True)
    return 2


def _measure_all(
    work: Sequence[tuple[Suite, Workload]], results: Results, console: Console, save: Callable[[], None]
) -> None:
    device, quick = results.device, results.quick
    budget = _BUDGETS[device][quick]
    clocks, flush = _clocks(device), _flush(device)
    with _progress(len(work) + 1, console) as start:
        start("limits of this machine")
        repetitions = 3 if quick else 6
        results.ceilings = measure_ceilings(repetitions=repetitions, device=device, clock=clocks["device"])
        for suite, workload in work:
            start(workload.name)
            results.rows += measure(workload, suite, results.ceilings, budget, flush, clocks)
            save()
    results.complete = True


def _clocks(device: str) -> Mapping[str, Clock]:
    """What tells the time of a device, and of the host that calls it."""
    if device == "cpu":
        return HOST_CLOCKS
    return {"device": CudaClock(torch.cuda), "host": HostClock(torch.cuda.synchronize)}


def _flush(device: str) -> Callable[[], object]:
    """Fills the device's caches with what no workload uses."""
    block = torch.zeros(2 * cache_bytes(device)[1], dtype=torch.uint8, device=device)
    if device == "cpu":
        return lambda: block.add_(1)

    def flush() -> None:
        # More than once, so that the host comes to launch what is timed before the GPU waits for it.
        for _ in range(4):
            block.add_(1)

    return flush


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """A function to call at the start of each of ``total`` parts: a bar on a terminal, lines elsewhere."""
    started = 0
    if not console.is_terminal:

        def line(name: str) -> None:
            nonlocal started
            started += 1
            console.print(f"{started}/{total} {name}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def move(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, completed=started)
            started += 1

        yield move


def _write(results: Results, json_path: Path | str | None, html_path: Path | str | None) -> None:
    for path in (json_path, html_path):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if json_path:
        write_atomically(json_path, results.to_json())
    if html_path:
        from recsys_ops.benchmarks.page import render_results

        write_atomically(html_path, render_results(results))

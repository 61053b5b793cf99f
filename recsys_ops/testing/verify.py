"""Everything that the suite can check on this machine, and what a person sees of it."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, cast

import torch

from recsys_ops import __version__
from recsys_ops._output import INTERRUPTED, progress_bar, write_json
from recsys_ops.backends import BACKENDS, operators
from recsys_ops.testing.contract import OperatorSpec
from recsys_ops.testing.execution import targets
from recsys_ops.testing.registry import Example, Result, examples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[int, int, Result], None]

_APART_AT_ONCE = 4
_SAVE_SECONDS = 10


@dataclass
class Report:
    """What was checked, and what could not be."""

    results: list[tuple[str, Result]] = field(default_factory=list)  # operator, outcome
    absent: dict[tuple[str, str], str] = field(default_factory=dict)  # (operator, backend): why
    evidence: dict[tuple[str, str], str] = field(default_factory=dict)  # (operator, target): highest rung
    total: int = 0  # examples that there are

    @property
    def failures(self) -> list[Result]:
        return [result for _, result in self.results if not result.ok]

    @property
    def complete(self) -> bool:
        return len(self.results) == self.total

    @property
    def ok(self) -> bool:
        return self.complete and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what ran where, counts, and every failure."""
        operators = []
        for name in dict.fromkeys(operator for operator, _ in [*self.evidence, *self.absent]):
            counts = [
                {"check": check, "target": target, "passed": passed, "failed": failed}
                for (check, target), (passed, failed) in self._counts(name).items()
            ]
            operators.append(
                {
                    "operator": name,
                    "evidence": {target: rung for (op, target), rung in self.evidence.items() if op == name},
                    "skipped": {backend: why for (op, backend), why in self.absent.items() if op == name},
                    "counts": counts,
                }
            )
        return {
            "recsys_ops": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "ok": self.ok,
            "complete": self.complete,
            "operators": operators,
            "failures": [asdict(failure) for failure in self.failures],
        }

    def tables(self) -> Iterator[Table]:
        """One table per operator: checks down, targets across."""
        from rich.table import Table

        for name in dict.fromkeys(operator for operator, _ in [*self.evidence, *self.absent]):
            ran = [target for op, target in self.evidence if op == name]
            missing = [backend for op, backend in self.absent if op == name]
            table = Table(title=name, title_justify="left")
            table.add_column("check")
            for column in ran + missing:
                table.add_column(column, justify="right")
            counts = self._counts(name)
            for check in dict.fromkeys(check for check, _ in counts):
                cells = [_cell(*counts.get((check, target), (0, 0))) for target in ran]
                table.add_row(check, *cells, *("skipped" for _ in missing))
            table.add_section()
            table.add_row(
                "evidence", *(self.evidence[name, target] for target in ran), *("none" for _ in missing)
            )
            yield table

    def _counts(self, operator: str) -> dict[tuple[str, str], tuple[int, int]]:
        """Passed and failed examples by check and target."""
        counts = Counter((r.check, r.backend, r.ok) for name, r in self.results if name == operator)
        cells = dict.fromkeys((check, target) for check, target, _ in counts)
        return {(c, t): (counts[c, t, True], counts[c, t, False]) for c, t in cells}


def spec_of(operator: str) -> OperatorSpec:
    """The description of an operator for the suite."""
    spec: OperatorSpec = importlib.import_module(f"recsys_ops.{operator}.cases").SPEC
    return spec


def verify(
    op: str | None = None,
    backend: str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    save: Callable[[Report], None] = lambda report: None,
    jobs: int = 1,
) -> Report:
    """Run the correctness suite on this machine: every backend, and every instruction set of the native one.

    Args:
        op: an operator's name, or None for all.
        backend: a backend's name, or None for all.
        quick: run the fewest cases that reach every branch.
        progress: called after each example with how many are done, how many there are, and the
            result; if it raises KeyboardInterrupt, the report so far is given back.
        save: called now and then with the report so far: not everything that ends a process can be caught.
        jobs: processes that share the work, most of which is to compile kernels where those are Triton's.

    Raises:
        ValueError: no such operator or backend.

    Example:
        >>> from recsys_ops.testing.verify import verify
        >>> verify("no such operator")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: verify: expected op to be one of [...], got 'no such operator'
    """
    report, plan = _plan(op, backend, quick)
    results = _run(plan) if jobs == 1 else _run_in_processes(op, backend, quick, jobs)
    saved = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for done, (operator, result) in enumerate(results, start=1):
            report.results.append((operator, result))
            if progress:
                progress(done, report.total, result)
            if time.monotonic() - saved > _SAVE_SECONDS:
                save(report)
                saved = time.monotonic()
    return report


def _run(plan: Sequence[Example], apart_at_once: int = _APART_AT_ONCE) -> Iterator[tuple[str, Result]]:
    """Each example's operator and result, in order."""
    pool = ThreadPoolExecutor(apart_at_once)
    try:
        apart = {example: pool.submit(example.run) for example in plan if example.apart}
        for example in plan:
            yield example.spec.name, apart[example].result() if example.apart else example.run()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run_in_processes(
    op: str | None, backend: str | None, quick: bool, jobs: int
) -> Iterator[tuple[str, Result]]:
    """The same as it comes from several processes; one that dies leaves the rest of its share undone."""
    context = multiprocessing.get_context("spawn")
    receivers: list[Connection] = []
    for share in range(jobs):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, op, backend, quick, share, jobs)
        context.Process(target=_run_share, args=arguments, daemon=True).start()
        sender.close()
        receivers.append(receiver)
    while receivers:
        for receiver in cast("list[Connection]", wait(receivers)):
            try:
                yield receiver.recv()
            except EOFError:
                receivers.remove(receiver)


def _run_share(
    sender: Connection, op: str | None, backend: str | None, quick: bool, share: int, jobs: int
) -> None:
    """Run one share of the examples: those of a subject stay together, for they have much in common."""
    torch.set_num_threads(max(2, torch.get_num_threads() // jobs))
    _, plan = _plan(op, backend, quick)
    subjects = dict.fromkeys(example.subject for example in plan)
    mine = set(list(subjects)[share::jobs])
    with contextlib.suppress(KeyboardInterrupt):
        for result in _run([example for example in plan if example.subject in mine], apart_at_once=1):
            sender.send(result)


def run_verify(
    op: str | None = None,
    backend: str | None = None,
    json_path: str | os.PathLike[str] | None = None,
    console: Console | None = None,
    quick: bool = False,
    jobs: int = 1,
) -> int:
    """``recsys-ops verify``: a progress bar on a terminal, plain lines in a pipe, a table at the end.

    Where there is no GPU, Triton kernels run interpreted. Interrupted, it reports what is finished.

    Returns:
        The exit code: 0 if all is well, 1 if a check failed, 2 for an unknown operator or backend,
        130 after Ctrl-C.
    """
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")

    def save(report: Report) -> None:
        if json_path is not None:
            write_json(json_path, report.to_dict())

    try:
        with _progress(console) as progress:
            report = verify(op, backend, quick, progress, save, jobs)
    except ValueError as error:
        console.print(escape(str(error)), style="red", soft_wrap=True)
        return 2
    save(report)
    for failure in report.failures:
        console.print(escape(str(failure)), style="red", soft_wrap=True)
    for table in report.tables():
        console.print(table)
    for (operator, name), reason in report.absent.items():
        console.print(f"{operator}: {name} skipped: {escape(reason)}", soft_wrap=True)
    failed, ran = len(report.failures), len(report.results)
    stopped = "" if report.complete else f" Interrupted: {report.total - ran} did not run."
    console.print(f"{ran - failed} passed, {failed} failed.{stopped}")
    if not report.complete:
        return INTERRUPTED
    return 0 if report.ok else 1


def _plan(op: str | None, backend: str | None, quick: bool) -> tuple[Report, list[Example]]:
    known = operators()
    for argument, name, choices in (("op", op, sorted(known)), ("backend", backend, list(BACKENDS))):
        if name is not None and name not in choices:
            raise ValueError(f"verify: expected {argument} to be one of {choices}, got {name!r}")
    report, plan = Report(), []
    for name in sorted(known) if op is None else [op]:
        found, absent = targets(known[name])
        serving = [t for t in found if backend in (None, t.backend)]
        report.evidence |= {(name, str(t)): t.evidence for t in serving}
        report.absent |= {(name, b): why for b, why in absent.items() if backend in (None, b)}
        plan += list(examples(spec_of(name), serving, quick))
    report.total = len(plan)
    return report, plan


def _cell(passed: int, failed: int) -> str:
    if failed:
        return f"[red]{failed} of {passed + failed} failed[/red]"
    return f"{passed} passed" if passed else "-"


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, a line for every check in a pipe."""
    if not console.is_terminal:
        begun: set[str] = set()

        def line(done: int, total: int, result: Result) -> None:
            if result.check not in begun or done == total:
                console.print(f"{done}/{total} {result.check}", soft_wrap=True)
            begun.add(result.check)

        yield line
        return
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, result: Result) -> None:
            bar.update(task, total=total, completed=done, description=f"{result.check:<20}")

        yield advance

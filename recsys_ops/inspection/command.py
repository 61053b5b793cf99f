"""``recsys-ops inspect``: compile every kernel for every GPU, and compare with what is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_ops import _nvcc
from recsys_ops._output import progress_bar, write_json
from recsys_ops.backends import operators
from recsys_ops.inspection import TARGETS, cuda_compiler, expectations, triton_compiler
from recsys_ops.inspection.binaries import CompiledKernel
from recsys_ops.inspection.expectations import Finding, Key, Recorded
from recsys_ops.inspection.occupancy import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

    Compile = Callable[[], dict[str, CompiledKernel]]

_COMPILERS = {"triton": triton_compiler, "cuda": cuda_compiler}
_COLUMNS = 110


@dataclass
class Inspection:
    """What was compiled, with which compilers, and what was left out for which reason."""

    kernels: dict[Key, CompiledKernel] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    op: str
    backend: str
    target: str
    compile: Compile


def inspect(
    ops: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, compiled: None,
) -> Inspection:
    """Compile kernels, by default all for all GPUs, as many at once as this machine bears.

    Raises:
        RuntimeError: one does not compile.
    """
    inspection = Inspection()
    jobs: list[_Job] = []
    for backend in backends or TARGETS:
        if reason := _COMPILERS[backend].missing():
            inspection.absent[backend] = reason
            continue
        inspection.versions[backend] = _COMPILERS[backend].version()
        for target in TARGETS[backend]:
            if targets and target not in targets:
                continue
            if backend == "cuda" and not cuda_compiler.supports(target):
                inspection.absent[f"cuda for {target}"] = f"nvcc {cuda_compiler.version()} does not know it"
                continue
            jobs += (job for op in ops or operators() for job in _jobs(op, backend, target))
    with ThreadPoolExecutor(_nvcc.jobs()) as pool:
        running = {pool.submit(job.compile): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(running)):
                job = running[future]
                for name, kernel in future.result().items():
                    inspection.kernels[Key(job.op, job.backend, name, job.target)] = kernel
                progress(done + 1, len(jobs), f"{job.op} {job.backend} for {job.target}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return inspection


def _jobs(op: str, backend: str, target: str) -> Iterator[_Job]:
    if backend == "triton":
        yield _Job(op, backend, target, partial(triton_compiler.compile_operator, op, target))
        return
    for source in cuda_compiler.sources(op):
        yield _Job(op, backend, target, partial(cuda_compiler.compile_source, op, source, target))


def run_inspect(
    op: str | None,
    targets: Sequence[str] | None,
    backend: str | None,
    record: bool,
    json_path: Path | None,
    console: Console,
) -> int:
    """Print what kernels became, and what they lost; 1 where they lost something or ``backend`` is absent."""
    with _progress(console) as progress:
        inspection = inspect([op] if op else None, targets, [backend] if backend else None, progress)
    console.width = max(_COLUMNS, console.width)  # also into a pipe, in lines that are not cut
    _print_kernels(inspection, console)
    for name, reason in inspection.absent.items():
        _say(console, f"{name}: not inspected: {reason}")
    recorded = expectations.read()
    findings: list[Finding] = []
    failed = not inspection.kernels or backend in inspection.absent
    if record and not failed:
        recorded = expectations.updated(recorded, inspection.kernels, inspection.versions)
        expectations.write(recorded)
        _say(console, f"wrote {expectations.FILE}: {len(inspection.kernels)} of {len(recorded.lines)} lines")
    else:
        findings = expectations.compare(inspection.kernels, recorded, inspection.versions)
        _print_findings(inspection, recorded, findings, console)
    if json_path is not None:
        write_json(json_path, _to_dict(inspection, findings))
    return int(failed or any(not finding.is_note for finding in findings))


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for each compilation in a pipe."""
    if not console.is_terminal:
        yield lambda done, total, compiled: _say(console, f"[{done}/{total}] {compiled}")
        return
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda done, total, compiled: bar.update(task, completed=done, total=total)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_kernels(inspection: Inspection, console: Console) -> None:
    from rich import box
    from rich.table import Table

    for op, backend in sorted({key[:2] for key in inspection.kernels}):
        table = Table(
            title=f"{op}, {backend}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in ("kernel", "GPU"):
            table.add_column(heading, no_wrap=True)
        for heading in ("regs", "spill", "shared", "occ %", "load", "store", "flying", "code"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("also", no_wrap=True)
        for key, kernel in sorted(inspection.kernels.items()):
            if key[:2] == (op, backend):
                table.add_row(key.kernel, key.target, *_cells(kernel))
        console.print(table)
    if inspection.kernels:
        _say(
            console,
            "load and store: bytes of the widest; flying: 16-byte loads issued before the first is used.",
        )
        console.print(_limits({key.target for key in inspection.kernels}))


def _cells(kernel: CompiledKernel) -> list[str]:
    line = expectations.Expectation.of(kernel)
    also = {"MMA": line.tensor_core, "async": line.async_copies, "atomic": line.atomics}
    return [
        str(line.registers),
        str(line.spilled_bytes),
        str(line.shared_bytes),
        str(line.occupancy),
        str(line.load_bytes),
        str(line.store_bytes),
        "-" if line.loads_in_flight is None else str(line.loads_in_flight),
        str(kernel.code_bytes),
        ", ".join(f"{count} {name}" for name, count in also.items() if count),
    ]


def _limits(targets: set[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Limits of a multiprocessor that occupancy is of", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("GPU")
    for heading in ("registers", "warps", "lanes of each", "blocks", "shared bytes", "reserved of a block"):
        table.add_column(heading, justify="right")
    for target in sorted(targets):
        limits = LIMITS[target]
        numbers = (limits.registers, limits.warps, limits.lanes, limits.blocks)
        table.add_row(target, *map(str, (*numbers, limits.shared_bytes, limits.shared_reserved)))
    return table


def _print_findings(
    inspection: Inspection, recorded: Recorded, findings: list[Finding], console: Console
) -> None:
    for backend, version in inspection.versions.items():
        before = recorded.versions.get(backend, version)
        if before != version:
            compiler = expectations.COMPILERS[backend]
            _say(console, f"note: this is {compiler} {version}, recorded is {before}")
    for finding in sorted(findings, key=lambda finding: not finding.is_note):
        _say(console, f"{'note' if finding.is_note else 'finding'}: {finding}")
    failures = sum(not finding.is_note for finding in findings)
    if inspection.kernels:
        _say(console, f"{len(inspection.kernels)} kernels compiled, {failures or 'no'} findings")


def _to_dict(inspection: Inspection, findings: list[Finding]) -> dict[str, Any]:
    return {
        "versions": inspection.versions,
        "absent": inspection.absent,
        "limits": {key.target: asdict(LIMITS[key.target]) for key in inspection.kernels},
        "kernels": [key._asdict() | kernel.to_dict() for key, kernel in sorted(inspection.kernels.items())],
        "findings": [
            {
                **finding.key._asdict(),
                "expected": finding.expected,
                "found": finding.found,
                "note": finding.is_note,
            }
            for finding in findings
        ],
    }

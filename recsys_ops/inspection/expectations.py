"""What is expected of each kernel, in one file for all of them, and what compiled kernels lost of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from recsys_ops._output import write_atomically
from recsys_ops.inspection.binaries import CompiledKernel

FILE = Path(__file__).with_name("expectations.csv")
COMPILERS = {"triton": "triton", "cuda": "nvcc"}
# What every version of a compiler decides anew: Triton 3.6 has 6 loads in flight where 3.7 has 8.
_SCHEDULING = ("occupancy", "loads_in_flight")


class Key(NamedTuple):
    """Which kernel, for which GPU."""

    op: str
    backend: str
    kernel: str
    target: str

    def __str__(self) -> str:
        return f"{self.op} {self.backend}: {self.kernel} on {self.target}"


@dataclass(frozen=True)
class Expectation:
    """Of a kernel, what a change can lose; names and meaning are those of ``CompiledKernel``."""

    registers: int
    shared_bytes: int
    occupancy: int  # percent
    spilled_bytes: int
    load_bytes: int  # of the widest load; 0 where there is none
    store_bytes: int
    loads_in_flight: int | None
    tensor_core: int
    async_copies: int
    atomics: int

    @classmethod
    def of(cls, kernel: CompiledKernel) -> Expectation:
        return cls(
            kernel.registers,
            kernel.shared_bytes,
            round(100 * kernel.occupancy),
            kernel.spilled_bytes,
            max(kernel.loads, default=0),
            max(kernel.stores, default=0),
            kernel.loads_in_flight,
            kernel.tensor_core,
            kernel.async_copies,
            kernel.atomics,
        )

    def lost_by(self, found: Expectation) -> Iterator[tuple[str, str]]:
        """Fields that ``found`` is worse in, and how to say their values."""
        if found.spilled_bytes > self.spilled_bytes:
            yield "spilled_bytes", "{spilled_bytes} spilled bytes"
        if found.load_bytes < self.load_bytes:
            yield "load_bytes", "loads of {load_bytes} bytes"
        if found.store_bytes < self.store_bytes:
            yield "store_bytes", "stores of {store_bytes} bytes"
        if (found.loads_in_flight or 0) < (self.loads_in_flight or 0):
            yield "loads_in_flight", "{loads_in_flight} loads in flight"
        if found.occupancy < self.occupancy:
            yield (
                "occupancy",
                "occupancy {occupancy} % with {registers} registers and {shared_bytes} shared bytes",
            )
        if self.tensor_core and not found.tensor_core:
            yield "tensor_core", "{tensor_core} tensor-core instructions"
        if self.async_copies and not found.async_copies:
            yield "async_copies", "{async_copies} asynchronous copies"
        if found.atomics and not self.atomics:
            yield "atomics", "{atomics} atomics"


@dataclass(frozen=True)
class Recorded:
    """The file: versions of the compilers by backend, and a line for each kernel."""

    versions: dict[str, str]
    lines: dict[Key, Expectation]


@dataclass(frozen=True)
class Finding:
    """One expectation that a kernel lost. A note fails nothing."""

    key: Key
    expected: str
    found: str
    is_note: bool = False

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}"


def read(file: Path = FILE) -> Recorded:
    """What is recorded; nothing where there is no file."""
    if not file.exists():
        return Recorded({}, {})
    comment, _, table = file.read_text(encoding="utf-8").partition("\n")
    words = comment.replace(",", "").split()
    versions = {backend: words[words.index(name) + 1] for backend, name in COMPILERS.items() if name in words}
    lines = {}
    for row in csv.DictReader(io.StringIO(table)):
        key = Key(*(row.pop(name) for name in Key._fields))
        lines[key] = Expectation(**{name: int(value) if value else None for name, value in row.items()})  # type: ignore[arg-type]
    return Recorded(versions, lines)


def write(recorded: Recorded, file: Path = FILE) -> None:
    """Replace the file."""
    versions = [f"{COMPILERS[backend]} {version}" for backend, version in sorted(recorded.versions.items())]
    text = io.StringIO()
    text.write(f"# recorded with {', '.join(versions)}, by recsys-ops inspect --record\n")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*Key._fields, *(field.name for field in fields(Expectation))])
    rows.writerows([*key, *astuple(line)] for key, line in sorted(recorded.lines.items()))
    write_atomically(file, text.getvalue())


def compare(
    kernels: Mapping[Key, CompiledKernel], recorded: Recorded, versions: Mapping[str, str]
) -> list[Finding]:
    """What kernels lost of what is recorded of their operators, backends and GPUs.

    Where a compiler's version is not the recorded one, lower occupancy and fewer loads in flight are
    only notes.
    """
    findings = []
    compiled = {key._replace(kernel="") for key in kernels}
    for key in sorted({*kernels, *(key for key in recorded.lines if key._replace(kernel="") in compiled)}):
        if key not in kernels:
            findings.append(Finding(key, "a kernel", "none: it vanished"))
        elif key not in recorded.lines:
            findings.append(Finding(key, "a recorded line", "none: recsys-ops inspect --record adds it"))
        else:
            expected, found = recorded.lines[key], Expectation.of(kernels[key])
            same = recorded.versions.get(key.backend) == versions[key.backend]
            for name, words in expected.lost_by(found):
                wanted, got = words.format(**asdict(expected)), words.format(**asdict(found))
                findings.append(Finding(key, wanted, got, is_note=name in _SCHEDULING and not same))
    return findings


def updated(
    recorded: Recorded, kernels: Mapping[Key, CompiledKernel], versions: Mapping[str, str]
) -> Recorded:
    """The file with the lines of these kernels' operators, backends and GPUs replaced.

    Raises:
        RuntimeError: lines that stay were recorded with another version of a compiler.
    """
    compiled = {key._replace(kernel="") for key in kernels}
    kept = {key: line for key, line in recorded.lines.items() if key._replace(kernel="") not in compiled}
    for backend, version in versions.items():
        before = recorded.versions.get(backend, version)
        if before != version and any(key.backend == backend for key in kept):
            compiler = COMPILERS[backend]
            raise RuntimeError(
                f"the other lines of {backend} were recorded with {compiler} {before}, this is {version}: "
                f"record all of them, by --backend {backend} alone"
            )
    lines = kept | {key: Expectation.of(kernel) for key, kernel in kernels.items()}
    return Recorded(recorded.versions | dict(versions), lines)

"""The checks by name, their results, and the examples that they make of an operator."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from recsys_ops.testing.contract import OperatorSpec
from recsys_ops.testing.execution import Results, Target
from recsys_ops.testing.tolerances import first_difference


class Subject(Protocol):
    """What a check runs on: a case, an isolation, a bad input or a mutant."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Result:
    """The outcome of one check on one subject."""

    check: str
    case: str
    backend: str
    dtype: str
    ok: bool
    detail: str
    reproduce: str  # a line for the shell

    def __str__(self) -> str:
        ran = f"{self.check} [{self.case}] on {self.backend}, {self.dtype}"
        return f"{ran}: {'ok' if self.ok else self.detail}\n  reproduce: {self.reproduce}"


Subjects = Callable[[OperatorSpec, bool], Sequence[Any]]
DTypes = Callable[[OperatorSpec, bool], Sequence[torch.dtype]]
Body = Callable[[OperatorSpec, Any, Target, torch.dtype, int], None]
Apart = Callable[[Any, Target], bool]

HERE = "--here"  # what tells the process that a check has started for itself from all others
_APART_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """A check and what it runs on; called, it gives a ``Result`` and raises nothing.

    Args:
        name: without the ``check_`` of its function.
        body: raises where it finds a fault.
        subjects: of a spec; with True, the few that interpreted kernels can bear.
        dtypes: of the inputs, likewise.
        every_simd: whether it runs on every instruction set of native kernels, or on the best.
        serves: whether it has a meaning for a target.
        apart: whether it takes a process of its own to run it on a subject by a target.
    """

    name: str
    body: Body
    subjects: Subjects
    dtypes: DTypes
    every_simd: bool
    serves: Callable[[Target], bool]
    apart: Apart

    def __call__(
        self,
        spec: OperatorSpec,
        subject: Subject,
        target: Target,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Result:
        line = _reproduce(spec, self.name, subject, target, dtype, seed)
        if self.apart(subject, target):
            fault = _fault_apart(line)
        else:
            fault = self.fault(spec, subject, target, dtype, seed)
        return Result(self.name, subject.name, str(target), dtype_name(dtype), not fault, fault, line)

    def fault(
        self, spec: OperatorSpec, subject: Subject, target: Target, dtype: torch.dtype, seed: int
    ) -> str:
        """What the check finds wrong when this process runs it, or nothing."""
        try:
            with target.active():
                self.body(spec, subject, target, dtype, seed)
                target.synchronize()
        except AssertionError as error:
            return str(error) or "an assertion failed"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


CHECKS: dict[str, Check] = {}


def first_dtype(spec: OperatorSpec, quick: bool) -> tuple[torch.dtype, ...]:
    return spec.dtypes[:1]


def all_dtypes(spec: OperatorSpec, quick: bool) -> tuple[torch.dtype, ...]:
    return spec.dtypes[:1] if quick else spec.dtypes


def check(
    subjects: Subjects,
    dtypes: DTypes = first_dtype,
    every_simd: bool = False,
    serves: Callable[[Target], bool] = lambda target: True,
    apart: Apart = lambda subject, target: False,
) -> Callable[[Body], Check]:
    """Register a function as a check; the arguments are those of ``Check``."""

    def register(body: Body) -> Check:
        name = body.__name__.removeprefix("check_")
        CHECKS[name] = Check(name, body, subjects, dtypes, every_simd, serves, apart)
        return CHECKS[name]

    return register


@dataclass(frozen=True)
class Example:
    """One check on one subject, by one target in one precision."""

    check: Check
    spec: OperatorSpec
    subject: Subject
    target: Target
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.check.name}-{self.subject.name}-{dtype_name(self.dtype)}-{self.target}"

    @property
    def apart(self) -> bool:
        """Whether it runs in a process of its own, so that others can run at the same time."""
        return self.check.apart(self.subject, self.target)

    def run(self, seed: int = 0) -> Result:
        return self.check(self.spec, self.subject, self.target, self.dtype, seed)


def examples(spec: OperatorSpec, targets: Sequence[Target], quick: bool = False) -> Iterator[Example]:
    """Everything that the suite runs of an operator on these targets.

    With ``quick``, every target runs no more than interpreted kernels do.
    """
    for check in CHECKS.values():
        serving = list(_serving(check, targets))
        work = {few: (check.subjects(spec, few), check.dtypes(spec, few)) for few in (True, False)}
        for subject in dict.fromkeys([*work[True][0], *work[False][0]]):
            for dtype in work[False][1]:
                for target in serving:
                    subjects, dtypes = work[quick or target.interpreted]
                    if subject in subjects and dtype in dtypes:
                        yield Example(check, spec, subject, target, dtype)


def _serving(check: Check, targets: Sequence[Target]) -> Iterator[Target]:
    served = set()
    for target in targets:
        if not check.serves(target):
            continue
        if (target.backend, target.device) not in served or check.every_simd:
            yield target
        served.add((target.backend, target.device))


def demand(condition: bool, detail: str) -> None:
    """Raise AssertionError, of a check, unless the condition holds."""
    if not condition:
        raise AssertionError(detail)


def demand_same_bits(found: Results, wanted: Results, runs: str) -> None:
    """Raise AssertionError where two runs differ by a bit in what both have."""
    for name, value in found.items():
        difference = first_difference(value, wanted[name])
        demand(difference is None, f"{name} of {runs}: {difference}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _reproduce(
    spec: OperatorSpec, check: str, subject: Subject, target: Target, dtype: torch.dtype, seed: int
) -> str:
    words = ["python -m recsys_ops.testing", spec.name, check, _quoted(subject.name)]
    words += ["--backend", target.backend, "--dtype", dtype_name(dtype)]
    words += ["--simd", target.simd] if target.simd else []
    words += [] if target.on_cpu else ["--device", target.device]
    words += ["--seed", str(seed)] if seed else []
    return ("TRITON_INTERPRET=1 " if target.interpreted else "") + " ".join(words)


def _fault_apart(line: str) -> str:
    """What a process finds that runs a line which reproduces a result, or nothing."""
    # Without the cache, freeing memory fails once a kernel has failed, and ends the process.
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_NO_CUDA_MEMORY_CACHING"}
    command = [sys.executable, *shlex.split(line.partition("python ")[2]), HERE]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_APART_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the process that ran it did not end within {_APART_SECONDS} s"
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or [""])[-1]
        return f"the process that ran it ended with status {done.returncode}: {last_words}"
    return str(json.loads(done.stdout.splitlines()[-1]))


def _quoted(name: str) -> str:
    """For the shell, and easy to read: names of cases hold single quotes."""
    return f'"{name}"' if "'" in name and not set(name) & set('"$`\\!') else shlex.quote(name)

"""What is measured: workloads of an operator, and the candidates that compute them.

An operator is added with one file, ``suites/<operator>.py``, whose ``suite(device)`` gives its ``Suite``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from recsys_ops.backends import Call, Operator
from recsys_ops.embedding_bag.cost import Cost

Run = Callable[[Any], Any]  # one call on one batch
Check = Callable[[Any, Any], str | None]  # (batch, what a Run gave) -> why it is wrong, or None


class Growth(NamedTuple):
    """What grows from workload to workload of a series, and how large it is in one: drawn over time."""

    of: str  # such as "rows of a table"
    size: float


class Unsupported(Exception):
    """A candidate cannot compute a workload; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """What the calls of a workload work on."""

    state: Any  # the same at every call, such as a table
    batches: Sequence[Any]  # taken in turns, so that no two successive calls see the same


@dataclass(frozen=True)
class Workload:
    """One kind of call, at one size, under one condition of the caches."""

    name: str  # "group/detail/…"
    operator: str
    pass_: Literal["forward", "step"]
    conditions: str  # sizes, dtype, distributions, caches: for the reader
    rows_from: Literal["memory", "last-level cache", "cache"]  # where a row is found that is first looked up
    case: Any  # the suite's own description, for its candidates
    inputs: Callable[[], Inputs]
    cost: Callable[[Any], Cost]  # of one batch
    check: Callable[[Inputs], Check]
    quick: bool = False  # part of a quick run
    timed: Literal["device", "host"] = "device"  # how long calls take, or how long they keep their caller
    growth: Growth | None = None

    @property
    def flushed(self) -> bool:
        """Whether the caches are flushed before every call."""
        return self.rows_from == "memory"


@dataclass(frozen=True)
class Candidate:
    """One way to compute workloads. The first of a suite is ours, the others are its peers.

    ``prepare`` may take its time; it raises ``Unsupported`` where the candidate cannot serve.
    ``variant`` turns a workload into the one that this candidate computes in its place, on the
    same inputs: it is checked and costed as that one.
    """

    name: str
    prepare: Callable[[Workload, Inputs], Run]
    available: Callable[[], str | None] = lambda: None  # why it is absent here
    applies: Callable[[Workload], bool] = lambda workload: True  # whether the comparison has a meaning
    variant: Callable[[Workload], Workload] = lambda workload: workload


OURS = "recsys_ops"  # the candidate that a suite is about
LIMIT = "the limit"  # stands in a target for a peer that takes the least possible time


@dataclass(frozen=True)
class Target:
    """The least speedup over a peer, or share of the limit, that the workloads of a pattern should reach."""

    workloads: str  # a glob of names
    peer: str  # a candidate's name, or LIMIT
    minimum: float


@dataclass(frozen=True)
class Suite:
    """An operator's workloads on one device, the candidates with ours first, and the targets."""

    operator: str
    workloads: Sequence[Workload]
    candidates: Sequence[Candidate]
    targets: Sequence[Target] = ()
    backend: Callable[[], str] = lambda: ""  # the backend that serves ours


def compiler_missing() -> str | None:
    """Why ``torch.compile`` is no candidate here, or None."""
    return None if torch._dynamo.is_dynamo_supported() else "torch.compile does not support this platform"


def other_gpu_backends(operator: Operator, call: Call, prepare: Callable[..., Run]) -> list[Candidate]:
    """Ours by the backends for GPUs that are not chosen on their own; ``prepare`` takes ``backend``."""
    chosen = operator.choose(call).backend
    return [
        Candidate(
            f"{OURS} {backend}",
            functools.partial(prepare, backend=backend),
            available=functools.partial(operator.rejection, backend, call),
        )
        for backend in operator.implementations
        if backend in ("cuda", "triton") and backend != chosen
    ]


@functools.cache
def suites(device: str = "cpu") -> dict[str, Suite]:
    """Every suite for a device, "cpu" or "cuda", by its operator's name."""
    folder = importlib.import_module("recsys_ops.benchmarks.suites")
    modules = (
        importlib.import_module(f"{folder.__name__}.{m.name}") for m in pkgutil.iter_modules(folder.__path__)
    )
    return {suite.operator: suite for suite in (module.suite(device) for module in modules)}

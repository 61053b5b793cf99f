"""Which backends exist, which can serve a call, and why the others cannot."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import recsys_ops
from recsys_ops import _extension

log = logging.getLogger("recsys_ops")

_F = TypeVar("_F", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "RECSYS_OPS_BACKEND"
# Read once: reading the environment costs a tenth of a small call.
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or None


def _constant_while_tracing(function: _F) -> _F:
    # What torch.compiler.assume_constant_result does, which imports all of Dynamo for it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Call(NamedTuple):
    """What the choice of a backend depends on: a hashable summary of one call."""

    device: str  # torch.device.type
    dtype: torch.dtype


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'recsys-ops[triton]'"
    return None


def triton_rejects_device(device: str) -> str | None:
    """Why Triton kernels cannot run on a device: on a CPU they only run interpreted, for tests."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU triton kernels only run interpreted, for tests: set TRITON_INTERPRET=1 at start"
    if device not in ("cpu", "cuda", "meta"):
        return f"triton kernels run on GPUs, not on {device}"
    return None


def native_rejects(subject: str) -> Callable[[Call], str | None]:
    """Why native kernels cannot serve a call, told of the ``subject``: "weight is"."""

    def rejects(call: Call) -> str | None:
        if call.device not in ("cpu", "meta"):
            return f"{subject} on {call.device}, native kernels run on the CPU"
        return None

    return rejects


def cuda_rejects(subject: str) -> Callable[[Call], str | None]:
    """The same of CUDA kernels."""

    def rejects(call: Call) -> str | None:
        if call.device not in ("cuda", "meta"):
            return f"{subject} on {call.device}, CUDA kernels run on NVIDIA GPUs"
        return None

    return rejects


# In order of preference. The value tells why the backend is absent from this
# machine, or None where it is present.
BACKENDS: dict[str, Callable[[], str | None]] = {
    "native": _extension.missing,
    "cuda": _extension.cuda_missing,
    "triton": _triton_missing,
    "reference": lambda: None,
}


@dataclass(frozen=True)
class Implementation:
    """One backend's kernels for one operator."""

    backend: str
    load: Callable[[], Any]  # a namespace of kernels; imports what it needs
    rejects: Callable[[Call], str | None]  # why it cannot serve a call

    @functools.cached_property
    def kernels(self) -> Any:
        return self.load()


class Decision(NamedTuple):
    """The outcome of one choice."""

    implementation: Implementation
    because: str
    rejected: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """What serves a call, and why the other backends do not."""

    operator: str
    call: Call
    chosen: str
    because: str
    rejected: dict[str, str] = field(default_factory=dict)
    configuration: str = "the kernel's defaults (no tuned table)"

    def __str__(self) -> str:
        lines = [
            f"{self.operator} on {self.call.device}, {_name(self.call.dtype)}: {self.chosen}",
            f"  chosen     {self.because}",
            f"  configured {self.configuration}",
        ]
        lines += [f"  rejected   {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


class Operator:
    """An operator's name and implementations, and the choice among them.

    ``describe`` takes the arguments of the public function and returns their ``Call``.
    """

    def __init__(
        self,
        name: str,
        implementations: list[Implementation],
        describe: Callable[..., Call],
    ) -> None:
        unknown = [i.backend for i in implementations if i.backend not in BACKENDS]
        if unknown:
            raise ValueError(f"{name}: unknown backends {unknown}, expected some of {list(BACKENDS)}")
        by_name = {i.backend: i for i in implementations}
        self.name = name
        self.implementations = {b: by_name[b] for b in BACKENDS if b in by_name}
        self.describe = describe
        self._decisions: dict[tuple[str | None, Call], Implementation] = {}

    def choose(self, call: Call, backend: str | None = None) -> Implementation:
        """The implementation that serves ``call``; an explicit choice that cannot serve it raises."""
        key = ((_context.get() or _from_environment) if backend is None else backend, call)
        found = self._decisions.get(key)
        if found is None:
            found = self._decisions[key] = self._choose_and_log(call, backend)
        return found

    def forget(self, backend: str) -> None:
        """Drop what was decided for calls that ask for ``backend``, whose implementation goes away."""
        self._decisions = {key: found for key, found in self._decisions.items() if key[0] != backend}

    def decide(self, call: Call, backend: str | None = None) -> Decision:
        """Like ``choose``, with the reasons."""
        requested, because = _request(backend)
        if requested is not None:
            implementation = self._named(requested)
            reason = self.rejection(requested, call)
            if reason is not None:
                raise RuntimeError(
                    f"{self.name}: backend {requested!r} ({because}) cannot serve this call: {reason}"
                )
            others = {b: f"not asked for ({because})" for b in self.implementations if b != requested}
            return Decision(implementation, because, others)
        rejected: dict[str, str] = {}
        chosen: Implementation | None = None
        for name, implementation in self.implementations.items():
            reason = self.rejection(name, call)
            if reason is None and chosen is None:
                chosen = implementation
            else:
                rejected[name] = reason or f"{chosen.backend if chosen else ''} is preferred"
        if chosen is None:
            raise RuntimeError(f"{self.name}: no backend can serve {call}: {rejected}")
        return Decision(chosen, "first in order of preference that can serve the call", rejected)

    def rejection(self, backend: str, call: Call) -> str | None:
        """Why ``backend`` cannot serve ``call`` here, or None where it can."""
        implementation = self._named(backend)
        return BACKENDS[backend]() or implementation.rejects(call)

    def _named(self, backend: str) -> Implementation:
        if backend not in self.implementations:
            raise ValueError(
                f"{self.name}: expected backend to be one of {list(self.implementations)}, got {backend!r}"
            )
        return self.implementations[backend]

    def _choose_and_log(self, call: Call, backend: str | None) -> Implementation:
        decision = self.decide(call, backend)
        chosen = decision.implementation
        preferred = list(self.implementations)[: list(self.implementations).index(chosen.backend)]
        slow = chosen.backend == "reference" and _request(backend)[0] is None
        for name in preferred:
            reason = decision.rejected[name]
            if not reason.startswith("not asked for"):
                level = logging.WARNING if slow and name == "native" else logging.INFO
                log.log(
                    level,
                    "%s: %s serves %s calls on %s; not %s: %s",
                    self.name,
                    chosen.backend,
                    _name(call.dtype),
                    call.device,
                    name,
                    reason,
                )
        return chosen


@_constant_while_tracing
def is_requested() -> bool:
    """Whether ``use_backend`` or the environment asks for a backend."""
    return _context.get() is not None or _from_environment is not None


@_constant_while_tracing
def choose_while_tracing(operator: str, backend: str | None, *call: Any) -> str:
    """The chosen backend's name, as a constant of the graph that ``torch.compile`` is tracing.

    ``call`` holds the fields of the ``Call``: Dynamo passes on no named tuples.
    """
    return operators()[operator].choose(Call(*call), backend).backend


_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("recsys_ops_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every operator called inside the ``with`` block.

    The innermost block wins; a ``backend=`` argument wins over it.

    Args:
        name: ``"reference"``, ``"native"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: ``name`` is not a backend.

    Example:
        >>> import torch, recsys_ops
        >>> weight, ids = torch.ones(4, 2), torch.tensor([[0, 1]])
        >>> with recsys_ops.use_backend("reference"):
        ...     recsys_ops.embedding_bag(ids, weight, mode="sum")
        tensor([[2., 2.]])
    """
    _check_name(name, "use_backend: name")
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell which backend serves a call, and why the others do not.

    Args:
        op: an operator's name or its public function.
        *args, **kwargs: the arguments of the call.

    Raises:
        ValueError: no such operator.
        RuntimeError: a backend asked for cannot serve the call.

    Example:
        >>> import torch, recsys_ops
        >>> print(recsys_ops.explain("embedding_bag", torch.tensor([[0]]), torch.ones(2, 2)).operator)
        embedding_bag
    """
    operator = _operator(op if isinstance(op, str) else getattr(op, "__name__", repr(op)))
    return explain_call(operator.name, operator.describe(*args, **kwargs), kwargs.get("backend"))


def explain_call(op: str, call: Call, backend: str | None = None) -> Explanation:
    """Like ``explain``, for a call that is only described."""
    decision = _operator(op).decide(call, backend)
    return Explanation(op, call, decision.implementation.backend, decision.because, decision.rejected)


def survey(call: Call) -> dict[str, dict[str, str | None]]:
    """For each operator and backend, why it cannot serve ``call`` here, or None where it can."""
    return {
        name: {backend: operator.rejection(backend, call) for backend in operator.implementations}
        for name, operator in operators().items()
    }


@functools.cache
def operators() -> dict[str, Operator]:
    """Every operator of the package by name: each subpackage with an ``api`` module is one."""
    found = {}
    for module in pkgutil.iter_modules(recsys_ops.__path__):
        package = f"recsys_ops.{module.name}"
        if module.ispkg and (Path(recsys_ops.__path__[0]) / module.name / "api.py").is_file():
            operator = importlib.import_module(f"{package}.api").OPERATOR
            found[operator.name] = operator
    return found


def _operator(name: str) -> Operator:
    if name not in operators():
        raise ValueError(f"explain: expected op to be one of {sorted(operators())}, got {name!r}")
    return operators()[name]


def _request(backend: str | None) -> tuple[str | None, str]:
    if backend is not None:
        return _check_name(backend, "backend"), "the backend= argument"
    if (name := _context.get()) is not None:
        return name, "use_backend"
    if _from_environment is not None:
        return _check_name(_from_environment, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    return None, ""


def _check_name(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {list(BACKENDS)}, got {name!r}")
    return name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

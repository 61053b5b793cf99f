"""Running an operator on one problem: where, by which kernels, and what must come out."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys_ops import _extension
from recsys_ops.backends import BACKENDS, Call, Implementation, Operator
from recsys_ops.testing.contract import Case, OperatorSpec
from recsys_ops.testing.inputs import Inputs
from recsys_ops.testing.poison import deterministic_algorithms
from recsys_ops.testing.tolerances import compare

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """What runs a check: a backend, a device, and for native kernels an instruction set."""

    backend: str
    device: str = "cpu"
    simd: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.backend, self.simd, None if self.on_cpu else self.device)))

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def evidence(self) -> str:
        """The highest rung of evidence that a check on this target gives."""
        return "interpreted" if self.interpreted else f"run on {self.device}"

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which the target's instruction set is in use."""
        if self.simd:
            return _extension.use_simd_level(self.simd)
        # On a GPU, eager PyTorch adds in whatever order its atomics come, unless told not to.
        eager_on_gpu = self.backend == "reference" and not self.on_cpu
        return deterministic_algorithms() if eager_on_gpu else contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait for the device: what went wrong in a kernel is raised here."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


def targets(operator: Operator) -> tuple[list[Target], dict[str, str]]:
    """The targets of an operator that this machine can run, and why the other backends are absent."""
    found: list[Target] = []
    absent: dict[str, str] = {}
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    devices = ["cuda", "cpu"] if torch.cuda.is_available() and not interpreting else ["cpu"]
    for backend in operator.implementations:
        reasons = {d: operator.rejection(backend, Call(d, torch.float32)) for d in devices}
        for device in (d for d, reason in reasons.items() if reason is None):
            levels = _extension.simd_levels() if backend == "native" else [None]
            found += [Target(backend, device, level) for level in levels]
        if all(reasons.values()):
            absent[backend] = str(reasons[devices[0]])
    return found, absent


@contextlib.contextmanager
def candidate(spec: OperatorSpec, kernels: Any, name: str = "candidate") -> Iterator[Target]:
    """Let kernels serve an operator as one more backend inside the block, for checking them.

    Args:
        spec: of the operator.
        kernels: has the functions of the operator's ``reference`` module.
        name: of the backend; blocks may be nested under different names.

    Raises:
        ValueError: there is a backend of this name.

    Example:
        >>> from recsys_ops.embedding_bag import reference
        >>> from recsys_ops.embedding_bag.cases import SPEC
        >>> from recsys_ops.testing import check_forward_backward
        >>> with candidate(SPEC, reference) as target:
        ...     check_forward_backward(SPEC, SPEC.quick[0], target).ok
        True
    """
    operator = spec.operator
    if name in BACKENDS:
        raise ValueError(f"candidate: expected the name of no other backend, got {name!r}")
    BACKENDS[name] = lambda: None
    operator.implementations[name] = Implementation(name, lambda: kernels, lambda call: None)
    spec.kernels[name] = kernels
    try:
        yield Target(name)
    finally:
        del BACKENDS[name], operator.implementations[name], spec.kernels[name]
        operator.forget(name)


def overridden(kernels: Any, override: dict[str, Callable[..., Any]]) -> SimpleNamespace:
    """Kernels some of which are replaced."""
    return SimpleNamespace(**{**vars(kernels), **override})


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, and the gradients that flow back into its outputs."""

    arguments: dict[str, Any]
    cotangents: tuple[Tensor | None, ...]
    differentiable: tuple[str, ...]
    mutates: tuple[str, ...] = ()

    def map(self, f: Callable[[Tensor], Tensor], but: tuple[str, ...] = ()) -> Problem:
        """Replace every tensor, except the arguments named."""
        arguments = {
            name: f(value) if isinstance(value, Tensor) and name not in but else value
            for name, value in self.arguments.items()
        }
        return replace(
            self, arguments=arguments, cotangents=tuple(t if t is None else f(t) for t in self.cotangents)
        )

    def copy(self) -> Problem:
        return self.map(torch.clone)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy with every floating-point tensor in another precision."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t).copy()

    def absolute(self, but: tuple[str, ...]) -> Problem:
        return self.map(lambda t: t.abs() if t.is_floating_point() else t, but)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What computes little in many small steps is faster so, much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
@one_thread()
def pose(spec: OperatorSpec, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
    """The problem that a case poses for one seed; run a copy of it if the operator changes its arguments."""
    draw = Inputs(seed, dtype, device)
    problem = Problem(case.build(draw), (), case.differentiable, case.mutates)
    with torch.no_grad():
        outputs = as_tuple(spec.function(**problem.copy().arguments, backend="reference"))
    cotangents = tuple(draw.normal(*o.shape) if o.is_floating_point() else None for o in outputs)
    return replace(problem, cotangents=cotangents)


def evaluate(function: Callable[..., Any], problem: Problem, backend: str | None = None) -> Results:
    """Outputs, gradients, and the arguments that the call is documented to change, by name.

    A sparse gradient must be coalesced, its rows in ascending order; it is given back dense.
    """
    arguments = dict(problem.arguments)
    for name in problem.differentiable:
        arguments[name] = arguments[name].detach().requires_grad_()
    outputs = as_tuple(function(**arguments, backend=backend))
    results = {f"output {i}" if len(outputs) > 1 else "output": o.detach() for i, o in enumerate(outputs)}
    if problem.differentiable:
        pairs = [(o, c) for o, c in zip(outputs, problem.cotangents, strict=True) if c is not None]
        leaves = [arguments[name] for name in problem.differentiable]
        gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs])
        for name, gradient in zip(problem.differentiable, gradients, strict=True):
            results[f"gradient of {name}"] = _dense(gradient, name)
    for name in problem.mutates:
        results[f"{name} afterwards"] = arguments[name].detach()
    return results


class Expected(NamedTuple):
    """What ``compare`` holds results against."""

    dtypes: dict[str, torch.dtype]
    eager: Results
    exact: Results
    magnitude: Results


@one_thread()
def expect(spec: OperatorSpec, case: Case, problem: Problem) -> Expected:
    """The reference's results in the same precision (or fp32 for fp64), in fp64, and on absolute values."""
    run = functools.partial(evaluate, spec.function, backend="reference")
    same = run(problem.copy())
    dtypes = {name: value.dtype for name, value in same.items()}
    double = torch.float64 in dtypes.values()
    return Expected(
        dtypes,
        run(problem.to(torch.float32)) if double else same,
        same if double else run(problem.to(torch.float64)),
        run(problem.to(torch.float64).absolute(but=case.signed)),
    )


@functools.lru_cache(maxsize=4)
def expected(
    spec: OperatorSpec, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Expected:
    """What the problem that ``pose`` gives must give."""
    return expect(spec, case, pose(spec, case, dtype, device, seed))


def disagreement(found: Results, wanted: Expected) -> str | None:
    """The first result outside its error budget, or None."""
    for name, exact in wanted.exact.items():
        comparison = compare(
            found[name], wanted.eager[name], exact, wanted.magnitude[name], wanted.dtypes[name]
        )
        if not comparison:
            return f"{name} {comparison.detail}"
    return None


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a public function, which may be one tensor."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _dense(gradient: Tensor, name: str) -> Tensor:
    if gradient.layout == torch.strided:
        return gradient
    if not gradient.is_coalesced():
        raise AssertionError(f"gradient of {name} is sparse but not coalesced")
    rows = gradient.indices()[0]
    if not bool((rows[1:] > rows[:-1]).all()):
        raise AssertionError(f"gradient of {name} has rows {rows.tolist()}, expected them in ascending order")
    return gradient.to_dense()

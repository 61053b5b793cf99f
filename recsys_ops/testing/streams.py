"""The checks of work that a GPU does later: on the caller's stream, and recorded in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from recsys_ops.testing.contract import Case, OperatorSpec
from recsys_ops.testing.execution import Problem, Target, evaluate, pose
from recsys_ops.testing.registry import check, demand_same_bits

_LATE_CYCLES = 50_000_000  # some 30 ms, in which a kernel on another stream has long run


def _runs_on_gpu(target: Target) -> bool:
    """Whether kernels of ours run on a GPU; the eager reference waits for it."""
    return torch.device(target.device).type == "cuda" and target.backend != "reference"


@check(lambda spec, quick: spec.asynchronous, serves=_runs_on_gpu)
def check_stream(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """On a stream of the caller's, kernels wait for what is on it before them, and nobody for the GPU."""
    problem = pose(spec, case, dtype, target.device, seed)
    wanted = evaluate(spec.function, problem.copy(), target.backend)
    late = problem.map(torch.zeros_like)
    target.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(target.device)), _synchronising_is_an_error():
        torch.cuda._sleep(_LATE_CYCLES)
        for tensor, value in zip(_tensors(late), _tensors(problem), strict=True):
            tensor.copy_(value)
        found = evaluate(spec.function, late, target.backend)
    target.synchronize()
    demand_same_bits(found, wanted, "a stream of the caller's and the default one")


@check(lambda spec, quick: spec.asynchronous, serves=_runs_on_gpu)
def check_graph(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """A CUDA graph of forward and backward gives the same bits, each time that it is replayed."""
    problem = pose(spec, case, dtype, target.device, seed).copy()
    with torch.cuda.stream(torch.cuda.Stream(target.device)):
        wanted = evaluate(spec.function, problem, target.backend)
    target.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(spec.function, problem, target.backend)
    for _ in range(2):
        for value in found.values():
            value.fill_(torch.nan)
        graph.replay()
        target.synchronize()
        demand_same_bits(found, wanted, "a replayed graph and plain calls")


def _tensors(problem: Problem) -> list[Tensor]:
    return [t for t in (*problem.arguments.values(), *problem.cotangents) if isinstance(t, Tensor)]


@contextmanager
def _synchronising_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

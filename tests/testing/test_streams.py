"""The checks of streams and graphs, with a GPU that is only played."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recsys_ops.embedding_bag.cases import SPEC
from recsys_ops.testing import Target, check_graph, check_stream, examples, streams

TARGET = Target("reference")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is recorded, and how it is replayed: by default rightly."""
    played = SimpleNamespace(recorded=[], replay=lambda found, again: found.copy_(again))

    def evaluate(*args: Any) -> dict[str, torch.Tensor]:
        results = streams_evaluate(*args)
        played.recorded.append((args, results))
        return results

    class Graph:
        def replay(self) -> None:
            args, results = played.recorded[-1]
            for name, again in streams_evaluate(*args).items():
                played.replay(results[name], again)

    streams_evaluate = streams.evaluate
    monkeypatch.setattr(streams, "evaluate", evaluate)
    cuda = {
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "Stream": lambda device: None,
        "CUDAGraph": Graph,
        "_sleep": lambda cycles: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return played


@pytest.mark.parametrize("case", SPEC.asynchronous, ids=lambda case: case.name)
def test_right_kernels_pass(graphs: SimpleNamespace, case: Any) -> None:
    assert not check_stream.fault(SPEC, case, TARGET, torch.float32, 0)
    assert not check_graph.fault(SPEC, case, TARGET, torch.float32, 0)


def test_a_graph_that_leaves_results_unwritten_fails(graphs: SimpleNamespace) -> None:
    graphs.replay = lambda found, again: None
    fault = check_graph.fault(SPEC, SPEC.asynchronous[0], TARGET, torch.float32, 0)
    assert "a replayed graph and plain calls" in fault


def test_a_kernel_that_does_not_wait_fails(graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_tensors", lambda problem: [])  # nothing has arrived yet
    fault = check_stream.fault(SPEC, SPEC.asynchronous[0], TARGET, torch.float32, 0)
    assert "a stream of the caller's and the default one" in fault


def test_they_run_on_gpus_alone() -> None:
    targets = [
        Target("native"),
        Target("cuda", "cuda"),
        Target("triton", "cuda"),
        Target("reference", "cuda"),
    ]
    found = {
        str(e.target) for e in examples(SPEC, targets, quick=True) if e.check in (check_stream, check_graph)
    }
    assert found == {"cuda/cuda", "triton/cuda"}

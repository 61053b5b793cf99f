"""The gate before the timing, and what becomes of candidates that cannot take part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_suite as tiny
import torch

from recsys_ops.benchmarks import ceilings as ceilings_module
from recsys_ops.benchmarks.cases.embedding_bag import Case, make_workload
from recsys_ops.benchmarks.ceilings import measure_ceilings
from recsys_ops.benchmarks.machine import cache_bytes
from recsys_ops.benchmarks.measure import Figures, Row, measure
from recsys_ops.benchmarks.registry import Candidate, Inputs, Unsupported, Workload, suites
from recsys_ops.benchmarks.results import ceiling_cells
from recsys_ops.benchmarks.suites.embedding_bag import suite
from recsys_ops.benchmarks.targets import judge
from recsys_ops.embedding_bag.api import OPERATOR
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.timing import HOST_CLOCK, HostClock, Ratio

OPERATOR_NAMES = {f"recsys_ops {backend}" for backend in OPERATOR.implementations}
NONE_FLUSHED: Callable[[], Any] = lambda: None  # noqa: E731


def rows_of(workload: Workload, *candidates: Candidate) -> dict[str, Row]:
    suite = tiny.suite([tiny.OURS, *candidates])
    return {row.candidate: row for row in measure(workload, suite, tiny.CEILINGS, tiny.BUDGET, NONE_FLUSHED)}


def test_right_candidates_get_figures_and_ours_no_ratio() -> None:
    rows = rows_of(tiny.workload(), tiny.TORCH)
    ours, torch_row = rows["recsys_ops"], rows["torch"]
    assert (ours.status, torch_row.status) == ("ok", "ok")
    assert ours.figures and ours.figures.seconds > 0 and len(ours.figures.samples) == 3
    assert ours.ours_speedup is None
    assert torch_row.ours_speedup and torch_row.ours_speedup.low <= torch_row.ours_speedup.value


def off_by_a_little(output: torch.Tensor) -> torch.Tensor:
    return output * (1 + 1e-4)


def without_the_last_bag(output: torch.Tensor) -> torch.Tensor:
    return torch.cat([output[:-1], torch.zeros_like(output[-1:])])


FORWARD_MUTANTS: dict[str, Callable[[Any], Any]] = {
    "a little off": off_by_a_little,
    "last bag dropped": without_the_last_bag,
    "zeros": torch.zeros_like,
    "NaN": lambda output: torch.full_like(output, torch.nan),
    "other dtype": lambda output: output.double(),
    "one bag too few": lambda output: output[:-1],
}


@pytest.mark.parametrize("mutant", FORWARD_MUTANTS)
def test_a_wrong_output_gets_no_figures(mutant: str) -> None:
    row = rows_of(tiny.workload(), tiny.altered("wrong", FORWARD_MUTANTS[mutant]))["wrong"]
    assert row.status == "failed" and row.reason and row.reason.startswith("output: ")
    assert row.figures is None and row.ours_speedup is None


def in_gradient(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], Any]:
    return lambda result: (result[0], change(result[1].clone()), *result[2:])


def touch_another_row(gradient: torch.Tensor) -> torch.Tensor:
    row = int((gradient == 0).all(dim=1).nonzero()[0])
    gradient[row] = 1e-30
    return gradient


DENSE_MUTANTS = {
    "doubled": lambda gradient: 2 * gradient,
    "a row that no id names": touch_another_row,
    "missing": lambda gradient: None,
    "sparse": lambda gradient: gradient.to_sparse(1),
}


@pytest.mark.parametrize("mutant", DENSE_MUTANTS)
def test_a_wrong_dense_gradient_gets_no_figures(mutant: str) -> None:
    wrong = tiny.altered("wrong", in_gradient(DENSE_MUTANTS[mutant]))
    rows = rows_of(tiny.workload(gradient="dense"), wrong)
    assert rows["recsys_ops"].status == "ok"
    assert rows["wrong"].status == "failed" and "gradient of the table" in str(rows["wrong"].reason)


SPARSE_MUTANTS = {
    "dense": lambda gradient: gradient.to_dense(),
    "halved": lambda gradient: gradient * 0.5,
    "a row missing": lambda gradient: torch.sparse_coo_tensor(
        gradient.coalesce().indices()[:, 1:], gradient.coalesce().values()[1:], gradient.shape
    ),
}


@pytest.mark.parametrize("mutant", SPARSE_MUTANTS)
def test_a_wrong_sparse_gradient_gets_no_figures(mutant: str) -> None:
    wrong = tiny.altered("wrong", in_gradient(SPARSE_MUTANTS[mutant]))
    rows = rows_of(tiny.workload(gradient="sparse"), wrong)
    assert rows["recsys_ops"].status == "ok"
    assert rows["wrong"].status == "failed" and "gradient of the table" in str(rows["wrong"].reason)


def test_a_wrong_gradient_of_the_weights_gets_no_figures() -> None:
    workload = tiny.workload(gradient="sparse", weighted=True, weights_gradient=True)
    wrong = tiny.altered("wrong", lambda result: (*result[:2], result[2] + 1))
    rows = rows_of(workload, wrong)
    assert rows["recsys_ops"].status == "ok"
    assert "gradient of the weights" in str(rows["wrong"].reason)


def test_a_result_remembered_from_the_first_batch_gets_no_figures() -> None:
    def prepare(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        first = tiny.OURS.prepare(workload, inputs)(inputs.batches[0])
        return lambda batch: first

    assert rows_of(tiny.workload(), Candidate("remembers", prepare))["remembers"].status == "failed"


def test_absent_and_unable_candidates_say_why() -> None:
    def unable(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        raise Unsupported("no pooling of teapots")

    def breaks(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        raise OSError("lost\nits way")

    rows = rows_of(
        tiny.workload(),
        Candidate("absent", unable, available=lambda: "not installed"),
        Candidate("unable", unable),
        Candidate("breaks", breaks),
        Candidate("elsewhere", unable, applies=lambda workload: False),
    )
    assert {name: (row.status, row.reason) for name, row in rows.items() if row.figures is None} == {
        "absent": ("unavailable", "not installed"),
        "unable": ("unavailable", "no pooling of teapots"),
        "breaks": ("unavailable", "OSError: lost its way"),
    }


def test_ours_breaking_is_a_failure_and_peers_get_no_ratio() -> None:
    def breaks(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        raise RuntimeError("no kernel")

    suite = tiny.suite([Candidate("recsys_ops", breaks), tiny.TORCH])
    ours, peer = measure(tiny.workload(), suite, tiny.CEILINGS, tiny.BUDGET, NONE_FLUSHED)
    assert (ours.status, ours.reason) == ("failed", "RuntimeError: no kernel")
    assert peer.figures is not None and peer.ours_speedup is None


def test_caches_are_flushed_before_each_call_of_a_cold_workload_alone() -> None:
    calls: list[int] = []
    for rows_from in ("memory", "cache"):
        case = Case(8, bags=5, rows=60)
        workload = make_workload("tiny", case, rows_from)
        measure(workload, tiny.suite(), tiny.CEILINGS, tiny.BUDGET, lambda: calls.append(1))
        if rows_from == "memory":
            assert len(calls) >= 2 * tiny.BUDGET.fewest_rounds
            calls.clear()
    assert not calls


CPU, GPU = suite("cpu"), suite("cuda")
FIGURES = Figures(2.0, (2.0, 2.0, 4.0), 1.0, 1.0, 0.6, "memory", 1.0, 1.0)


@pytest.mark.parametrize("workload", [*CPU.workloads, *GPU.workloads], ids=lambda workload: workload.name)
def test_everyone_computes_every_workload_of_the_suite(workload: Workload) -> None:
    """On small sizes and the CPU; a peer that is absent here or says it cannot is left out."""
    small = replace(workload.case, rows=60, bags=5, dim=8, device="cpu")
    workload = make_workload(workload.name, small)
    # On a CPU, PyTorch coalesces fp16 in fp16.
    left_out = {"torch.compile"} | ({"torch + coalesce"} if small.dtype == torch.float16 else set())
    candidates = [c for c in CPU.candidates if c.name not in left_out]
    rows = measure(workload, replace(CPU, candidates=candidates), tiny.CEILINGS, tiny.BUDGET, NONE_FLUSHED)
    assert rows[0].candidate == "recsys_ops" and rows[0].status == "ok", rows[0].reason
    assert not [row for row in rows if row.status == "failed"]
    assert not [row for row in rows if "Error" in (row.reason or "")]


def test_inputs_change_from_call_to_call_and_are_the_same_in_every_run() -> None:
    first, second = (tiny.workload(weighted=True).inputs() for _ in range(2))
    assert not torch.equal(first.batches[0].ids, first.batches[1].ids)
    assert torch.equal(first.batches[1].ids, second.batches[1].ids)
    assert torch.equal(first.state.weight, second.state.weight)


def test_zipf_names_few_rows_often() -> None:
    def share_of_hottest(ids: str) -> float:
        batch = tiny.workload(ids=ids, rows=10_000, bags=500).inputs().batches[0].ids
        return float(batch.bincount().max()) / len(batch)

    assert share_of_hottest("zipf") > 10 * share_of_hottest("uniform")


@pytest.mark.parametrize("operator", ["embedding_bag", "embedding_bag_collection"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_are_found_with_unique_names_and_targets_that_match(device: str, operator: str) -> None:
    suite = suites(device)[operator]
    names = [workload.name for workload in suite.workloads]
    assert len(set(names)) == len(names)
    assert any(workload.quick for workload in suite.workloads)
    rows = [
        Row(w.name, w.operator, w.pass_, w.conditions, c.name, "ok", None, FIGURES, Ratio(1, 1, 1))
        for w in suite.workloads
        for c in suite.candidates
        if c.applies(w)
    ]
    for target in suite.targets:
        assert judge([target], rows), target


def test_a_limit_is_the_slowest_of_memory_cache_flops_and_call() -> None:
    cold, warm = (make_workload("w", Case(64), place) for place in ("memory", "cache"))
    row = 256
    cost = Cost(
        flops=10, row_bytes=row, unique_row_bytes=10**6, lookup_row_bytes=10**7, streamed_bytes=2 * 10**6
    )
    assert tiny.CEILINGS.limit(cold, cost) == (pytest.approx(1e-3 + 1e-3), "memory")
    assert tiny.CEILINGS.limit(warm, cost) == (pytest.approx(10**7 / 8e9), "cache")
    assert tiny.CEILINGS.limit(warm, replace(cost, flops=10**9)) == (pytest.approx(0.1), "flops")
    assert tiny.CEILINGS.limit(warm, replace(cost, zeroed_bytes=10**9)) == (pytest.approx(1.0), "memory")
    assert tiny.CEILINGS.limit(warm, replace(cost, lookup_row_bytes=8)) == (1e-6, "call")


def test_the_limit_of_cold_rows_on_a_gpu_is_that_of_a_copy() -> None:
    cold, warm = (make_workload("w", Case(64, device="cuda"), place) for place in ("memory", "cache"))
    on_gpu = replace(tiny.CEILINGS, device="cuda", read_one_thread=None, call=1e-9)
    cost = Cost(
        flops=10,
        row_bytes=256,
        unique_row_bytes=10**6,
        lookup_row_bytes=10**9,
        streamed_bytes=2 * 10**6,
        zeroed_bytes=10**6,
    )
    assert on_gpu.limit(cold, cost) == (pytest.approx(4e6 / on_gpu.copy), "memory")
    assert on_gpu.limit(warm, cost) == (pytest.approx(10**9 / 8e9), "cache")


def test_row_rates_lie_between_those_of_the_measured_sizes() -> None:
    ceilings = replace(tiny.CEILINGS, rows={"memory": {64: 1e9, 256: 4e9}})
    assert ceilings.row_rate("memory", 128) == pytest.approx(2e9)
    assert ceilings.row_rate("memory", 32) == pytest.approx(1e9)
    assert ceilings.row_rate("memory", 1024) == pytest.approx(4e9)


def test_a_workload_about_the_host_is_timed_by_its_clock() -> None:
    class Reversed(HostClock):
        def seconds_since(self, mark: float) -> float:
            return -super().seconds_since(mark)

    clocks = {"device": HOST_CLOCK, "host": Reversed()}
    for timed in ("device", "host"):
        workload = replace(tiny.workload(), timed=timed)
        rows = measure(workload, tiny.suite(), tiny.CEILINGS, tiny.BUDGET, NONE_FLUSHED, clocks)
        assert all(row.figures and (row.figures.seconds < 0) == (timed == "host") for row in rows)


def test_backends_for_gpus_are_measured_once_each() -> None:
    chosen = GPU.backend()
    names = [candidate.name for candidate in GPU.candidates]
    assert names[0] == "recsys_ops" and f"recsys_ops {chosen}" not in names
    assert {"recsys_ops cuda", "recsys_ops triton"} & OPERATOR_NAMES - {f"recsys_ops {chosen}"} <= set(names)
    assert not [candidate.name for candidate in CPU.candidates if candidate.name == "recsys_ops triton"]


def test_tables_of_a_gpu_are_several_times_its_cache() -> None:
    cold = [workload for workload in GPU.workloads if workload.flushed]
    least = 8 * cache_bytes("cuda")[0]
    assert cold and all(w.case.rows * w.case.dim * w.case.dtype.itemsize >= least for w in cold)


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "cache_bytes", lambda device: (2**16, 2**18))
    threads = torch.get_num_threads()
    found = measure_ceilings(working_set=2**20, repetitions=1)
    assert torch.get_num_threads() == threads
    assert set(found.rows) == {"memory", "last-level cache", "cache"}
    by_size = [found.zeroed, *found.rows.values()]
    rates = [found.read_one_thread or 0.0, found.read, found.copy, found.flops]
    rates += [rate for measured in by_size for rate in measured.values()]
    assert all(list(measured) == sorted(measured) for measured in by_size)
    assert all(1e6 < rate < 1e13 for rate in rates)
    assert 1e-8 < found.call < 1e-3


def test_ceilings_of_a_gpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU, by another name."""
    monkeypatch.setattr(ceilings_module, "cache_bytes", lambda device: (2**18, 2**18))
    found = measure_ceilings(working_set=2**20, repetitions=1, device="cpu:0")
    assert found.device == "cpu:0" and found.read_one_thread is None
    assert set(found.rows) == {"memory", "cache"}
    assert all(rate > 0 for rate in (found.read, found.copy, found.flops, found.call))
    assert all(name for name, _ in ceiling_cells(found))


def test_a_probe_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "cache_bytes", lambda device: (2**16, 2**18))
    monkeypatch.setattr(ceilings_module, "embedding_bag", None)
    assert measure_ceilings(working_set=2**20, repetitions=1).row_rate("cache", 256) > 0

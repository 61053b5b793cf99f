"""The workloads of embedding bag collections: what they say, what they accept, and who computes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_suite as tiny
import torch

from recsys_ops.benchmarks import fbgemm, page, torchrec
from recsys_ops.benchmarks.cases.collection_checks import Stepped
from recsys_ops.benchmarks.cases.collection_inputs import Case
from recsys_ops.benchmarks.cases.embedding_bag_collection import make_workload
from recsys_ops.benchmarks.measure import Figures, Row, measure
from recsys_ops.benchmarks.registry import OURS, Candidate, Growth, Inputs, Suite, Workload
from recsys_ops.benchmarks.suites.embedding_bag_collection import suite

CPU, GPU = suite("cpu"), suite("cuda")
WORKLOADS = [*CPU.workloads, *GPU.workloads]
needs_peers = pytest.mark.skipif(torchrec.missing("cpu") is not None, reason="peers are not installed")


def tiny_case(case: Case) -> Case:
    sizes: dict[str, Any] = {"rows": 60, "bags": 3, "dim": 8, "lengths": (1, 6), "device": "cpu"}
    return replace(case, tables=min(case.tables, 2 if case.tables_per_feature > 1 else 3), **sizes)


def rows_of(case: Case, *candidates: Candidate) -> dict[str, Row]:
    workload = make_workload("tiny/collection", case)
    tiny_suite = Suite("embedding_bag_collection", [workload], candidates or CPU.candidates)
    rows = measure(workload, tiny_suite, tiny.CEILINGS, tiny.BUDGET, lambda: None)
    return {row.candidate: row for row in rows}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_workload_is_drawn_and_costed(workload: Workload) -> None:
    case: Case = workload.case
    assert workload.pass_ == ("step" if case.optimizer else "forward")
    assert f"tables {case.tables} x {case.rows:,} x {case.dim}, B {case.bags}" in workload.conditions
    small = make_workload(workload.name, tiny_case(case))
    first, second = (small.inputs() for _ in range(2))
    assert torch.equal(first.batches[1].values, second.batches[1].values)
    assert not torch.equal(first.batches[0].offsets, first.batches[1].offsets)
    cost = small.cost(first.batches[0])
    row = {"int8": 16, "fp8": 16, "int4": 12}.get(case.format or "", 8 * case.dtype.itemsize)
    assert cost.flops > 0 and cost.lookup_row_bytes >= cost.unique_row_bytes > 0
    assert case.optimizer or cost.row_bytes == row


@pytest.mark.parametrize("case", dict.fromkeys(tiny_case(w.case) for w in WORKLOADS), ids=str)
def test_everyone_computes_every_kind_of_case(case: Case) -> None:
    """On small sizes and the CPU; a peer that is absent here or says it cannot is left out."""
    rows = rows_of(case)
    assert rows[OURS].status == "ok", rows[OURS].reason
    assert not [row for row in rows.values() if row.status == "failed"]
    assert not [row for row in rows.values() if "Error" in (row.reason or "")]


SMALL = Case(3, 8, bags=5, rows=60, lengths=(1, 6))


def altered(change: Callable[[Any], Any]) -> Candidate:
    """Ours with its results changed."""

    def prepare(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        run = CPU.candidates[0].prepare(workload, inputs)
        return lambda batch: change(run(batch))

    return Candidate("wrong", prepare)


WRONG_OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "a little off": lambda output: output * (1 + 1e-4),
    "columns of two tables swapped": lambda output: output.roll(8, 1),
    "other dtype": lambda output: output.double(),
    "NaN": lambda output: torch.full_like(output, torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG_OUTPUTS)
def test_a_wrong_output_gets_no_figures(wrong: str) -> None:
    row = rows_of(SMALL, CPU.candidates[0], altered(WRONG_OUTPUTS[wrong]))["wrong"]
    assert row.status == "failed" and row.reason and row.reason.startswith("output: ")


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_quantised_outputs_may_be_off_by_what_is_documented(format: str) -> None:
    allowed = {"int8": 0.005, "int4": 0.07, "fp8": 0.07}[format]
    case = replace(SMALL, lengths=(1, 1), format=format)
    for off, status in ((0.0, "ok"), (3 * allowed, "failed"), (torch.nan, "failed")):
        shifted = altered(lambda output, off=off: output + off)
        assert rows_of(case, CPU.candidates[0], shifted)["wrong"].status == status


def change_tables(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    return lambda result: Stepped(result.output, [change(table.detach().clone()) for table in result.tables])


WRONG_STEPS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "output": (lambda result: Stepped(result.output * 1.001, result.tables), "output of step 1: "),
    "other tables": (
        lambda result: Stepped(result.output, [torch.rand_like(table) for table in result.tables]),
        "rows of table 0: ",
    ),
    "half precision": (change_tables(lambda table: table.half()), "rows of table 0: expected dtype"),
    "a little off": (change_tables(lambda table: table * (1 + 1e-5)), "rows of table 0: "),
}


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_wrong_step_gets_no_figures(wrong: str, optimizer: str) -> None:
    change, said = WRONG_STEPS[wrong]
    row = rows_of(replace(SMALL, optimizer=optimizer), CPU.candidates[0], altered(change))["wrong"]
    assert row.status == "failed" and row.reason and row.reason.startswith(said)


def test_a_step_of_another_optimizer_or_size_gets_no_figures() -> None:
    ours = CPU.candidates[0]

    def other(optimizer: str) -> Candidate:
        def prepare(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
            case = replace(workload.case, optimizer=optimizer)
            return ours.prepare(replace(workload, case=case), inputs)

        return Candidate("wrong", prepare)

    for right, wrong in (("sgd", "adagrad"), ("rowwise_adagrad", "adagrad"), ("adam", "sgd")):
        rows = rows_of(replace(SMALL, optimizer=right), ours, other(wrong))
        assert (rows[OURS].status, rows["wrong"].status) == ("ok", "failed")


def test_a_row_that_no_id_names_must_stay_as_it_was() -> None:
    named: list[Any] = []

    def prepare(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        run = CPU.candidates[0].prepare(workload, inputs)
        rows = torch.cat([batch.values for batch in inputs.batches[:2]]).unique()
        free = next(int(r) + 1 for r in rows if int(r) + 1 not in rows and int(r) + 1 < 60)
        named.append(free)

        def step(batch: Any) -> Stepped:
            result = run(batch)
            result.tables[0].detach()[free] += 1e-6
            return Stepped(result.output, result.tables)

        return step

    case = replace(SMALL, tables=1, bags=2, optimizer="sgd")
    row = rows_of(case, CPU.candidates[0], Candidate("wrong", prepare))["wrong"]
    assert named and row.reason == "rows of table 0: one that no id names was changed"


@needs_peers
@pytest.mark.parametrize(
    ("changes", "candidate", "reason"),
    [
        ({"optimizer": "adam"}, "FBGEMM TBE", "no adam on a CPU"),
        ({"optimizer": "adam"}, "TorchRec fused", "no adam on a CPU"),
        ({"optimizer": "sgd"}, "TorchRec", "its steps make dense gradients of whole tables"),
        ({"format": "fp8"}, "FBGEMM IntNBit", "its fp8 is another format, without scales of rows"),
        ({"format": "fp8"}, "torch quantised loop", "int8 and int4 on a CPU only"),
        ({"keyed": "made before"}, "torch loop", "takes no KeyedJaggedTensor"),
        ({"dtype": torch.float16}, "TorchRec", "rounds sums to the precision of the tables"),
        ({"dtype": torch.float16, "optimizer": "sgd"}, "TorchRec fused", "keeps all tables in fp32"),
        (
            {"dtype": torch.float16, "optimizer": "sgd"},
            "torch sparse + SGD",
            "adds gradients up in half precision",
        ),
    ],
)
def test_peers_that_cannot_say_why(changes: dict[str, Any], candidate: str, reason: str) -> None:
    row = rows_of(replace(SMALL, **changes), *[c for c in CPU.candidates if c.name in (OURS, candidate)])
    assert (row[candidate].status, row[candidate].reason) == ("unavailable", reason)


def test_absent_peers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fbgemm, torchrec):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    rows = rows_of(SMALL)
    assert rows[OURS].status == rows["torch loop"].status == "ok"
    absent = {name: row.reason for name, row in rows.items() if row.status == "unavailable"}
    assert set(absent) == {"TorchRec", "TorchRec fused", "FBGEMM TBE"}
    assert all("is not installed" in (reason or "") for reason in absent.values())


def grown(candidate: str, exponent: float, of: str = "tables") -> list[Row]:
    rows = []
    for size in (1, 10, 100):
        figures = Figures(1e-3 * size**exponent, (1.0,), 1.0, 1.0, 1.0, "memory", 1.0, 1.0)
        growth = Growth(of, size)
        name = f"growth/{of}/{size}"
        rows.append(Row(name, "op", "step", "", candidate, "ok", None, figures, growth=growth))
    return rows


def test_growth_is_drawn_with_its_exponent() -> None:
    rows = [*grown(OURS, 1), *grown("peer", 0.5), *grown(OURS, 0.25, "rows of a table")]
    figure = page.growth_figure([*rows, replace(rows[0], growth=None)])
    by_rows, by_tables = figure.axes
    assert [axes.get_title(loc="left") for axes in (by_rows, by_tables)] == [
        "step, by rows of a table",
        "step, by tables",
    ]
    legend = by_tables.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "recsys_ops, exponent 1.00",
        "peer, exponent 0.50",
    ]
    ours, slope_of_one, peer = by_tables.get_lines()
    assert list(slope_of_one.get_ydata()) == pytest.approx(list(ours.get_ydata()))  # type: ignore[arg-type]
    assert math.isclose(float(peer.get_ydata()[-1]), 10)  # type: ignore[index]


def test_growth_of_one_size_has_no_exponent() -> None:
    (axes,) = page.growth_figure(grown(OURS, 1)[:1]).axes
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [OURS]


def test_both_kinds_of_growth_have_several_sizes() -> None:
    sizes: dict[tuple[str, str], list[float]] = {}
    for workload in CPU.workloads:
        if workload.growth:
            assert workload.name.startswith("growth/")
            sizes.setdefault((workload.growth.of, workload.pass_), []).append(workload.growth.size)
    assert len(sizes) == 4 and all(len(found) >= 4 and found == sorted(found) for found in sizes.values())

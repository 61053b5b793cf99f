"""The command: exit codes, reports, targets, and what Ctrl-C leaves."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tiny_suite as tiny
import torch
from rich.console import Console

from recsys_ops.benchmarks import machine, run
from recsys_ops.benchmarks.measure import Figures, Row
from recsys_ops.benchmarks.registry import LIMIT, OURS, Candidate, Inputs, Suite, Target, Workload
from recsys_ops.benchmarks.run import run_bench, select
from recsys_ops.benchmarks.suites.embedding_bag import suite as real_suite
from recsys_ops.benchmarks.targets import judge
from recsys_ops.timing import Ratio

Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs a suite with limits that cost no time; gives the exit code and what was printed."""

    def run_it(suite: Suite, terminal: bool = False, **options: Any) -> tuple[int, str]:
        monkeypatch.setattr(run, "suites", lambda device: {suite.operator: suite})
        monkeypatch.setattr(run, "measure_ceilings", lambda **_: tiny.CEILINGS)
        monkeypatch.setattr(run, "_BUDGETS", {"cpu": (tiny.BUDGET, tiny.BUDGET)})
        console = Console(file=io.StringIO(), force_terminal=terminal)
        code = run_bench(suite.operator, console=console, **options)
        assert isinstance(console.file, io.StringIO)
        return code, console.file.getvalue()

    return run_it


ABSENT = Candidate("absent", tiny.TORCH.prepare, available=lambda: "absent is not installed")
WRONG = tiny.altered("wrong", lambda output: output + 1)


def test_a_run_prints_the_table_and_ends_well(bench: Bench) -> None:
    code, text = bench(tiny.suite([tiny.OURS, tiny.TORCH, ABSENT]))
    assert code == 0
    assert re.search(r"tiny/sum +recsys_ops +[\d.]+ .s +[\d.e-]+ +[\d.e-]+ +\d+% \w+ *\n", text)
    assert re.search(r"torch +[\d.]+ .s .* \d+\.\d\dx \[[\d.]+, [\d.]+\]", text)
    assert "absent: absent is not installed (everywhere)" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 110


def test_a_wrong_candidate_is_a_finding_without_a_speed(bench: Bench, tmp_path: Path) -> None:
    code, text = bench(tiny.suite([tiny.OURS, WRONG]), json_path=tmp_path / "b.json")
    assert code == 1
    assert re.search(r"wrong +FAILED *\n", text)
    assert "FAILED tiny/sum, wrong: output: at [" in text
    (row,) = [r for r in json.loads((tmp_path / "b.json").read_text())["rows"] if r["candidate"] == "wrong"]
    assert row["status"] == "failed" and row["figures"] is None and row["ours_speedup"] is None


def test_json_has_the_schema(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench(tiny.suite([tiny.OURS, tiny.TORCH, ABSENT]), json_path=path)
    record = json.loads(path.read_text())
    assert record["schema"] == 1 and record["complete"] is True and record["verdicts"] is None
    assert record["device"] == "cpu" and record["operators"] == {"embedding_bag": "reference"}
    assert set(record["machine"]) == {"cpu", "system", "cores", "threads", "caches", "simd", "memory"}
    assert set(record["versions"]) == {
        "python",
        "torch",
        "cuda",
        "triton",
        "recsys_ops",
        "torchrec",
        "fbgemm",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert {"read", "copy", "rows", "flops", "call"} < set(record["ceilings"])
    ours, peer, absent = record["rows"]
    keys = {
        "workload",
        "operator",
        "pass",
        "conditions",
        "candidate",
        "status",
        "reason",
        "figures",
        "ours_speedup",
        "growth",
    }
    assert set(ours) == set(peer) == set(absent) == keys
    assert (ours["pass"], ours["ours_speedup"]) == ("forward", None)
    assert {"seconds", "samples", "effective_rate", "unique_rate", "of_limit", "bound_by"} < set(
        peer["figures"]
    )
    assert set(peer["ours_speedup"]) == {"value", "low", "high"}
    assert absent["reason"] == "absent is not installed"


def test_html_is_one_file_that_asks_the_network_for_nothing(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    targets = [Target("tiny/*", "torch", 0.001)]
    bench(tiny.suite([tiny.OURS, tiny.TORCH, WRONG], targets=targets), html_path=path, check_targets=True)
    page = path.read_text()
    assert page.startswith("<!DOCTYPE html>")
    for heading in ("What was measured", "Targets", "Against peers", "Against the limits", "Every workload"):
        assert f"<h2>{heading}" in page
    assert "FAILED" in page
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert len(images) == 2
    assert "http://" not in page and "https://" not in page
    for image in images:
        drawing = base64.b64decode(image).decode()
        assert not re.search(r"(href|src)=\"(?!#|data:)|url\((?!#)|<script", drawing)


def test_nothing_is_left_beside_the_reports(bench: Bench, tmp_path: Path) -> None:
    bench(tiny.suite(), json_path=tmp_path / "a.json", html_path=tmp_path / "a.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_ctrl_c_leaves_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    def interrupted(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        if workload.name == "tiny/second":
            raise KeyboardInterrupt
        return tiny.OURS.prepare(workload, inputs)

    suite = tiny.suite(
        [Candidate("recsys_ops", interrupted), tiny.TORCH],
        [tiny.workload("tiny/first"), tiny.workload("tiny/second")],
    )
    path = tmp_path / "bench.json"
    code, text = bench(suite, json_path=path, html_path=tmp_path / "bench.html")
    record = json.loads(path.read_text())
    assert code == 130
    assert "interrupted" in text
    assert record["complete"] is False
    assert {row["workload"] for row in record["rows"]} == {"tiny/first"}
    assert "Interrupted" in (tmp_path / "bench.html").read_text()


def test_an_error_leaves_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    def breaks_later(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        right, calls = tiny.OURS.prepare(workload, inputs), iter(range(100))

        def call(batch: Any) -> Any:
            if workload.name == "tiny/second" and next(calls) > 5:
                raise RuntimeError("out of memory")
            return right(batch)

        return call

    suite = tiny.suite(
        [Candidate("recsys_ops", breaks_later), tiny.TORCH],
        [tiny.workload("tiny/first"), tiny.workload("tiny/second")],
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        bench(suite, json_path=tmp_path / "bench.json")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["complete"] is False
    assert {row["workload"] for row in record["rows"]} == {"tiny/first"}


def test_a_run_that_is_killed_leaves_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    left: list[int] = []

    def looks(workload: Workload, inputs: Inputs) -> Callable[[Any], Any]:
        left.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return tiny.OURS.prepare(workload, inputs)

    workloads = [tiny.workload("tiny/first"), tiny.workload("tiny/second")]
    bench(tiny.suite([Candidate("recsys_ops", looks), tiny.TORCH], workloads), json_path=path)
    assert left == [0, 2]


def test_ctrl_c_before_anything_is_finished_writes_an_empty_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    suite = tiny.suite()
    bench(suite)
    monkeypatch.setattr(run, "measure_ceilings", interrupt)
    paths = tmp_path / "b.json", tmp_path / "b.html"
    assert run_bench(None, *paths, console=Console(file=io.StringIO())) == 130
    record = json.loads(paths[0].read_text())
    assert record["rows"] == [] and record["ceilings"] is None


def test_progress_in_a_pipe_is_plain_lines(bench: Bench) -> None:
    _, text = bench(tiny.suite(workloads=[tiny.workload("tiny/a"), tiny.workload("tiny/b")]))
    assert text.startswith("1/3 limits of this machine\n2/3 tiny/a\n3/3 tiny/b\n")
    assert "\x1b" not in text and "\r" not in text


def test_progress_on_a_terminal_is_a_bar_that_goes_away(bench: Bench) -> None:
    code, text = bench(tiny.suite(), terminal=True)
    assert code == 0
    assert "1/2 limits" not in text and "\x1b[2K" in text


@pytest.mark.parametrize(("op", "filter"), [("no_such_op", None), ("embedding_bag", "no such workload")])
def test_a_name_that_matches_nothing_is_wrong_usage(op: str, filter: str | None) -> None:
    console = Console(file=io.StringIO())
    assert run_bench(op, filter=filter, console=console) == 2
    assert isinstance(console.file, io.StringIO)
    assert "bench: expected" in console.file.getvalue()


def test_workloads_are_picked_by_glob_part_and_quickness() -> None:
    def names(filter: str | None, quick: bool = False) -> list[str]:
        return [workload.name for workload in select(suite, filter, quick)]

    suite = real_suite("cpu")

    assert names("special/*") == names("special")
    assert names("special/m*") == ["special/max", "special/mean", "special/mean-weighted", "special/matrix"]
    assert names("half") and all(name.startswith("half/") for name in names("half"))
    assert 0 < len(names(None, quick=True)) < len(names(None)) == len(suite.workloads)


def row(ratio: Ratio | None, reason: str | None = None) -> Row:
    status = "ok" if ratio else "unavailable"
    return Row("a/b", "op", "forward", "", "torch", status, reason, ours_speedup=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (row(Ratio(2.0, 1.9, 2.1)), "met"),
        (row(Ratio(2.5, 1.5, 2.6)), "met"),
        (row(Ratio(1.9, 1.8, 2.1)), "within noise"),
        (row(Ratio(1.8, 1.7, 1.9)), "missed"),
        (row(None, "not installed"), "not measured"),
    ],
)
def test_targets_are_judged_by_median_and_interval(found: Row, verdict: str) -> None:
    (judged,) = judge([Target("a/*", "torch", 2.0), Target("b/*", "torch", 2.0)], [found])
    assert judged.verdict == verdict
    assert judged.reason == found.reason


@pytest.mark.parametrize(
    ("minimum", "verdict"), [(0.5, "met"), (0.6, "met"), (0.7, "within noise"), (0.9, "missed")]
)
def test_a_share_of_the_limit_is_judged_by_ours(minimum: float, verdict: str) -> None:
    figures = Figures(2.0, (1.5, 2.0, 2.0, 2.0, 2.0, 3.0), 1.0, 1.0, 0.6, "memory", 1.0, 1.0)
    ours, peer = (Row("a/b", "op", "forward", "", name, "ok", None, figures) for name in (OURS, "torch"))
    (judged,) = judge([Target("a/*", LIMIT, minimum)], [ours, peer])
    assert (judged.peer, judged.verdict) == (LIMIT, verdict)
    assert judged.ratio and judged.ratio.value == pytest.approx(0.6)
    (unknown,) = judge([Target("a/*", LIMIT, minimum)], [dataclasses.replace(ours, figures=None)])
    assert unknown.verdict == "not measured"


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "expected a GPU that PyTorch can use"), ("mps", "to be cpu or cuda, got 'mps'")],
)
def test_a_device_that_cannot_be_measured_is_wrong_usage(
    device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console = Console(file=io.StringIO(), width=200)
    assert run_bench(device=device, console=console) == 2
    assert isinstance(console.file, io.StringIO) and said in console.file.getvalue()


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=60 * 2**20,
        total_memory=140 * 2**30,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with mock.patch.object(machine.subprocess, "run") as smi:
        smi.return_value.stdout = "580.159.04\n"
        gpu = machine.describe_machine("cuda")["gpu"]
    assert gpu | {"cuda": None} == {
        "name": "NVIDIA H200",
        "driver": "580.159.04",
        "cuda": None,
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "L2": "60 MiB",
        "memory": "140.0 GiB",
    }
    with mock.patch.object(machine.subprocess, "run", side_effect=FileNotFoundError):
        assert machine.describe_gpu()["driver"] is None


def test_targets_are_told_and_do_not_fail_the_run(bench: Bench) -> None:
    targets = [Target("tiny/*", "torch", 1e-6), Target("tiny/*", "torch", 1e6)]
    code, text = bench(tiny.suite(targets=targets), check_targets=True)
    assert code == 0
    assert re.search(r"tiny/sum +torch .* met", text) and re.search(r"tiny/sum +torch .* missed", text)

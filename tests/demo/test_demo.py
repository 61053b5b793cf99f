"""The whole demo on a small share of the data: what it writes, prints and returns."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

import recsys_ops
from recsys_ops.demo import run, run_demo
from recsys_ops.demo.data import load_online_retail
from recsys_ops.demo.tasks import Settings, Task
from recsys_ops.demo.trial import Trial, run_trial

COLUMNS = {"user": "who", "item": "what", "time": "when", "quantity": "many"}
TINY = Settings(
    steps=8,
    history_batch=64,
    history_dim=8,
    dlrm_batch=32,
    dlrm_dim=8,
    buckets=1 << 10,
    history_customers=50,
    dlrm_customers=5,
    sequence_epochs=1,
    sequence_purchases=2000,
    sequence_tokens=512,
    sequence_dim=8,
    sequence_negatives=64,
    sequence_short=50,
    rounds=2,
)


@pytest.fixture(scope="module")
def purchases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The purchases of 200 customers as a CSV file."""
    data = load_online_retail()
    path = tmp_path_factory.mktemp("data") / "purchases.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.values())
        for i in range(data.starts[200]):
            writer.writerow(
                [
                    data.user_names[data.user[i]],
                    data.item_names[data.item[i]],
                    data.time[i],
                    int(data.quantity[i]),
                ]
            )
    return path


def demo(
    purchases: Path, folder: Path, terminal: bool = False, settings: Settings = TINY
) -> tuple[int, str, dict[str, Any]]:
    """The exit code, what was printed, and the JSON."""
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    json_path = folder / "demo.json"
    code = run_demo(
        purchases,
        output=folder / "report",
        json_path=json_path,
        console=console,
        settings=settings,
        **COLUMNS,
    )
    numbers = json.loads(json_path.read_text()) if json_path.exists() else {}
    return code, console.file.getvalue(), numbers


class Finished(NamedTuple):
    folder: Path
    code: int
    printed: str
    numbers: dict[str, Any]
    trials: dict[str, Trial]


@pytest.fixture(scope="module")
def finished(purchases: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("demo")
    trials = {}

    def keep(task: Task, *args: Any) -> Trial:
        trials[task.name] = run_trial(task, *args)
        return trials[task.name]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run, "run_trial", keep)
        return Finished(folder, *demo(purchases, folder), trials)


def test_both_models_learn_the_same(finished: Finished) -> None:
    assert finished.code == 0
    models = finished.numbers["models"]
    assert [model["name"] for model in models] == ["History pooling", "DLRM"]
    for model in models:
        assert model["agrees"]
        assert len(model["before"]["losses"]) == len(model["after"]["losses"]) == TINY.steps
        assert model["before"]["losses"][-1] < model["before"]["losses"][0]
        assert model["largest_loss_difference"] < 1e-4
        assert model["before"]["ranking"] == model["after"]["ranking"]
        for difference in model["differences"]:
            assert 0 < difference["after"] < 1e-5, difference
    assert models[0]["collected"] is None
    collected = models[1]["collected"]
    assert len(collected["losses"]) == TINY.steps
    assert models[1]["largest_loss_difference_collected"] < 1e-4
    assert collected["ranking"] == models[1]["before"]["ranking"]
    lookups = [part["name"] for part in models[0]["lookups"]]
    assert lookups == ["items", "pairs", "recent", "customer_month"]


def test_report_is_one_file_with_its_plots(finished: Finished) -> None:
    report = finished.folder / "report"
    assert [path.name for path in report.iterdir()] == ["index.html"]
    page = (report / "index.html").read_text()
    assert page.count('<img src="data:image/svg+xml;base64,') == 9
    assert not re.search(r"""(src|href)=["']?(?!["']?data:)""", page)
    assert "History pooling" in page and "DLRM" in page
    assert f"Report: {report / 'index.html'}" in finished.printed


def test_prints_plain_lines_in_a_pipe(finished: Finished) -> None:
    assert "\x1b" not in finished.printed and "━" not in finished.printed
    assert "DLRM: training both\n" in finished.printed
    assert "Sequences: training all three\n" in finished.printed
    assert finished.printed.count("collection") == 1
    step = finished.numbers["models"][0]["step"]
    assert f"{1e3 * step['before']:.2f}" in finished.printed
    assert f"{step['ratio']['value']:.2f}x" in finished.printed


def test_second_run_gives_the_same_losses(finished: Finished, purchases: Path, tmp_path: Path) -> None:
    _, printed, numbers = demo(purchases, tmp_path, terminal=True)
    assert "━" in printed
    for first, second in zip(finished.numbers["models"], numbers["models"], strict=True):
        assert first["before"]["losses"] == second["before"]["losses"]
        assert first["before"]["ranking"] == second["before"]["ranking"]
    learners = (run["sequences"]["learners"] for run in (finished.numbers, numbers))
    for one, other in zip(*learners, strict=True):
        assert one["losses"] == other["losses"]


def test_no_epochs_leave_the_sequences_out(
    finished: Finished, purchases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_trial", lambda task, *_: finished.trials[task.name])
    settings = dataclasses.replace(TINY, sequence_epochs=0)
    code, printed, numbers = demo(purchases, tmp_path, settings=settings)
    assert code == 0
    assert numbers["sequences"] is None and len(numbers["models"]) == 2
    assert "HSTU" not in printed and "HSTU" not in (tmp_path / "report" / "index.html").read_text()


def test_eager_attention_is_not_waited_for(
    finished: Finished, purchases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_trial", lambda task, *_: finished.trials[task.name])
    with recsys_ops.use_backend("reference"):
        code, printed, numbers = demo(purchases, tmp_path)
    assert code == 0 and numbers["sequences"] is None
    assert "Sequences: left out, as eager PyTorch takes too long" in printed


def test_interrupt_leaves_the_finished_model(
    finished: Finished, purchases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: Task, *args: Any) -> Trial:
        if task.name == "DLRM":
            raise KeyboardInterrupt
        return finished.trials[task.name]

    monkeypatch.setattr(run, "run_trial", interrupted)
    code, printed, numbers = demo(purchases, tmp_path)
    assert code == 130
    assert numbers["interrupted"]
    assert [model["name"] for model in numbers["models"]] == ["History pooling"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "The run was interrupted" in page and "DLRM" not in page
    assert numbers["sequences"] is None
    assert "History pooling" in printed


def test_interrupt_before_anything_is_finished_writes_nothing(
    purchases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_trial", interrupted)
    code, _, numbers = demo(purchases, tmp_path)
    assert code == 130
    assert not numbers and not list((tmp_path / "report").iterdir())


def test_a_swap_that_changes_results_is_a_finding(
    finished: Finished, purchases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(task: Task, *args: Any) -> Trial:
        return dataclasses.replace(finished.trials[task.name], agrees=task.name != "DLRM")

    monkeypatch.setattr(run, "run_trial", wrong)
    code, printed, _ = demo(purchases, tmp_path)
    finding = "DLRM: a swap changed results beyond round-off and was put back."
    assert code == 1
    assert finding in printed and "History pooling: a swap" not in printed
    assert finding in (tmp_path / "report" / "index.html").read_text()


def test_unusable_data_and_folder_are_wrong_usage(purchases: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    assert run_demo(tmp_path / "absent.csv", output=tmp_path / "report", console=console) == 2
    assert run_demo(purchases, output=tmp_path / "report", console=console) == 2
    (tmp_path / "file").write_text("")
    assert run_demo(purchases, output=tmp_path / "file", console=console, **COLUMNS) == 2
    printed = console.file.getvalue()
    assert "absent.csv does not exist" in printed
    assert "no column 'user' for --user; its columns are 'who', 'what', 'when', 'many'" in printed
    assert f"expected --output to be a folder to write to, got {tmp_path / 'file'}" in printed

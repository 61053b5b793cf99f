"""verify on a toy operator, and the lines that reproduce failures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from rich.console import Console

from recsys_ops.embedding_bag.cases import SPEC, EmbeddingBagCase
from recsys_ops.testing import (
    Case,
    OperatorSpec,
    Result,
    Target,
    candidate,
    check_forward_backward,
    overridden,
)
from recsys_ops.testing import verify as module
from recsys_ops.testing.__main__ import main
from recsys_ops.testing.registry import Example
from recsys_ops.testing.verify import run_verify, verify


def columns_swapped(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return toy.right(x, factor).flip(1)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def serve(spec: OperatorSpec, native_is_absent: bool = False) -> None:
        spec = dataclasses.replace(spec, typical=())  # tracing takes seconds
        monkeypatch.setattr(module, "operators", lambda: {"scale_rows": spec.operator})
        monkeypatch.setattr(module, "spec_of", lambda operator: spec)
        found = [] if native_is_absent else [toy.TARGET]
        absent = {"native": "not built"} if native_is_absent else {}
        monkeypatch.setattr(module, "targets", lambda operator: ([Target("reference"), *found], absent))

    return serve


def run(**given: object) -> tuple[int, str]:
    out = io.StringIO()
    code = run_verify(console=Console(file=out, width=120), **given)  # type: ignore[arg-type]
    return code, out.getvalue()


def test_all_is_well(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())
    code, said = run(json_path=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    (operator,) = report["operators"]
    ran = sum(cell["passed"] for cell in operator["counts"])
    assert code == 0
    assert report["ok"] and report["complete"] and report["failures"] == []
    assert operator["evidence"] == {"reference": "run on cpu", "native": "run on cpu"}
    assert f"{ran} passed, 0 failed." in said
    assert said.splitlines()[0].startswith("1/")
    assert "forward_backward" in said


def test_failures_are_findings_with_a_line_that_reproduces_them(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec(forward=columns_swapped))
    code, said = run(backend="native", json_path=tmp_path / "report.json")
    failures = json.loads((tmp_path / "report.json").read_text())["failures"]
    assert code == 1
    assert {failure["backend"] for failure in failures} == {"native"}
    assert (
        "reproduce: python -m recsys_ops.testing scale_rows forward_backward default --backend native" in said
    )
    assert "failed" in said


def test_absent_backend_is_skipped_with_the_reason(serve) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec(), native_is_absent=True)
    code, said = run(quick=True)
    assert code == 0
    assert "scale_rows: native skipped: not built" in said


@pytest.mark.parametrize("given", [{"op": "no_such"}, {"backend": "no_such"}])
def test_unknown_names_are_wrong_usage(given: dict[str, str]) -> None:
    code, said = run(**given)
    assert code == 2
    assert "to be one of [" in said and "got 'no_such'" in said


def test_interrupted_run_keeps_what_is_finished(serve) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())

    def interrupt(done: int, total: int, result: Result) -> None:
        if done == 3:
            raise KeyboardInterrupt

    report = verify(progress=interrupt)
    assert len(report.results) == 3
    assert not report.complete and not report.ok and not report.failures


def test_a_run_that_is_killed_leaves_what_it_saved(serve, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1)
    saved: list[tuple[int, bool]] = []
    report = verify(save=lambda report: saved.append((len(report.results), report.complete)))
    assert saved[0] == (1, False) and saved[-1] == (report.total, True) and len(saved) == report.total


@pytest.mark.parametrize("jobs", [1, 3])
def test_shares_are_the_whole(serve, jobs: int) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())
    sent: list[tuple[str, Result]] = []
    threads = torch.get_num_threads()
    try:
        for share in range(jobs):
            sender = SimpleNamespace(send=sent.append)
            module._run_share(sender, None, None, False, share, jobs)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    assert sorted(str(result) for _, result in sent) == sorted(str(result) for _, result in verify().results)


def one_result_then_maybe_death(sender: Connection, *_: object) -> None:
    """In the place of a share: the first dies."""
    share, jobs = _[-2:]
    sender.send(("scale_rows", Result(f"check {share} of {jobs}", "case", "native", "float32", True, "", "")))
    if share == 0:
        os._exit(3)
    sender.send(("scale_rows", Result("last", "case", "native", "float32", True, "", "")))


def test_a_process_that_dies_leaves_only_its_share_undone(serve, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())
    monkeypatch.setattr(module, "_run_share", one_result_then_maybe_death)
    report = verify(jobs=2)
    assert sorted(r.check for _, r in report.results) == ["check 0 of 2", "check 1 of 2", "last"]
    assert not report.complete


def test_interrupted_command_says_so(serve, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def interrupt(self: Example, seed: int = 0) -> Result:
        raise KeyboardInterrupt

    serve(toy.spec())
    monkeypatch.setattr(Example, "run", interrupt)
    code, said = run()
    assert code == 130 and "Interrupted" in said


def test_terminal_shows_a_bar(serve) -> None:  # type: ignore[no-untyped-def]
    serve(toy.spec())
    out = io.StringIO()
    code = run_verify(quick=True, console=Console(file=out, force_terminal=True, width=120))
    assert code == 0
    assert "━" in out.getvalue()


def lines_of(result: Result) -> list[str]:
    words = shlex.split(result.reproduce)
    return words[words.index("recsys_ops.testing") + 1 :]


@pytest.mark.parametrize(
    "case",
    [EmbeddingBagCase(), EmbeddingBagCase("mean", lengths=(3, 0), norm_type=1.0, renormalized=True)],
    ids=lambda case: case.name,
)
def test_line_reproduces(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    result = check_forward_backward(SPEC, case, Target("reference"), torch.bfloat16, 7)
    assert main(lines_of(result)) == 0
    assert capsys.readouterr().out == f"{result}\n"


def test_line_of_a_failure_fails_as_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    right = SPEC.operator.implementations["reference"].kernels
    zeros = {"embedding_bag_forward": lambda *args: right.embedding_bag_forward(*args) * 0}
    with candidate(SPEC, overridden(right, zeros)) as target:
        result = check_forward_backward(SPEC, SPEC.quick[0], target)
        assert not result.ok
        assert main(lines_of(result)) == 1
    assert capsys.readouterr().out == f"{result}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["embedding_bag", "forward_backward", "nonsense=1"],
        ["embedding_bag", "forward_backward", "not a name"],
        ["embedding_bag", "mutant", "no such mutant"],
        ["embedding_bag", "no_such_check", "default"],
        ["embedding_bag", "forward_backward", "default", "--dtype", "no_such_dtype"],
    ],
)
def test_wrong_usage_of_the_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "no_such" in capsys.readouterr().err or arguments[-1] in (
        "nonsense=1",
        "not a name",
        "no such mutant",
    )

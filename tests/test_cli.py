"""The command line: arguments, exit codes, and what goes to which stream."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command_line import Run

from recsys_ops import __version__, backends, cli, doctor
from recsys_ops.demo.tasks import Settings

COMMANDS = ("doctor", "ops", "explain", "verify", "bench", "inspect", "accelerate", "demo")
ROOT = Path(__file__).parents[1]


def test_help_lists_every_command(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    for command in COMMANDS:
        assert f" {command} " in ended.out


def test_no_command_is_wrong_usage(run: Run) -> None:
    assert run().code == 2
    assert run("no-such-command").code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example_and_json(run: Run, command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert "example" in ended.out.lower()
    assert f"recsys-ops {command}" in ended.out
    assert "--json" in ended.out


def test_version(run: Run) -> None:
    assert run("--version") == (0, __version__ + "\n", "")


def test_ops_lists_each_backend_with_its_reason(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    ended = run("ops", "--device", "meta", "--dtype", "float16", "--json", path)
    assert ended.code == 0
    assert "embedding_bag" in ended.out
    assert json.loads(path.read_text()) == {
        "device": "meta",
        "dtype": "float16",
        "rejections": backends.survey(backends.Call("meta", torch.float16)),
    }


def test_json_to_standard_output_leaves_the_rest_to_standard_error(run: Run) -> None:
    ended = run("ops", "--json", "-")
    assert set(json.loads(ended.out)["rejections"]) == set(backends.operators())
    assert "can serve" in ended.err


def test_explain_prints_the_decision(run: Run) -> None:
    call = backends.Call("cpu", torch.bfloat16)
    ended = run("explain", "embedding_bag", "--dtype", "bfloat16")
    assert ended == (0, f"{backends.explain_call('embedding_bag', call)}\n", "")


def test_explain_as_json(run: Run) -> None:
    ended = run("explain", "embedding_bag", "--backend", "reference", "--json", "-")
    said = json.loads(ended.out)
    assert (said["chosen"], said["because"]) == ("reference", "the backend= argument")
    assert said["rejected"]["native"] == "not asked for (the backend= argument)"


def test_explain_of_a_backend_that_cannot_serve_is_a_finding(run: Run) -> None:
    ended = run("explain", "embedding_bag", "--device", "xpu", "--backend", "triton")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("recsys-ops: embedding_bag: backend 'triton'")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "softmax"], "expected one of embedding_bag"),
        (["explain"], "Missing argument"),
        (["explain", "embedding_bag", "--backend", "cudnn"], "got 'cudnn'"),
        (["explain", "embedding_bag", "--dtype", "int64"], "got 'int64'"),
        (["explain", "embedding_bag", "--device", "abacus"], "got 'abacus'"),
        (["ops", "--json", "no/such/folder/ops.json"], "folder that exists"),
        (["verify", "--op", "softmax"], "got 'softmax'"),
        (["bench", "softmax"], "got 'softmax'"),
        (["bench", "--html", "no/such/folder/bench.html"], "folder that exists"),
        (["accelerate"], "Missing argument"),
        (["doctor", "--no-such-option"], "unrecognized arguments"),
        (["demo", "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_was_expected(run: Run, arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in " ".join(ended.err.replace("│", " ").split())


@pytest.mark.parametrize(("variable", "value"), [("RECSYS_OPS_BACKEND", "cudnn"), ("RECSYS_OPS_SIMD", "mmx")])
def test_a_wrong_variable_is_wrong_usage(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    extension = mock.Mock(
        simd_level=mock.Mock(side_effect=RuntimeError(f"expected RECSYS_OPS_SIMD …, got '{value}'"))
    )
    monkeypatch.setattr("recsys_ops._extension.missing", lambda: None)
    monkeypatch.setattr("recsys_ops._extension.module", lambda: extension)
    monkeypatch.setenv(variable, value)
    ended = run("ops")
    assert (ended.code, ended.out) == (2, "")
    assert variable in ended.err
    assert value in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "target", "handed_over"),
    [
        (
            ["verify", "--op", "embedding_bag", "--backend", "reference", "--quick", "--jobs", "3"],
            "recsys_ops.testing.verify.run_verify",
            {"op": "embedding_bag", "backend": "reference", "quick": True, "jobs": 3, "json_path": None},
        ),
        (
            [
                *("bench", "embedding_bag", "--device", "cuda:0", "--filter", "serve/*"),
                *("--check-targets", "--html", "bench.html"),
            ],
            "recsys_ops.benchmarks.run_bench",
            {
                "op": "embedding_bag",
                "device": "cuda",
                "html_path": "bench.html",
                "filter": "serve/*",
                "quick": False,
                "check_targets": True,
            },
        ),
        (
            [
                *("demo", "--data", "sales.csv", "--item", "sku", "--quantity", "number"),
                *("--output", "folder", "--epochs", "1"),
            ],
            "recsys_ops.demo.run_demo",
            {
                "data": Path("sales.csv"),
                "user": "user",
                "item": "sku",
                "quantity": "number",
                "output": Path("folder"),
                "settings": Settings(sequence_epochs=1),
            },
        ),
        (
            ["accelerate", "a:b", "--inputs", "c:d", "--include", "x.*", "--include", "y", "--exclude", "z"],
            "recsys_ops.accelerate.run_accelerate",
            {"model_spec": "a:b", "inputs_spec": "c:d", "include": ["x.*", "y"], "exclude": ["z"]},
        ),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_a_command_hands_over_its_arguments(
    run: Run, arguments: list[str], target: str, handed_over: dict[str, Any], code: int
) -> None:
    with mock.patch(target, autospec=True, return_value=code) as function:
        signature = inspect.signature(function)
        assert run(*arguments).code == code
    received = signature.bind(*function.call_args.args, **function.call_args.kwargs).arguments
    assert {name: received[name] for name in handed_over} == handed_over
    assert not received["console"].stderr


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a module with functions that make a model and its inputs."""
    (tmp_path / "some_model.py").write_text(
        "import torch\n"
        "def build(): return torch.nn.Sequential(torch.nn.EmbeddingBag(9, 4, mode='sum'))\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "some_model"


def test_accelerate_writes_json(run: Run, model: str) -> None:
    ended = run("accelerate", f"{model}:build", "--json", "-")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["model"] == f"{model}:build"
    assert "EmbeddingBag" in ended.err


def test_accelerate_without_a_model_is_wrong_usage(run: Run, model: str) -> None:
    for spec in ("no_such_module:build", f"{model}:no_such_function", f"{model}:wrong", "nonsense"):
        ended = run("accelerate", spec)
        assert ended.code == 2
        assert "Traceback" not in ended.out + ended.err


@pytest.mark.parametrize("command", ["doctor", "ops"])
def test_interruption_exits_130_with_one_line(run: Run, command: str) -> None:
    with (
        mock.patch("recsys_ops.doctor.examine", side_effect=KeyboardInterrupt),
        mock.patch("recsys_ops.backends.survey", side_effect=KeyboardInterrupt),
    ):
        assert run(command) == (130, "", "recsys-ops: interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recsys-ops", "ops"])
    with (
        mock.patch("recsys_ops.backends.survey", side_effect=ZeroDivisionError),
        pytest.raises(ZeroDivisionError),
    ):
        cli.main()


@pytest.mark.parametrize("name", ["torch", *doctor.REQUIRED])
def test_a_missing_package_is_named(run: Run, name: str) -> None:
    with mock.patch("recsys_ops.backends.survey", side_effect=ModuleNotFoundError(name=name)):
        assert run("ops") == (f"recsys-ops: {name} is not installed: pip install {name}", "", "")


def test_a_module_that_is_no_dependency_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recsys-ops", "ops"])
    with (
        mock.patch("recsys_ops.backends.survey", side_effect=ModuleNotFoundError(name="recsys_ops.lost")),
        pytest.raises(ModuleNotFoundError),
    ):
        cli.main()


def test_an_empty_interpreter_gets_one_line(tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [tmp_path / "bin" / "python", "-m", "recsys_ops", "ops"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "recsys-ops: typer is not installed: pip install typer\n"

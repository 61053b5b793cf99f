"""``recsys-ops accelerate``: what it builds, prints, writes and returns."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recsys_ops.accelerate import run_accelerate
from recsys_ops.embedding_bag import modules as bag_modules

SOURCE = """
import torch

def build_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"bag": torch.nn.EmbeddingBag(20, 4, mode="sum")})["bag"]

def make_inputs():
    return torch.tensor([[1, 2], [3, 4]])

def wrong_inputs():
    return torch.tensor([[99]])

def build_number():
    return 3

def fails():
    raise RuntimeError("no data here")

NUMBER = 3
"""

BUILD = "shop_model:build_model"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "shop_model.py").write_text(SOURCE)
    (tmp_path / "shop_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "shop_failing.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shop_model", raising=False)

    def call(model: str = BUILD, inputs: str | None = None, **options: Any) -> tuple[int, str]:
        file = io.StringIO()
        arguments = {"include": None, "exclude": None, "json_path": None, **options}
        code = run_accelerate(model, inputs, console=Console(file=file, width=100), **arguments)
        return code, file.getvalue()

    return call


def test_swaps_without_inputs(run: Run) -> None:
    code, text = run()
    assert code == 0
    assert "EmbeddingBag sum" in text and "1 of 1 lookups swapped" in text


def test_measures_with_inputs_and_writes_json(run: Run, tmp_path: Path) -> None:
    code, text = run(inputs="shop_model:make_inputs", json_path="report.json")
    assert code == 0
    assert "fwd + bwd" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["model"] == "shop_model:build_model" and content["inputs"] == "shop_model:make_inputs"
    assert content["modules"][0]["forward"]["value"] > 0


def test_selects(run: Run) -> None:
    assert "not in include" in run(include=["other.*"])[1]
    assert "in exclude" in run(exclude=["*"])[1]
    assert "1 of 1 lookups swapped" in run(include=[], exclude=[])[1]


def test_a_changed_result_is_a_finding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bag_modules.embedding_bag
    monkeypatch.setattr(bag_modules, "embedding_bag", lambda *args, **kwargs: 2 * right(*args, **kwargs))
    code, text = run(inputs="shop_model:make_inputs")
    assert code == 1
    assert "put back" in text and "0 of 1 lookups swapped" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(model="shop_model"), "expected the model as module:function, got 'shop_model'"),
        (dict(model=":build_model"), "expected the model as module:function, got ':build_model'"),
        (dict(model="shop_modle:build_model"), "cannot import 'shop_modle' for the model: No module named"),
        (dict(model="shop_broken:build"), "No module named 'a_module_that_is_not_there'"),
        (dict(model="shop_failing:build"), "cannot import 'shop_failing' for the model: ZeroDivisionError"),
        (
            dict(model="shop_model:build"),
            "a function 'build' in 'shop_model' for the model, got nothing",
        ),
        (dict(model="shop_model:NUMBER"), "for the model, got a int"),
        (dict(model="shop_model:build_number"), "to return a torch.nn.Module, got int"),
        (dict(model="shop_model:fails"), "shop_model:fails raises RuntimeError: no data here"),
        (dict(inputs="make_inputs"), "expected --inputs as module:function, got 'make_inputs'"),
        (dict(inputs="shop_model:inputs"), "for --inputs, got nothing of that name"),
        (dict(inputs="shop_model:wrong_inputs"), "accelerating the model of shop_model:build_model fails: "),
        (dict(json_path="missing/report.json"), "cannot write --json missing/report.json: No such file"),
    ],
)
def test_wrong_use(run: Run, arguments: dict[str, str], expected: str) -> None:
    code, text = run(**arguments)
    assert code == 2
    assert expected in " ".join(text.split())
    assert "recsys-ops accelerate: " in text


def test_shows_where_the_users_code_failed(run: Run) -> None:
    assert 'raise RuntimeError("no data here")' in run("shop_model:fails")[1]
    assert "Traceback" not in run("shop_modle:build_model")[1]

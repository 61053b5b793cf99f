"""What a swap changes, what it leaves alone, and how it is undone."""

from __future__ import annotations

import copy
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_model import ALL, BAGS, Model, TaggedBag, reason, status, timed, types
from torch import Tensor, nn

import recsys_ops
from recsys_ops.acceleration import pooling as pooling


class OwnForward(nn.EmbeddingBag):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Registered(nn.EmbeddingBag):
    def __init_subclass__(cls) -> None:
        raise AssertionError("must not be subclassed")


def test_swap_changes_nothing_but_the_class(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [model.genres, model.history]
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    heard: list[Tensor] = []
    model.genres.register_forward_hook(lambda module, args, output: heard.append(output))
    before = model.eval()(*inputs)

    report = recsys_ops.accelerate(model)

    assert report.accelerated == ALL
    assert status(report) == dict.fromkeys(ALL, "swapped")
    assert [type(model.genres), type(model.words)] == [recsys_ops.nn.EmbeddingBag] * 2
    assert held == [model.genres, model.history]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters.values(), model.parameters(), strict=True))
    after = model(*inputs)
    torch.testing.assert_close(after, before)
    assert len(heard) == 2 and heard[1] is not heard[0]
    rows = model.genres.weight.detach().clone()
    after["score"].sum().backward()
    optimizer.step()
    assert not torch.equal(model.genres.weight, rows)


def test_restore_undoes_everything(model: Model) -> None:
    before = types(model)
    attributes = [set(module.__dict__) for module in model.modules()]
    recsys_ops.accelerate(model)
    assert types(model) != before
    assert recsys_ops.restore(model) is model
    assert types(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes
    recsys_ops.restore(model)
    assert types(model) == before


def test_subclass_keeps_its_methods(model: Model) -> None:
    recsys_ops.accelerate(model)
    assert isinstance(model.clicks, TaggedBag) and isinstance(model.clicks, recsys_ops.nn.EmbeddingBag)
    assert model.clicks.tag() == "tagged 40"
    assert repr(model.clicks) == "TaggedBag(40, 8, mode='sum')"


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_are_accelerated_and_can_be_restored(
    model: Model, inputs: tuple[Tensor, Tensor], way: str
) -> None:
    plain = types(model)
    recsys_ops.accelerate(model.eval())
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert types(copied) == types(model)
    assert copied.history.weight is not model.history.weight
    torch.testing.assert_close(copied(*inputs), model(*inputs), rtol=0, atol=0)
    assert types(recsys_ops.restore(copied)) == plain
    assert types(model) != plain


def test_checkpoints_pass_both_ways(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    recsys_ops.accelerate(model.eval())
    plain = Model().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(*inputs), model(*inputs))
    model.load_state_dict(Model().state_dict())


def test_trains_to_the_same_weights(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    ids, weights = inputs
    plain = copy.deepcopy(model)
    recsys_ops.accelerate(model)
    for each in (plain, model):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            (each(ids.roll(step), weights)["score"] ** 2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_a_second_call_finds_nothing_left(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    recsys_ops.accelerate(model)
    swapped = types(model)
    for sample in (None, inputs):
        report = recsys_ops.accelerate(model, sample)
        assert status(report) == dict.fromkeys(ALL, "declined")
        assert {m.reason for m in report.modules} == {"already accelerated"}
    assert types(model) == swapped


def test_a_second_call_leaves_earlier_swaps(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    model.recent = nn.Embedding(50, 8)
    recsys_ops.accelerate(model, include=["history", "genres"])
    report = recsys_ops.accelerate(model, inputs, include="words", measure=timed(0.5))
    assert report.accelerated == ()
    assert isinstance(model.genres, recsys_ops.nn.EmbeddingBag)
    assert isinstance(model.history, pooling.PooledEmbedding)
    assert type(model.words) is nn.EmbeddingBag
    assert type(model) is not Model


def patched() -> nn.EmbeddingBag:
    bag = nn.EmbeddingBag(5, 2)
    bag.forward = lambda input: input  # type: ignore[method-assign]
    return bag


def parametrized() -> nn.EmbeddingBag:
    bag = nn.EmbeddingBag(5, 2)
    nn.utils.parametrizations.weight_norm(bag)
    return bag


def with_backend() -> nn.EmbeddingBag:
    bag = nn.EmbeddingBag(5, 2)
    bag.backend = "mine"
    return bag


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: OwnForward(5, 2), "OwnForward has a forward of its own"),
        (lambda: Registered(5, 2), "Registered defines __init_subclass__"),
        (patched, "its forward is patched on the instance"),
        (parametrized, "its parameters are parametrized"),
        (with_backend, "EmbeddingBag has attributes that recsys_ops.nn.EmbeddingBag reads"),
        (lambda: nn.EmbeddingBag(5, 2, dtype=torch.complex64), "its weight is complex64"),
        (lambda: nn.EmbeddingBag(0, 2), "its weight has shape [0, 2]"),
        (lambda: recsys_ops.nn.EmbeddingBag(5, 2), "already accelerated"),
        (lambda: nn.Embedding(5, 2), "no sum or mean recognised"),
    ],
)
def test_declines_what_is_not_certain(build: Callable[[], nn.Module], expected: str) -> None:
    model = nn.Sequential(build())
    before = types(model)
    report = recsys_ops.accelerate(model)
    assert status(report) == {"0": "declined"}
    assert reason(report, "0") == expected
    assert types(model) == before


def test_a_shared_module_is_swapped_once() -> None:
    bag = nn.EmbeddingBag(5, 2)
    model = nn.ModuleDict({"user": bag, "item": bag})
    assert recsys_ops.accelerate(model, include="item").accelerated == ("user",)
    assert model["user"] is model["item"]
    recsys_ops.restore(model)
    assert recsys_ops.accelerate(model, exclude="item").accelerated == ()


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ALL),
        ("*s", None, BAGS),
        (["genres", "hist*"], None, ("genres", "history")),
        ((name for name in ["words", "history"]), None, ("words", "history")),
        (None, "words", ("genres", "clicks", "history")),
        ("*s", lambda name, module: module.mode == "max", ("genres", "clicks")),
        (lambda name, module: isinstance(module, nn.Embedding), None, ("history",)),
        ("nothing", None, ()),
    ],
)
def test_include_and_exclude(model: Model, include: Any, exclude: Any, expected: tuple[str, ...]) -> None:
    report = recsys_ops.accelerate(model, include=include, exclude=exclude)
    assert report.accelerated == expected
    assert {m.reason for m in report.modules if m.status == "declined"} <= {"not in include", "in exclude"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_selection_of_the_wrong_type_is_refused(model: Model, argument: str) -> None:
    with pytest.raises(TypeError, match=f"expected {argument} to be patterns or a predicate, got int"):
        recsys_ops.accelerate(model, **{argument: 3})


@pytest.mark.parametrize("function", [recsys_ops.accelerate, recsys_ops.restore])
def test_something_else_than_a_module_is_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got int"):
        function(3)


def test_an_exception_while_swapping_leaves_the_model_as_it_was(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, swap = types(model), importlib.import_module("recsys_ops.acceleration.swap").swap

    def failing(module: nn.Module) -> None:
        if module is model.clicks:
            raise MemoryError
        swap(module)

    monkeypatch.setitem(recsys_ops.accelerate.__globals__, "swap", failing)
    with pytest.raises(MemoryError):
        recsys_ops.accelerate(model)
    assert types(model) == before


def test_restore_refuses_a_class_that_something_else_changed(model: Model) -> None:
    recsys_ops.accelerate(model)
    swapped = types(model)
    model.genres.__class__ = type("Wrapped", (type(model.genres),), {})
    with pytest.raises(RuntimeError, match="expected module 'genres' to be of the class that"):
        recsys_ops.restore(model)
    assert type(model) is swapped[0]


WRAPPED = """
import os, sys, torch
from accelerate_model import ALL, Model, timed
import recsys_ops

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model, inputs = Model(), (torch.randint(0, 20, (16, 5)), torch.rand(16, 5))
model.clicks.sparse = False
wrapper = torch.nn.parallel.DistributedDataParallel(model)
report = recsys_ops.accelerate(wrapper, inputs, measure=timed(2))
assert report.accelerated == tuple(f"module.{name}" for name in ALL), report
for _ in range(2):
    wrapper(*inputs)["score"].sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
os._exit(0)  # gloo's threads may keep an interpreter from ending
"""


def test_a_wrapper_made_before_goes_on_training(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRAPPED, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_afterwards(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    del model.calls
    model = model.eval()
    expected = model.history(inputs[0]).mean(1)
    recsys_ops.accelerate(model)
    encode = torch.compile(Encoder(model.history), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(encode(inputs[0]), expected)


class Encoder(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1)


def test_report_as_text_and_numbers(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    model.a_rather_long_name_of_a_module = nn.ModuleList(
        [nn.Embedding(5, 2, padding_idx=0), OwnForward(5, 2)]
    )
    report = recsys_ops.accelerate(model, inputs, measure=timed(2, 2, 0.9))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "genres" in text and "1 of 6 lookups swapped" in text and "2.00x" in text
    numbers = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert numbers["accelerated"] == ["genres"] and numbers["agrees"] is True
    assert numbers["modules"][0]["forward"] == {"value": 2, "low": 1.99, "high": 2.01}
    assert numbers["modules"][0]["parity"]["error"] <= numbers["modules"][0]["parity"]["budget"]
    assert "No lookups found" in str(recsys_ops.accelerate(nn.Linear(2, 2)))

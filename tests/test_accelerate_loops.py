"""Bags in a loop as one lookup: which loops, what they compute, and what keeps a bag by itself."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_model import reason, results, status, timed, types
from rich.console import Console
from torch import Tensor, nn

import recsys_ops
from recsys_ops.accelerate import run_accelerate
from recsys_ops.acceleration import collected
from recsys_ops.acceleration.collected import CollectedEmbeddingBag, look_up_together

ROWS, DIM = 20, 4


class Base(nn.Module):
    """Three bags, and a layer above them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        modes = ("sum", "mean", "sum")
        self.bags = nn.ModuleList(
            [nn.EmbeddingBag(ROWS + i, DIM, mode=m, **options) for i, m in enumerate(modes)]
        )
        self.named = nn.ModuleDict({name: nn.EmbeddingBag(ROWS, DIM, mode="sum", **options) for name in "ab"})
        self.towers = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(3)])

    def top(self, pooled: list[Tensor]) -> Tensor:
        return torch.cat([tower(x) for tower, x in zip(self.towers, pooled)], 1).tanh()  # noqa: B905


class Zipped(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.top([bag(x, o) for bag, x, o in zip(self.bags, ids, offsets, strict=True)])


class Indexed(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled = [self.bags[i](ids[i], offsets=offsets[i]) for i in range(len(self.bags))]
        return self.top(pooled)


class Enumerated(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.top([bag(*(ids[i], offsets[i])) for i, bag in enumerate(self.bags)])


class Named(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        table = {"a": ids[0].view(2, -1), "b": ids[1].view(3, -1)}
        pooled = {name: bag(table[name]) for name, bag in self.named.items()}
        return torch.cat([pooled["a"], pooled["b"]]).tanh()


class Appended(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        for i, bag in enumerate(self.bags):
            x = ids[i]
            if i == 5:
                continue
            pooled.append(bag(x, offsets[i]))
        return self.top(pooled)


class InPlace(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled = [bag(ids[i], offsets[i]) for i, bag in enumerate(self.bags)]
        for x in pooled:
            x.mul_(2)
        return self.top(pooled)


LOOPS = (Zipped, Indexed, Enumerated, Appended, InPlace, Named)


def loop_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ROWS, (3, 12), generator=generator)
    offsets = torch.tensor([0, 2, 2, 5, 9, 12])
    return ids, torch.stack([offsets, offsets // 2, offsets])


def container(kind: type) -> str:
    return "named" if kind is Named else "bags"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lookups each call of a collection has, for those in loops."""
    found: list[int] = []

    def counting(bags: Any) -> Any:
        found.append(len(bags))
        return look_up_together(bags)

    monkeypatch.setattr(collected, "look_up_together", counting)
    return found


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_becomes_one_lookup(kind: type, calls: list[int]) -> None:
    model, inputs = kind(), loop_inputs()
    before, kinds, keys = results(model, inputs), types(model), list(model.state_dict())
    parameters = list(model.parameters())
    report = recsys_ops.accelerate(model, inputs, measure=timed(2))
    name = container(kind)
    assert status(report)[name] == "kept", report
    members = [m for m in status(report) if m.startswith(name + ".")]
    assert {status(report)[m] for m in members} == {"joined"}
    assert reason(report, members[0]) == f"looked up by {name}"
    assert report.agrees and name in report.accelerated
    del calls[:]
    for was, now in zip(before, results(model, inputs), strict=True):
        torch.testing.assert_close(now, was)
    assert calls == [len(members)]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert f"loop of {len(members)} bags" in str(report)
    recsys_ops.restore(model)
    assert types(model) == kinds
    for was, now in zip(before, results(model, inputs), strict=True):
        assert torch.equal(now, was)
    assert calls == [len(members)]


def test_a_loop_without_samples_is_swapped_too(calls: list[int]) -> None:
    model = Zipped()
    report = recsys_ops.accelerate(model, exclude="named*")
    assert report.accelerated == ("bags",)
    model(*loop_inputs())
    assert calls == [3]
    report = recsys_ops.accelerate(model, exclude="named*")
    assert {m.reason for m in report.modules if m.name.startswith("bags")} == {"already accelerated"}


def test_a_loop_that_is_not_faster_leaves_the_bags_by_themselves(calls: list[int]) -> None:
    model = Zipped()
    ratios = [2, 2] * 3 + [0.5, 0.5] + [2, 2]
    report = recsys_ops.accelerate(model, loop_inputs(), exclude="named*", measure=timed(*ratios))
    assert status(report)["bags"] == "put back"
    assert report.accelerated == ("bags.0", "bags.1", "bags.2")
    del calls[:]
    model(*loop_inputs())
    assert calls == []
    assert [type(bag) for bag in model.bags] == [recsys_ops.nn.EmbeddingBag] * 3


def test_trains_and_copies_like_the_original() -> None:
    model, inputs = Appended(sparse=True), loop_inputs()
    plain = copy.deepcopy(model)
    recsys_ops.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(each.bags[0]) is CollectedEmbeddingBag
        plain_twin = copy.deepcopy(plain)
        for trained in (plain_twin, each):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                trained(*inputs).square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(each.state_dict(), plain_twin.state_dict())
        assert types(recsys_ops.restore(each)) == types(plain)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m.bags, "1", nn.EmbeddingBag(9, DIM, padding_idx=0)), "bag 1 has padding_idx=0"),
        (lambda m: setattr(m.bags, "1", nn.EmbeddingBag(9, DIM, max_norm=1.0)), "bag 1 has max_norm=1.0"),
        (
            lambda m: setattr(m.bags, "2", nn.EmbeddingBag(9, DIM, scale_grad_by_freq=True)),
            "bag 2 has scale_grad_by_freq=True",
        ),
        (lambda m: setattr(m.bags[1], "weight", m.bags[2].weight), "two of its bags share a weight"),
        (lambda m: setattr(m.bags[1], "sparse", True), "its bags differ in dtype or sparse"),
        (lambda m: m.bags[0].register_forward_hook(lambda *_: None), "bag 0 has hooks"),
        (lambda m: setattr(m, "forward", lambda *_: None), "Zipped.forward is patched on the instance"),
    ],
)
def test_declines_bags_that_a_collection_cannot_be(change: Callable[[Any], Any], expected: str) -> None:
    model = Zipped()
    change(model)
    report = recsys_ops.accelerate(model)
    assert status(report)["bags"] == "declined"
    assert reason(report, "bags") == expected


class Unrolled(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.top([self.bags[0](ids[0], offsets[0]), self.bags[1](ids[1], offsets[1])])


class Recurrent(Base):
    """What one bag gives decides what the next is asked."""

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled = []
        x = ids[0]
        for i, bag in enumerate(self.bags):
            pooled.append(bag(x, offsets[i]))
            x = (x + (pooled[-1].sum() > 0)) % ROWS
        return self.top(pooled)


class Guarded(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        try:
            for i, bag in enumerate(self.bags):
                pooled.append(bag(ids[i], offsets[i]))
        except RuntimeError:
            pooled.clear()
        return self.top(pooled)


class Aliased(Base):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        also = pooled
        for i, bag in enumerate(self.bags):
            pooled.append(bag(ids[i] if len(also) == i else ids[0], offsets[i]))
        return self.top(pooled)


@pytest.mark.parametrize("kind", [Unrolled, Recurrent, Guarded, Aliased])
def test_loops_that_use_what_they_look_up_stay(kind: type, calls: list[int]) -> None:
    model, inputs = kind(), loop_inputs()
    before = results(model, inputs)
    report = recsys_ops.accelerate(model, inputs, include="bags*", measure=timed(2))
    assert reason(report, "bags") == "no loop over its bags recognised"
    assert "bags.0" in report.accelerated
    assert calls == []
    for was, now in zip(before, results(model, inputs), strict=True):
        torch.testing.assert_close(now, was)


def test_other_modules_in_a_loop_are_called_in_its_order() -> None:
    order: list[str] = []

    class Noting(nn.Module):
        def forward(self, x: int) -> int:
            order.append(f"call {x}")
            return x

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.ModuleList([nn.EmbeddingBag(5, 2), nn.EmbeddingBag(5, 2)])
            self.others = nn.ModuleList([Noting(), Noting()])

        def operand(self, x: int) -> int:
            order.append(f"operand {x}")
            return x

        def forward(self, ids: Tensor) -> tuple[list[int], list[Tensor]]:
            others = [other(self.operand(i)) for i, other in enumerate(self.others)]
            return others, [bag(ids) for bag in self.bags]

    # A class in a function has its source, too.
    model = Mixed()
    assert recsys_ops.accelerate(model).accelerated == ("bags",)
    model(torch.tensor([[1, 2]]))
    assert order == ["operand 0", "call 0", "operand 1", "call 1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bags[1].register_forward_hook(lambda module, args, output: 2 * output),
        lambda m: setattr(m.bags[1], "padding_idx", 0),
        lambda m: m.bags[2].double(),
        lambda m: m.__setattr__("bags", nn.ModuleList([m.bags[0], nn.EmbeddingBag(30, DIM), m.bags[2]])),
    ],
)
def test_what_changes_after_the_swap_is_respected(change: Callable[[Any], Any], calls: list[int]) -> None:
    model, inputs = Zipped(), loop_inputs()
    model.towers = nn.ModuleList([nn.Identity()] * 3)
    recsys_ops.accelerate(model)
    change(model)
    after = model(*inputs)
    assert 3 not in calls
    torch.testing.assert_close(after, recsys_ops.restore(model)(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_calls_of_all_forms_at_once(dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    modes = ("sum", "sum", "mean") if weighted else ("sum", "max", "mean")
    bags: list[Any] = [
        nn.EmbeddingBag(ROWS, dim, mode=mode, dtype=dtype, include_last_offset=i == 1)
        for i, (mode, dim) in enumerate(zip(modes, (2, 3, 4), strict=True))
    ]
    weights = torch.rand(7, dtype=dtype, requires_grad=True) if weighted else None
    arguments = [
        (torch.randint(0, ROWS, (4, 3)), None, None),
        (torch.randint(0, ROWS, (7,)), torch.tensor([0, 2, 2, 5]), weights),  # two entries are in no bag
        (torch.randint(0, ROWS, (5,)), torch.tensor([0, 0, 4]), None),
    ]
    found = look_up_together([collected.Bags(bag, *a) for bag, a in zip(bags, arguments, strict=True)])
    # PyTorch is not always right about those two.
    arguments[1] = (arguments[1][0][:5], arguments[1][1], None if weights is None else weights[:5])
    expected = [bag(*a) for bag, a in zip(bags, arguments, strict=True)]
    targets = [bag.weight for bag in bags] + ([weights] if weighted else [])
    of_found, of_expected = (
        torch.autograd.grad([(x.float() ** 2).sum() for x in each], targets) for each in (found, expected)
    )
    for now, was in zip((*found, *of_found), (*expected, *of_expected), strict=True):
        assert now.dtype == dtype
        tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(now, was, **tolerance)


def test_a_wrong_collection_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bags: Any) -> Any:
        return [1.001 * x for x in look_up_together(bags)]

    monkeypatch.setattr("recsys_ops.acceleration.checks.look_up_together", wrong)
    report = recsys_ops.accelerate(Zipped(), loop_inputs(), exclude="named*", measure=timed(2))
    assert status(report)["bags"] == "put back" and not report.agrees
    assert reason(report, "bags").startswith("it differs: gradient of weight")
    assert "bags.0" in report.accelerated


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loop_compiles_afterwards() -> None:
    model, inputs = Zipped(), loop_inputs()
    expected = results(model, inputs)
    recsys_ops.accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for now, was in zip(results(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(now, was)


def test_the_command_reports_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from test_accelerate_loops import Zipped as build, loop_inputs as make\n"
    (tmp_path / "loop_model.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    console = Console(file=io.StringIO(), width=100)
    json_path = tmp_path / "report.json"
    code = run_accelerate("loop_model:build", None, None, ["named*"], json_path, console)
    assert code == 0
    assert "loop of 3 bags" in console.file.getvalue() and "looked up by bags" in console.file.getvalue()
    statuses = [m["status"] for m in json.loads(json_path.read_text())["modules"]]
    assert statuses == ["swapped", "joined", "joined", "joined", "declined", "declined", "declined"]


def test_containers_of_one_module_are_swapped_one_after_the_other(calls: list[int]) -> None:
    class Both(Base):
        def forward(self, ids: Tensor) -> list[Tensor]:
            named = {name: bag(ids) for name, bag in self.named.items()}
            return [bag(ids) for bag in self.bags] + list(named.values())

    model, ids = Both(), torch.tensor([[1, 2], [3, 4]])
    before = model(ids)
    assert recsys_ops.accelerate(model, include="bags*").accelerated == ("bags",)
    model(ids)
    assert calls == [3]
    report = recsys_ops.accelerate(model, exclude="named.a")
    assert reason(report, "named") == "a table of it is in exclude"
    assert report.accelerated == ("named.b",)
    recsys_ops.restore(model.named)
    assert recsys_ops.accelerate(model, ids, measure=timed(2)).accelerated == ("named",)
    del calls[:]
    for was, now in zip(before, model(ids), strict=True):
        torch.testing.assert_close(now, was)
    assert calls == [2, 3]

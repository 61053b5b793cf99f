"""Many lookups as one: TorchRec's collections, fused or not, and bags in a loop."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_model import reason, status, timed, types
from rich.console import Console
from torch import Tensor, nn

import recsys_ops
from recsys_ops.accelerate import run_accelerate
from recsys_ops.acceleration import collected
from recsys_ops.acceleration.collected import CollectedEmbeddingBag, look_up_together
from recsys_ops.embedding_bag_collection import torchrec_modules

ROWS, DIM, BATCH = 20, 4, 6


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


def results(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    output = model(*inputs)
    output = output if isinstance(output, Tensor) else output.values()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    return [output, *(g for g in gradients if g is not None)]


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
    source = "from test_accelerate_collections import Zipped as build, loop_inputs as make\n"
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


class Keyed(nn.Module):
    """TorchRec's collection, and a layer above it."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc
        self.over = nn.Linear(
            sum(c.embedding_dim * len(c.feature_names) for c in ebc.embedding_bag_configs()), 2
        )

    def forward(self, features: Any) -> Tensor:
        return self.over(self.ebc(features).values()).tanh()


def configs(**options: Any) -> list[Any]:
    torchrec = pytest.importorskip("torchrec")
    return [
        torchrec.EmbeddingBagConfig(
            name="user", num_embeddings=ROWS, embedding_dim=4, feature_names=["u", "both"], **options
        ),
        torchrec.EmbeddingBagConfig(
            name="item", num_embeddings=ROWS, embedding_dim=8, feature_names=["both", "i"], **options
        ),
    ]


def keyed_inputs(weighted: bool = False) -> Any:
    torchrec = pytest.importorskip("torchrec")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 4, (4 * BATCH,), generator=generator)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(values), generator=generator) if weighted else None
    return torchrec.KeyedJaggedTensor(
        keys=["i", "other", "u", "both"], values=values, lengths=lengths, weights=weights
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_torchrec_collection(weighted: bool) -> None:
    torchrec = pytest.importorskip("torchrec")
    torch.manual_seed(0)
    model = Keyed(torchrec.EmbeddingBagCollection(tables=configs(), is_weighted=weighted))
    features = keyed_inputs(weighted)
    parameters, keys, kinds = list(model.parameters()), list(model.state_dict()), types(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
    before, names = results(model, (features,)), model.ebc(features).keys()
    report = recsys_ops.accelerate(model, features, measure=timed(2))
    assert status(report) == {
        "ebc": "kept",
        "ebc.embedding_bags.user": "joined",
        "ebc.embedding_bags.item": "joined",
    }
    assert report.modules[0].kind == "collection of 2"
    assert report.agrees and report.parity is not None
    assert isinstance(model.ebc, torchrec.EmbeddingBagCollection)
    after = results(model, (features,))
    assert model.ebc(features).keys() == names
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    weight = parameters[0].detach().clone()
    model(features).square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameters[0], weight)
    again = recsys_ops.accelerate(model)
    assert {m.reason for m in again.modules} == {"already accelerated"}
    copied = copy.deepcopy(model)
    assert torch.equal(copied(features), model(features))
    with torch.no_grad():
        copied.ebc.embedding_bags["user"].weight.zero_()
    assert not torch.equal(copied(features), model(features))
    assert types(recsys_ops.restore(model)) == kinds
    assert type(model.ebc) is torchrec.EmbeddingBagCollection
    assert types(recsys_ops.restore(copied)) == kinds


def test_torchrec_collection_by_itself_without_samples() -> None:
    torchrec = pytest.importorskip("torchrec")
    ebc = torchrec.EmbeddingBagCollection(tables=configs())
    features = keyed_inputs()
    before = ebc(features).values()
    report = recsys_ops.accelerate(ebc)
    assert report.accelerated == ("",)
    assert isinstance(ebc, torchrec_modules.Accelerated)
    torch.testing.assert_close(ebc(features).values(), before)
    # What ours does not take goes where it went before.
    ebc.embedding_bags["user"].register_forward_hook(lambda module, args, output: 0 * output)
    assert ebc(features)["u"].eq(0).all()
    for change in (lambda e: e.double(), lambda e: setattr(e.embedding_bags["item"], "padding_idx", 3)):
        changed = torchrec.EmbeddingBagCollection(tables=configs())
        recsys_ops.accelerate(changed)
        changed(features)
        change(changed)
        after = changed(features).values()
        assert torch.equal(after, recsys_ops.restore(changed)(features).values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: setattr(e.embedding_bags["item"], "padding_idx", 0), "'item' has padding_idx=0"),
        (lambda e: setattr(e.embedding_bags["user"], "max_norm", 1.0), "'user' has max_norm=1.0"),
        (lambda e: setattr(e.embedding_bags["user"], "sparse", True), "only some of its tables are sparse"),
        (lambda e: e.double(), "the weight of 'user' is a Parameter of float64"),
        (lambda e: e.embedding_bags["item"].register_forward_hook(lambda *_: None), "'item' has hooks"),
        (lambda e: setattr(e, "forward", None), "EmbeddingBagCollection has a forward of its own"),
    ],
)
def test_declines_torchrec_collections_that_do_more(change: Callable[[Any], Any], expected: str) -> None:
    torchrec = pytest.importorskip("torchrec")
    ebc = torchrec.EmbeddingBagCollection(tables=configs())
    change(ebc)
    report = recsys_ops.accelerate(nn.ModuleDict({"ebc": ebc}))
    assert (status(report)["ebc"], reason(report, "ebc")) == ("declined", expected)
    assert not isinstance(ebc, torchrec_modules.Accelerated)
    with pytest.raises(ValueError, match=r"expected what TorchRec's and ours both do"):
        torchrec_modules.as_ours(ebc)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3},
    "Adagrad": {"lr": 0.3, "eps": 1e-4},
    "RowWiseAdagrad": {"lr": 0.3, "eps": 1e-4},
}


def fused(name: str, **options: Any) -> Any:
    torchrec = pytest.importorskip("torchrec")
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    kind = getattr(torchrec.optim, name) if name == "RowWiseAdagrad" else getattr(torch.optim, name)
    torch.manual_seed(0)
    tables = configs()
    if options.pop("two_groups", False):
        tables[0].pooling = torchrec.PoolingType.MEAN
    return Keyed(FusedEmbeddingBagCollection(tables, kind, {**OPTIMIZERS.get(name, {}), **options}))


def train(model: nn.Module, features: Any, steps: int = 3) -> dict[str, Tensor]:
    """All that a model with a fused collection holds after some steps."""
    for _ in range(steps):
        model(features).square().sum().backward()
    held = torchrec_modules.changed_in_backward(model.ebc)  # type: ignore[arg-type]
    return {name: tensor.clone() for name, tensor in held.items()}


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_collection_goes_on_training(name: str, two_groups: bool) -> None:
    features = keyed_inputs()
    model, plain = fused(name, two_groups=two_groups), fused(name, two_groups=two_groups)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        train(each, features)
    held, keys, kinds = train(model, features, 0), list(model.state_dict()), types(model)
    parameters = list(model.parameters())
    report = recsys_ops.accelerate(model, features, measure=timed(2))
    assert status(report) == {"ebc": "kept"}, report
    assert report.modules[0].kind == "fused collection of 2"
    assert report.agrees and report.modules[0].step is not None
    torch.testing.assert_close(train(model, features, 0), held, rtol=0, atol=0)  # no trace
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

    model.ebc.fused_optimizer().param_groups[0]["lr"] = 0.1
    plain.ebc.fused_optimizer().param_groups[0]["lr"] = 0.1
    for each in (model, plain):
        each.ebc.fused_optimizer().step()
    torch.testing.assert_close(train(model, features), train(plain, features))
    assert model.ebc(features).keys() == plain.ebc(features).keys()
    torch.testing.assert_close(model(features), plain(features))
    with torch.no_grad():
        model(features)
    recsys_ops.restore(model)
    assert types(model) == kinds
    torch.testing.assert_close(train(model, features), train(plain, features))  # its own kernels again
    assert torch.equal(model.state_dict()[keys[0]], model.ebc._emb_modules[0].split_embedding_weights()[0])


def test_a_copy_of_a_fused_collection_trains_by_itself() -> None:
    model, features = fused("RowWiseAdagrad"), keyed_inputs()
    train(model, features, 1)
    recsys_ops.accelerate(model)
    train(model, features, 1)
    copied = copy.deepcopy(model)
    assert isinstance(copied.ebc, torchrec_modules.Accelerated)
    before = train(model, features, 0)
    theirs = train(copied, features, 2)
    torch.testing.assert_close(train(model, features, 0), before, rtol=0, atol=0)
    torch.testing.assert_close(train(model, features, 2), theirs)
    torch.testing.assert_close(copied(features), model(features))


def test_fused_collection_whose_update_differs_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, features = fused("Adagrad"), keyed_inputs()
    held = train(model, features, 0)
    right = torchrec_modules._optimizer

    def wrong(tables: Any) -> Any:
        return recsys_ops.optim.Adagrad(lr=right(tables).lr, eps=1e-2)

    monkeypatch.setattr(torchrec_modules, "_optimizer", wrong)
    report = recsys_ops.accelerate(model, features, measure=timed(2))
    assert status(report) == {"ebc": "put back"} and not report.agrees
    assert reason(report, "ebc").startswith("the whole model differs: updated ebc.")
    torch.testing.assert_close(train(model, features, 0), held, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("SGD", {"weight_decay": 0.1}, "its optimizer has weight_decay=0.1, which FBGEMM may ignore"),
        ("Adagrad", {"gradient_clipping": True}, "its optimizer has gradient_clipping=True"),
    ],
)
def test_declines_fused_collections_that_do_more(name: str, options: dict[str, Any], expected: str) -> None:
    report = recsys_ops.accelerate(fused(name, **options))
    assert (status(report)["ebc"], reason(report, "ebc")) == ("declined", expected)


def test_adam_of_fbgemm() -> None:
    """FBGEMM has Adam on GPUs alone: here its state and numbers stand in for it."""
    model, features = fused("Adagrad"), keyed_inputs()
    twin = recsys_ops.nn.EmbeddingBagCollection(
        [
            recsys_ops.nn.TableConfig("user", ROWS, 4, ["u", "both"]),
            recsys_ops.nn.TableConfig("item", ROWS, 8, ["both", "i"]),
        ],
        recsys_ops.optim.Adam(
            lr=0.3, eps=1e-4, betas=(0.8, 0.9), weight_decay=0.1, weight_decay_mode="decoupled"
        ),
    )
    twin.load_state_dict(model.ebc.state_dict())
    tables = model.ebc._emb_modules[0]._emb_module
    states = [[torch.zeros_like(w), torch.zeros_like(w)] for w in tables.split_embedding_weights()]
    tables.split_optimizer_states = lambda: states
    tables.optimizer = "adam"
    numbers = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}
    tables.optimizer_args = tables.optimizer_args._replace(**numbers)
    assert recsys_ops.accelerate(model).accelerated == ("ebc",)
    for _ in range(3):
        for ebc in (model.ebc, twin):
            ebc(features).values().square().sum().backward()
    torch.testing.assert_close(model.ebc.state_dict(), twin.state_dict())
    state = twin.fused_optimizer.state[twin.weights[1]]
    torch.testing.assert_close(states[1][0], state["exp_avg"])
    torch.testing.assert_close(states[1][1], state["exp_avg_sq"])
    assert tables.iter.item() == tables.iter_cpu.item() == 3


def test_torchrec_is_recognised_only_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class EmbeddingBagCollection(nn.Module):
        pass

    monkeypatch.setattr(torchrec_modules, "_MODULES", {"EmbeddingBagCollection": "not.there"})
    assert torchrec_modules.torchrec_class(EmbeddingBagCollection()) is None

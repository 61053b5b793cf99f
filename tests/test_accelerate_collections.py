"""TorchRec's collections, fused or not, as ours: what they give, and what they train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_model import reason, results, status, timed, types
from torch import Tensor, nn

import recsys_ops
from recsys_ops.embedding_bag_collection import torchrec_modules

ROWS, DIM, BATCH = 20, 4, 6


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
    right = torchrec_modules.optimizer_of_tables

    def wrong(tables: Any) -> Any:
        return recsys_ops.optim.Adagrad(lr=right(tables).lr, eps=1e-2)

    monkeypatch.setattr(torchrec_modules, "optimizer_of_tables", wrong)
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


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("lamb", {}, "its optimizer is lamb, and FBGEMM's leaves rows of zeros as they are"),
        ("lars_sgd", {}, "its optimizer is lars_sgd"),
        (
            "adam",
            {"weight_decay": 0.1, "weight_decay_mode": 1},
            "its optimizer has weight_decay=0.1, which FBGEMM may ignore",
        ),
    ],
)
def test_declines_optimizers_that_differ(name: str, numbers: dict[str, Any], expected: str) -> None:
    """FBGEMM has these on GPUs alone: here their names stand in for them."""
    model = fused("SGD")
    tables = model.ebc._emb_modules[0]._emb_module
    tables.optimizer = name
    tables.optimizer_args = tables.optimizer_args._replace(**numbers)
    report = recsys_ops.accelerate(model)
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

"""Our collection in place of TorchRec's: same names, same numbers, same checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

# With this folder's parent on the path `torchrec` alone is found, if need be as this folder.
pytest.importorskip("torchrec.modules", reason="needs torchrec and fbgemm-gpu-cpu", exc_type=ImportError)

import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from tensordict import TensorDict
from torchrec import EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

import recsys_ops
from recsys_ops.optim import LAMB, SGD, Adagrad, Adam, PartialRowWiseAdam, RowOptimizer, RowWiseAdagrad
from recsys_ops.torchrec import EmbeddingBagCollection, from_torchrec, optimizer_of, to_torchrec

KEYS = ("viewed", "bought", "query")
BATCH = 5


def configs(**changes: Any) -> list[EmbeddingBagConfig]:
    """Three tables; two share a feature, and one has two."""
    tables = (
        ("products", 13, 8, ["viewed", "bought"], PoolingType.SUM),
        ("words", 29, 4, ["query"], PoolingType.MEAN),
        ("brands", 13, 4, ["viewed"], PoolingType.SUM),
    )
    return [
        EmbeddingBagConfig(
            **{
                "name": name,
                "num_embeddings": rows,
                "embedding_dim": dim,
                "feature_names": features,
                "pooling": pooling,
                **changes,
            }
        )
        for name, rows, dim, features, pooling in tables
    ]


def batch(seed: int = 0, keys: tuple[str, ...] = KEYS, weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids that every table has."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(keys) * BATCH,), generator=generator)
    total = int(lengths.sum())
    ids = torch.randint(0, 13, (total,), generator=generator)
    weights = torch.rand(total, generator=generator) if weighted else None
    return KeyedJaggedTensor(list(keys), ids, weights, lengths)


def both(is_weighted: bool = False, **changes: Any) -> tuple[EmbeddingBagCollection, Any]:
    """Ours and TorchRec's, of equal weights."""
    torch.manual_seed(0)
    ours = EmbeddingBagCollection(configs(**changes), is_weighted)
    theirs = torchrec.EmbeddingBagCollection(configs(**changes), is_weighted)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    assert ours.length_per_key() == theirs.length_per_key()
    torch.testing.assert_close(ours.values(), theirs.values())


def loss_of(output: Any) -> Tensor:
    """Depends on every element, not linearly."""
    values = output.values()
    scale = torch.linspace(0.5, 1.5, values.numel()).view_as(values)
    return ((values - 0.3) * scale).square().sum()


def train(ebc: Any, steps: range) -> None:
    for step in steps:
        loss_of(ebc(batch(step))).backward()


def test_interface() -> None:
    tables = configs()
    ours = EmbeddingBagCollection(tables, device="cpu")
    assert isinstance(ours, EmbeddingBagCollectionInterface)
    assert ours.is_weighted() is False
    assert EmbeddingBagCollection(configs(), is_weighted=True).is_weighted() is True
    assert ours.device == torch.device("cpu")
    assert ours.embedding_bag_configs() == tables
    assert type(ours).__name__ == "EmbeddingBagCollection"


@pytest.mark.parametrize(
    "keys", [KEYS, KEYS[::-1], ("other", "bought", "viewed", "query", "unused")], ids=" ".join
)
def test_output(keys: tuple[str, ...]) -> None:
    ours, theirs = both()
    output = ours(batch(keys=keys))
    assert_same(output, theirs(batch(keys=keys)))
    assert output.keys() == ["viewed@products", "bought", "query", "viewed@brands"]


@pytest.mark.parametrize("is_weighted", [False, True])
def test_weights_of_a_batch_count_only_where_asked_for(is_weighted: bool) -> None:
    ours, theirs = both(is_weighted, pooling=PoolingType.SUM)
    assert_same(ours(batch(weighted=True)), theirs(batch(weighted=True)))


def test_a_missing_feature_is_a_key_error() -> None:
    for ebc in both():
        with pytest.raises(KeyError):
            ebc(batch(keys=KEYS[:2]))


def test_no_samples() -> None:
    features = KeyedJaggedTensor(
        list(KEYS), torch.tensor([], dtype=torch.int64), lengths=torch.zeros(0).long()
    )
    assert EmbeddingBagCollection(configs())(features).values().shape == (0, 24)


def test_different_batch_sizes_with_inverse_indices() -> None:
    strides = [[3], [2], [4]]
    lengths = torch.tensor([1, 2, 0, 3, 1, 0, 1, 1, 2])
    inverse = torch.tensor([[0, 1, 2, 2, 1], [1, 1, 0, 0, 1], [3, 2, 1, 0, 0]])
    features = KeyedJaggedTensor(
        list(KEYS),
        torch.arange(11),
        lengths=lengths,
        stride_per_key_per_rank=strides,
        inverse_indices=(list(KEYS), inverse),
    )
    ours, theirs = both()
    assert_same(ours(features), theirs(features))


def test_a_tensor_dict_of_jagged_tensors() -> None:
    parts = batch().to_dict().items()
    features = TensorDict({key: JaggedTensor(part.values(), lengths=part.lengths()) for key, part in parts})
    ours, theirs = both()
    assert_same(ours(features), theirs(features))


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16, DataType.BF16])
def test_tables_have_the_dtype_that_is_asked_for(data_type: DataType) -> None:
    ours = EmbeddingBagCollection(configs(data_type=data_type))
    assert {str(w.dtype) for w in ours.weights} == {
        {"FP32": "torch.float32", "FP16": "torch.float16", "BF16": "torch.bfloat16"}[data_type.value]
    }
    exact = torchrec.EmbeddingBagCollection(configs())
    exact.load_state_dict(ours.state_dict())
    assert_same(ours(batch()), exact(batch()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": DataType.INT8}, "FP32, FP16 or BF16"),
        ({"pooling": PoolingType.NONE}, "SUM or MEAN"),
        ({"use_virtual_table": True}, "virtual"),
    ],
)
def test_what_it_cannot_be_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingBagCollection(configs(**changes))


def test_a_table_has_a_feature_of_its_name_by_default() -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=13, embedding_dim=4)
    ours = EmbeddingBagCollection([table])
    assert ours.embedding_bag_configs()[0].feature_names == ["t"]
    assert table.feature_names == []
    assert ours(batch(keys=("t",))).keys() == ["t"]


def test_initial_weights() -> None:
    within = EmbeddingBagCollection(configs(weight_init_min=0.25, weight_init_max=0.5))
    assert all(0.25 <= w.min() < w.max() <= 0.5 for w in within.weights)
    filled = EmbeddingBagCollection(configs(init_fn=lambda weight: weight.fill_(3.0)))
    assert all((w == 3).all() for w in filled.weights)


def test_state_dicts_load_both_ways() -> None:
    ours, theirs = EmbeddingBagCollection(configs()), torchrec.EmbeddingBagCollection(configs())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours(batch()), theirs(batch()))
    torch.nn.init.normal_(theirs.embedding_bags["products"].weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours(batch()), theirs(batch()))


def test_meta_tables_are_allocated_later() -> None:
    ours = EmbeddingBagCollection(configs(), device="meta", optimizer=Adam())
    assert ours.device.type == "meta"
    assert ours(batch().to(torch.device("meta"))).values().shape == (BATCH, 24)
    ours.to_empty(device="cpu").reset_parameters()
    train(ours, range(2))
    assert ours.fused_optimizer is not None
    assert all(ours.fused_optimizer.state[w]["exp_avg"].abs().sum() > 0 for w in ours.weights)
    assert ours.to("meta").device.type == "meta"


def test_to_dtype_keeps_the_state_in_its_own() -> None:
    ours = EmbeddingBagCollection(configs(), optimizer=Adagrad())
    ours.to(torch.bfloat16)
    train(ours, range(2))
    assert ours.weights[0].dtype == torch.bfloat16
    assert ours.fused_optimizer is not None
    assert ours.fused_optimizer.state[ours.weights[0]]["sum"].dtype == torch.float32


def test_without_an_optimizer_the_parameters_are_the_same() -> None:
    theirs = torchrec.EmbeddingBagCollection(configs())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    ours = from_torchrec(theirs)
    assert [p is q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)] == [True] * 3
    expected = copy.deepcopy(theirs)
    loss_of(expected(batch())).backward()
    gradients = [p.grad for p in expected.parameters()]
    train(ours, range(1))
    torch.testing.assert_close([p.grad for p in theirs.parameters()], gradients)
    optimizer.step()
    assert torch.equal(theirs(batch()).values(), torchrec_output(ours))


def torchrec_output(ours: EmbeddingBagCollection) -> Tensor:
    """What TorchRec computes with our weights."""
    return to_torchrec(ours)(batch()).values()


@pytest.mark.parametrize("optimizer", [None, SGD(lr=0.1)])
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
def test_memory_is_shared_both_ways(optimizer: RowOptimizer | None, data_type: DataType) -> None:
    theirs = torchrec.EmbeddingBagCollection(configs(data_type=data_type), is_weighted=True).eval()
    ours = from_torchrec(theirs, optimizer)
    back = to_torchrec(ours)
    for name in ("products", "words", "brands"):
        weights = [ebc.embedding_bags[name].weight for ebc in (theirs, ours, back)]
        assert len({w.data_ptr() for w in weights}) == 1
        assert len({w.dtype for w in weights}) == 1
    assert back.embedding_bag_configs() == theirs.embedding_bag_configs()
    assert ours.is_weighted()
    assert back.is_weighted()
    assert not ours.training
    assert back.device == torch.device("cpu")


def test_a_plain_collection_of_torchrec_gets_bf16_tables() -> None:
    ours = EmbeddingBagCollection(configs(data_type=DataType.BF16))
    back = to_torchrec(ours)
    assert back.embedding_bags["products"].weight.dtype == torch.bfloat16
    # PyTorch rounds what it pools to the dtype of the table, ours is fp32.
    torch.testing.assert_close(back(batch()).values(), ours(batch()).values(), rtol=2**-7, atol=2**-7)


def test_a_collection_that_torchrec_made_fp16_stays_fp16() -> None:
    ours = from_torchrec(torchrec.EmbeddingBagCollection(configs(data_type=DataType.BF16)))
    assert ours.weights[0].dtype == torch.float16
    assert ours.embedding_bag_configs()[0].data_type == DataType.FP16


def test_what_does_not_go_over_is_refused() -> None:
    with pytest.raises(TypeError, match="unsharded"):
        from_torchrec(torch.nn.EmbeddingBag(3, 4))  # type: ignore[arg-type]
    frozen = torchrec.EmbeddingBagCollection(configs())
    frozen.embedding_bags["words"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen ones: \['words'\]"):
        from_torchrec(frozen, SGD())
    assert not from_torchrec(frozen).weights[1].requires_grad
    with pytest.raises(ValueError, match="float64"):
        to_torchrec(EmbeddingBagCollection(configs()).double())


# TorchRec's own; FBGEMM has no Adam on a CPU.
FUSED = [
    (torch.optim.SGD, {"lr": 0.1}, SGD(lr=0.1)),
    (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-6}, Adagrad(lr=0.1, eps=1e-6)),
    (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}, RowWiseAdagrad(lr=0.1)),
]
fused_optimizers = pytest.mark.parametrize(
    ("kind", "arguments", "optimizer"), FUSED, ids=[type(o).__name__ for _, _, o in FUSED]
)


def fused_pair(
    kind: type[torch.optim.Optimizer], arguments: dict[str, Any], pooling: PoolingType = PoolingType.SUM
) -> list[Any]:
    """Two equal collections of TorchRec, of one pooling: else their values are in another order than keys."""
    pair = [FusedEmbeddingBagCollection(configs(pooling=pooling), kind, arguments) for _ in range(2)]
    with torch.no_grad():
        for one, other in zip(*(ebc.parameters() for ebc in pair), strict=True):
            other.copy_(one)
    return pair


def weights_of(ebc: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in ebc.state_dict().items()}


@fused_optimizers
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_a_fused_collection_is_taken_over_amid_training(
    kind: type[torch.optim.Optimizer],
    arguments: dict[str, Any],
    optimizer: RowOptimizer,
    pooling: PoolingType,
) -> None:
    theirs, twin = fused_pair(kind, arguments, pooling)
    train(theirs, range(3))
    train(twin, range(6))
    ours = from_torchrec(theirs)
    fused = ours.fused_optimizer
    assert fused is not None
    assert fused.config == optimizer
    shared = [
        theirs.embedding_bags[c.name].weight.data_ptr() == w.data_ptr()
        for c, w in zip(configs(), ours.weights, strict=True)
    ]
    assert shared == [True] * 3
    train(ours, range(3, 6))
    # Both sum a bag in fp32 and in their own order; so do sums of gradients. Weights are about 1.
    torch.testing.assert_close(weights_of(ours), weights_of(twin), rtol=1e-5, atol=1e-6)
    state = twin.fused_optimizer().state_dict()["state"]
    for config, weight in zip(configs(), ours.weights, strict=True):
        expected = list(state.get(f"{config.name}.weight", {}).values())
        own = [value for name, value in fused.state[weight].items() if name != "step"]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_a_fused_collection_whose_values_are_not_in_the_order_of_its_keys_is_refused() -> None:
    theirs = FusedEmbeddingBagCollection(configs(), torch.optim.SGD, {"lr": 0.1})
    exact = torchrec.EmbeddingBagCollection(configs())
    exact.load_state_dict(theirs.state_dict())
    assert theirs(batch()).keys() == exact(batch()).keys()
    assert not torch.allclose(theirs(batch()).values(), exact(batch()).values())
    with pytest.raises(ValueError, match="another order"):
        from_torchrec(theirs)


def test_another_optimizer_starts_afresh() -> None:
    theirs, _ = fused_pair(torch.optim.SGD, {"lr": 0.1})
    train(theirs, range(2))
    ours = from_torchrec(theirs, LAMB())
    assert ours.fused_optimizer is not None
    assert ours.fused_optimizer.config == LAMB()
    assert int(ours.fused_optimizer.count) == 0


def test_a_fused_adam_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # FBGEMM has none on a CPU: the state is a stand-in with its names.
    theirs, _ = fused_pair(torch.optim.SGD, {"lr": 0.1})
    states = {
        f"{c.name}.weight": {f"{c.name}.weight.momentum_{n}": torch.rand(w.shape) for n in (1, 2)}
        for c, w in zip(configs(), theirs.parameters(), strict=True)
    }
    monkeypatch.setattr(theirs, "_optimizer_type", torch.optim.Adam)
    monkeypatch.setattr(theirs, "_optimizer_kwargs", {"lr": 0.1, "beta1": 0.5})
    monkeypatch.setattr(
        theirs, "fused_optimizer", lambda: SimpleNamespace(state_dict=lambda: {"state": states})
    )
    for engine in theirs._emb_modules:
        engine._emb_module.iter.fill_(7)
    ours = from_torchrec(theirs)
    fused = ours.fused_optimizer
    assert fused is not None
    assert fused.config == Adam(lr=0.1, betas=(0.5, 0.999))
    assert int(fused.count) == 7
    for config, weight in zip(configs(), ours.weights, strict=True):
        own = [fused.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        theirs_of_table = states[f"{config.name}.weight"].values()
        assert [a is b for a, b in zip(own, theirs_of_table, strict=True)] == [True, True]
    train(ours, range(1))
    assert int(fused.count) == 8


def test_the_learning_rate_of_the_moment_is_taken_over() -> None:
    theirs, _ = fused_pair(torch.optim.SGD, {"lr": 0.1})
    for group in theirs.fused_optimizer().param_groups:
        group["lr"] = 0.025
    theirs.fused_optimizer().step()
    ours = from_torchrec(theirs)
    assert ours.fused_optimizer is not None
    assert ours.fused_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, SGD(lr=0.01)),
        ({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5}, SGD(lr=0.5)),
        ({"optimizer": torchrec.optim.RowWiseAdagrad, "lr": 0.5}, RowWiseAdagrad(lr=0.5)),
        (
            {
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "weight_decay": 0.1,
                "weight_decay_mode": WeightDecayMode.L2,
                "gradient_clipping": True,
                "max_gradient": 2.0,
                "stochastic_rounding": False,
                "cache_load_factor": 0.3,
            },
            RowWiseAdagrad(lr=0.01, weight_decay=0.1, max_gradient=2.0, stochastic_rounding=False),
        ),
        (
            {"optimizer": EmbOptimType.ADAM, "betas": (0.5, 0.6), "weight_decay": 0.1},
            Adam(lr=0.01, betas=(0.5, 0.6), weight_decay=0.1, weight_decay_mode="decoupled"),
        ),
        (
            {"optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM, "eps": 1e-3},
            PartialRowWiseAdam(lr=0.01, eps=1e-3),
        ),
        ({"optimizer": Adam(lr=0.5), "output_dtype": None}, Adam(lr=0.5)),
    ],
)
def test_names_of_optimizers(params: dict[str, Any], expected: RowOptimizer) -> None:
    assert optimizer_of(params) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optimizer": EmbOptimType.LARS_SGD}, "got 'lars_sgd'"),
        ({"optimizer": EmbOptimType.EXACT_SGD, "weight_decay": 0.1}, "FBGEMM ignores weight_decay"),
        ({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay": 0.1}, "mode NONE"),
        ({"optimizer": EmbOptimType.ADAM, "max_norm": 1.0, "momentm": 0.1}, "knows no max_norm, momentm"),
        ({"optimizer": Adam(), "eps": 0.1}, "nothing beside"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    ],
)
def test_an_optimizer_that_would_differ_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_of(params)


def pickled(ebc: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(ebc, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def resumed(ebc: EmbeddingBagCollection) -> EmbeddingBagCollection:
    buffer = io.BytesIO()
    assert ebc.fused_optimizer is not None
    torch.save([ebc.state_dict(), ebc.fused_optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    data_type = ebc.embedding_bag_configs()[0].data_type
    fresh = EmbeddingBagCollection(
        configs(data_type=data_type), optimizer=dataclasses.replace(ebc.fused_optimizer.config)
    )
    assert fresh.fused_optimizer is not None
    fresh.load_state_dict(weights)
    fresh.fused_optimizer.load_state_dict(state)
    return fresh


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, resumed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.BF16])
@pytest.mark.parametrize("optimizer", [SGD(), RowWiseAdagrad(), Adam()], ids=lambda o: type(o).__name__)
def test_a_copy_trains_on_to_the_bit(copied: Any, data_type: DataType, optimizer: RowOptimizer) -> None:
    ours = EmbeddingBagCollection(configs(data_type=data_type), optimizer=optimizer)
    train(ours, range(2))
    other = copied(ours)
    for ebc in (ours, other):
        train(ebc, range(2, 4))
    for one, two in zip(ours.weights, other.weights, strict=True):
        assert one.data_ptr() != two.data_ptr()
        assert torch.equal(one, two)
        for name, state in ours.fused_optimizer.state[one].items():
            assert torch.equal(state, other.fused_optimizer.state[two][name])


class Model(torch.nn.Module):
    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc
        self.over = torch.nn.Linear(24, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.over(self.ebc(features).values())


class OfTensors(Model):
    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(KeyedJaggedTensor(list(KEYS), values, lengths=lengths))


@pytest.mark.parametrize("optimizer", [None, SGD()])
@pytest.mark.parametrize("leaves", [[], ["EmbeddingBagCollection"]])
def test_torch_fx(optimizer: RowOptimizer | None, leaves: list[str]) -> None:
    model = Model(EmbeddingBagCollection(configs(), optimizer=optimizer))
    traced = symbolic_trace(model, leaf_modules=leaves)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["ebc", "over"]
    assert torch.equal(traced(batch()), model(batch()))


@pytest.mark.parametrize("optimizer", [None, SGD()])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(optimizer: RowOptimizer | None, strict: bool) -> None:
    model = OfTensors(EmbeddingBagCollection(configs(), optimizer=optimizer))
    features = batch()
    inputs = features.values(), features.lengths()
    with torch.no_grad():
        program = torch.export.export(
            model, inputs, strict=strict, dynamic_shapes=({0: torch.export.Dim.AUTO}, None)
        )
        other = batch(seed=1)
        inputs = other.values(), other.lengths()
        assert torch.equal(program.module()(*inputs), model(*inputs))


def test_torch_compile() -> None:
    model = OfTensors(EmbeddingBagCollection(configs()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    features = batch()
    inputs = features.values(), features.lengths()
    output = compiled(*inputs)
    torch.testing.assert_close(output, model(*inputs))
    output.sum().backward()
    assert all(w.grad is not None for w in model.ebc.weights)


def test_recsys_ops_does_not_import_torchrec_itself() -> None:
    assert not hasattr(recsys_ops, "EmbeddingBagCollection")

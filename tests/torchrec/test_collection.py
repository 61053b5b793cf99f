"""Our collection in place of TorchRec's: same names, same numbers, same checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

# With this folder's parent on the path `torchrec` alone is found, if need be as this folder.
pytest.importorskip("torchrec.modules", reason="needs torchrec and fbgemm-gpu-cpu", exc_type=ImportError)

import torchrec
from same_batches import BATCH, KEYS, assert_same, batch, both, configs, train
from tensordict import TensorDict
from torchrec import EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from recsys_ops.optim import SGD, Adagrad, Adam, RowOptimizer, RowWiseAdagrad
from recsys_ops.torchrec import EmbeddingBagCollection


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
        ({"data_type": DataType.INT8}, "data_type FP32 or FP16 or BF16"),
        ({"pooling": PoolingType.NONE}, "pooling SUM or MEAN"),
        ({"use_virtual_table": True}, "use_virtual_table False"),
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

"""From TorchRec's collections to ours and back, with their optimizers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

# With this folder's parent on the path `torchrec` alone is found, if need be as this folder.
pytest.importorskip("torchrec.modules", reason="needs torchrec and fbgemm-gpu-cpu", exc_type=ImportError)

import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from same_batches import batch, configs, loss_of, train
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from recsys_ops.optim import LAMB, SGD, Adagrad, Adam, PartialRowWiseAdam, RowOptimizer, RowWiseAdagrad
from recsys_ops.torchrec import EmbeddingBagCollection, from_torchrec, optimizer_of, to_torchrec


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
    class Other(torchrec.EmbeddingBagCollection):
        pass

    for other in (torch.nn.EmbeddingBag(3, 4), Other(configs())):
        with pytest.raises(TypeError, match="unsharded"):
            from_torchrec(other)  # type: ignore[arg-type]
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
    # FBGEMM keeps the learning rate in fp32.
    assert fused.config == dataclasses.replace(optimizer, lr=fused.config.lr)
    assert fused.config.lr == pytest.approx(optimizer.lr)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_clipping": True}, "gradient_clipping=True"),
        ({"weight_decay": 0.1}, "which FBGEMM may ignore"),
    ],
)
def test_an_optimizer_that_does_more_is_not_taken_over(arguments: dict[str, Any], message: str) -> None:
    theirs, _ = fused_pair(torch.optim.SGD, {"lr": 0.1, **arguments})
    with pytest.raises(ValueError, match=message):
        from_torchrec(theirs)
    assert from_torchrec(theirs, SGD(lr=0.1)).fused_optimizer is not None


def test_a_collection_that_was_changed_is_refused() -> None:
    theirs = torchrec.EmbeddingBagCollection(configs())
    theirs.embedding_bags["words"].padding_idx = 0
    with pytest.raises(ValueError, match="'words' has padding_idx=0"):
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
    (lookups,) = theirs._emb_modules
    engine = lookups._emb_module
    states = [(torch.rand(w.shape), torch.rand(w.shape)) for w in theirs.parameters()]
    monkeypatch.setattr(engine, "optimizer", EmbOptimType.ADAM)
    monkeypatch.setattr(engine, "optimizer_args", engine.optimizer_args._replace(beta1=0.5))
    monkeypatch.setattr(engine, "split_optimizer_states", lambda: states)
    engine.iter.fill_(7)
    ours = from_torchrec(theirs)
    fused = ours.fused_optimizer
    assert fused is not None
    assert fused.config == dataclasses.replace(Adam(betas=(0.5, 0.999)), lr=fused.config.lr)
    assert fused.config.lr == pytest.approx(0.1)
    assert int(fused.count) == 7
    for weight, of_table in zip(ours.weights, states, strict=True):
        own = [fused.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        assert [a.data_ptr() for a in own] == [b.data_ptr() for b in of_table]
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
                "gradient_clipping": False,
                "stochastic_rounding": False,
                "cache_load_factor": 0.3,
            },
            RowWiseAdagrad(lr=0.01, weight_decay=0.1, stochastic_rounding=False),
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
        ({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay": 0.1}, "weight_decay_mode 0"),
        # FBGEMM clamps the gradients of pooled rows, before it sums them.
        ({"gradient_clipping": True, "max_gradient": 1.0}, "knows no gradient_clipping"),
        ({"optimizer": EmbOptimType.ADAM, "max_norm": 1.0, "momentm": 0.1}, "knows no max_norm, momentm"),
        ({"optimizer": Adam(), "eps": 0.1}, "nothing beside"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    ],
)
def test_an_optimizer_that_would_differ_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_of(params)

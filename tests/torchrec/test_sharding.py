"""Two processes train sharded collections to the weights that one process gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchrec.distributed", reason="needs torchrec and fbgemm-gpu-cpu", exc_type=ImportError)

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import BoundsCheckMode
from torchrec.modules.embedding_configs import DataType
from two_ranks import Case, train_in_one, work

from recsys_ops.optim import SGD, Adagrad, Adam, RowWiseAdagrad
from recsys_ops.torchrec import EmbeddingBagCollectionSharder

SHARDINGS = {
    "table_wise": ("table_wise",) * 3,
    "row_wise": ("row_wise",) * 3,
    "column_wise": ("column_wise",) * 3,
    "mixed": ("row_wise", "column_wise", "table_wise"),
}
OPTIMIZERS = {"sgd": SGD(lr=0.02), "rowwise_adagrad": RowWiseAdagrad(lr=0.1), "adam": Adam(lr=0.1)}

CASES = {
    f"{sharding}_{optimizer}": Case(SHARDINGS[sharding], OPTIMIZERS[optimizer])
    for sharding in SHARDINGS
    for optimizer in OPTIMIZERS
} | {
    "planned_adagrad": Case(SHARDINGS["mixed"], Adagrad(lr=0.1), planned=True),
    "ours_adam": Case(SHARDINGS["mixed"], Adam(lr=0.1), ours=True),
    "weighted_sgd": Case(SHARDINGS["mixed"], SGD(lr=0.02), is_weighted=True),
    # Random bits of a rounding are of the shard's rows and columns, so not those of the whole table.
    "half_adam": Case(SHARDINGS["mixed"], Adam(lr=0.1, stochastic_rounding=False), data_type=DataType.FP16),
    "bfloat16_rowwise_adagrad": Case(
        SHARDINGS["table_wise"],
        RowWiseAdagrad(lr=0.1, stochastic_rounding=False),
        data_type=DataType.BF16,
        ours=True,  # TorchRec's own collection has FP16 tables
    ),
    "fbgemm_adam": Case(
        SHARDINGS["mixed"],
        {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.1, "beta1": 0.8, "weight_decay": 0.01},
    ),
    # Not row-wise, whose gradients gloo gathers of batches of one size alone.
    "uneven_adam": Case(("column_wise", "table_wise", "table_wise"), Adam(lr=0.1), batches=(6, 3)),
    "meta_adam": Case(SHARDINGS["mixed"], Adam(lr=0.1), meta=True),
    "deduplicated_table_wise": Case(SHARDINGS["table_wise"], SGD(lr=0.02), deduplicated=True),
    "deduplicated_column_wise": Case(SHARDINGS["column_wise"], SGD(lr=0.02), deduplicated=True),
    "deduplicated_row_wise": Case(SHARDINGS["row_wise"], SGD(lr=0.02), deduplicated=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all cases, trained by two processes that are started once."""
    folder: Path = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(work, (CASES, folder), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name: str, results: dict[str, Any]) -> None:
    case = CASES[name]
    ours, expected = results[name]["weights"], train_in_one(case)
    for table, kind in zip(expected, case.sharding, strict=True):
        if kind == "row_wise" or case.deduplicated:
            # A bag is the sum of two ranks' sums, or a gradient first that of a bag's samples: another
            # order, so an ulp or two of values about 4 in each step. Adam and Adagrad divide by the root
            # of squared gradients, which keeps it relative.
            tolerance = 1e-5 if case.data_type == DataType.FP32 else 1e-2
            torch.testing.assert_close(ours[table], expected[table], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours[table], expected[table])


@pytest.mark.parametrize("name", CASES)
def test_a_restored_checkpoint_trains_on_to_the_bit(name: str, results: dict[str, Any]) -> None:
    assert results[name]["kinds"] == {"ShardedTensor"}
    for table, weight in results[name]["weights"].items():
        assert torch.equal(results[name]["restored"][table], weight)


def test_distributed_checkpoints(results: dict[str, Any]) -> None:
    assert results["reload"] == {
        "same sharding, trained on": True,
        "other sharding": True,
        "unsharded": True,
    }


def test_states_have_torchrecs_names_and_shapes(results: dict[str, Any]) -> None:
    # On rank 0. Row-wise states of column-wise shards follow one another, as with TorchRec's kernel.
    assert results["row_wise_rowwise_adagrad"]["state"] == {
        f"ebc.embedding_bags.{table}.weight {table}.{name}": shape
        for table, rows in (("products", 13), ("brands", 11), ("words", 12))
        for name, shape in (("momentum1", (rows,)), ("step", (2,)))
    }
    assert results["column_wise_rowwise_adagrad"]["state"][
        "ebc.embedding_bags.words.weight words.momentum1"
    ] == (48,)
    assert results["table_wise_adam"]["state"] == {
        f"ebc.embedding_bags.{table}.weight {table}.{name}": shape
        for table, rows in (("products", 13), ("words", 12))
        for name, shape in (("momentum1", (rows, 16)), ("exp_avg_sq", (rows, 16)), ("step", (1,)))
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optimizer": EmbOptimType.LARS_SGD}, "got 'lars_sgd'"),
        ({"optimizer": Adam(), "learning_rate": 0.1}, "nothing beside"),
        ({"bounds_check_mode": BoundsCheckMode.IGNORE}, "'bounds': 'drop'"),
    ],
)
def test_what_cannot_be_is_said_when_the_sharder_is_made(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingBagCollectionSharder(params)

"""The formulas of cost.py against counts by hand, and against those of one embedding bag."""

from __future__ import annotations

import pytest
import torch

from recsys_ops.embedding_bag import cost as of_one_table
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.embedding_bag_collection.cost import (
    OPERATIONS,
    Bags,
    Pooled,
    backward_cost,
    count,
    forward_cost,
    update_cost,
)
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS

# Bags [3, 3, 7] and [1] of an fp32 table with rows of 2 elements; [0] and [5] of a bf16 one with rows of 4.
TABLES = [Pooled(2, 4, 3, 2, num_embeddings=10), Pooled(2, 2, 2, 4, torch.bfloat16, num_embeddings=6)]
BAGS = Bags(num_ids=6, num_bags=4)
READ = (6 + 5) * 8  # ids and offsets


def test_forward_counts_every_byte_and_operation_of_a_small_call() -> None:
    assert forward_cost(TABLES, BAGS) == Cost(
        flops=4 * 2 + 2 * 4,
        row_bytes=8,
        unique_row_bytes=3 * 8 + 2 * 8,
        lookup_row_bytes=4 * 8 + 2 * 8,
        streamed_bytes=READ + 2 * 2 * 4 + 2 * 4 * 4,
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("index_bytes", [4, 8])
def test_one_table_costs_what_an_embedding_bag_does(mode: str, weighted: bool, index_bytes: int) -> None:
    table, bags = Pooled(2, 4, 3, 2, mode=mode, num_embeddings=10), Bags(4, 2, index_bytes, weighted=weighted)
    options = {"mode": mode, "weighted": weighted, "index_bytes": index_bytes}
    assert forward_cost([table], bags) == of_one_table.forward_cost(2, 4, 3, 2, **options)
    for sparse in (False, True):
        found = backward_cost([table], bags, sparse=sparse)
        rows = None if sparse else 10
        wanted = of_one_table.backward_cost(2, 4, 3, 2, num_embeddings=rows, **options)
        origins = 4 * 2 * 2 if mode == "max" else 0
        assert found.streamed_bytes == wanted.streamed_bytes + origins
        assert (found.flops, found.bytes - origins) == (wanted.flops, wanted.bytes)


def test_a_feature_of_two_tables_is_read_once() -> None:
    once, twice = (forward_cost(TABLES[:1] * n, Bags(4, 2)) for n in (1, 2))
    assert twice.unique_row_bytes == 2 * once.unique_row_bytes
    assert twice.streamed_bytes - once.streamed_bytes == 2 * 2 * 4


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [
        ("sgd", (0, 0)),
        ("adagrad", (8, 16)),
        ("rowwise_adagrad", (4, 4)),
        ("adam", (16, 32)),
        ("partial_rowwise_adam", (12, 20)),
        ("lamb", (16, 32)),
    ],
)
def test_update_reads_and_writes_touched_rows_and_their_states(
    optimizer: str, state_bytes: tuple[int, int]
) -> None:
    cost = update_cost(TABLES, BAGS, optimizer)
    rows = 2 * 3 * (8 + state_bytes[0]) + 2 * 2 * (8 + state_bytes[1])
    gradient = 2 * 8 + 2 * 16
    assert cost.unique_row_bytes == gradient + rows
    assert cost.lookup_row_bytes == 4 * 8 + 2 * 16 + rows
    assert (cost.streamed_bytes, cost.zeroed_bytes) == (READ, 0)
    assert cost.flops == (4 * 2 + 2 * 4) + (3 * 2 + 2 * 4) * OPERATIONS[optimizer]


def test_every_optimizer_has_operations() -> None:
    assert tuple(OPERATIONS) == OPTIMIZERS


def test_an_update_moves_less_than_gradients_and_an_optimizer_apart() -> None:
    apart = backward_cost(TABLES, BAGS, sparse=True).bytes + 3 * (3 * 8 + 2 * 8)
    assert update_cost(TABLES, BAGS, "sgd").bytes < apart
    assert update_cost(TABLES, BAGS, "adam", state_dtype=torch.float16).bytes < (
        update_cost(TABLES, BAGS, "adam").bytes
    )


def test_counts_of_a_call() -> None:
    weights = [torch.zeros(10, 2), torch.zeros(6, 4, dtype=torch.bfloat16)]
    values, offsets = torch.tensor([3, 3, 7, 1, 0, 5, 2, 6]), torch.tensor([0, 3, 4, 5, 8])
    layout = Layout(((0, 1), (1,)), ("sum", "mean"), (2, 4))
    tables, bags = count(weights, values, offsets, layout.side_by_side(2).lookups)
    assert tables == [
        Pooled(4, 8, 7, 2, torch.float32, "sum", 10),
        Pooled(2, 3, 3, 4, torch.bfloat16, "mean", 6),
    ]
    assert bags == Bags(num_ids=8, num_bags=4)

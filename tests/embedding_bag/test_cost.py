"""The formulas of cost.py against counts by hand."""

from __future__ import annotations

import pytest
import torch

from recsys_ops.embedding_bag.cost import Cost, backward_cost, forward_cost


def test_forward_counts_every_byte_and_operation_of_a_small_call() -> None:
    # Bags [3, 3, 7] and [1] of an fp32 table with rows of 2 elements, 8 bytes.
    cost = forward_cost(num_bags=2, num_ids=4, num_unique=3, dim=2)
    ids, offsets, output = 4 * 8, 3 * 8, 2 * 8
    assert cost == Cost(
        flops=8,
        row_bytes=8,
        unique_row_bytes=3 * 8,
        lookup_row_bytes=4 * 8,
        streamed_bytes=ids + offsets + output,
    )
    assert cost.bytes == 3 * 8 + 72
    assert cost.effective_bytes == 4 * 8 + 72


@pytest.mark.parametrize(
    ("options", "flops", "streamed"),
    [
        ({"mode": "mean"}, 8 + 4, 72),
        ({"mode": "max"}, 8, 72),
        ({"weighted": True}, 16, 72 + 4 * 4),
        ({"mode": "mean", "weighted": True}, 16 + 4, 72 + 4 * 4),
        ({"index_bytes": 4}, 8, 16 + 12 + 16),
    ],
)
def test_forward_options(options: dict[str, object], flops: int, streamed: int) -> None:
    cost = forward_cost(2, 4, 3, 2, **options)  # type: ignore[arg-type]
    assert (cost.flops, cost.streamed_bytes) == (flops, streamed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_as_wide_as_their_dtype(dtype: torch.dtype) -> None:
    cost = forward_cost(2, 4, 3, 16, dtype)
    assert cost.row_bytes == 16 * torch.empty(0, dtype=dtype).element_size()
    assert cost.unique_row_bytes == 3 * cost.row_bytes


def test_sparse_gradient_writes_each_touched_row_and_its_number() -> None:
    cost = backward_cost(num_bags=2, num_ids=4, num_unique=3, dim=2)
    ids, offsets, values, numbers = 4 * 8, 3 * 8, 3 * 8, 3 * 8
    assert cost == Cost(
        flops=8,
        row_bytes=8,
        unique_row_bytes=2 * 8,
        lookup_row_bytes=4 * 8,
        streamed_bytes=ids + offsets + values + numbers,
    )


def test_dense_gradient_writes_the_whole_table_and_no_row_numbers() -> None:
    cost = backward_cost(num_bags=2, num_ids=4, num_unique=3, dim=2, num_embeddings=100)
    assert (cost.zeroed_bytes, cost.streamed_bytes) == (100 * 8, 4 * 8 + 3 * 8)
    assert cost.bytes == 2 * 8 + 56 + 800


def test_gradient_of_the_maximum_gathers_each_output_row_once() -> None:
    cost = backward_cost(num_bags=2, num_ids=4, num_unique=3, dim=2, num_embeddings=100, mode="max")
    assert (cost.flops, cost.lookup_row_bytes) == (4, 2 * 8)


def test_gradient_of_the_weights_reads_the_rows_again() -> None:
    without = backward_cost(2, 4, 3, 2, weighted=True)
    added = backward_cost(2, 4, 3, 2, weighted=True, weights_gradient=True)
    assert added.flops - without.flops == 2 * 4 * 2
    assert added.unique_row_bytes - without.unique_row_bytes == 3 * 8
    assert added.lookup_row_bytes - without.lookup_row_bytes == 4 * 8
    assert added.streamed_bytes - without.streamed_bytes == 4 * 4


def test_costs_of_a_step_add_up() -> None:
    forward, backward = forward_cost(2, 4, 3, 2), backward_cost(2, 4, 3, 2, num_embeddings=10)
    step = forward + backward
    assert step.bytes == forward.bytes + backward.bytes
    assert (step.flops, step.row_bytes) == (16, 8)


def test_rows_of_two_sizes_add_up_to_their_mean() -> None:
    small, large = forward_cost(2, 4, 3, 2), forward_cost(2, 12, 3, 6)
    both = small + large
    assert both.lookup_row_bytes == 4 * 8 + 12 * 24
    assert both.row_bytes == (4 * 8 + 12 * 24) / 16
    nothing = forward_cost(0, 0, 0, 2) + forward_cost(0, 0, 0, 6)
    assert (nothing.lookup_row_bytes, nothing.row_bytes) == (0, 24)

"""What HSTU attention needs at least is counted right."""

from __future__ import annotations

import itertools

import pytest
import torch

from recsys_ops import HSTUMask
from recsys_ops.hstu_attention.cost import backward_cost, count_pairs, forward_cost
from recsys_ops.hstu_attention.reference import Mask, Sequence

MASKS = [
    {"causal": causal, "window": window, "num_contextual": contextual, "num_targets": targets, **more}
    for causal, window, contextual, targets in itertools.product((True, False), (None, 1, 5), (0, 3), (0, 4))
    for more in ({}, {"target_group_size": 3}, {"full_window_tail": 2})
    if window or "full_window_tail" not in more
]


@pytest.mark.parametrize("fields", MASKS, ids=str)
def test_pairs_are_those_of_the_mask(fields: dict[str, int]) -> None:
    lengths = torch.tensor([4, 17, 9])
    mask = HSTUMask(**fields)
    seen = 0
    for n in lengths.tolist():
        sequence = Sequence(
            slice(0, n),
            slice(0, n),
            min(fields["num_contextual"], n - fields["num_targets"]),
            fields["num_targets"],
        )
        of_reference = Mask(
            mask.causal, mask.window or 0, mask.target_group_size, mask.full_window_tail, None
        )
        seen += int(of_reference.seen(sequence, torch.device("cpu")).sum())
    assert count_pairs(lengths, mask) == seen


def test_pairs_of_nothing_and_of_intervals() -> None:
    assert count_pairs(torch.tensor([], dtype=torch.int64)) == 0
    assert count_pairs(torch.tensor([0, 0])) == 0
    with pytest.raises(ValueError, match="without intervals"):
        count_pairs(torch.tensor([1]), HSTUMask(intervals=torch.zeros(1, 1, 2).long()))


def test_operations_and_bytes() -> None:
    """Counted by hand: 6 pairs of 3 tokens, 2 heads of 4 and 5 columns, fp16."""
    forward = forward_cost(6, 3, 3, 2, 4, 5, torch.float16)
    backward = backward_cost(6, 3, 3, 2, 4, 5, torch.float16)
    assert forward.flops == 2 * 6 * 2 * 9
    assert forward.bytes == (3 * 9 + 3 * 9) * 2 * 2
    assert backward.flops == 2 * 6 * 2 * 22
    assert backward.bytes == (3 * 13 + 3 * 18) * 2 * 2

"""The held-out split, and what the models see of a purchase: nothing of it and nothing later."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recsys_ops.demo.data import Interactions
from recsys_ops.demo.features import hash_pair, history_batch, leave_last_out, offers_batch
from recsys_ops.demo.metrics import popularity, ranking, ranks

BUCKETS = 1 << 10


@pytest.fixture
def data() -> Interactions:
    """Three customers: of five purchases in two baskets, of two, and of three."""
    return Interactions(
        "test",
        np.array(["a", "b", "c"]),
        np.array(list("uvwxyz")),
        np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2]),
        np.array([0, 1, 2, 3, 0, 4, 5, 1, 1, 2]),
        np.array([1, 3, 1, 7, 1, 1, 1, 1, 1, 1], np.float32),
        np.array([10, 10, 10, 20, 20, 5, 6, 1, 2, 3], np.float64),
    )


def test_the_last_purchase_is_held_out(data: Interactions) -> None:
    split = leave_last_out(data)
    assert split.held_out.tolist() == [4, 9]  # not of the customer with two purchases
    assert split.train.tolist() == [1, 2, 3, 6, 8]  # first purchases have no history


def test_history_holds_the_purchases_before(data: Interactions) -> None:
    batch = history_batch(data, np.array([4, 6]), BUCKETS)
    assert batch.offsets.tolist() == [0, 4]
    assert batch.items.tolist() == [0, 1, 2, 3, 4]
    raw = np.log1p([1, 3, 1, 7]) * [0.8**3, 0.8**2, 0.8, 1]
    np.testing.assert_allclose(batch.weights.numpy(), [*(raw / raw.sum()), 1], rtol=1e-6)
    assert batch.recent[:, :5].tolist() == [[4, 3, 2, 1, 0], [5, 0, 0, 0, 0]]
    assert batch.recent[:, 5:].eq(0).all()
    assert (
        batch.pairs[0, :3].tolist() == hash_pair(np.array([3, 2, 1]), np.array([4, 3, 2]), BUCKETS).tolist()
    )
    assert batch.pairs[0, 3:].eq(0).all()
    assert batch.pairs[1].eq(0).all()


def test_basket_holds_what_the_invoice_has_so_far(data: Interactions) -> None:
    batch = offers_batch(data, np.array([4, 3, 2]), np.array([5, 5, 0]), BUCKETS)
    assert batch.offsets.tolist() == [0, 1, 1]  # an empty basket between
    assert batch.basket.tolist() == [3, 0, 1]
    raw = np.log1p([1, 3])
    np.testing.assert_allclose(batch.weights.numpy(), [1, *(raw / raw.sum())], rtol=1e-6)
    assert batch.item.tolist() == [[5], [5], [0]]
    assert batch.crosses[2, :2].tolist() == hash_pair(np.array([2, 1]), np.array([0, 0]), BUCKETS).tolist()
    assert batch.crosses[2, 2:].eq(0).all()
    assert batch.dense.isfinite().all()


def test_no_feature_depends_on_the_purchase_or_on_what_follows(data: Interactions) -> None:
    positions = np.array([2, 8])
    changed_item, changed_quantity = data.item.copy(), data.quantity.copy()
    for position, end in zip(positions, (5, 10), strict=True):
        changed_item[position:end] = 5
        changed_quantity[position:end] = 100
    changed = dataclasses.replace(data, item=changed_item, quantity=changed_quantity)
    offered = np.array([3, 4])
    for mine, theirs in zip(
        (*history_batch(data, positions, BUCKETS), *offers_batch(data, positions, offered, BUCKETS)),
        (*history_batch(changed, positions, BUCKETS), *offers_batch(changed, positions, offered, BUCKETS)),
        strict=True,
    ):
        assert mine.equal(theirs)


def test_hashes_avoid_the_padding_row_and_spread() -> None:
    first, second = np.meshgrid(np.arange(-50, 50), np.arange(100))
    hashes = hash_pair(first, second, BUCKETS)
    assert hashes.min() >= 1 and hashes.max() < BUCKETS
    counts = np.bincount(hashes.ravel(), minlength=BUCKETS)[1:]
    assert 0.5 < counts.var() / counts.mean() < 2  # 1 for independent uniform draws
    assert (hashes != hash_pair(second, first, BUCKETS)).mean() > 0.9


def test_ranks_by_hand() -> None:
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [np.nan, 1.0, 2.0, 3.0], [np.nan] * 4])
    assert ranks(scores, np.array([2, 1, 3, 0])).tolist() == [3, 4, 2, 4]


def test_metrics_by_hand() -> None:
    found = ranking(np.array([1, 2, 10, 11]))
    assert found.hit_rate == 0.75
    assert found.ndcg == pytest.approx((1 + 0.6309297536 + 0.2890648263) / 4)
    assert found.customers == 4


def test_popularity_by_hand(data: Interactions) -> None:
    # Without the held-out purchases item 1 was bought three times, the others once.
    assert popularity(data, leave_last_out(data), np.array([4, 9])) == ranking(np.array([6, 6]))
    data = dataclasses.replace(data, item=np.where(np.arange(10) == 9, 1, data.item))
    assert popularity(data, leave_last_out(data), np.array([9])) == ranking(np.array([1]))

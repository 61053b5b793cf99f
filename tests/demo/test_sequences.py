"""Sequence recommenders: what they see and are trained on, that padded and jagged agree, and the report."""

from __future__ import annotations

import copy
import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from recsys_ops.demo import report, sequence_report
from recsys_ops.demo.data import Interactions, load_online_retail
from recsys_ops.demo.features import Split, leave_last_out
from recsys_ops.demo.metrics import popularity
from recsys_ops.demo.sequence_models import PaddedHSTU, SequenceRecommender, Transformer, hstu
from recsys_ops.demo.sequence_trial import SequenceTrial, run_sequence_trial
from recsys_ops.demo.sequences import (
    Sequences,
    batches_by_tokens,
    draw_negatives,
    history_lengths,
    last_trained,
    next_item_loss,
    sequences_before,
)
from recsys_ops.demo.tasks import Settings

DIM, PLACES = 8, 16
TINY = Settings(
    sequence_epochs=2,
    sequence_purchases=3000,
    sequence_tokens=512,
    sequence_dim=DIM,
    sequence_negatives=64,
    sequence_short=50,
    history_customers=60,
)


@pytest.fixture(scope="module")
def retail() -> Interactions:
    """The purchases of 100 customers."""
    data = load_online_retail()
    purchases = slice(int(data.starts[100]), int(data.starts[200]))
    user, item = data.user[purchases] - 100, data.item[purchases]
    return Interactions(
        "test",
        data.user_names[100:200],
        data.item_names,
        user,
        item,
        data.quantity[purchases],
        data.time[purchases],
    )


@pytest.fixture(scope="module")
def split(retail: Interactions) -> Split:
    return leave_last_out(retail)


@pytest.fixture(scope="module")
def trial(retail: Interactions, split: Split) -> SequenceTrial:
    return run_sequence_trial(retail, split, TINY, lambda *_: None)


def recommenders(relative_bias: bool, num_items: int) -> tuple[SequenceRecommender, SequenceRecommender]:
    """HSTU jagged and padded, of the same weights, which are large enough that attention matters."""
    torch.manual_seed(0)
    jagged = SequenceRecommender(hstu(num_items, DIM, 2, PLACES, 0.1, 0.0, relative_bias))
    with torch.no_grad():
        for layer in jagged.encoder.layers:
            for weight in layer.parameters():
                weight.normal_(std=0.5)
    padded = copy.deepcopy(jagged)
    padded.encoder = PaddedHSTU(padded.encoder)
    return jagged, padded


def of_customers(retail: Interactions, split: Split, customers: int) -> Sequences:
    return sequences_before(retail, last_trained(retail, split)[:customers])


def test_every_purchase_to_train_on_is_predicted_once_from_the_one_before(
    retail: Interactions, split: Split
) -> None:
    positions = last_trained(retail, split)
    sequences = sequences_before(retail, positions)
    assert sequences.targets.tolist() == retail.item[split.train].tolist()
    assert sequences.items.tolist() == retail.item[split.train - 1].tolist()
    assert sequences.timestamps.tolist() == retail.time[split.train - 1].tolist()
    assert sequences.request_timestamps.tolist() == retail.time[positions].tolist()
    assert sequences.offsets.diff().tolist() == history_lengths(retail, positions).tolist()
    assert not np.isin(positions, split.held_out).any()


def test_held_out_purchases_follow_whole_histories(retail: Interactions, split: Split) -> None:
    some = split.held_out[:7]
    sequences = sequences_before(retail, some)
    assert sequences.offsets.diff().tolist() == history_lengths(retail, some).tolist()
    assert sequences.targets[sequences.offsets[1:] - 1].tolist() == retail.item[some].tolist()
    assert sequences.request_timestamps.tolist() == retail.time[some].tolist()


def test_training_knows_nothing_of_what_is_held_out(retail: Interactions, split: Split) -> None:
    item, time = retail.item.copy(), retail.time.copy()
    item[split.held_out] = 0
    time[split.held_out] += 1e6
    changed = dataclasses.replace(retail, item=item, time=time)
    for mine, theirs in zip(
        of_customers(retail, split, 100), of_customers(changed, leave_last_out(changed), 100), strict=True
    ):
        assert mine.equal(theirs)


@pytest.mark.parametrize("relative_bias", [True, False])
def test_a_score_depends_on_what_came_before_alone(
    retail: Interactions, split: Split, relative_bias: bool
) -> None:
    held_out = split.held_out[:9]
    sequences = sequences_before(retail, held_out)
    models = [*recommenders(relative_bias, len(retail.item_names))]
    models.append(SequenceRecommender(Transformer(len(retail.item_names), DIM, 2, PLACES, 0.0)))
    for model in models:
        full = model(sequences)
        first, end = sequences.offsets[3:5].tolist()
        alone = sequences_before(retail, held_out[3:4])
        torch.testing.assert_close(model(alone), full[first:end], rtol=1e-4, atol=1e-5)
        middle = (first + end) // 2
        items, targets = sequences.items.clone(), sequences.targets.clone()
        items[middle:end] = 0
        targets[:] = 0
        changed = model(sequences._replace(items=items, targets=targets))
        torch.testing.assert_close(changed[:middle], full[:middle], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed[middle:end], full[middle:end], atol=1e-3)


@pytest.mark.parametrize("relative_bias", [True, False])
def test_padded_and_jagged_give_the_same_loss_and_gradients(
    retail: Interactions, split: Split, relative_bias: bool
) -> None:
    sequences = of_customers(retail, split, 12)
    assert sequences.offsets.diff().max() > PLACES  # some distances share a weight
    jagged, padded = recommenders(relative_bias, len(retail.item_names))
    losses = [model.double().loss(sequences, None) for model in (jagged, padded)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    gradients = [
        dict(zip(dict(m.named_parameters()), torch.autograd.grad(loss, m.parameters()), strict=True))
        for m, loss in zip((jagged, padded), losses, strict=True)
    ]
    assert any("time_weight" in name for name in gradients[0]) == relative_bias
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-12, msg=name)


def test_only_the_bias_knows_times(retail: Interactions, split: Split) -> None:
    sequences = of_customers(retail, split, 5)
    later = sequences._replace(request_timestamps=sequences.request_timestamps + 10**6)
    last = sequences.offsets[1:] - 1
    for relative_bias in (True, False):
        for model in recommenders(relative_bias, len(retail.item_names)):
            same = torch.isclose(model(sequences), model(later), atol=1e-6).all(1)
            assert same[last].all() != relative_bias
            same[last] = True
            assert same.all()


def test_batches_hold_every_history_once() -> None:
    lengths, order = np.array([3, 9, 1, 4, 2, 30, 1]), np.array([6, 5, 4, 3, 2, 1, 0])
    batches = [batch.tolist() for batch in batches_by_tokens(lengths, 10, order)]
    assert batches == [[6], [5], [4, 3, 2], [1], [0]]


def test_sampled_softmax_learns_what_softmax_over_all_items_does() -> None:
    random = np.random.default_rng(0)
    counts, bought = random.integers(0, 50, 100), random.dirichlet(np.full(100, 0.3))
    targets = torch.from_numpy(random.choice(100, 500, p=bought))
    shares = torch.bincount(targets, minlength=100) / 500
    assert draw_negatives(counts, 100, random) is None

    def distance(negatives: int, corrected: bool) -> float:
        """From the shares of the targets to what a bias alone learns, at most 1."""
        bias = torch.zeros(100, requires_grad=True)
        optimizer = torch.optim.Adam([bias], lr=0.1)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
            drawn = draw_negatives(counts, negatives, random)
            if drawn is not None and not corrected:
                drawn = drawn._replace(log_expected=torch.zeros(100))
            optimizer.zero_grad()
            next_item_loss(torch.zeros(500, 1), targets, torch.zeros(100, 1), bias, drawn).backward()
            optimizer.step()
        return float((bias.detach().softmax(0) - shares).abs().sum() / 2)

    assert distance(100, corrected=True) < 0.02
    assert distance(64, corrected=True) < 0.15  # of so few negatives in so few steps
    assert distance(64, corrected=False) > 0.5


def test_models_are_of_one_size() -> None:
    sizes = [
        sum(p.numel() for p in encoder.parameters())
        for encoder in (hstu(3665, 64, 2, 1024, 0.01, 0.1, False), Transformer(3665, 64, 2, 1024, 0.1))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_all_learn_in_the_same_steps(trial: SequenceTrial, retail: Interactions, split: Split) -> None:
    assert [learner.name for learner in trial.learners] == [
        "HSTU with bias",
        "HSTU without bias",
        "transformer",
    ]
    for learner in trial.learners:
        assert len(learner.losses) == len(trial.learners[0].losses)
        assert np.mean(learner.losses[-3:]) < np.mean(learner.losses[:3])
        assert len(learner.epoch_seconds) == TINY.sequence_epochs
        assert 0 < learner.longest_seconds < sum(learner.epoch_seconds)
        assert learner.ranking.customers == min(60, len(split.held_out))
    assert trial.purchases <= TINY.sequence_purchases
    assert trial.customers + trial.customers_left_out == len(last_trained(retail, split))
    assert trial.agrees and len(trial.padded) == 2
    assert trial.short <= TINY.sequence_short < trial.longest
    assert trial.popularity.customers == trial.learners[0].ranking.customers
    assert popularity(retail, split, split.held_out).customers == len(split.held_out)


def test_second_run_learns_the_same(trial: SequenceTrial, retail: Interactions, split: Split) -> None:
    again = run_sequence_trial(retail, split, TINY, lambda *_: None)
    for one, other in zip(trial.learners, again.learners, strict=True):
        assert one.losses == other.losses
        assert one.ranking == other.ranking


def test_report_says_what_came_out(trial: SequenceTrial, retail: Interactions, split: Split) -> None:
    result = report.Result(retail, split, [], {}, {}, sequences=trial)
    console = Console(file=io.StringIO(), width=80)
    report.print_summary(result, console)
    printed, page = console.file.getvalue(), report.to_html(result)
    for learner in trial.learners:
        row = rf"{learner.name} +{learner.parameters:,} +{learner.ranking.hit_rate:.4f} "
        assert re.search(row, printed)
    assert f"{trial.padded[0].ratio.value:.2f}x" in printed and f"{trial.padded[0].ratio.value:.2f}x" in page
    assert "were not timed padded" in page
    assert page.count('<img src="data:image/svg+xml;base64,') == 3
    assert report.to_json(result)["sequences"]["learners"][0]["losses"] == trial.learners[0].losses


def test_a_verdict_needs_more_than_chance(trial: SequenceTrial) -> None:
    def with_rates(*rates: float) -> str:
        learners = [
            dataclasses.replace(
                learner, ranking=dataclasses.replace(learner.ranking, hit_rate=rate, customers=4000)
            )
            for learner, rate in zip(trial.learners, rates, strict=True)
        ]
        return sequence_report.notes(dataclasses.replace(trial, learners=learners))[0]

    assert "none of the three ranks better" in with_rates(0.3, 0.31, 0.3)
    verdict = with_rates(0.2, 0.21, 0.3)
    assert "HSTU with bias ranks like HSTU without bias" in verdict
    assert "HSTU with bias ranks worse than transformer" in verdict
    assert "HSTU without bias ranks better than transformer" in with_rates(0.1, 0.4, 0.3)


def test_results_that_differ_are_a_finding(trial: SequenceTrial) -> None:
    assert not sequence_report.findings(trial)
    epoch = trial.padded[0]
    assert 0 < epoch.outputs_apart < 1e-5
    for wrong in (
        dataclasses.replace(epoch, jagged_loss=epoch.padded_loss * 1.001),
        dataclasses.replace(epoch, outputs_apart=1e-3),
    ):
        changed = dataclasses.replace(trial, padded=[wrong, trial.padded[1]])
        assert not changed.agrees
        (finding,) = sequence_report.findings(changed)
        assert finding.startswith("HSTU with bias: padded and jagged differ beyond round-off")


def test_long_histories_alone_are_not_timed_padded(retail: Interactions, split: Split) -> None:
    settings = dataclasses.replace(TINY, sequence_epochs=1, sequence_short=0)
    trial = run_sequence_trial(retail, split, settings, lambda *_: None)
    assert trial.agrees and not trial.padded
    assert "was not timed padded" in sequence_report.details(trial)

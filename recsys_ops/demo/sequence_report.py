"""What the report and the console say about the sequence recommenders."""

from __future__ import annotations

import math

import numpy as np

from recsys_ops import html
from recsys_ops.demo.metrics import K, Ranking
from recsys_ops.demo.plots import draw_padded, draw_rankings, draw_smoothed_losses
from recsys_ops.demo.sequence_trial import (
    BIASED,
    DROPOUT,
    LAYERS,
    LEARNING_RATE,
    LOSS_TOLERANCE,
    OUTPUT_TOLERANCE,
    SOFTMAX,
    UNBIASED,
    SequenceTrial,
)

HEADING = "Whole histories: HSTU and a softmax transformer"

_ALIKE = "ranks like"

Table = tuple[list[str], list[list[str]]]


def learnt(trial: SequenceTrial) -> Table:
    """For each model: its size, how it ranks, and how long an epoch takes."""
    headers = ["model", "parameters", f"HR@{K}", f"NDCG@{K}", "epoch (s)", "longest (s)"]
    rows = [["popularity", "", *_metrics(trial.popularity), "", ""]]
    for learner in trial.learners:
        rows.append(
            [
                learner.name,
                f"{learner.parameters:,}",
                *_metrics(learner.ranking),
                f"{np.median(learner.epoch_seconds):.1f}",
                f"{learner.longest_seconds:.2f}",
            ]
        )
    return headers, rows


def padded(trial: SequenceTrial) -> Table:
    """For HSTU with and without bias: an epoch of short histories, padded and jagged."""
    headers = ["model", "padded eager (s)", "ours (s)", "faster", "outputs apart"]
    rows = [
        [
            epoch.name,
            f"{epoch.padded_seconds:.1f}",
            f"{epoch.jagged_seconds:.1f}",
            f"{epoch.ratio.value:.2f}x ({epoch.ratio.low:.2f}-{epoch.ratio.high:.2f})",
            f"{epoch.outputs_apart:.1e}",
        ]
        for epoch in trial.padded
    ]
    return headers, rows


def padded_title(trial: SequenceTrial) -> str:
    """Which histories ``padded`` is about."""
    return f"One epoch of the histories of up to {trial.short} purchases"


def summary(trial: SequenceTrial) -> str:
    """What was done, for the top of the report."""
    faster = ""
    if trial.padded:
        faster = (
            f" On those of up to {trial.short}, HSTU trains {trial.padded[0].ratio.value:.1f} times faster "
            "with our operator than padded."
        )
    return (
        f"Three more recommenders read whole histories, of up to {trial.longest:,} purchases: HSTU with and "
        f"without its relative bias, and a softmax transformer.{faster}"
    )


def notes(trial: SequenceTrial) -> list[str]:
    """What came out, in sentences."""
    return [_verdict(trial), _limits(trial)]


def findings(trial: SequenceTrial) -> list[str]:
    """What is wrong."""
    return [
        f"{epoch.name}: padded and jagged differ beyond round-off, in losses ({epoch.padded_loss:.6f} and "
        f"{epoch.jagged_loss:.6f}; at most {LOSS_TOLERANCE:.0e} relative) or outputs "
        f"({epoch.outputs_apart:.1e}; at most {OUTPUT_TOLERANCE:.0e})."
        for epoch in trial.padded
        if not epoch.agrees
    ]


def details(trial: SequenceTrial) -> str:
    """The section of the report."""
    rankings = {learner.name: learner.ranking for learner in trial.learners}
    headers, rows = learnt(trial)
    parts = [
        *map(html.paragraph_html, (_task(trial), _models(trial), _verdict(trial))),
        draw_smoothed_losses({learner.name: learner.losses for learner in trial.learners}),
        draw_rankings(HEADING, {"popularity": trial.popularity} | rankings),
        html.table_html(headers, rows, numeric=range(1, len(headers))),
        html.paragraph_html(
            "An epoch is forward, backward and optimizer of all its steps, the median of "
            f"{_count(trial.epochs, 'epoch')}; the longest history is the step that has it, alone if it is "
            f"longer than {trial.tokens:,}. Attention of HSTU is scaled by {trial.scale:.2g}, 1 / the mean "
            "length of a history, whatever the batch, so that what a customer is recommended does not depend "
            "on who else is in it. The norm that follows takes out a constant that is not so small that its "
            f"epsilon of 1e-6 outweighs what was attended to, as 1 / {trial.longest:,} would be for short "
            "histories.",
            note=True,
        ),
    ]
    if trial.padded:
        headers, rows = padded(trial)
        seconds = {epoch.name: (epoch.padded_seconds, epoch.jagged_seconds) for epoch in trial.padded}
        parts += [
            draw_padded(padded_title(trial), seconds),
            html.table_html(headers, rows, numeric=range(1, len(headers))),
        ]
    parts.append(html.paragraph_html(_limits(trial), note=True))
    return "".join(parts)


def _task(trial: SequenceTrial) -> str:
    loss = "softmax over all items"
    if trial.negatives is not None:
        loss = (
            f"softmax over it and {trial.negatives:,} items drawn for each step by how often they were "
            "bought, and corrected for that"
        )
    drawn = (
        f", drawn from {trial.customers + trial.customers_left_out:,}," if trial.customers_left_out else ""
    )
    return (
        f"Each of the {trial.purchases:,} purchases in the histories of {trial.customers:,} customers{drawn} "
        f"predicts the next, by {loss}. A history is one sequence, in the order of the file within a basket, "
        f"of up to {trial.longest:,} purchases; nothing is cut off. Ranked is as above: the last purchase, "
        "which no model was trained on."
    )


def _models(trial: SequenceTrial) -> str:
    return (
        f"Three models of {LAYERS} layers and about as many parameters, with embeddings of items, by which "
        f"they also score, and of places: HSTU as in its paper, with a bias of distances in position and in "
        "time; the same without; and a causal softmax transformer whose MLPs are twice as wide as it, and "
        "which attends to one history at a time by scaled_dot_product_attention. They had the same "
        f"{_count(trial.epochs, 'epoch')}, in turns on the same batches of about {trial.tokens:,} purchases, "
        f"with the same negatives, by Adam with a learning rate of up to {LEARNING_RATE:g}, and dropout of "
        f"{DROPOUT:g}. The bias knows when the next purchase is made, as a shop that is asked for a "
        "recommendation does; the other two know no times."
    )


def _verdict(trial: SequenceTrial) -> str:
    found = {learner.name: learner.ranking for learner in trial.learners}
    ordered = sorted(found.items(), key=lambda item: -item[1].hit_rate)
    metrics = ", ".join(f"{ranking.hit_rate:.3f} of {name}" for name, ranking in ordered)
    pairs = [(BIASED, UNBIASED), (BIASED, SOFTMAX), (UNBIASED, SOFTMAX)]
    compared = {(one, other): _compared(found[one], found[other]) for one, other in pairs}
    if set(compared.values()) == {_ALIKE}:
        comparisons = "none of the three ranks better than another beyond chance"
    else:
        comparisons = "; ".join(f"{one} {how} {other}" for (one, other), how in compared.items())
    return (
        f"After {_count(trial.epochs, 'epoch')} HR@{K} is {metrics}, and {trial.popularity.hit_rate:.3f} of "
        f"popularity; so many customers tell it to ±{max(map(_margin, found.values())):.3f} (95 %). In this "
        f"one run, {comparisons}."
    )


def _compared(one: Ranking, other: Ranking) -> str:
    difference = one.hit_rate - other.hit_rate
    if abs(difference) <= math.hypot(_margin(one), _margin(other)):
        return _ALIKE
    return "ranks better than" if difference > 0 else "ranks worse than"


def _margin(ranking: Ranking) -> float:
    """Half the 95 % interval of its hit rate."""
    return 1.96 * math.sqrt(ranking.hit_rate * (1 - ranking.hit_rate) / ranking.customers)


def _limits(trial: SequenceTrial) -> str:
    too_large = (
        "padded to its longest history, a batch of the training above would take up to "
        f"{trial.padded_bytes / 2**30:.2g} GiB for each tensor of scores [B, H, N, N], of which autograd "
        "keeps several a layer."
    )
    if not trial.padded:
        return f"HSTU was not timed padded, as no history is short enough: {too_large}"
    customers = 1 - trial.short_customers / trial.customers
    purchases = 1 - trial.short_purchases / trial.purchases
    return (
        "Padded eager is the formula of the paper's code, padded to the longest history of the batch; ours "
        "is recsys_ops.nn.HSTU. Both trained one epoch from the same weights on the same batches, in turns; "
        "outputs apart is how far those of the first batch were before, without dropout, at most and "
        f"relative to the largest element; their losses may be apart by {LOSS_TOLERANCE:.0e}. "
        f"Longer histories, {customers:.0%} of the customers with {purchases:.0%} of the purchases, were not "
        f"timed padded: {too_large}"
    )


def _metrics(ranking: Ranking) -> list[str]:
    return [f"{ranking.hit_rate:.4f}", f"{ranking.ndcg:.4f}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

"""The demo's result as an HTML page with plots, as JSON, and as a summary on the console."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ops import html
from recsys_ops.demo import sequence_report
from recsys_ops.demo.data import MIN_HISTORY, Interactions
from recsys_ops.demo.features import Split
from recsys_ops.demo.metrics import K, Ranking
from recsys_ops.demo.plots import draw_losses, draw_rankings, draw_times
from recsys_ops.demo.sequence_trial import SequenceTrial
from recsys_ops.demo.trial import Trial
from recsys_ops.timing import Ratio


@dataclass(frozen=True)
class Result:
    """What the demo has found so far."""

    data: Interactions
    split: Split
    trials: list[Trial]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    interrupted: bool = False
    sequences: SequenceTrial | None = None  # where they were asked for and finished


def to_json(result: Result) -> dict[str, Any]:
    """The numbers of a result, ready for ``json.dumps``."""
    return {
        "data": {
            "name": result.data.name,
            "purchases": len(result.data.item),
            "customers": len(result.data.user_names),
            "items": len(result.data.item_names),
            "left_out": result.data.left_out,
            "held_out": len(result.split.held_out),
        },
        "interrupted": result.interrupted,
        "models": [
            dataclasses.asdict(trial)
            | {
                "largest_loss_difference": trial.largest_loss_difference,
                "largest_loss_difference_collected": trial.largest_loss_difference_collected,
            }
            for trial in result.trials
        ],
        "sequences": None if result.sequences is None else dataclasses.asdict(result.sequences),
        "machine": result.machine,
        "versions": result.versions,
    }


def print_summary(result: Result, console: Console) -> None:
    """A table of times for each model, then one of outcomes."""
    width = max(console.width, 80)  # a column that does not fit would not be shown
    for trial in result.trials:
        console.print()
        console.print(_console_table(f"{trial.name}: medians in ms", *_times(trial)), width=width, crop=False)
    if result.trials:
        console.print()
        console.print(_console_table("What both learnt", *_outcomes(result.trials)), width=width, crop=False)
    sequences = result.sequences
    if sequences is not None:
        tables = [_console_table(sequence_report.HEADING, *sequence_report.learnt(sequences))]
        if sequences.padded:
            title = sequence_report.padded_title(sequences)
            tables.append(_console_table(title, *sequence_report.padded(sequences)))
        for table in tables:
            console.print()
            console.print(table, width=width, crop=False)
        for note in sequence_report.notes(sequences):
            console.print()
            console.print(Text(note))
    for finding in _findings(result):
        console.print(Text(finding, "red"))


def to_html(result: Result) -> str:
    """The whole report."""
    return html.render_page(
        "recsys-ops demo: recommenders before and after, and on whole histories",
        [
            html.Section("Summary", _summary(result)),
            *(html.Section(trial.name, _details(trial)) for trial in result.trials),
            *(
                []
                if result.sequences is None
                else [html.Section(sequence_report.HEADING, sequence_report.details(result.sequences))]
            ),
            html.Section("Data and conditions", _conditions(result)),
        ],
    )


def _summary(result: Result) -> str:
    headers, rows = _outcomes(result.trials)
    paragraphs = [
        f"Two recommenders in plain PyTorch, trained on {result.data.name}. A copy of each went through "
        "recsys_ops.accelerate, which swaps embedding lookups, checks that outputs and gradients agree, and "
        "keeps the swaps that are faster here. Original and copy then trained from the same state on the "
        "same batches, in turns. So did a third model where one is listed: its tables are a single "
        "recsys_ops.nn.EmbeddingBagCollection, which trains them in its backward.",
        *([] if result.sequences is None else [sequence_report.summary(result.sequences)]),
        *_findings(result),
        *(["The run was interrupted: this is what was finished by then."] if result.interrupted else []),
    ]
    table = html.table_html(headers, rows, numeric=range(2, len(headers)))
    return "".join(map(html.paragraph_html, paragraphs)) + table


def _details(trial: Trial) -> str:
    plain, accelerated = trial.before, trial.after
    headers, rows = _times(trial)
    rankings = {"popularity": trial.popularity, "plain": plain.ranking, "accelerated": accelerated.ranking}
    if trial.collected is not None:
        rankings["collection"] = trial.collected.ranking
    errors = [[d.name, *(f"{x:.1e}" for x in (d.before, d.after, d.apart))] for d in trial.differences]
    return "".join(
        [
            html.paragraph_html(f"{trial.description} {trial.parameters:,} parameters, trained by Adagrad."),
            draw_losses(trial.name, plain.losses, accelerated.losses),
            draw_rankings(trial.name, rankings),
            html.paragraph_html(
                f"The last purchase of {trial.popularity.customers:,} customers is ranked among all items "
                f"after {len(plain.losses)} steps; nothing is excluded, ties count against the model. "
                f"HR@{K} is the share ranked among the first {K}; NDCG@{K} weights each of those by "
                "1 / log2(1 + rank). Popularity recommends what was bought most often. Ranking took them "
                f"{plain.ranking_seconds:.1f} s and {accelerated.ranking_seconds:.1f} s.",
                note=True,
            ),
            draw_times(trial.name, [trial.step, trial.optimizer, *trial.lookups]),
            html.table_html(headers, rows, numeric=(2, 3, 4)),
            html.paragraph_html(
                "Medians in ms, and how many times faster with a 95 % interval. A step is forward, backward "
                "and optimizer, timed during training with the models in turns; a lookup is forward and "
                "backward of that module alone on one batch, in turns. One that was put back runs "
                "as plain PyTorch in the accelerated model.",
                note=True,
            ),
            html.table_html(
                ["largest error", "plain", "accelerated", "one from the other"], errors, numeric=(1, 2, 3)
            ),
            html.paragraph_html(
                "Of the output and the gradients of the first batch, before training, against the same in "
                "fp64, relative to its largest element.",
                note=True,
            ),
        ]
    )


def _outcomes(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """For each model: how much faster, and that it learns the same."""
    headers = ["model", "", "step (ms)", "faster", f"HR@{K}", f"NDCG@{K}", "losses apart, at most"]
    rows = []
    for trial in trials:
        kinds: list[tuple[str, float | None, Ratio | None, Ranking, float | None]] = [
            ("popularity", None, None, trial.popularity, None),
            ("plain", trial.step.before, None, trial.before.ranking, None),
        ]
        step, apart = trial.step, trial.largest_loss_difference
        kinds.append(("accelerated", step.after, step.ratio, trial.after.ranking, apart))
        if trial.collected is not None and trial.collected_step is not None:
            step, of_collection = trial.collected_step, trial.largest_loss_difference_collected
            kinds.append(("collection", step.after, step.ratio, trial.collected.ranking, of_collection))
        for kind, seconds, ratio, ranking, difference in kinds:
            rows.append(
                [
                    trial.name if kind == "popularity" else "",
                    kind,
                    _milliseconds(seconds),
                    _faster(ratio),
                    f"{ranking.hit_rate:.4f}",
                    f"{ranking.ndcg:.4f}",
                    "" if difference is None else f"{difference:.1e}",
                ]
            )
    return headers, rows


def _times(trial: Trial) -> tuple[list[str], list[list[str]]]:
    """What a step, its optimizer and its lookups take, and what became of those."""
    rows = [
        [p.name, p.kind, _milliseconds(p.before), _milliseconds(p.after), _faster(p.ratio), p.outcome]
        for p in (trial.step, trial.optimizer, *trial.lookups)
    ]
    return ["part", "lookup", "plain", "accelerated", "faster", "outcome"], rows


def _findings(result: Result) -> list[str]:
    found = [
        f"{trial.name}: a swap changed results beyond round-off and was put back."
        for trial in result.trials
        if not trial.agrees
    ]
    return found + ([] if result.sequences is None else sequence_report.findings(result.sequences))


def _conditions(result: Result) -> str:
    data = result.data
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in data.left_out.items())
    rows = [
        ["data", data.name],
        ["purchases", f"{len(data.item):,}"],
        ["customers", f"{len(data.user_names):,}"],
        ["items", f"{len(data.item_names):,}"],
        ["left out", left_out or "nothing"],
        [
            "held out",
            f"the last purchase of {len(result.split.held_out):,} customers, who made {MIN_HISTORY} or more; "
            "training sees purchases that other customers made later",
        ],
        *([name, _words(value)] for name, value in (result.machine | result.versions).items()),
    ]
    return html.table_html(["", ""], rows)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "not installed" if value is None else str(value)


def _console_table(title: str, headers: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
    for header, *cells in zip(headers, *rows, strict=True):
        words = header in ("part", "model", "", "lookup", "outcome")
        longest_word = max(len(word) for cell in (header, *cells) for word in (*cell.split(), ""))
        table.add_column(header, justify="left" if words else "right", min_width=longest_word)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def _faster(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"

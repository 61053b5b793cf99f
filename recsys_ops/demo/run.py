"""``recsys-ops demo``: from the data to the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import TaskID

from recsys_ops._output import INTERRUPTED, progress_bar, write_atomically, write_json
from recsys_ops.demo import report
from recsys_ops.demo.data import (
    DataError,
    Interactions,
    check_enough,
    keep_most_frequent,
    load_csv,
    load_online_retail,
)
from recsys_ops.demo.features import leave_last_out
from recsys_ops.demo.sequence_trial import NAME as SEQUENCES
from recsys_ops.demo.sequence_trial import run_sequence_trial
from recsys_ops.demo.tasks import Progress, Settings, dlrm_task, history_task
from recsys_ops.demo.trial import run_trial
from recsys_ops.hstu_attention.api import choose

REPORT = "index.html"
_MAX_ITEMS = 20_000  # scored one by one for every customer ranked
_MOST_PURCHASES_EAGER = 10_000  # in whole histories without compiled kernels, which takes minutes
_STAGES = {
    "accelerate": "accelerating",
    "train": "training both",
    "train sequences": "training all three",
    "rank": "ranking held-out purchases",
    "pad": "timing HSTU padded",
}


def run_demo(
    data: Path | None = None,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    quantity: str | None = None,
    output: Path = Path("demo-report"),
    json_path: Path | None = None,
    console: Console | None = None,
    settings: Settings | None = None,
) -> int:
    """Train two recommenders before and after ``recsys_ops.accelerate``, and three that read whole histories.

    Args:
        data: a CSV file of purchases; None for the data set that ships with the package.
        user, item, time, quantity: its columns, see ``recsys_ops.demo.data.load_csv``.
        output: the folder of the report, ``index.html``.
        json_path: where to write the numbers, or None.
        console: where to print.
        settings: how large.

    Returns:
        The exit code: 0, or 1 if a swap or an operator changed results beyond round-off, 2 if the data or the
        folder cannot be used, 130 after Ctrl-C, when the report holds the models that were finished.
    """
    console = console or Console()
    settings = settings or Settings()
    try:
        output.mkdir(parents=True, exist_ok=True)
        purchases = _load(data, user, item, time, quantity)
        check_enough(purchases)
    except DataError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        message = f"demo: expected --output to be a folder to write to, got {output}: {error.strerror}"
        console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED

    split = leave_last_out(purchases)
    _describe(purchases, console)
    trials, sequences = [], None
    interrupted = False
    try:
        for make in (history_task, dlrm_task):
            task = make(purchases, split, settings)
            with _progress(task.name, console) as progress:
                trials.append(run_trial(task, progress))
        if settings.sequence_epochs and _can_train_sequences(purchases, console):
            with _progress(SEQUENCES, console) as progress:
                sequences = run_sequence_trial(purchases, split, settings, progress)
    except KeyboardInterrupt:
        interrupted = True

    from recsys_ops.benchmarks.machine import describe_machine, versions

    result = report.Result(purchases, split, trials, describe_machine(), versions(), interrupted, sequences)
    report.print_summary(result, console)
    if trials:
        write_atomically(output / REPORT, report.to_html(result))
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            write_json(json_path, report.to_json(result))
        console.print(f"\nReport: {output / REPORT}", markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    agree = [trial.agrees for trial in trials] + ([] if sequences is None else [sequences.agrees])
    return 0 if all(agree) else 1


def _load(data: Path | None, user: str, item: str, time: str, quantity: str | None) -> Interactions:
    if data is None:
        return load_online_retail()
    return keep_most_frequent(load_csv(data, user, item, time, quantity), _MAX_ITEMS)


def _can_train_sequences(data: Interactions, console: Console) -> bool:
    if choose(torch.empty(0), None) != "reference" or len(data.item) <= _MOST_PURCHASES_EAGER:
        return True
    reason = (
        "left out, as eager PyTorch takes too long for it; recsys-ops doctor tells how to get the kernels"
    )
    console.print(f"{SEQUENCES}: {reason}", markup=False, highlight=False, soft_wrap=True)
    return False


def _describe(data: Interactions, console: Console) -> None:
    console.print(
        f"{data.name}: {len(data.item):,} purchases of {len(data.user_names):,} customers, "
        f"{len(data.item_names):,} items",
        markup=False,
        highlight=False,
    )
    for reason, count in data.left_out.items():
        console.print(f"  left out: {count:,} {reason}", markup=False, highlight=False)


@contextlib.contextmanager
def _progress(name: str, console: Console) -> Iterator[Progress]:
    """Bars on a terminal; elsewhere a line when a stage begins."""
    stages: dict[str, TaskID] = {}
    with progress_bar(console, disable=not console.is_terminal) as bars:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                description = f"{name}: {_STAGES[stage]}"
                stages[stage] = bars.add_task(description, total=total)
                if not console.is_terminal:
                    console.print(description, markup=False, highlight=False)
            bars.update(stages[stage], completed=done, total=total)

        yield advance

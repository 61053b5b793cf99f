"""The demo's plots: loss curves, ranking metrics, and times."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from recsys_ops.demo.metrics import K, Ranking
from recsys_ops.demo.trial import Part
from recsys_ops.html import BLUE, GREEN, GREY, ORANGE, VERMILION, figure_html, new_figure

_COLOURS = {"plain": BLUE, "accelerated": ORANGE, "popularity": GREY, "collection": GREEN}
_SERIES = (ORANGE, GREEN, BLUE)  # of sequence recommenders
_LEAST = 1e-9  # where a difference of 0 is drawn on a logarithmic axis


def draw_losses(name: str, plain: Sequence[float], accelerated: Sequence[float]) -> str:
    """Both loss curves on each other, and how far they are apart."""
    steps = np.arange(1, len(plain) + 1)
    with new_figure(10.5, 3.6) as figure:
        curves, apart = figure.subplots(1, 2)
        curves.plot(steps, plain, color=_COLOURS["plain"], linewidth=4, label="plain")
        curves.plot(steps, accelerated, color=_COLOURS["accelerated"], linewidth=1.2, label="accelerated")
        curves.set(title="Loss", xlabel="step", ylabel="loss (nats)")
        curves.legend()
        difference = np.maximum(np.abs(np.subtract(plain, accelerated)), _LEAST)
        apart.plot(steps, difference, color=VERMILION, linewidth=1.2)
        apart.set(title="How far apart", xlabel="step", ylabel="absolute difference (nats)", yscale="log")
        apart.set_ylim(_LEAST / 2, max(1e-2, 2 * difference.max()))
        return figure_html(
            figure,
            alt=f"{name}: the loss of both models by step, and the difference between them",
            caption=f"Training loss. A difference of 0 is drawn at {_LEAST:.0e}.",
        )


def draw_rankings(name: str, rankings: dict[str, Ranking]) -> str:
    """HR@10 and NDCG@10 as bars, for "popularity" and each model."""
    others = iter(_SERIES)
    colours = [_COLOURS[name] if name in _COLOURS else next(others) for name in rankings]
    labels = [textwrap.fill(name, 12) for name in rankings]
    with new_figure(10.5, 3.4) as figure:
        axes = figure.subplots(1, 2)
        for axis, title, metric in zip(axes, (f"HR@{K}", f"NDCG@{K}"), ("hit_rate", "ndcg"), strict=True):
            values = [getattr(found, metric) for found in rankings.values()]
            bars = axis.bar(labels, values, width=0.6, color=colours)
            axis.bar_label(bars, [f"{value:.4f}" for value in values], padding=3)
            axis.set(title=title, ylabel="average over customers", ylim=(0, 1.18 * max(*values, 1e-4)))
            axis.grid(visible=False, axis="x")
        return figure_html(
            figure,
            alt=f"{name}: HR@{K} and NDCG@{K} of popularity and of the models",
            caption="Ranking of the held-out purchases among all items; higher is better.",
        )


def draw_times(name: str, parts: Sequence[Part]) -> str:
    """The time of each part that was measured, plain and accelerated, as pairs of bars."""
    measured = [(p.name, 1e3 * p.before, 1e3 * p.after) for p in parts if p.before and p.after]
    names, plain, accelerated = zip(*measured, strict=True)
    rows = np.arange(len(measured))[::-1]
    with new_figure(10.5, 0.55 * len(measured) + 1.3) as figure:
        axes = figure.subplots()
        for kind, values, shift in (("plain", plain, 0.19), ("accelerated", accelerated, -0.19)):
            bars = axes.barh(rows + shift, values, height=0.36, color=_COLOURS[kind], label=kind)
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        axes.set_yticks(rows, names)
        axes.set(title="Time of a step and of its lookups", xlabel="median (ms)")
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right")
        return figure_html(
            figure,
            alt=f"{name}: time of a step, of its optimizer and of each lookup, plain and accelerated",
            caption="The step and its optimizer during training; each lookup alone, forward and backward.",
        )


def draw_smoothed_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """The loss of each model by step, averaged over the steps around."""
    with new_figure(10.5, 3.6) as figure:
        axes = figure.subplots()
        for (name, values), colour in zip(losses.items(), _SERIES, strict=True):
            window = max(1, len(values) // 20)
            smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
            axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=colour, label=name)
        axes.set(title="Loss", xlabel="step", ylabel="loss (nats)")
        axes.legend()
        return figure_html(
            figure,
            alt=f"Loss by step of {', '.join(losses)}",
            caption=f"Training loss on the same batches and negatives, a mean of {window} steps.",
        )


def draw_padded(title: str, seconds: Mapping[str, tuple[float, float]]) -> str:
    """The time of an epoch of each model, padded and by our operator, as pairs of bars."""
    rows = np.arange(len(seconds))[::-1]
    with new_figure(10.5, 0.55 * len(seconds) + 1.5) as figure:
        axes = figure.subplots()
        for i, (kind, colour) in enumerate((("padded eager", BLUE), ("ours", ORANGE))):
            values = [of_model[i] for of_model in seconds.values()]
            bars = axes.barh(rows + 0.19 - 0.38 * i, values, height=0.36, color=colour, label=kind)
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=9)
        axes.set_yticks(rows, list(seconds))
        axes.set(title=title, xlabel="time of the epoch (s)")
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right")
        return figure_html(
            figure,
            alt=f"{title}, padded and by our operator, of {', '.join(seconds)}",
            caption="Forward, backward and optimizer of all steps.",
        )

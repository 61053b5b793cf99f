"""The record of a run as one HTML page with its plots inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys_ops import html
from recsys_ops.benchmarks.ceilings import Ceilings
from recsys_ops.benchmarks.measure import Row
from recsys_ops.benchmarks.registry import OURS
from recsys_ops.benchmarks.results import (
    HEADERS,
    VERDICT_HEADERS,
    Results,
    ceiling_cells,
    cells,
    missing_lines,
    verdict_cells,
)
from recsys_ops.html import Section, figure_html, new_figure, paragraph_html, render_page, table_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = (
    html.BLUE,
    html.ORANGE,
    html.PURPLE,
    html.GREEN,
    html.SKY,
    html.VERMILION,
    "#000000",
    "#882255",
    "#999933",
    "#332288",
    "#44AA99",
    "#F0E442",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_COARSE_TICKS = tuple(10.0**power for power in range(-3, 6))
_FINE_TICKS = (*_COARSE_TICKS, 0.2, 0.5, 2, 5, 20, 50)
_FINE_TICKS_SPAN = 30
_HOW_TO_READ = (
    "Candidates take turns in one run, in random order, on inputs that change from call to call, so a busy "
    "machine slows all of them alike. A time is the median over the turns. A ratio is the median over the "
    "turns of the peer's time over ours, with its 95 % confidence interval: above 1 we are faster.",
    "GB/s counts every lookup, also those that a cache serves. Unique, in GB/s too, counts each distinct "
    "row once: what memory must deliver at least. The share of the limit is the least time that this "
    "machine could take, from the measured limits, over the time taken, with the limit that binds: memory "
    "(distinct rows at random addresses, and all that is read or written in order; on a GPU with its caches "
    "flushed, both at the rate of a copy), cache (every lookup), flops (at the rate of a matrix product), or "
    "the cost of a call that returns a tensor.",
    "Before it is timed, each candidate's output, and its gradients where there are any, are compared with "
    "the same computation in fp64. A candidate may err twice as much as eager PyTorch does in the same "
    "precision, plus three units in the last place. Whoever errs more gets no figure.",
)
_RATIO_CAPTION = (
    "How many times faster recsys_ops is than each peer, with 95 % confidence intervals: to the right of 1 "
    "we are faster, to the left slower. Where there is no bar the peer cannot compute the workload."
)
_ROOFLINE_CAPTION = (
    "Each point is one candidate on one workload. Operations per byte count the least traffic, every "
    "distinct row once, so a workload whose rows are found in a cache may lie above the lines of memory."
)
_GROWTH_CAPTION = (
    "Both axes are logarithmic. Each line is one candidate; its exponent is the slope of the straight line "
    "that fits it best, so 1 is time that grows as fast as the size, and 0 time that does not grow. Dotted "
    "lines have exponent 1 and start where ours does."
)


def render_results(results: Results) -> str:
    """The page as text; it needs no other file."""
    names = ", ".join(results.operators)
    sections = [Section("What was measured", _conditions(results))]
    if results.verdicts is not None:
        numbers = Counter(verdict.verdict for verdict in results.verdicts)
        summary = ", ".join(f"{count} {verdict}" for verdict, count in numbers.items())
        table = table_html(VERDICT_HEADERS, list(map(verdict_cells, results.verdicts)), numeric=[2])
        sections.append(Section("Targets", paragraph_html(summary) + table))
    if any(row.ours_speedup for row in results.rows):
        figure = ratio_figure(results.rows)
        plot = figure_html(figure, "how many times faster ours is than each peer", _RATIO_CAPTION)
        sections.append(Section("Against peers", plot))
    if any(row.growth and row.figures for row in results.rows):
        plot = figure_html(growth_figure(results.rows), "time of a call over sizes", _GROWTH_CAPTION)
        sections.append(Section("How time grows", plot))
    if results.ceilings and any(row.figures for row in results.rows):
        limits = table_html(["limit of this machine", "measured"], ceiling_cells(results.ceilings), [1])
        figure = roofline_figure(results.ceilings, results.rows)
        plot = figure_html(figure, "operations per second over operations per byte", _ROOFLINE_CAPTION)
        sections.append(Section("Against the limits of this machine", plot + limits))
    sections.append(Section("Every workload", _rows_html(results)))
    sections.append(Section("How to read this", "".join(map(paragraph_html, _HOW_TO_READ))))
    return render_page(f"recsys-ops bench: {names}", sections)


def ratio_figure(rows: Sequence[Row]) -> Figure:
    """Bars of ours against each peer: a panel for each that is measured often, one for all others."""
    compared = [row for row in rows if row.ours_speedup]
    counts = Counter(row.candidate for row in compared)
    usual = [peer for peer, count in counts.items() if count >= max(counts.values()) / 3]
    workloads = list(dict.fromkeys(row.workload for row in compared if row.candidate in usual))
    others = [row for row in compared if row.candidate not in usual]
    heights = [len(workloads) + 2, *([len(others) + 2] if others else [])]
    with new_figure(10.5, 0.25 * sum(heights) + 1.2) as figure:
        grid = figure.add_gridspec(len(heights), len(usual), height_ratios=heights)
        upper = [figure.add_subplot(grid[0, i]) for i in range(len(usual))]
        for axes, peer in zip(upper, usual, strict=True):
            bars = {workloads.index(row.workload): row for row in compared if row.candidate == peer}
            labels = workloads if axes is upper[0] else [""] * len(workloads)
            _bars(axes, bars, labels, room=0.1 * max(2, len(usual)))
            axes.set_title(f"against\n{peer}" if len(usual) > 3 else f"against {peer}")
        if others:
            axes = figure.add_subplot(grid[1, :])
            _bars(axes, dict(enumerate(others)), [f"{row.workload}, {row.candidate}" for row in others])
            axes.set_title("against others")
    return figure


def _bars(axes: Axes, bars: dict[int, Row], labels: Sequence[str], room: float = 0.2) -> None:
    """Horizontal bars from 1, longer the further from it, on a logarithmic axis with room for figures."""
    ratios = {place: row.ours_speedup for place, row in bars.items() if row.ours_speedup}
    places, values = list(ratios), [ratio.value for ratio in ratios.values()]
    colors = [html.BLUE if value >= 1 else html.VERMILION for value in values]
    axes.barh(places, [value - 1 for value in values], left=1, height=0.62, color=colors)
    middles = [(ratio.low * ratio.high) ** 0.5 for ratio in ratios.values()]
    spread = [
        [m - ratio.low for m, ratio in zip(middles, ratios.values(), strict=True)],
        [ratio.high - m for m, ratio in zip(middles, ratios.values(), strict=True)],
    ]
    axes.errorbar(middles, places, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    for place, ratio in ratios.items():
        end = (max(ratio.high, 1), place)
        text = f"{ratio.value:.2f}" if ratio.value < 10 else f"{ratio.value:.0f}"
        axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    lowest = min([0.8, *(ratio.low for ratio in ratios.values())])
    highest = max([1.25, *(ratio.high for ratio in ratios.values())])
    axes.set_xlim(lowest / 1.1, highest * (highest / lowest) ** room)
    choice = _FINE_TICKS if highest / lowest <= _FINE_TICKS_SPAN else _COARSE_TICKS
    ticks = sorted(t for t in choice if lowest / 1.1 <= t <= highest * 1.1)
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), labels, size=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def growth_figure(rows: Sequence[Row]) -> Figure:
    """Time over what grows, a panel for each such thing and pass, with lines of exponent 1 beside ours."""
    series: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.growth and row.figures:
            panel = series.setdefault((row.growth.of, row.pass_), {})
            panel.setdefault(row.candidate, []).append((row.growth.size, row.figures.seconds))
    candidates = list(dict.fromkeys(candidate for panel in series.values() for candidate in panel))
    columns = len({pass_ for _, pass_ in series})
    lines = -(-len(series) // columns)
    with new_figure(10.5, 3.6 * lines) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).flat
        for axes, ((of, pass_), panel) in zip(grid, sorted(series.items()), strict=False):
            for candidate, points in panel.items():
                sizes, seconds = np.array(sorted(points)).T
                index = candidates.index(candidate)
                axes.plot(
                    sizes,
                    seconds * 1e3,
                    marker=_MARKERS[index % len(_MARKERS)],
                    color=_COLORS[index % len(_COLORS)],
                    linewidth=2.2 if candidate == OURS else 1.2,
                    label=f"{candidate}{_exponent(sizes, seconds)}",
                )
                if candidate == OURS:
                    axes.plot(sizes, seconds[0] * 1e3 * sizes / sizes[0], ":", color=html.GREY, linewidth=1)
            measured = [1e3 * seconds for points in panel.values() for _, seconds in points]
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(10 ** np.floor(np.log10(min(measured))), 8 * max(measured))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_xlabel(of)
            axes.set_ylabel("ms of a call")
            axes.set_title(f"{pass_}, by {of}")
            axes.legend(fontsize=9, loc="upper left", frameon=True, framealpha=0.9, edgecolor="white")
    return figure


def _exponent(sizes: np.ndarray, seconds: np.ndarray) -> str:
    if len(sizes) < 2:
        return ""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return f", exponent {slope:.2f}"


def roofline_figure(ceilings: Ceilings, rows: Sequence[Row]) -> Figure:
    """Operations per second over operations per byte, below the limits of this machine."""
    points = [(row.candidate, _group(row), row.figures) for row in rows if row.figures]
    candidates = list(dict.fromkeys(candidate for candidate, _, _ in points))
    groups = list(dict.fromkeys(group for _, group, _ in points))
    slopes = {
        "sequential read": (ceilings.read, "-"),
        "random 256-byte rows, cache": (ceilings.row_rate("cache", 256), "--"),
        "random 256-byte rows, memory": (ceilings.row_rate("memory", 256), ":"),
    }
    lowest = min(figures.intensity for _, _, figures in points) / 2
    highest = 4 * ceilings.flops / min(slope for slope, _ in slopes.values())
    intensities = np.geomspace(lowest, highest, 200)
    with new_figure(10.5, 5.2) as figure:
        axes = figure.subplots()
        for name, (slope, style) in slopes.items():
            limit = np.minimum(slope * intensities, ceilings.flops)
            label = f"{name}, {slope / 1e9:.1f} GB/s"
            axes.plot(intensities, limit / 1e9, style, color=html.GREY, label=label)
        for candidate, group, figures in points:
            axes.plot(
                figures.intensity,
                figures.flop_rate / 1e9,
                _MARKERS[groups.index(group) % len(_MARKERS)],
                color=_COLORS[candidates.index(candidate) % len(_COLORS)],
                markersize=8 if candidate == candidates[0] else 5,
                alpha=0.8,
                markeredgewidth=0,
            )
        for index, candidate in enumerate(candidates):
            axes.plot([], [], "o", color=_COLORS[index % len(_COLORS)], label=candidate)
        for index, group in enumerate(groups):
            axes.plot([], [], _MARKERS[index % len(_MARKERS)], color="#333333", label=f"{group} workloads")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte of the least traffic")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"Roofline, up to the fp32 matrix product at {ceilings.flops / 1e9:.0f} GFLOP/s")
        figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _group(row: Row) -> str:
    return row.workload.split("/")[0]


def _conditions(results: Results) -> str:
    facts: list[tuple[str, Any]] = [
        ("date", results.date),
        ("device", results.device),
        ("workloads", "quick selection" if results.quick else "all"),
        *((f"recsys_ops {name} served by", backend) for name, backend in results.operators.items()),
        *((name, _text(value)) for name, value in results.machine.items()),
        *((f"version of {name}", version or "not installed") for name, version in results.versions.items()),
        ("load before the run", f"{results.load:.2f}"),
    ]
    warnings = [w for w in (results.busy, None if results.complete else "Interrupted: not all is here.") if w]
    failures = [f"FAILED {row.workload}, {row.candidate}: {row.reason}" for row in results.failed]
    return table_html(["", ""], facts) + "".join(map(paragraph_html, warnings + failures))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _rows_html(results: Results) -> str:
    rows = [[row.workload, row.candidate, *cells(row)] for row in results.rows if row.status != "unavailable"]
    conditions = {row.workload: row.conditions for row in results.rows}
    return (
        table_html(HEADERS, rows, range(2, len(HEADERS)))
        + "".join(paragraph_html(line, note=True) for line in missing_lines(results.rows))
        + table_html(["workload", "conditions"], list(conditions.items()))
    )

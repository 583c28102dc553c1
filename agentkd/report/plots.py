"""The plots of a report, as SVG to be set into the page.

Drawn by matplotlib (imported here only, and only when drawing) without pyplot, so nothing global
is left behind. Colours are drawn as stand-ins and replaced by the page's CSS variables: a plot
then follows the light or dark theme, and its text is text in the page's own font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agentkd.report.content import CellLike, Content, Row, name, number, percent

__all__ = ["INSTALL_HINT", "Plot", "draw_plots"]

INSTALL_HINT = "Plots need matplotlib: pip install 'agentkd[report]', then write the report again."

_VARIABLES = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--s1)",
    "#010207": "var(--s2)",
    "#010208": "var(--s3)",
    "#010209": "var(--s4)",
    "#01020a": "var(--s5)",
    "#01020b": "var(--s6)",
    "#01020c": "var(--good)",
    "#01020d": "var(--bad)",
}
_INK, _MUTED, _LINE, *_SERIES, _GOOD, _BAD = _VARIABLES
_WIDTH = 6.8
"""Inches; at 72 units an inch this is about the width of a half-width card in CSS pixels."""
_FULL_WIDTH = 13.8
_OUTCOMES = ("correct", "wrong answer", "errored")
_FADED = {"linewidth": 2.4, "alpha": 0.55}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "agentkd",
    "text.parse_math": False,
    "font.size": 12.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 12.5,
}


@dataclass(frozen=True)
class Plot:
    """One drawn plot."""

    key: str
    title: str
    caption: str
    """What is seen, in words; also what a screen reader says."""
    svg: str
    """An ``<svg>`` element."""
    wide: bool = False


def draw_plots(content: Content) -> list[Plot]:
    """All plots for which there are figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        plots = [
            _accuracy(content),
            _cost(content),
            _losses(content),
            _endings(content),
            _failures(content),
            _tools(content),
            _collection(content),
        ]
    return [plot for plot in plots if plot is not None]


def series_colours(count: int) -> list[str]:
    """A colour for each of ``count`` systems, as names of CSS variables, baselines greyest."""
    order = [2] if count == 1 else [index % len(_SERIES) for index in range(count)]
    return [f"var(--s{index + 1})" for index in order]


def _colours(count: int) -> list[str]:
    stand_ins = {variable: colour for colour, variable in _VARIABLES.items()}
    return [stand_ins[variable] for variable in series_colours(count)]


@contextmanager
def _figure(height: float, width: float = _WIDTH) -> Iterator[tuple[Any, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0)
    yield figure, axes


def _svg(figure: Any, key: str, caption: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # One page holds several plots: ids must differ, and the fonts are the page's.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The caption holds no foreign text, so it needs no escaping.
    opening = rf'<svg \1 role="img" aria-label="{caption}">'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', opening, text, count=1)


def _accuracy(content: Content) -> Plot | None:
    rows = [*content.family_rows(), *content.pooled_rows()]
    count = len(content.results)
    if count == 0 or not any(cell is not None and cell.n for row in rows for cell in row.cells):
        return None
    caption = "Accuracy with its 95% interval, each family and system."
    slot = 0.17 * count + 0.24
    with _figure(slot * len(rows) + 0.9, _FULL_WIDTH) as (figure, axes):
        _accuracy_points(axes, rows, content.labels, _colours(count))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [name(row.name, 30) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.pooled else "normal")
        axes.set_xlim(-2, 102)
        axes.set_xticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        for index in range(len(rows) - 1):
            axes.axhline(index + 0.5, color=_LINE, linewidth=0.6)
        _legend(figure, axes)
        return Plot("accuracy", "Accuracy by family", caption, _svg(figure, "accuracy", caption), wide=True)


def _accuracy_points(axes: Any, rows: Sequence[Row], labels: Sequence[str], colours: Sequence[str]) -> None:
    count = len(labels)
    step = 0.72 / count
    for index, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        offset = (index - (count - 1) / 2) * step
        known = [(at, row.cells[index]) for at, row in enumerate(rows)]
        cells: list[tuple[int, CellLike]] = [(at, cell) for at, cell in known if cell is not None and cell.n]
        ys = [at + offset for at, _ in cells]
        lows, highs = [100 * cell.low for _, cell in cells], [100 * cell.high for _, cell in cells]
        shares = [100 * (cell.accuracy or 0.0) for _, cell in cells]
        axes.hlines(ys, lows, highs, color=colour, **_FADED)
        axes.plot(shares, ys, "o", color=colour, markersize=7.5, label=label)


def _cost(content: Content) -> Plot | None:
    colours = _colours(len(content.results))
    points = [
        (label, colour, result.overall)
        for label, colour, result in zip(content.labels, colours, content.results, strict=True)
        if result.overall.n and result.overall.tokens_per_task
    ]
    if not points:
        return None
    caption = "Accuracy over all tasks, with its 95% interval, by mean tokens per task (input and output)."
    with _figure(4.0) as (figure, axes):
        tokens = [cell.tokens_per_task or 0.0 for _, _, cell in points]
        if max(tokens) > 8 * min(tokens):
            axes.set_xscale("log")
            axes.set_xlim(min(tokens) / 1.6, max(tokens) * 1.6)
        else:
            axes.set_xlim(0, max(tokens) * 1.2)
        for (label, colour, cell), x in zip(points, tokens, strict=True):
            axes.vlines(x, 100 * cell.low, 100 * cell.high, color=colour, **_FADED)
            shown = f"{name(label, 30)}: {percent(cell.accuracy)}, {number(x, 0)} tokens"
            axes.plot([x], [100 * (cell.accuracy or 0.0)], "o", color=colour, markersize=8, label=shown)
        axes.set_ylim(-3, 103)
        axes.set_yticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
        axes.xaxis.set_major_formatter(lambda value, _: number(value, 0))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.tick_params(which="both", length=0, labelcolor=_MUTED)
        axes.set_xlabel("tokens per task")
        axes.grid()
        _legend(figure, axes, columns=1)
        return Plot("cost", "Accuracy and its cost", caption, _svg(figure, "cost", caption))


def _losses(content: Content) -> Plot | None:
    curves = {
        label: [(step, loss) for step, loss in points if math.isfinite(loss)]
        for label, points in content.losses.items()
    }
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return None
    caption = "Training loss by step (nats per target token): thin as measured, thick as a running mean."
    with _figure(4.0) as (figure, axes):
        colours = _curve_colours(list(curves), content.labels)
        for (label, points), colour in zip(curves.items(), colours, strict=True):
            steps, losses = [step for step, _ in points], [loss for _, loss in points]
            axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.35)
            style = {"linewidth": 2, "marker": "o" if len(points) == 1 else "", "label": name(label, 40)}
            axes.plot(steps, _running_mean(losses), color=colour, **style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("training step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelcolor=_MUTED)
        axes.grid(axis="y")
        _legend(figure, axes)
        return Plot("losses", "Training loss", caption, _svg(figure, "losses", caption))


def _running_mean(values: Sequence[float]) -> list[float]:
    # Centred and narrower towards the ends, so that the mean neither lags nor bends there.
    means = []
    for at in range(len(values)):
        reach = min(len(values) // 20, at, len(values) - 1 - at)
        part = values[at - reach : at + reach + 1]
        means.append(sum(part) / len(part))
    return means


def _curve_colours(curves: Sequence[str], systems: Sequence[str]) -> list[str]:
    """A curve named after a system ("agent", "agent-distilled") has that system's colour."""
    by_system = dict(zip((system.casefold() for system in systems), _colours(len(systems)), strict=True))
    chosen: list[str] = []
    for curve in curves:
        named = [colour for system, colour in by_system.items() if curve.casefold() in system]
        free = [colour for colour in [*named, *_SERIES[1:], *_SERIES] if colour not in chosen]
        chosen.append(free[0] if free else _INK)
    return chosen


def _endings(content: Content) -> Plot | None:
    """Of all runs that count: right, wrong, and those that ended without an answer, by how."""
    kinds = _per_hundred(content, _outcomes)
    if not kinds:
        return None
    order = ["correct", "wrong answer", *(kind for kind in kinds if kind not in _OUTCOMES), "errored"]
    kinds = {kind: kinds[kind] for kind in order if kind in kinds}
    caption = "How runs ended: share of all runs of each system, errored ones included."
    colours = {"correct": _GOOD, "wrong answer": _BAD, "errored": _MUTED}
    return _grouped_bars(content, kinds, "endings", "How runs ended", caption, colours)


def _failures(content: Content) -> Plot | None:
    kinds = _per_hundred(content, lambda cell: cell.failures)
    if not kinds:
        return None
    caption = "Failures on the way, per 100 runs of each system; one run can have several."
    return _grouped_bars(content, kinds, "failures", "Kinds of failure", caption, {}, unit="")


def _per_hundred(content: Content, counts: Callable[[CellLike], Mapping[str, int]]) -> dict[str, list[float]]:
    """By kind, for each system: how often per 100 of its runs, errored ones included."""
    kinds: dict[str, list[float]] = {}
    systems = [result.overall for result in content.results]
    for at, cell in enumerate(systems):
        for kind, count in counts(cell).items():
            kinds.setdefault(kind, [0.0] * len(systems))[at] = 100 * count / (cell.n + cell.errors)
    return kinds


def _outcomes(cell: CellLike) -> dict[str, int]:
    answered = cell.stop_reasons.get("final_answer", 0)
    others = {kind: count for kind, count in cell.stop_reasons.items() if kind != "final_answer"}
    unanswered = cell.n - answered
    shown = {"correct": cell.correct, "wrong answer": answered - cell.correct}
    for kind, count in others.items():
        if unanswered > 0 and not kind.endswith("_error") and kind != "cancelled":
            shown[kind.replace("_", " ")] = count
    shown["errored"] = cell.errors
    return {kind: count for kind, count in shown.items() if count > 0}


def _tools(content: Content) -> Plot | None:
    tools = list(dict.fromkeys(tool for shares in content.tool_use.values() for tool in shares))
    labels = [result.label for result in content.results]
    if not tools or not labels:
        return None
    shares = {
        tool: [100 * content.tool_use.get(label, {}).get(tool, 0.0) for label in labels] for tool in tools
    }
    caption = "Tool use: share of each system's runs in which the code called the tool at least once."
    return _grouped_bars(content, shares, "tools", "Tool use", caption, {})


def _grouped_bars(
    content: Content,
    values: dict[str, list[float]],
    key: str,
    title: str,
    caption: str,
    colours: dict[str, str],
    unit: str = "%",
) -> Plot:
    """Horizontal bars: a group for each kind, in it a bar for each system."""
    largest = 100.0 if unit else max(max(found) for found in values.values())
    series = _colours(len(content.results))
    slot = 0.17 * len(series) + 0.2
    with _figure(max(1.6, slot * len(values) + 0.9)) as (figure, axes):
        thick = 0.74 / len(series)
        for at, (label, colour) in enumerate(zip(content.labels, series, strict=True)):
            places = [group + (at - (len(series) - 1) / 2) * thick for group in range(len(values))]
            shares = [found[at] for found in values.values()]
            axes.barh(places, shares, height=thick * 0.86, color=colour, label=label)
            for place, share in zip(places, shares, strict=True):
                if share:
                    shown = percent(share / 100) if unit else number(share, 0 if share >= 10 else 1)
                    axes.text(share + largest / 100, place, shown, va="center", color=_MUTED, fontsize=10)
        axes.set_yticks(range(len(values)), [name(kind, 26) for kind in values])
        for tick, kind in zip(axes.get_yticklabels(), values, strict=True):
            tick.set_color(colours.get(kind, _INK))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * largest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        _legend(figure, axes)
        return Plot(key, title, caption, _svg(figure, key, caption))


def _collection(content: Content) -> Plot | None:
    bars: list[tuple[str, int, int, str]] = []
    several = len(content.collection) > 1
    for label, counts in content.collection.items():
        prefix = f"{name(label, 20)}: " if several else ""
        bars.append((f"{prefix}kept", counts.kept, counts.collected, _GOOD))
        for reason, count in sorted(counts.dropped.items(), key=lambda item: -item[1]):
            bars.append((f"{prefix}{name(reason, 30)}", count, counts.collected, _BAD))
    if not bars:
        return None
    caption = "Collected trajectories: how many were kept, and how many were dropped for which reason."
    with _figure(0.36 * len(bars) + 0.35, _FULL_WIDTH) as (figure, axes):
        largest = max(1, *(count for _, count, _, _ in bars))
        lengths, colours = [bar[1] for bar in bars], [bar[3] for bar in bars]
        axes.barh(range(len(bars)), lengths, color=colours, height=0.62, alpha=0.85)
        for at, (_, count, collected, _) in enumerate(bars):
            share = f"  ({percent(count / collected)})" if collected else ""
            axes.text(count + largest * 0.008, at, f"{count:,}{share}", va="center", color=_MUTED)
        axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, largest * 1.14)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return Plot("collection", "What was kept", caption, _svg(figure, "collection", caption), wide=True)


def _legend(figure: Any, axes: Any, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "outside upper left", "ncols": columns}
    figure.legend(handles, labels, **place, handlelength=1.2, columnspacing=1.6)

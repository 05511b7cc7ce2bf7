"""Draws the report's figures as SVG text, from result files only.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; lines differ in dash as well.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from physioray.signals import STAGES, UNKNOWN, WINDOW_SECONDS, find_task

INK, PALE = "#1b2a33", "#8a969d"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#DCEBF5"

FEATURE_COLOURS = {"pretrained": BLUE, "untrained": ORANGE, "band_powers": GREEN}
FEATURE_DASHES = {"pretrained": "-", "untrained": "--", "band_powers": "-."}
FEATURE_NAMES = {"pretrained": "pretrained", "untrained": "untrained encoder", "band_powers": "band powers"}

HYPNOGRAM_ORDER = ("W", "REM", "N1", "N2", "N3")
"""From top to bottom, as sleep laboratories draw it."""

STYLE: Any = {
    "font.family": ["sans-serif"],
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "path.simplify_threshold": 0.6,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The look of all figures, for what is drawn in the body."""
    with matplotlib.rc_context(STYLE):
        yield


def render_svg(figure: Figure, name: str, alt: str = "") -> str:
    """A figure as an inline SVG element that scales with the page; the same figure gives the same text.

    Args:
        figure: what is drawn.
        name: of the figure, different from all others on a page.
        alt: what it shows, for those who do not see it; made from the name if empty.
    """
    sink = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # Identifiers share one page: they are told apart by the figure's name.
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    label = escape(alt or f"Figure: {name.replace('-', ' ')}", {'"': "&quot;"})
    return f'{head} role="img" aria-label="{label}">{body}'


def plot_losses(name: str, passes: Sequence[int], train: Sequence[float], held_out: Sequence[float | None]) -> str:
    """Loss of one modality (or of all) by pass: training solid, validation dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(passes, train, color=BLUE, marker="o", markersize=3, label="training")
        known = [(number, value) for number, value in zip(passes, held_out, strict=True) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=ORANGE, ls="--", marker="s", markersize=3, label="validation")
        axes.set(title=name, xlabel="pass", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return render_svg(figure, _slug(f"loss-{name}"))


def plot_probe_curve(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Balanced accuracy of the probe against passes of pretraining, floors as horizontal lines.

    Args:
        task: name of the task.
        rows: `pass`, `value`, `low`, `high` of the pretrained encoder; rows with `features` are floors.
    """
    found = find_task(task)
    curve = sorted((row for row in rows if row.get("features", "pretrained") == "pretrained"), key=lambda r: r["pass"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        if curve:
            passes, values = [row["pass"] for row in curve], [row["value"] for row in curve]
            axes.plot(passes, values, color=BLUE, marker="o", markersize=4, label=FEATURE_NAMES["pretrained"])
            _draw_bars(axes, curve)
        for row in rows:
            kind = row.get("features", "pretrained")
            if kind != "pretrained":
                colour, dash = FEATURE_COLOURS.get(kind, PURPLE), FEATURE_DASHES.get(kind, ":")
                axes.axhline(row["value"], color=colour, ls=dash, label=FEATURE_NAMES.get(kind, kind))
                if row.get("low") is not None and row.get("high") is not None:
                    axes.axhspan(row["low"], row["high"], color=colour, alpha=0.08, lw=0)
        axes.axhline(found.chance, color=PALE, ls=":", label="chance")
        axes.set(title=found.title, xlabel="passes of pretraining", ylabel="balanced accuracy")
        _scale_passes(axes, [row["pass"] for row in curve])
        figure.legend(loc="outside lower center", ncols=4, fontsize=9, handlelength=2.4, columnspacing=1.2)
        return render_svg(figure, _slug(f"curve-{task}"))


def _draw_bars(axes: Axes, curve: Sequence[Mapping[str, Any]]) -> None:
    bars = [row for row in curve if row.get("low") is not None and row.get("high") is not None]
    axes.vlines([row["pass"] for row in bars], [row["low"] for row in bars], [row["high"] for row in bars], color=BLUE)


def _scale_passes(axes: Axes, passes: Sequence[int]) -> None:
    """A logarithmic axis that keeps pass 0, labelled where something was measured."""
    if not passes:
        axes.set_xticks([])
        return
    if max(passes) > 10:
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    marks = sorted(set(passes))
    # Labels that would touch are left out, the last pass never.
    shown = [mark for mark in marks if mark == marks[-1] or mark < 0.7 * marks[-1]]
    axes.set_xticks(marks, [str(mark) if mark in shown else "" for mark in marks])
    axes.minorticks_off()


def plot_confusion(task: str, counts: Int[np.ndarray, "true predicted"], caption: str = "") -> str:
    """Confusion matrix: shares of each true class as shade and per cent, with the windows below.

    Args:
        task: name of the task.
        counts: windows by true class (rows) and predicted class (columns).
        caption: behind the title.
    """
    found = find_task(task)
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    size = 1.6 + 0.75 * len(found.classes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size + 0.4, size), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(found.classes) + 1) - 0.5
        axes.pcolormesh(places, places, shares, cmap="Blues", vmin=0, vmax=1)
        axes.invert_yaxis()
        for row, column in np.ndindex(*counts.shape):
            ink = "white" if shares[row, column] > 0.55 else INK
            text = f"{shares[row, column]:.0%}\n{int(counts[row, column]):,}" if total[row, 0] else "-"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=ink)
        axes.set_xticks(range(len(found.classes)), found.classes)
        axes.set_yticks(range(len(found.classes)), found.classes)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(title=f"{found.title}{caption}", xlabel="predicted", ylabel="true")
        return render_svg(figure, _slug(f"confusion-{task}"))


def find_runs(
    start: Float[np.ndarray, " n"], jumps: Sequence[float], *, step: float = float(WINDOW_SECONDS)
) -> list[slice]:
    """Stretches of windows that follow each other in time without a gap or a jump.

    Args:
        start: `(n,)` seconds, ascending.
        jumps: seconds at which the recording jumps: a window that starts there begins a new stretch.
        step: seconds between windows that follow each other.
    """
    edges = np.flatnonzero(np.abs(np.diff(start) - step) > 0.5) + 1
    at_jump = np.searchsorted(start, np.asarray(jumps, np.float64) - 1e-6) if len(jumps) else np.empty(0, np.int64)
    bounds = np.unique(np.concatenate([[0], edges, at_jump, [len(start)]])).astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def plot_hypnogram(
    start: Float[np.ndarray, " n"],
    true: Int[np.ndarray, " n"],
    predicted: Int[np.ndarray, " n"],
    runs: Sequence[slice],
) -> str:
    """The night as it was above the night as predicted; lines break where the recording does.

    Args:
        start: `(n,)` seconds from the start of the recording.
        true, predicted: `(n,)` stages as numbers of `signals.STAGES`.
        runs: see `find_runs`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, stages, title in zip(panels, (true, predicted), ("True stages", "Predicted stages"), strict=True):
            draw_stages(axes, start, stages, runs)
            axes.set_title(title)
        panels[-1].set_xlabel("hours from the start of the recording")
        return render_svg(figure, "hypnogram")


def draw_stages(
    axes: Axes, start: Float[np.ndarray, " n"], stages: Int[np.ndarray, " n"], runs: Sequence[slice]
) -> None:
    """Draw stages by the hour, REM in orange; there is no line across the ends of runs or where a stage is -1."""
    height = {STAGES.index(name): float(-place) for place, name in enumerate(HYPNOGRAM_ORDER)} | {UNKNOWN: np.nan}
    for run in runs:
        hours = np.append(start[run], start[run][-1] + WINDOW_SECONDS) / 3600
        levels = np.array([height[int(stage)] for stage in stages[run]], float)
        axes.step(hours, np.append(levels, levels[-1]), where="post", color=INK, lw=1)
        rem = np.where(np.asarray(stages[run]) == STAGES.index("REM"), levels, np.nan)
        axes.step(hours, np.append(rem, rem[-1]), where="post", color=ORANGE, lw=3)
    axes.set_yticks([-place for place in range(len(HYPNOGRAM_ORDER))], HYPNOGRAM_ORDER)
    axes.set_ylim(-len(HYPNOGRAM_ORDER) + 0.6, 0.4)


def plot_reconstructions(
    name: str,
    target: Float[np.ndarray, "k samples"],
    output: Float[np.ndarray, "k samples"],
    visible: Bool[np.ndarray, "k tokens"],
    present: Bool[np.ndarray, " k"],
) -> str:
    """What the model saw of a modality (shaded), what was there (grey) and what it filled in (colour).

    Args:
        name: of the modality.
        target, output: `(k, samples)` in units of the recording's scale.
        visible: `(k, tokens)` True where the model saw the signal.
        present: `(k,)` False where the window has no such signal.
    """
    examples = [number for number in range(len(target)) if present[number]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 1.55 * max(1, len(examples)) + 0.5), layout="constrained")
        panels = figure.subplots(max(1, len(examples)), 1, sharex=True, squeeze=False)[:, 0]
        for axes, number in zip(panels, examples, strict=False):
            draw_reconstruction(axes, target[number], output[number], visible[number])
            axes.set_ylabel(f"window {number + 1}", color=INK)
        panels[0].set_title(name)
        panels[-1].set_xlabel("seconds")
        return render_svg(figure, _slug(f"reconstruction-{name}"))


def draw_reconstruction(
    axes: Axes,
    target: Float[np.ndarray, " samples"],
    output: Float[np.ndarray, " samples"],
    visible: Bool[np.ndarray, " tokens"],
) -> None:
    """One window: what the model saw shaded, the signal grey, what was filled in orange."""
    seconds = np.arange(len(target)) * (WINDOW_SECONDS / len(target))
    width = WINDOW_SECONDS / len(visible)
    for token in np.flatnonzero(visible):
        axes.axvspan(token * width, (token + 1) * width, color=SKY, lw=0)
    hidden = np.repeat(~visible, len(target) // len(visible))
    axes.plot(seconds, target, color=PALE, lw=0.8)
    axes.plot(seconds, np.where(hidden[: len(output)], output, np.nan), color=ORANGE, lw=1.1)
    reach = max(1.0, float(np.percentile(np.abs(target), 99.5)) * 1.15)
    axes.set(xlim=(0, WINDOW_SECONDS), ylim=(-reach, reach))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

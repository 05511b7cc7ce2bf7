"""Draws what was found in checkpoints: attention maps, source variance, reconstructions, and their numbers.

Colours are cividis for maps and those of Okabe and Ito (2008) for lines, which also differ in dash and mark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from physioray.analysis_results import Analysis
from physioray.attention_rollout import ROLLOUT
from physioray.figures import BLUE, GREEN, INK, ORANGE, PALE, PURPLE, draw_reconstruction, figure_style
from physioray.observation import TokenGrid, name_states
from physioray.reconstruction_quality import HIDDEN_WAYS
from physioray.signals import WINDOW_SECONDS
from physioray.subject_sums import Number

LINES = (
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    ("#E69F00", (0, (6, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), "P"),
    (INK, (0, (1, 1)), "X"),
)
"""Curves are told apart by colour, dash and mark."""

MAP_COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="#d5dde1")
"""Pairs of tokens that no window has are grey."""

CAP = 3.6
"""Where the colours of a map end, in units of uniform attention: 0.03 for the paper's 120 tokens (Figure 2)."""

LEAST_REACH = 0.05
"""Axes of relative numbers reach at least so far to both sides of the number that means nothing."""

HIDDEN_TITLES = {"scattered": "seconds hidden at random", "whole": "one modality hidden whole"}

MODALITY_TITLES = {"eeg": "EEG", "eog": "EOG", "emg": "EMG", "ecg": "ECG", "spo2": "SpO2", "ibi": "IBI"}


def title_modality(name: str) -> str:
    """A modality as sleep laboratories write it."""
    return MODALITY_TITLES.get(name, name)


def slug(text: str) -> str:
    """A name that can stand in files and identifiers."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def render_png(figure: Figure, dots: int = 200) -> bytes:
    """A figure as PNG at so many dots per inch; the same figure gives the same bytes."""
    sink = io.BytesIO()
    with figure_style():
        FigureCanvasAgg(figure).print_png(sink, metadata={"Software": None}, pil_kwargs={"dpi": (dots, dots)})
    return sink.getvalue()


def plot_rollout(analyses: Sequence[Analysis]) -> Figure:
    """Attention rollout of checkpoints side by side, on one scale (Fang et al. 2024, Figure 2 A to C)."""
    with figure_style():
        figure = Figure(figsize=(4.4 * len(analyses) + 0.6, 4.5), layout="constrained")
        panels = figure.subplots(1, len(analyses), squeeze=False)[0].tolist()
        for axes, analysis in zip(panels, analyses, strict=True):
            image = draw_map(axes, analysis.maps[-1], analysis.grid, title=analysis.name)
        panels[0].set_ylabel("output token of")
        for axes in panels:
            axes.set_xlabel("input token of")
        _add_scale(figure, image, panels)
        return figure


def plot_layers(analysis: Analysis) -> Figure:
    """Mean attention of every layer of one checkpoint (Fang et al. 2024, Figure 6)."""
    columns = min(4, analysis.layers)
    rows = -(-analysis.layers // columns)
    with figure_style():
        figure = Figure(figsize=(2.5 * columns + 0.7, 2.65 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(panels.flat):
            if number >= analysis.layers:
                axes.set_axis_off()
                continue
            image = draw_map(axes, analysis.maps[number], analysis.grid, title=f"layer {number + 1}")
        _add_scale(figure, image, panels.ravel().tolist())
        return figure


def plot_layers_beside(analyses: Sequence[Analysis]) -> Figure:
    """Mean attention of every layer (downwards) of several checkpoints (to the right), on one scale (Figure 6)."""
    rows = max(analysis.layers for analysis in analyses)
    with figure_style():
        figure = Figure(figsize=(2.9 * len(analyses) + 0.7, 2.75 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, len(analyses), squeeze=False)
        for column, analysis in enumerate(analyses):
            for number in range(rows):
                axes = panels[number, column]
                if number >= analysis.layers:
                    axes.set_axis_off()
                    continue
                title = f"{analysis.name}\nlayer {number + 1}" if not number else f"layer {number + 1}"
                image = draw_map(axes, analysis.maps[number], analysis.grid, title=title)
        _add_scale(figure, image, panels.ravel().tolist())
        return figure


def draw_map(axes: Axes, weights: Float[np.ndarray, "t t"], grid: TokenGrid, *, title: str) -> AxesImage:
    """One map: attending tokens downwards, attended ones to the right, a line between modalities."""
    image = axes.imshow(weights, cmap=MAP_COLOURS, vmin=0.0, vmax=CAP / len(grid), interpolation="nearest")
    counts = list(grid.counts.values())
    edges = np.cumsum([0, *counts])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", lw=0.8)
        axes.axvline(edge - 0.5, color="white", lw=0.8)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    names = [title_modality(name) for name in grid.names]
    axes.set_xticks(middles, names, rotation=0 if len(names) <= 4 else 90, fontsize=9)
    axes.set_yticks(middles, names, rotation=90, va="center", fontsize=9)
    axes.tick_params(length=0)
    axes.set_title(title)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _add_scale(figure: Figure, image: AxesImage, panels: Sequence[Axes]) -> None:
    bar = figure.colorbar(image, ax=list(panels), extend="max", shrink=0.75, pad=0.01, aspect=30)
    bar.set_label("share of attention")
    bar.outline.set_visible(False)


def plot_source_variance(analysis: Analysis) -> Figure:
    """Relative source variance by layer, in both forms (Fang et al. 2024, Figure 2 D to F).

    Bands: 95 % interval of the mean over units, as in the paper; bars: 95 % interval by subject of the contexts.
    """
    places = name_states(analysis.layers)[1:]
    with figure_style():
        figure = Figure(figsize=(7.4, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True)
        for axes, (form, title) in zip(panels, VARIANCE_TITLES.items(), strict=True):
            for name, line in zip(analysis.grid.names, _cycle(len(analysis.grid.names)), strict=True):
                traced = {number.place: number for number in analysis.trace(f"source_variance_{form}", name)}
                _draw_trace(axes, [traced[place] for place in places], title_modality(name), line)
            axes.axhline(1 / len(analysis.grid.names), color=PALE, lw=0.8, ls=":", zorder=0)
            _label_layers(axes, places)
            axes.set_title(title, fontsize=10)
        panels[0].set_ylabel("relative source variance")
        panels[1].set_ylim(0, None)
        # Differences in the fourth digit must not fill the panel.
        low, high = panels[0].get_ylim()
        even = 1 / len(analysis.grid.names)
        panels[0].set_ylim(min(low, even - LEAST_REACH), max(high, even + LEAST_REACH))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
        figure.suptitle(analysis.name, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure


VARIANCE_TITLES = {"softmax": "softmax of variances (the paper's)", "share": "share of the variances"}


def plot_source_variance_beside(analyses: Sequence[Analysis]) -> Figure:
    """As `plot_source_variance`, for several checkpoints to the right; each form (downwards) on one scale."""
    with figure_style():
        figure = Figure(figsize=(3.1 * len(analyses) + 0.4, 5.6), layout="constrained")
        panels = figure.subplots(2, len(analyses), sharey="row", squeeze=False)
        handles: dict[str, Any] = {}
        for column, analysis in enumerate(analyses):
            places, names = name_states(analysis.layers)[1:], analysis.grid.names
            for axes, form in zip(panels[:, column], VARIANCE_TITLES, strict=True):
                for name, line in zip(names, _cycle(len(names)), strict=True):
                    traced = {number.place: number for number in analysis.trace(f"source_variance_{form}", name)}
                    _draw_trace(axes, [traced[place] for place in places], title_modality(name), line)
                axes.axhline(1 / len(names), color=PALE, lw=0.8, ls=":", zorder=0)
                _label_layers(axes, places)
                handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            panels[0, column].set_title(analysis.name)
        for axes, title in zip(panels[:, 0], VARIANCE_TITLES.values(), strict=True):
            axes.set_ylabel(title.replace(" (", "\n("))
        panels[1, 0].set_ylim(0, None)
        # Differences in the fourth digit must not fill the panel.
        low, high = panels[0, 0].get_ylim()
        evens = [1 / len(analysis.grid.names) for analysis in analyses]
        panels[0, 0].set_ylim(min(low, min(evens) - LEAST_REACH), max(high, max(evens) + LEAST_REACH))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
        return figure


def _draw_trace(axes: Axes, numbers: Sequence[Number], label: str, line: tuple[str, object, str]) -> None:
    colour, dash, mark = line
    at = np.arange(len(numbers))
    value, low, high = (np.array([_or_nan(getattr(n, key)) for n in numbers]) for key in ("value", "low", "high"))
    axes.plot(at, value, color=colour, ls=dash, marker=mark, markersize=4, label=label)
    axes.vlines(at, low, high, color=colour, lw=1.2)
    below, above = (np.array([_or_nan(getattr(n, key)) for n in numbers]) for key in ("unit_low", "unit_high"))
    if np.isfinite(below).any():
        axes.fill_between(at, below, above, color=colour, alpha=0.15, lw=0)


def _label_layers(axes: Axes, places: Sequence[str]) -> None:
    names = [place.removeprefix("layer ").replace("embedding", "out").replace(ROLLOUT, "roll") for place in places]
    axes.set_xticks(range(len(places)), names)
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_xlabel("layer")


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _cycle(count: int) -> list[tuple[str, object, str]]:
    return [LINES[number % len(LINES)] for number in range(count)]


ATTENTION_TITLES = {
    "attention_off_modality": "to other modalities",
    "attention_within_1s": "within 1 s",
    "attention_alignment": "of that to other modalities,\nwithin 1 s",
    "attention_entropy": "evenness (entropy)",
    "attention_specificity": "specificity of tokens",
}


def plot_attention_numbers(analyses: Sequence[Analysis]) -> Figure:
    """What the attention maps show, as numbers by layer and for the rollout, checkpoints beside uniform attention."""
    with figure_style():
        figure = Figure(figsize=(9.4, 5.4), layout="constrained")
        panels = figure.subplots(2, 3).ravel()
        longest = max(analyses, key=lambda item: item.layers)
        places = [*(f"layer {number + 1}" for number in range(longest.layers)), ROLLOUT]
        for axes, (quantity, title) in zip(panels, ATTENTION_TITLES.items(), strict=False):
            for analysis, line in zip(analyses, _cycle(len(analyses)), strict=True):
                traced = {number.place: number for number in analysis.trace(quantity)}
                numbers = [traced.get(place) for place in places]
                _draw_points(axes, numbers, analysis.name, line)
            reference = {number.place: number for number in longest.trace(quantity)}
            marks = [_or_nan(reference[place].reference) for place in places]
            axes.plot(range(len(places)), marks, color=PALE, lw=0, marker="_", markersize=13, mew=1.5, label="uniform")
            _label_layers(axes, places)
            axes.set_title(title, fontsize=10)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        panels[-1].set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        panels[-1].legend(handles, labels, loc="center left", fontsize=9)
        return figure


def _draw_points(axes: Axes, numbers: Sequence[Number | None], label: str, line: tuple[str, object, str]) -> None:
    """Layers joined by a line; the rollout, the last, stands alone."""
    colour, dash, mark = line
    keys = ("value", "low", "high")
    value, low, high = (np.array([np.nan if n is None else _or_nan(getattr(n, k)) for n in numbers]) for k in keys)
    at = np.arange(len(numbers))
    axes.plot(at[:-1], value[:-1], color=colour, ls=dash, marker=mark, markersize=4, label=label)
    axes.plot(at[-1:], value[-1:], color=colour, marker=mark, markersize=5)
    axes.vlines(at, low, high, color=colour, lw=1.2)


def plot_reconstruction_errors(analyses: Sequence[Analysis]) -> Figure | None:
    """Error of hidden samples over that of guessing the modality's mean; None if no checkpoint reconstructs."""
    able = [item for item in analyses if item.find("reconstruction_relative", HIDDEN_WAYS[0]) is not None]
    if not able:
        return None
    names = list(dict.fromkeys(name for item in able for name in item.grid.names))
    with figure_style():
        figure = Figure(figsize=(9.4, 0.8 + 0.5 * len(names) + 0.14 * len(able) * len(names)), layout="constrained")
        panels = figure.subplots(1, len(HIDDEN_WAYS), sharey=True)
        for axes, way in zip(panels, HIDDEN_WAYS, strict=True):
            axes.axvline(1.0, color=PALE, lw=1, ls=":", label="guessing the mean")
            for place, (item, line) in enumerate(zip(able, _cycle(len(able)), strict=True)):
                shift = (place - (len(able) - 1) / 2) * 0.7 / len(able)
                found = [item.find("reconstruction_relative", way, name) for name in names]
                rows = [(i + shift, number) for i, number in enumerate(found) if number and number.value is not None]
                heights, numbers = [height for height, _ in rows], [number for _, number in rows]
                values = [_or_nan(number.value) for number in numbers]
                axes.plot(values, heights, line[2], color=line[0], markersize=5, label=item.name)
                lows, highs = [_or_nan(n.low) for n in numbers], [_or_nan(n.high) for n in numbers]
                axes.hlines(heights, lows, highs, color=line[0], lw=1.4)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, 1 - LEAST_REACH), max(high, 1 + LEAST_REACH))
            axes.set(title=HIDDEN_TITLES[way], xlabel="squared error / that of guessing the mean")
            axes.xaxis.set_major_locator(MaxNLocator(5))
        panels[0].set_yticks(range(len(names)), [title_modality(name) for name in names])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
        return figure


def plot_examples(analysis: Analysis, window: int) -> Figure | None:
    """One window with its visible seconds shaded (Fang et al. 2024, Figure 4); None if it was not reconstructed."""
    kept = analysis.examples.get(window)
    if not kept:
        return None
    with figure_style():
        figure = Figure(figsize=(9.4, 1.25 * len(kept) + 0.7), layout="constrained")
        panels = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, example) in zip(panels, kept.items(), strict=True):
            draw_reconstruction(axes, example.target, example.output, example.visible)
            axes.set_ylabel(title_modality(name))
        panels[0].set_title(analysis.name)
        panels[-1].set(xlabel="seconds", xlim=(0, WINDOW_SECONDS))
        return figure

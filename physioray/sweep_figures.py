"""Draws a sweep as SVG text: its history, one panel per varied setting, all settings side by side, and trade-offs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from physioray.figures import BLUE, GREEN, INK, ORANGE, PALE, PURPLE, figure_style, render_svg
from physioray.sweep_journal import SweepResult, TrialRecord
from physioray.sweep_plan import EPOCH, Objective

LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"))
"""Curves are told apart by colour, dash and mark."""


class _Axis:
    """Where the values of one varied setting stand: numbers in their place, all else one after the other."""

    def __init__(self, name: str, described: Mapping[str, Any]) -> None:
        self.name = name
        values = described.get("values", [])
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self.labels = None if numeric else [_label(value) for value in values]
        ratio = max(values) / min(values) if values and numeric and min(values) > 0 else 1.0
        self.log = bool(described.get("log")) or ratio >= 100
        self.ticks = sorted(values) if values and numeric else None

    def place(self, value: Any) -> float:
        return float(self.labels.index(_label(value))) if self.labels is not None else float(value)

    def scale(self, value: Any) -> float:
        """As `place`, on a logarithmic axis the logarithm."""
        return float(np.log10(self.place(value))) if self.log else self.place(value)

    def style(self, axes: Axes) -> None:
        if self.log:
            axes.set_xscale("log")
        if self.labels is not None:
            axes.set_xticks(range(len(self.labels)), self.labels)
            axes.set_xlim(-0.5, len(self.labels) - 0.5)
        elif self.ticks is not None and len(self.ticks) <= 8:
            axes.set_xticks(self.ticks, [_label(tick) for tick in self.ticks])
            axes.minorticks_off()
        axes.set_xlabel(self.name)


def _label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(_label, value)) if isinstance(value, list | tuple) else str(value)


def _list_scored(result: SweepResult, metric: str, *states: str) -> list[TrialRecord]:
    return [trial for trial in result.trials if trial.state in states and metric in trial.last]


def _list_axes(result: SweepResult) -> list[_Axis]:
    return [_Axis(name, result.settings["space"][name]) for name in result.settings["order"]]


def plot_history(result: SweepResult, objective: Objective) -> str:
    """Score of every trial in the order of planning, and the best so far."""
    with figure_style():
        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        finished = _list_scored(result, objective.metric, "finished")
        numbers = [trial.number for trial in finished]
        values = [trial.last[objective.metric] for trial in finished]
        axes.plot(numbers, values, "o", color=BLUE, markersize=5, label="finished")
        stopped = _list_scored(result, objective.metric, "stopped")
        if stopped:
            heights = [trial.last[objective.metric] for trial in stopped]
            axes.plot(
                [trial.number for trial in stopped], heights, "x", color=ORANGE, markersize=6, label="stopped early"
            )
        if finished:
            best = np.maximum.accumulate(values) if objective.mode == "max" else np.minimum.accumulate(values)
            axes.step(numbers, best, where="post", color=INK, lw=1, label="best so far")
        axes.set(xlabel="trial", ylabel=objective.metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return render_svg(figure, f"history-{objective.metric}")


def plot_courses(result: SweepResult, objective: Objective) -> str | None:
    """Score by pass, a line per trial, the best one on top; None if no trial reported more than once."""
    ranked = result.rank()
    courses = [trial for trial in result.trials if len(trial.reports) > 1]
    if not courses:
        return None
    with figure_style():
        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        kinds = (("stopped", ORANGE, ":", "stopped early"), ("finished", PALE, "-", "finished"))
        for state, colour, dash, label in kinds:
            for place, trial in enumerate(item for item in courses if item.state == state):
                _draw_course(axes, trial, objective.metric, color=colour, ls=dash, label=label if not place else None)
        if ranked and ranked[0] in courses:
            label = f"best: trial {ranked[0].number}"
            _draw_course(axes, ranked[0], objective.metric, color=BLUE, lw=2.4, label=label)
        axes.set(xlabel="passes", ylabel=objective.metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return render_svg(figure, "courses")


def _draw_course(axes: Axes, trial: TrialRecord, metric: str, **style: Any) -> None:
    lines = [line for line in trial.reports if metric in line]
    axes.plot([line[EPOCH] for line in lines], [line[metric] for line in lines], **({"lw": 1.0} | style))


def plot_slices(result: SweepResult, objective: Objective) -> list[str]:
    """A panel per varied setting: its value against the score."""
    panels = []
    for place, axis in enumerate(_list_axes(result)):
        with figure_style():
            figure = Figure(figsize=(4.2, 2.7), layout="constrained")
            axes = figure.add_subplot()
            for state, colour, mark in (("stopped", ORANGE, "x"), ("finished", BLUE, "o")):
                trials = _list_scored(result, objective.metric, state)
                axes.plot(
                    [axis.place(trial.parameters[axis.name]) for trial in trials],
                    [trial.last[objective.metric] for trial in trials],
                    mark,
                    color=colour,
                    markersize=5,
                )
            axis.style(axes)
            axes.set_ylabel(objective.metric)
            panels.append(render_svg(figure, f"slice-{place}-{objective.metric}"))
    return panels


def plot_parallel(result: SweepResult, objective: Objective) -> str | None:
    """All varied settings side by side, a line per finished trial, darker where the score is better."""
    trials, axes_of = _list_scored(result, objective.metric, "finished"), _list_axes(result)
    if len(trials) < 2 or len(axes_of) < 2:
        return None
    scores = np.array([trial.last[objective.metric] for trial in trials])
    goodness = scores if objective.mode == "max" else -scores
    shade = matplotlib.colormaps["Blues"]
    norm = Normalize(goodness.min() - 0.35 * (np.ptp(goodness) or 1.0), goodness.max())
    columns = [np.array([axis.scale(trial.parameters[axis.name]) for trial in trials]) for axis in axes_of] + [scores]
    with figure_style():
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        axes = figure.add_subplot()
        heights = [(column - column.min()) / (np.ptp(column) or 1.0) for column in columns]
        for number in np.argsort(goodness):
            colour = shade(norm(goodness[number]))
            axes.plot(range(len(columns)), [height[number] for height in heights], color=colour, lw=1.4)
        for place, column in enumerate(columns):
            axes.axvline(place, color=PALE, lw=0.8)
            ends = [(column.min(), -0.03, "top"), (column.max(), 1.03, "bottom")]
            for value, height, side in ends:
                text = _label_end(axes_of[place], value) if place < len(axes_of) else f"{value:.3g}"
                axes.text(place, height, text, ha="center", va=side, fontsize=9)
        names = [_break_name(axis.name) for axis in axes_of] + [objective.metric]
        axes.set_xticks(range(len(columns)), names, fontsize=9)
        axes.set(ylim=(-0.12, 1.12), yticks=[], xlim=(-0.4, len(columns) - 0.6))
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, pad=8)
        return render_svg(figure, f"parallel-{objective.metric}")


def _label_end(axis: _Axis, value: float) -> str:
    return axis.labels[round(value)] if axis.labels is not None else f"{10**value if axis.log else value:.3g}"


def _break_name(name: str) -> str:
    return name.replace(".", ".\n")


def plot_field(result: SweepResult, objective: Objective, name: str = "", alt: str = "") -> str | None:
    """Score against one numeric setting, with intervals, and a line for every combination of the others' values.

    The setting is the numeric one with the most values. Intervals are those that the trials report as `METRIC_low` and
    `METRIC_high`; where trials repeat a value, points are means and, without reported intervals, bars reach from the
    least to the greatest. None where there would be more lines than can be told apart. `name` and `alt`: see
    `figures.render_svg`; of several on one page each needs a name of its own.
    """
    axes_of = _list_axes(result)
    trials = _list_scored(result, objective.metric, "finished")
    numeric = [axis for axis in axes_of if axis.labels is None]
    if not trials or not numeric:
        return None
    axis = max(numeric, key=lambda one: len({trial.parameters[one.name] for trial in trials}))
    others = [one.name for one in axes_of if one is not axis]
    groups: dict[tuple[str, ...], list[TrialRecord]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        groups.setdefault(tuple(_label(trial.parameters[name]) for name in others), []).append(trial)
    if len(groups) > len(LINES):
        return None
    with figure_style():
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.add_subplot()
        for (labels, own), (colour, dash, mark) in zip(groups.items(), LINES, strict=False):
            points = _gather_points(axis, own, objective.metric)
            spots, means, lows, highs = (np.array(column) for column in zip(*points, strict=True))
            title = ", ".join(
                f"{name.rsplit('.', 1)[-1].replace('_', ' ')} {label}"
                for name, label in zip(others, labels, strict=True)
            )
            axes.plot(spots, means, color=colour, ls=dash, marker=mark, markersize=5, label=title or None)
            axes.vlines(spots, lows, highs, color=colour, lw=1.2)
        axis.style(axes)
        axes.set(xlabel=axis.name.rsplit(".", 1)[-1].replace("_", " "), ylabel=objective.metric)
        if others:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return render_svg(figure, name or f"field-{objective.metric}", alt)


def _gather_points(axis: _Axis, trials: Sequence[TrialRecord], metric: str) -> list[tuple[float, float, float, float]]:
    """Per value, ascending: place, mean score, and the ends of its interval."""
    points = []
    for spot in sorted({axis.place(trial.parameters[axis.name]) for trial in trials}):
        same = [trial.last for trial in trials if axis.place(trial.parameters[axis.name]) == spot]
        scores = [line[metric] for line in same]
        low = [line[f"{metric}_low"] for line in same if f"{metric}_low" in line]
        high = [line[f"{metric}_high"] for line in same if f"{metric}_high" in line]
        known = len(low) == len(high) == len(same)
        ends = (float(np.mean(low)), float(np.mean(high))) if known else (min(scores), max(scores))
        points.append((spot, float(np.mean(scores)), *ends))
    return points


def plot_tradeoff(result: SweepResult, first: Objective, second: Objective) -> str:
    """Two sought metrics against each other; the trials that no other beats in both are joined."""
    trials = [trial for trial in _list_scored(result, first.metric, "finished") if second.metric in trial.last]
    with figure_style():
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.add_subplot()
        points = np.array([[trial.last[second.metric], trial.last[first.metric]] for trial in trials]).reshape(-1, 2)
        axes.plot(*points.T, "o", color=BLUE, markersize=5)
        signs = np.array([-1.0 if item.mode == "max" else 1.0 for item in (second, first)])
        costs = points * signs
        front = [
            place for place, cost in enumerate(costs) if not ((costs <= cost).all(1) & (costs < cost).any(1)).any()
        ]
        front.sort(key=lambda place: points[place][0])
        axes.plot(*points[front].T, color=ORANGE, ls="--", marker="o", markersize=6)
        for place in front:
            axes.annotate(f" {trials[place].number}", points[place], fontsize=9)
        axes.set(xlabel=second.metric, ylabel=first.metric)
        return render_svg(figure, f"tradeoff-{first.metric}-{second.metric}")

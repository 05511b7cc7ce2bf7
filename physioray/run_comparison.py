"""Compares finished runs: which differences in balanced accuracy hold for other people, and which pairs do not compare.

The paired test is that of `physioray.compare`: both runs are scored on the same windows of the same people, drawn
anew together, under the same seeds.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from physioray.analysis_figures import render_png
from physioray.compare import ComparisonError, PairedDifference, compare_paired
from physioray.figures import BLUE, ORANGE, PALE, figure_style, render_svg
from physioray.results import (
    EVALUATIONS,
    FEATURES,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    ScoreRow,
    read_predictions,
    read_results,
)
from physioray.score_tables import EVALUATION_TITLES
from physioray.signals import TASKS, find_task
from physioray.storage import Location, StorageError, open_location

PAGE_FILE = "comparison.html"
COMPARISON_FILE = "comparison.json"

SAME_FOLDS = 0.99
"""Share of windows on which band powers must predict the same in both runs; with other folds they do not."""

FEW_SUBJECTS = 10
"""Below so many people a bootstrap by subject gives intervals that are too narrow."""


@dataclass(frozen=True)
class FinishedRun:
    """A run's scores and predictions.

    Attributes:
        name: what it is called beside the others.
        rows: its scores.
        predictions: see `results.prediction_schema`.
        modalities: what its features are made of; empty if the run does not say.
    """

    name: str
    rows: Sequence[ScoreRow]
    predictions: pa.Table
    modalities: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the cohort it was scored on."""
        return self.rows[0].cohort_fingerprint

    @property
    def simulated(self) -> bool:
        """True if it was scored on simulated nights."""
        return any(row.simulated for row in self.rows)

    def count_training(self, task: str, evaluation: str) -> int:
        """People that the scored heads were trained on: the largest training set, whose predictions are kept."""
        counts = [row.training_subjects for row in self.rows if (row.task, row.evaluation) == (task, evaluation)]
        return max(counts, default=0)

    def select(self, task: str, evaluation: str, features: str | None = None) -> pa.Table:
        """Predictions of a task by an evaluation, of the best known features that have any."""
        chosen = self.predictions.filter((pc.field("task") == task) & (pc.field("evaluation") == evaluation))
        found = pc.unique(chosen.column("features")).to_pylist()
        wanted = features or next((name for name in FEATURES if name in found), "")
        return chosen.filter(pc.field("features") == wanted)


@dataclass(frozen=True)
class Comparison:
    """The first run against each of the others.

    Attributes:
        names: of the runs, the first one that the others are compared with.
        differences: other less first, by task and evaluation.
        refusals: pairs that do not compare, and why.
        notes: what a reader must know of the differences.
        simulated: True if the first run, and so every one that compares with it, was scored on simulated nights.
    """

    names: Sequence[str]
    differences: Sequence[PairedDifference]
    refusals: Sequence[str]
    notes: Sequence[str]
    simulated: bool


def open_run(path: str, name: str) -> FinishedRun:
    """Read a run's scores and predictions.

    Raises:
        StorageError: the folder lacks one of them, or holds those of several strategies.
    """
    folder = open_location(path)
    for file in (RESULTS_FILE, PREDICTIONS_FILE):
        if not (folder / file).exists():
            raise StorageError(f"A run to compare must hold {file}, but {folder} has none. Evaluate it first.")
    rows = read_results(folder / RESULTS_FILE)
    if not rows:
        raise StorageError(f"A run to compare must hold scores, but {folder / RESULTS_FILE} is empty.")
    strategies = list(dict.fromkeys(row.pretraining for row in rows if row.features == FEATURES[0]))
    if len(strategies) > 1:
        raise StorageError(
            f"A run to compare must hold one strategy, but {folder} holds {', '.join(strategies)}, as tables do. "
            "Score the runs one by one with physioray evaluate, and compare the folders that it writes."
        )
    model = (folder / "config.json").read_json().get("model") if (folder / "config.json").exists() else None
    sizes = model.get("model", model) if isinstance(model, dict) else {}  # late fusion holds a model within
    return FinishedRun(name, rows, read_predictions(folder / PREDICTIONS_FILE), tuple(sizes.get("modalities", ())))


def name_runs(paths: Sequence[str]) -> list[str]:
    """Short names of runs' folders: their last part, or as much of the path as tells them apart.

    Raises:
        ValueError: there are fewer than two, or the same folder stands there twice.
    """
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    if len(paths) < 2 or len({tuple(item) for item in parts}) < len(parts):
        raise ValueError(f"A comparison needs two or more different runs, but got {', '.join(paths) or 'none'}.")
    depth = 1
    while len({tuple(item[-depth:]) for item in parts}) < len(parts):
        depth += 1
    return ["/".join(item[-depth:]) for item in parts]


def compare_runs(runs: Sequence[FinishedRun], *, draws: int = 1000, seed: int = 0) -> Comparison:
    """Compare the first run with each of the others, on every task and evaluation that both have."""
    differences: list[PairedDifference] = []
    refusals, notes = [], []
    first = runs[0]
    for other in runs[1:]:
        if other.fingerprint != first.fingerprint:
            refusals.append(
                f"{other.name} cannot be compared with {first.name}: it was scored on another cohort "
                f"({other.fingerprint[:12]} and not {first.fingerprint[:12]})."
            )
            continue
        common = 0
        for task in TASKS:
            for evaluation in EVALUATIONS:
                tables = [run.select(task, evaluation) for run in (other, first)]
                if not all(len(table) for table in tables):
                    continue
                common += 1
                try:
                    _check_folds(other, first, task, evaluation)
                    one, two, note = _share_windows(tables[0], tables[1], other.name, first.name)
                    found = compare_paired(one, two, task, evaluation=evaluation, draws=draws, seed=seed)
                except ComparisonError as error:
                    title = f"{find_task(task).title}, {title_evaluation(evaluation)}"
                    refusals.append(f"{title}: {other.name} cannot be compared with {first.name}: {error}")
                    continue
                notes += [note] if note else []
                differences.append(replace(found, first=other.name, second=first.name))
        if not common:
            refusals.append(
                f"{other.name} cannot be compared with {first.name}: they have no task that both were evaluated on "
                f"in the same way."
            )
    people = [item.subjects for item in differences]
    if people and min(people) < FEW_SUBJECTS:
        notes.append(f"With {min(people)} people the intervals are too narrow: take them as a hint.")
    if len(differences) > 1:
        notes.append(
            f"{len(differences)} intervals of 95 %: one in twenty excludes 0 by chance, so expect "
            f"{len(differences) / 20:.1f} such here."
        )
    notes = list(dict.fromkeys(notes))
    return Comparison([run.name for run in runs], differences, refusals, notes, first.simulated)


def _check_folds(one: FinishedRun, other: FinishedRun, task: str, evaluation: str) -> None:
    """Refuse runs whose heads were trained on different people.

    Raises:
        ComparisonError: says what differs.
    """
    splits = [sorted(pc.unique(run.select(task, evaluation).column("split")).to_pylist()) for run in (one, other)]
    if splits[0] != splits[1]:
        ways = [", ".join(item).replace("_", " ") for item in splits]
        raise ComparisonError(f"one was scored by {ways[0]}, the other by {ways[1]}.")
    counts = [run.count_training(task, evaluation) for run in (one, other)]
    if counts[0] != counts[1]:
        raise ComparisonError(f"their folds differ, heads were trained on {counts[0]} and {counts[1]} people.")
    floors = [run.select(task, evaluation, "band_powers") for run in (one, other)]
    alike = bool(one.modalities) and sorted(one.modalities) == sorted(other.modalities)
    if alike and all(len(table) for table in floors):
        # Band powers depend on the modalities alone: under the same folds they predict the same.
        _, here, there = np.intersect1d(_key_windows(floors[0]), _key_windows(floors[1]), return_indices=True)
        same = floors[0].column("predicted").to_numpy()[here] == floors[1].column("predicted").to_numpy()[there]
        if len(same) and same.mean() < SAME_FOLDS:
            raise ComparisonError(
                f"their folds differ, the same band powers predict otherwise on {1 - same.mean():.0%} of windows."
            )


def _key_windows(table: pa.Table) -> np.ndarray:
    """A number per row for its seed and window."""
    return (table.column("seed").to_numpy().astype(np.int64) << 40) + table.column("window_id").to_numpy()


def _share_windows(one: pa.Table, other: pa.Table, name: str, other_name: str) -> tuple[pa.Table, pa.Table, str]:
    """Both tables on the windows and seeds that both scored, and a sentence if that leaves any out.

    Raises:
        ComparisonError: they share no seed, less than half of their windows, or hold a window twice.
    """
    keys = [_key_windows(table) for table in (one, other)]
    if any(len(np.unique(key)) < len(key) for key in keys):
        raise ComparisonError("a run holds several predictions of the same window. Evaluate it again.")
    shared = np.intersect1d(keys[0], keys[1])
    if not set(pc.unique(one.column("seed")).to_pylist()) & set(pc.unique(other.column("seed")).to_pylist()):
        raise ComparisonError("they share no seed.")
    if 2 * len(shared) < max(len(key) for key in keys):
        raise ComparisonError(f"they share only {len(shared):,} of {max(map(len, keys)):,} scored windows and seeds.")
    left = sum(len(key) - len(shared) for key in keys)
    kept = [table.filter(pa.array(np.isin(key, shared))) for table, key in zip((one, other), keys, strict=True)]
    note = f"{name} and {other_name} are compared on what both scored; {left:,} predictions of one alone are left out."
    return kept[0], kept[1], note if left else ""


def title_evaluation(name: str) -> str:
    """A way to evaluate as tables write it."""
    return EVALUATION_TITLES.get(name, name.replace("_", " "))


def judge(difference: PairedDifference) -> str:
    """`above`, `below`, or that the difference cannot be told from 0."""
    if difference.is_above or difference.is_below:
        return "above" if difference.is_above else "below"
    return "no interval" if difference.low is None else "cannot be told from 0"


def describe_comparison(comparison: Comparison) -> str:
    """The differences as a table for the terminal, refusals and notes below."""
    sink = io.StringIO()
    console = Console(file=sink, width=130, highlight=False, color_system=None)
    if comparison.simulated:
        console.print("SIMULATED SIGNALS: these scores say nothing about people.")
    first = comparison.names[0]
    if comparison.differences:
        table = Table("Task", "Evaluation", "Run", "Its score", f"{first}", "Difference", "95 % by subject", "Verdict")
        for item in comparison.differences:
            table.add_row(
                find_task(item.task).title,
                title_evaluation(item.evaluation),
                item.first,
                f"{item.first_value:.3f}",
                f"{item.second_value:.3f}",
                f"{item.value:+.3f}",
                "-" if item.low is None else f"{item.low:+.3f}, {item.high:+.3f}",
                judge(item),
            )
        console.print(table)
        people = sorted({item.subjects for item in comparison.differences})
        console.print(f"Balanced accuracy, run less {first}; the same people drawn for both ({_join(people)} people).")
    for sentence in (*comparison.refusals, *comparison.notes):
        console.print(sentence, markup=False)
    return sink.getvalue()


def _join(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def plot_comparison(comparison: Comparison) -> Figure:
    """Differences with their intervals, one panel per task, filled where the interval excludes 0.

    Raises:
        ValueError: there is no difference to draw.
    """
    tasks = list(dict.fromkeys(item.task for item in comparison.differences))
    if not tasks:
        raise ValueError("A figure of differences needs at least one, but no pair of runs compares.")
    rows = list(dict.fromkeys((item.first, item.evaluation) for item in comparison.differences))
    with figure_style():
        figure = Figure(figsize=(2.6 + 3.2 * len(tasks), 1.0 + 0.42 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            axes.axvline(0, color=PALE, lw=1)
            for item in comparison.differences:
                if item.task == task:
                    height = rows.index((item.first, item.evaluation))
                    told = item.is_above or item.is_below
                    colour = BLUE if item.value >= 0 else ORANGE
                    if item.low is not None and item.high is not None:
                        axes.hlines(height, item.low, item.high, color=colour, lw=1.6)
                    face = colour if told else "white"
                    mark = "^" if item.value >= 0 else "v"
                    axes.plot(item.value, height, mark, color=colour, markerfacecolor=face, markersize=7)
            axes.set(title=find_task(task).title, xlabel=f"difference from {comparison.names[0]}")
        panels[0].set_yticks(range(len(rows)), [f"{name}\n{title_evaluation(way)}" for name, way in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return figure


def write_comparison(comparison: Comparison, out: Location) -> Location:
    """Write the page, the figure as SVG and PNG, and the numbers as JSON.

    Returns:
        Where the page stands.
    """
    figure = plot_comparison(comparison) if comparison.differences else None
    drawn = render_svg(figure, "comparison") if figure is not None else None
    if figure is not None:
        (out / "comparison.png").write_bytes(render_png(figure))
    described = asdict(comparison)
    described["differences"] = [asdict(item) | {"verdict": judge(item)} for item in comparison.differences]
    (out / COMPARISON_FILE).write_json(described)
    text = resources.files("physioray.templates").joinpath("comparison.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    rows = [
        (item, find_task(item.task).title, title_evaluation(item.evaluation), judge(item))
        for item in comparison.differences
    ]
    page = out / PAGE_FILE
    page.write_text(template.render(comparison=comparison, rows=rows, figure=drawn))
    return page

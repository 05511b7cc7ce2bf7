"""Arranges score rows as tables: what was probed down, tasks across; the same for the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from physioray.metrics import AGGREGATE, METRICS, find_metric
from physioray.paper.reference import read_paper
from physioray.results import (
    CONVERGED,
    EVALUATIONS,
    FEATURES,
    FINETUNE,
    FROZEN,
    RECIPE,
    SCRATCH,
    ScoreRow,
)
from physioray.signals import SCOPES, TASKS, WINDOWS, find_task

FEATURE_TITLES = {"pretrained": "Pretrained encoder", "untrained": "Untrained encoder", "band_powers": "Band powers"}
EVALUATION_TITLES = {
    CONVERGED: "converged probe",
    RECIPE: "paper's recipe",
    FINETUNE: "finetuned",
    FROZEN: "trained with a frozen trunk",
    SCRATCH: "trained from scratch",
}

CLOSE = 1.15
"""Training-set sizes closer than this factor, or by one subject, can be one size (see `group_sizes`)."""

PAPER_TITLE = "Fang et al. 2024, Table 1, pretrained on all modalities: other data (500 training subjects)"
PAPER_SCORES: Mapping[str, tuple[float, float]] = {
    column.task: (cell.value, cell.spread)
    for column, cell in read_paper().find_table(1).list_cells("multimae_drop", "probe")
    if cell.value is not None and cell.spread is not None
}
"""Balanced accuracy and spread over seeds of arXiv 2410.16424, Table 1, 'Pretrained All'."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score over its seeds.

    Attributes:
        value: mean over the seeds; None where there is none.
        low, high: interval by subject; mean over the seeds of either bound.
        spread: standard deviation over the seeds; None with one seed.
        seeds: how many.
        above_chance: True if the interval lies above guessing, None where chance or interval do not exist.
        note: why there is no value, or what to know of it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    seeds: int = 0
    above_chance: bool | None = None
    note: str = ""

    def describe(self) -> str:
        """The cell as text: value, interval, spread."""
        if self.value is None:
            return "-"
        parts = [f"{self.value:.3f}"]
        if self.low is not None and self.high is not None:
            parts.append(f"[{self.low:.3f}, {self.high:.3f}]")
        if self.spread is not None:
            parts.append(f"±{self.spread:.3f}")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of a table: its title, and a cell per column."""

    title: str
    subtitle: str
    features: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Titles of columns and the lines below them."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def list_tasks(rows: Sequence[ScoreRow]) -> tuple[str, ...]:
    """Tasks that have a score or a reason for having none, in the order of `signals.TASKS`."""
    found = {row.task for row in rows}
    return tuple(task for task in TASKS if task in found)


def list_skipped(rows: Sequence[ScoreRow]) -> list[str]:
    """One sentence per task without any score, and per kind of features without any: which and why."""
    scored = {row.task for row in rows if row.value is not None}
    sentences = {}
    for row in rows:
        if row.task not in scored and row.note and row.task not in sentences:
            sentences[row.task] = f"{find_task(row.task).title}: {row.note}."
    kinds: dict[str, list[ScoreRow]] = {}
    for row in rows:
        if row.task in scored:
            kinds.setdefault(row.features, []).append(row)
    for features, members in kinds.items():
        note = next((row.note for row in members if row.note), "")
        if note and all(row.value is None for row in members):
            sentences[features] = f"{FEATURE_TITLES.get(features, features)}: {note}."
    return list(sentences.values())


def tabulate_headline(rows: Sequence[ScoreRow]) -> ScoreTable:
    """Balanced accuracy per task, and with several tasks the aggregate; the largest training size of each."""
    rows = [row for row in rows if row.scope == WINDOWS]
    columns = [(task, METRICS[0]) for task in list_tasks(rows)]
    titles = [find_task(task).title for task, _ in columns]
    # Of a single task an aggregate says the same in other units.
    if len({row.task for row in rows if row.value is not None}) > 2 and any(row.task == AGGREGATE for row in rows):
        columns.append((AGGREGATE, AGGREGATE))
        titles.append("Aggregate")
    return _tabulate(_keep_largest(rows), columns, titles)


def find_chance(rows: Sequence[ScoreRow], task: str) -> tuple[float, str]:
    """Balanced accuracy of a guess, and a note where the cohort lacks classes of the task.

    Where classes are missing from what was scored, guessing scores one over the number of those that occur.
    """
    found = find_task(task)
    occurring = [row.classes for row in rows if (row.task, row.scope) == (task, WINDOWS) and row.classes > 0]
    if not occurring or min(occurring) == len(found.classes):
        return found.chance, ""
    fewest = min(occurring)
    note = f"{found.title}: only {fewest} of {len(found.classes)} classes occur, so guessing scores 1/{fewest}"
    return 1.0 / fewest, note


def tabulate_scopes(rows: Sequence[ScoreRow]) -> ScoreTable | None:
    """Balanced accuracy where something other than all windows is counted; None without any such score."""
    columns = [(task, scope) for task in list_tasks(rows) for scope in find_task(task).scopes if scope != WINDOWS]
    kept = _keep_largest([row for row in rows if row.metric == METRICS[0] and row.scope != WINDOWS])
    lines = []
    for key in _list_keys(kept):
        members = [row for row in kept if _key(row) == key]
        cells = [merge_seeds([row for row in members if (row.task, row.scope) == column]) for column in columns]
        lines.append(_make_line(key, cells))
    titles = tuple(f"{find_task(task).title}, {SCOPES[scope]}" for task, scope in columns)
    return ScoreTable(columns=titles, rows=tuple(lines)) if lines else None


def tabulate_metric(rows: Sequence[ScoreRow], task: str) -> ScoreTable:
    """All metrics of one task; the largest training size of each."""
    rows = [row for row in rows if row.scope == WINDOWS]
    return _tabulate(_keep_largest(rows), [(task, name) for name in METRICS], [find_metric(name) for name in METRICS])


def tabulate_sizes(rows: Sequence[ScoreRow], task: str) -> ScoreTable | None:
    """Balanced accuracy of a task against the number of training subjects; None with a single number."""
    mine = [row for row in rows if row.task == task and row.metric == METRICS[0] and row.value is not None]
    mine = [row for row in mine if row.scope == WINDOWS]
    sizes = _name_sizes(mine)
    levels = sorted(set(sizes.values()))
    if len(levels) < 2:
        return None
    lines = []
    for key in _list_keys(mine):
        members = [row for row in mine if _key(row) == key]
        cells = [merge_seeds([row for row in members if sizes[row.training_subjects] == level]) for level in levels]
        lines.append(_make_line(key, cells))
    return ScoreTable(columns=tuple(f"{level} subjects" for level in levels), rows=tuple(lines))


def _tabulate(rows: Sequence[ScoreRow], columns: Sequence[tuple[str, str]], titles: Sequence[str]) -> ScoreTable:
    lines = []
    for key in _list_keys(rows):
        members = [row for row in rows if _key(row) == key]
        cells = [merge_seeds([row for row in members if (row.task, row.metric) == column]) for column in columns]
        if any(cell.value is not None for cell in cells):
            lines.append(_make_line(key, cells))
    return ScoreTable(columns=tuple(titles), rows=tuple(lines))


def _make_line(key: tuple[str, str, str], cells: Sequence[Cell]) -> TableRow:
    evaluation, features, pretraining = key
    title = FEATURE_TITLES.get(features, features)
    if features == "pretrained" and pretraining:
        title = f"{title} ({pretraining})"
    subtitle = EVALUATION_TITLES.get(evaluation, evaluation)
    return TableRow(title=title, subtitle=subtitle, features=features, cells=tuple(cells))


def _key(row: ScoreRow) -> tuple[str, str, str]:
    return row.evaluation, row.features, row.pretraining


def _list_keys(rows: Sequence[ScoreRow]) -> list[tuple[str, str, str]]:
    def place(names: Sequence[str], name: str) -> int:
        return list(names).index(name) if name in names else len(names)

    keys = {_key(row) for row in rows}
    return sorted(keys, key=lambda key: (place(EVALUATIONS, key[0]), place(FEATURES, key[1]), key))


def group_sizes(rows: Iterable[ScoreRow]) -> tuple[tuple[int, ...], ...]:
    """Training-set sizes, ascending; each as the numbers of subjects that count as one size.

    Folds and tasks of one size differ a little in how many subjects they hold. Neighbouring numbers are one size
    unless some score was made at both under the same seed.
    """
    owners: dict[int, set[tuple[object, ...]]] = {}
    for row in rows:
        owners.setdefault(row.training_subjects, set()).add((_key(row), row.task, row.metric, row.scope, row.seed))
    groups: list[list[int]] = []
    taken: set[tuple[object, ...]] = set()
    for size in sorted(owners):
        close = groups and size <= max(groups[-1][0] * CLOSE, groups[-1][0] + 1)
        if close and not taken & owners[size]:
            groups[-1].append(size)
            taken |= owners[size]
        else:
            groups.append([size])
            taken = set(owners[size])
    return tuple(tuple(group) for group in groups)


def _name_sizes(rows: Iterable[ScoreRow]) -> dict[int, int]:
    """By number of training subjects, the size it belongs to, named by its largest number."""
    return {number: group[-1] for group in group_sizes(rows) for number in group}


def _keep_largest(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Rows of the largest training size of every line and task."""
    lines: dict[tuple[object, ...], list[ScoreRow]] = {}
    for row in rows:
        lines.setdefault((*_key(row), row.task), []).append(row)
    levels = {key: _name_sizes(members) for key, members in lines.items()}

    def is_largest(row: ScoreRow) -> bool:
        level = levels[(*_key(row), row.task)]
        return level[row.training_subjects] == max(level.values())

    return [row for row in rows if is_largest(row)]


def merge_seeds(rows: Sequence[ScoreRow]) -> Cell:
    """One cell of the rows of one score under all its seeds."""
    known = [row for row in rows if row.value is not None]
    note = next((row.note for row in rows if row.note), "")
    if not known:
        return Cell(value=None, note=note)
    values = np.array([row.value for row in known], float)
    bounds = [(row.low, row.high) for row in known if row.low is not None and row.high is not None]
    low, high = (float(x) for x in np.mean(bounds, axis=0)) if bounds else (None, None)
    above = None
    if low is not None and known[0].metric == METRICS[0]:
        chances = [row.chance for row in known if row.chance is not None]
        above = low > max(chances) if chances else None
    elif low is not None and known[0].metric == AGGREGATE:
        above = low > 0  # scaled so that guessing gives zero
    return Cell(
        value=float(values.mean()),
        low=low,
        high=high,
        spread=float(values.std(ddof=1)) if len(values) > 1 else None,
        seeds=len(values),
        above_chance=above,
        note=note,
    )

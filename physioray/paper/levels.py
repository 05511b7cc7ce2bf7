"""Finds, among the scores of many runs, those that belong into one cell: one strategy, task, metric, training size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from physioray.metrics import AGGREGATE
from physioray.paper.reference import PROBE
from physioray.results import CROSS_VALIDATION, PROBES, TEST, ScoreRow
from physioray.score_tables import group_sizes
from physioray.signals import TASKS, WINDOWS

End = Literal["smallest", "largest"]

NOT_RUN, NO_LABELS, SKIPPED, UNDEFINED, OTHER_SIZE = "not run", "no labels", "skipped", "undefined", "not at this size"
"""Why a cell is empty, in two words; a sentence stands beside."""


class TablesError(ValueError):
    """Scores that cannot stand in one table; the message says what they do not share."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The scores of one cell, or why there are none.

    Attributes:
        rows: one per seed.
        status: empty if there are rows, else one of the reasons above.
        note: what a reader must know: the reason as a sentence, or what to mind.
        partial: True for an aggregate over fewer tasks than the paper's, which compares with nothing.
    """

    rows: tuple[ScoreRow, ...] = ()
    status: str = ""
    note: str = ""
    partial: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of training subjects, ascending; several where folds or seeds differ."""
        return tuple(sorted({row.training_subjects for row in self.rows}))


def name_line(row: ScoreRow) -> str:
    """What stands in the table's first column: the strategy, or the floor that a probe stands on."""
    return row.features if row.evaluation in PROBES and row.features != "pretrained" else row.pretraining


def find_kind(evaluation: str) -> str:
    """The paper's word for an evaluation: both probes are `probe`."""
    return PROBE if evaluation in PROBES else evaluation


class ScoreBook:
    """All scores of one cohort, by strategy, evaluation, task and training-set size.

    Scores on validation subjects are left out: they served selection. Where a line has scores of several settings,
    those of the settings with most scores are taken, and the others are spoken of.
    """

    def __init__(self, rows: Iterable[ScoreRow]) -> None:
        """Sort scores into lines.

        Raises:
            TablesError: they are of several cohorts.
        """
        known = [row for row in rows if row.split in (TEST, CROSS_VALIDATION)]
        cohorts = sorted({row.cohort_fingerprint for row in known})
        if len(cohorts) > 1:
            raise TablesError(
                "The scores of a table must be of one cohort, but these are of "
                f"{', '.join(name[:12] for name in cohorts)}. Make one set of tables per cohort."
            )
        splits = {row.split for row in known if row.value is not None}
        self.split = TEST if TEST in splits or not splits else CROSS_VALIDATION
        self.simulated = any(row.simulated for row in known)
        self._lines: dict[tuple[str, str], list[ScoreRow]] = {}
        self._other_settings: dict[tuple[str, str], int] = {}
        for row in known:
            if row.split == self.split or row.value is None:
                self._lines.setdefault((name_line(row), row.evaluation), []).append(row)
        for key, members in self._lines.items():
            self._lines[key] = self._keep_one_setting(key, members)
        self._levels = self._find_levels()
        self._unlabelled = self._find_unlabelled()

    def _keep_one_setting(self, key: tuple[str, str], members: Sequence[ScoreRow]) -> list[ScoreRow]:
        counts: dict[str, int] = {}
        for row in members:
            counts[row.config_hash] = counts.get(row.config_hash, 0) + (row.value is not None)
        self._other_settings[key] = len(counts) - 1
        chosen = max(counts, key=lambda name: counts[name])
        return [row for row in members if row.config_hash == chosen]

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """Name and evaluation of every line."""
        return tuple(self._lines)

    @property
    def tested(self) -> int:
        """The largest number of subjects that a score rests on."""
        return max((row.subjects for line in self._lines.values() for row in line), default=0)

    def find_levels(self, kind: str, task: str) -> tuple[tuple[int, ...], ...]:
        """Training-set sizes at which a task was scored, ascending; each as the numbers that count as one size."""
        return self._levels.get((kind, task), ())

    def find(
        self,
        name: str,
        evaluation: str,
        task: str,
        metric: str,
        *,
        end: End = "largest",
        scope: str = WINDOWS,
    ) -> Pick:
        """The scores of one cell.

        Args:
            name: strategy or floor, see `name_line`.
            evaluation: a name of `results.EVALUATIONS`.
            task, metric: see `results.ScoreRow`.
            end: at the largest training-set size there is, or at the smallest.
            scope: what is counted.
        """
        line = self._lines.get((name, evaluation), [])
        mine = [row for row in line if row.task == task and row.scope == scope]
        scored = [row for row in mine if row.metric == metric and row.value is not None]
        if not scored:
            if not mine and task in self._unlabelled:
                return Pick(status=NO_LABELS, note=self._unlabelled[task])
            return _explain_absence(name, mine, metric)
        level = self.find_levels(find_kind(evaluation), task)[-1 if end == "largest" else 0]
        # Where tasks were scored apart, each brought an aggregate of its own; one over all tasks goes first.
        scored.sort(key=_is_partial)
        chosen = _keep_one_per_seed([row for row in scored if row.training_subjects in level])
        if not chosen:
            there = ", ".join(str(size) for size in sorted({row.training_subjects for row in scored}))
            return Pick(
                status=OTHER_SIZE,
                note=f"{name} was not run with {describe_sizes(level)} training subjects, only with {there}",
            )
        notes = list(dict.fromkeys(row.note for row in chosen if row.note))
        if self._other_settings[name, evaluation]:
            notes.append(f"{name} has scores of {self._other_settings[name, evaluation]} further settings, not shown")
        missing = self._list_missing(line) if task == AGGREGATE else []
        if missing:
            notes = [f"over {', '.join(sorted(set(TASKS) - set(missing), key=list(TASKS).index))} only"]
        partial = bool(missing) or any(_is_partial(row) for row in chosen)
        return Pick(rows=tuple(chosen), note="; ".join(notes), partial=partial)

    def _list_missing(self, line: Sequence[ScoreRow]) -> list[str]:
        scored = {row.task for row in line if row.value is not None}
        return [task for task in TASKS if task not in scored]

    def _find_unlabelled(self) -> dict[str, str]:
        """By task that no line could be scored on for want of labels, the reason: it holds for every other line."""
        found: dict[str, str] = {}
        scored = {row.task for line in self._lines.values() for row in line if row.value is not None}
        for row in (row for line in self._lines.values() for row in line):
            if row.task not in scored and _lacks_labels(row.note):
                found.setdefault(row.task, row.note.removeprefix("skipped: "))
        return found

    def _find_levels(self) -> Mapping[tuple[str, str], tuple[tuple[int, ...], ...]]:
        found: dict[tuple[str, str], list[ScoreRow]] = {}
        for (_, evaluation), line in self._lines.items():
            for row in line:
                if row.value is not None and row.scope == WINDOWS:
                    found.setdefault((find_kind(evaluation), row.task), []).append(row)
        return {key: group_sizes(rows) for key, rows in found.items()}


def _is_partial(row: ScoreRow) -> bool:
    """True for an aggregate that says it is over some tasks only (see `evaluate.aggregate_rows`)."""
    return row.task == AGGREGATE and row.note.startswith("over ") and row.note.endswith("only")


def _keep_one_per_seed(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    # Floors stand in the files of every run, the same scores again and again.
    kept: dict[int, ScoreRow] = {}
    for row in rows:
        kept.setdefault(row.seed, row)
    return [kept[seed] for seed in sorted(kept)]


def _explain_absence(name: str, rows: Sequence[ScoreRow], metric: str) -> Pick:
    """Why a line has no score in a column; `rows` are those of the task."""
    if not rows:
        return Pick(status=NOT_RUN, note=f"{name} was not run")
    note = next((row.note for row in rows if row.metric == metric and row.note), "")
    if note and any(row.value is not None for row in rows):
        return Pick(status=UNDEFINED, note=note)
    note = note or next((row.note for row in rows if row.note), "no reason was written")
    return Pick(status=NO_LABELS if _lacks_labels(note) else SKIPPED, note=note.removeprefix("skipped: "))


def _lacks_labels(note: str) -> bool:
    return "no window has a label" in note or "carry labels of" in note


def describe_sizes(sizes: Sequence[int]) -> str:
    """Numbers of subjects as text: one number, or the smallest and largest of several."""
    if not sizes:
        return "no"
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"

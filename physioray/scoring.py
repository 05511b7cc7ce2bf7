"""Makes score rows and tables of predictions out of probabilities, the same for probes and for finetuning.

What is scored more than once: arousal also on windows of sleep alone, age also by the vote of a patient's windows,
and every person on their own. Intervals draw people anew; the aggregate draws the same people for all tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Int64

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.divisions import Plan
from physioray.metrics import (
    AGGREGATE,
    METRICS,
    aggregate_score,
    balance_confusions,
    bootstrap_by_subject,
    bound_draws,
    count_by_subject,
    count_confusion,
    draw_subjects,
    explain_rarity,
    explain_undefined,
    score_predictions,
    score_subjects,
)
from physioray.results import CROSS_VALIDATIONS, MOST_CLASSES, ScoreRow, prediction_schema, subject_score_schema
from physioray.signals import PATIENTS, SLEEP_WINDOWS, STAGES, UNKNOWN, WINDOWS, LookupMiss, Task, find_task

WAKE = STAGES.index("W")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one kind of features, and the predictions they were made from.

    Attributes:
        scores: see ScoreRow; a skipped task is a row without a value whose note says why.
        predictions: see `results.prediction_schema`; for several training sizes those of the largest.
        notes: sentences for the reader, for example a class that no training window had.
        subject_scores: see `results.subject_score_schema`; of every training size.
    """

    scores: list[ScoreRow]
    predictions: pa.Table
    notes: list[str] = field(default_factory=list)
    subject_scores: pa.Table = field(default_factory=lambda: subject_score_schema().empty_table())


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one plan's heads say of the windows they are tested on, all of them with a known label.

    Attributes:
        window_id: `(n,)` ascending.
        true: `(n,)` class numbers.
        probabilities: `(n, classes)`.
        subject: `(n,)` numbers of the people whose windows they are.
        training_subjects: people that the heads were trained on; the mean over folds, rounded.
    """

    window_id: Int64[np.ndarray, " n"]
    true: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]
    subject: Int64[np.ndarray, " n"]
    training_subjects: int

    @property
    def predicted(self) -> Int64[np.ndarray, " n"]:
        """The most probable class of each window."""
        return self.probabilities.argmax(1)

    def select(self, chosen: Bool[np.ndarray, " n"] | Int64[np.ndarray, " kept"]) -> Answers:
        """The windows where `chosen` is True, or those of the rows that it names, in that order."""
        names = ("window_id", "true", "probabilities", "subject")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in names})


@dataclass(frozen=True)
class SubjectCounts:
    """Who was scored, `(subjects,)`, and the confusion matrix of each, for the aggregate's interval."""

    subject: Int64[np.ndarray, " subjects"]
    confusions: Int[np.ndarray, "subjects true predicted"]


class ScoreBoard:
    """Gathers the rows and tables of one kind of features while it is evaluated.

    Args:
        cohort: whose windows are scored; its stages say which windows are sleep.
        config: tasks and bootstrap draws.
        features, pretraining, config_hash: written into every row.
    """

    def __init__(
        self, cohort: Cohort, config: ProbeConfig, *, features: str, pretraining: str, config_hash: str
    ) -> None:
        self.cohort, self.config = cohort, config
        self.common: dict[str, Any] = {"features": features, "pretraining": pretraining, "config_hash": config_hash}
        self.numbers, self.starts = cohort.read_column("window"), cohort.read_column("start")
        self.stages = cohort.read_labels("sleep")
        self.rows: list[ScoreRow] = []
        self.notes: list[str] = []
        self.tables: list[pa.Table] = []
        self.subject_tables: list[pa.Table] = []
        self.counts: dict[ScoreRow, SubjectCounts] = {}

    def note(self, sentence: str) -> None:
        """Keep a sentence for the reader, once."""
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)

    def skip(self, task: Task, evaluation: str, plan: Plan, reason: str) -> None:
        """Keep a row without a value that says why there is none."""
        row = self._make_row(task, evaluation, plan, metric=METRICS[0], value=None, note=f"skipped: {reason}")
        self.rows.append(row)

    def add(self, task: Task, evaluation: str, plan: Plan, answers: Answers) -> None:
        """Score one plan's answers in every scope of the task."""
        order = np.argsort(answers.window_id)
        answers = answers.select(order)
        for scope in task.scopes:
            found = self._limit(answers, task, scope)
            if scope != WINDOWS and not len(found.true):
                self.note(f"{task.title}, {scope.replace('_', ' ')}: no window could be scored.")
                continue
            rows = self._score(task, evaluation, plan, scope, found, len(answers.window_id))
            self.rows += rows
            if scope == WINDOWS:
                names, owner = np.unique(found.subject, return_inverse=True)
                confusions = count_by_subject(len(task.classes), found.true, found.predicted, owner, len(names))
                self.counts[rows[0]] = SubjectCounts(names.astype(np.int64), confusions)
            if scope != PATIENTS:
                self.subject_tables.append(self._tabulate_subjects(task, evaluation, plan, scope, found))
        if plan.largest:
            self.tables.append(self._tabulate(task, evaluation, plan, answers))

    def finish(self) -> Evaluation:
        """All that was gathered, with the aggregates."""
        tables = self.tables or [prediction_schema().empty_table()]
        people = self.subject_tables or [subject_score_schema().empty_table()]
        draws = self.config.bootstrap_draws
        return Evaluation(
            scores=self.rows + aggregate_rows(self.rows, self.config.tasks, self.counts, draws),
            predictions=pa.concat_tables(tables),
            notes=self.notes,
            subject_scores=pa.concat_tables(people),
        )

    def _limit(self, answers: Answers, task: Task, scope: str) -> Answers:
        """The answers that a scope counts: for patients one for each."""
        if scope == WINDOWS:
            return answers
        if scope == SLEEP_WINDOWS:
            stage = self.stages[answers.window_id]
            return answers.select((stage != UNKNOWN) & (stage != WAKE))
        if scope == PATIENTS:
            return vote_by_subject(answers, len(task.classes))
        raise LookupMiss(f"A scope of {task.name} must be windows, sleep_windows or patients, but is {scope!r}.")

    def _score(
        self, task: Task, evaluation: str, plan: Plan, scope: str, found: Answers, windows: int
    ) -> list[ScoreRow]:
        true, predicted, probabilities = found.true, found.predicted, found.probabilities
        scores = score_predictions(task, true, predicted, probabilities)
        draws = self.config.bootstrap_draws
        intervals = bootstrap_by_subject(task, true, predicted, probabilities, found.subject, draws, seed=0)
        reasons = explain_undefined(task, true, predicted)
        self.note(explain_rarity(task, true, found.subject) if scope == WINDOWS else "")
        return [
            self._make_row(
                task,
                evaluation,
                plan,
                metric=metric,
                value=scores[metric],
                bounds=intervals[metric],
                training_subjects=found.training_subjects,
                windows=windows if scope == PATIENTS else len(true),
                subjects=len(np.unique(found.subject)),
                note=reasons.get(metric, ""),
                scope=scope,
                classes=len(np.unique(true)),
            )
            for metric in METRICS
        ]

    def _make_row(
        self,
        task: Task,
        evaluation: str,
        plan: Plan,
        *,
        metric: str,
        value: float | None,
        bounds: tuple[float, float] | None = None,
        training_subjects: int = 0,
        windows: int = 0,
        subjects: int = 0,
        **more: Any,
    ) -> ScoreRow:
        return ScoreRow(
            **self.common,
            evaluation=evaluation,
            task=task.name,
            split=plan.split,
            metric=metric,
            value=value,
            low=bounds[0] if bounds and value is not None else None,
            high=bounds[1] if bounds and value is not None else None,
            seed=plan.seed,
            training_subjects=training_subjects,
            windows=windows,
            subjects=subjects,
            cohort_fingerprint=self.cohort.fingerprint,
            simulated=self.cohort.simulated,
            **more,
        )

    def _tabulate(self, task: Task, evaluation: str, plan: Plan, answers: Answers) -> pa.Table:
        ids, count = answers.window_id, len(answers.window_id)
        owners = [self.cohort.recordings[number] for number in self.cohort.locate(ids)[0]]
        columns: dict[str, object] = {
            "recording": [item.name for item in owners],
            "subject": [item.subject for item in owners],
            "window_id": ids,
            "window": self.numbers[ids],
            "start": self.starts[ids],
            "true": answers.true.astype(np.int8),
            "predicted": answers.predicted.astype(np.int8),
            "seed": np.full(count, plan.seed, np.int64),
        }
        for number in range(MOST_CLASSES):
            known = number < len(task.classes)
            columns[f"p{number}"] = answers.probabilities[:, number].astype(np.float32) if known else [None] * count
        texts = {"task": task.name, "evaluation": evaluation, "split": plan.split, "features": self.common["features"]}
        columns |= {name: [text] * count for name, text in texts.items()}
        schema = prediction_schema()
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _tabulate_subjects(self, task: Task, evaluation: str, plan: Plan, scope: str, found: Answers) -> pa.Table:
        names, owner = np.unique(found.subject, return_inverse=True)
        scores = score_subjects(task, found.true, found.predicted, found.probabilities, owner, len(names))
        confusions = count_by_subject(len(task.classes), found.true, found.predicted, owner, len(names))
        rows = confusions.sum(2)
        columns: dict[str, object] = {
            "subject": [self.cohort.subjects[number] for number in names],
            "seed": np.full(len(names), plan.seed, np.int64),
            "training_subjects": np.full(len(names), found.training_subjects, np.int64),
            "windows": rows.sum(1).astype(np.int64),
            "classes": (rows > 0).sum(1).astype(np.int64),
        }
        # A score that one person does not have (say an AUROC without a single arousal) is null, not NaN.
        columns |= {metric: pa.array(values, from_pandas=True) for metric, values in scores.items()}
        texts = {"task": task.name, "evaluation": evaluation, "split": plan.split, "scope": scope}
        texts |= {name: self.common[name] for name in ("features", "pretraining")}
        columns |= {name: [text] * len(names) for name, text in texts.items()}
        schema = subject_score_schema()
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def count_confusions(predictions: pa.Table) -> dict[tuple[str, str, str, int], Int[np.ndarray, "true predicted"]]:
    """Windows by true class (rows) and predicted class (columns) of every kind of evaluation in a table.

    Args:
        predictions: see `results.prediction_schema`.

    Returns:
        By task, features, evaluation and seed, in that order.
    """
    names = ("task", "features", "evaluation", "seed")
    found = {}
    keys = predictions.select(names).group_by(list(names)).aggregate([]).to_pylist()
    for key in sorted(keys, key=lambda key: tuple(key[name] for name in names)):
        chosen = predictions
        for name in names:
            chosen = chosen.filter(pc.field(name) == key[name])
        true, predicted = (chosen.column(name).to_numpy() for name in ("true", "predicted"))
        found[key["task"], key["features"], key["evaluation"], key["seed"]] = count_confusion(
            find_task(key["task"]), true, predicted
        )
    return found


def count_people(predictions: pa.Table, task: Task, names: Sequence[str]) -> SubjectCounts:
    """The confusion matrix of every person in a table of one task's predictions, for the aggregate's interval.

    A person's number is the place among `names`: everybody who is scored on any task, sorted.
    """
    owner = np.searchsorted(np.asarray(names), predictions.column("subject").to_numpy(zero_copy_only=False))
    people, place = np.unique(owner, return_inverse=True)
    true, predicted = (predictions.column(name).to_numpy() for name in ("true", "predicted"))
    confusions = count_by_subject(len(task.classes), true, predicted, place, len(people))
    return SubjectCounts(people.astype(np.int64), confusions)


def vote_by_subject(answers: Answers, classes: int) -> Answers:
    """One answer for each person: the mean of the probabilities of their windows.

    A person's true class is that of most of their windows (two nights may lie on either side of the age limit).
    """
    names, first, owner = np.unique(answers.subject, return_index=True, return_inverse=True)
    windows = np.bincount(owner)
    votes = np.zeros((len(names), classes))
    np.add.at(votes, owner, answers.probabilities)
    counts = np.bincount(owner * classes + answers.true, minlength=len(names) * classes).reshape(-1, classes)
    return Answers(
        window_id=answers.window_id[first],
        true=counts.argmax(1),
        probabilities=votes / windows[:, None],
        subject=names.astype(np.int64),
        training_subjects=answers.training_subjects,
    )


def aggregate_rows(
    rows: Iterable[ScoreRow],
    tasks: Sequence[str],
    counts: Mapping[ScoreRow, SubjectCounts] | None = None,
    draws: int = 500,
) -> list[ScoreRow]:
    """One aggregate per seed and training size; over fewer tasks than asked for, the note says which.

    Args:
        rows: of all tasks.
        tasks: that were asked for.
        counts: by row of balanced accuracy, who was scored; gives the aggregate an interval by subject.
        draws: of the bootstrap.
    """
    groups: dict[tuple[str, int, int], dict[str, ScoreRow]] = {}
    headline = [row for row in rows if row.metric == METRICS[0] and row.value is not None and row.scope == WINDOWS]
    # A single class among what was scored leaves nothing to guess; such a task has no say.
    headline = [row for row in headline if row.chance is not None]
    # The number of labelled training subjects may differ a little between tasks; they belong to one aggregate
    # if they stand at the same place in the order of sizes.
    sizes: dict[tuple[str, str], set[int]] = {}
    for row in headline:
        sizes.setdefault((row.evaluation, row.task), set()).add(row.training_subjects)
    for row in headline:
        ordered = sorted(sizes[row.evaluation, row.task])
        place = 0 if row.split in CROSS_VALIDATIONS else ordered.index(row.training_subjects)
        groups.setdefault((row.evaluation, row.seed, place), {})[row.task] = row
    return [_aggregate(members, tasks, counts or {}, draws) for members in groups.values()]


def _aggregate(
    members: Mapping[str, ScoreRow], tasks: Sequence[str], counts: Mapping[ScoreRow, SubjectCounts], draws: int
) -> ScoreRow:
    first = next(iter(members.values()))
    classes = {task: row.classes for task, row in members.items()}
    notes = [] if set(members) == set(tasks) else [f"over {', '.join(members)} only"]
    for task, row in members.items():
        if 0 < row.classes < len(find_task(task).classes):
            notes.append(f"guessing {task} scores 1/{row.classes}, as only so many classes occur")
    known = [counts[row] for row in members.values() if row in counts]
    bounds = None
    if len(known) == len(members):
        bounds = _bound_aggregate(dict(zip(members, known, strict=True)), classes, draws)
    return dataclasses.replace(
        first,
        task=AGGREGATE,
        metric=AGGREGATE,
        value=aggregate_score({task: row.value for task, row in members.items() if row.value is not None}, classes),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        windows=max(row.windows for row in members.values()),
        subjects=max(row.subjects for row in members.values()),
        note="; ".join(notes),
        classes=0,
    )


def _bound_aggregate(
    counts: Mapping[str, SubjectCounts], classes: Mapping[str, int], draws: int
) -> tuple[float, float] | None:
    """Interval of the aggregate when people are drawn anew, the same ones for every task."""
    everyone = np.unique(np.concatenate([entry.subject for entry in counts.values()]))
    if len(everyone) < 2:
        return None
    weights = draw_subjects(len(everyone), draws, 0)
    gains = []
    for task, entry in counts.items():
        mine = weights[:, np.searchsorted(everyone, entry.subject)]
        drawn = np.tensordot(mine, entry.confusions.astype(np.float64), 1)
        with np.errstate(invalid="ignore"):
            balanced = balance_confusions(drawn)
        chance = 1.0 / (classes[task] or len(find_task(task).classes))
        gains.append((balanced - chance) / chance)
    return bound_draws(np.mean(gains, axis=0))

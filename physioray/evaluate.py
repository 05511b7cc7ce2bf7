"""Scores embeddings by linear probes, on a held-out test split or by cross-validation over subjects.

Held out: the probe is trained on the training subjects (or a nested subset), its penalty chosen on the validation
subjects, and the test subjects are scored once. Cross-validation, for cohorts with too few people for that: every
labelled subject is in test once per seed, the penalty is chosen inside the fold, predictions are gathered over the
folds and then scored. What one task lacks never stops the others: it becomes a row without a value that says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Int64

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold
from physioray.divisions import Part, Plan, gather_parts, map_owners, plan_folds, plan_holdout
from physioray.embeddings import EmbeddingError, Embeddings, embed_windows
from physioray.metrics import (
    AGGREGATE,
    METRICS,
    aggregate_score,
    bootstrap_by_subject,
    explain_undefined,
    score_predictions,
)
from physioray.probe import LinearHead, choose_head, fit_path
from physioray.recipe import RecipeProblem, fit_recipe
from physioray.results import (
    CONVERGED,
    CROSS_VALIDATION,
    MOST_CLASSES,
    PROBES,
    RECIPE,
    TEST,
    ScoreRow,
    prediction_schema,
    write_results,
)
from physioray.signals import UNKNOWN, LookupMiss, Task, find_task

__all__ = ["Embeddings", "Evaluation", "ScoreRow", "embed_windows", "evaluate_probe", "write_results"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one kind of features, and the predictions they were made from.

    Attributes:
        scores: see ScoreRow; a skipped task is a row without a value whose note says why.
        predictions: see `results.prediction_schema`; for several training sizes those of the largest.
        notes: sentences for the reader, for example a class that no training window had.
    """

    scores: list[ScoreRow]
    predictions: pa.Table
    notes: list[str] = field(default_factory=list)


@dataclass
class _Context:
    """What one evaluation carries through its steps; notes and tables gather here."""

    embeddings: Embeddings
    cohort: Cohort
    config: ProbeConfig
    common: dict[str, Any]
    owners: dict[str, Int64[np.ndarray, " rows"]]
    numbers: Int[np.ndarray, " windows"]
    starts: Float[np.ndarray, " windows"]
    notes: list[str] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def evaluate_probe(
    embeddings: Embeddings,
    cohort: Cohort,
    config: ProbeConfig,
    *,
    features: str,
    pretraining: str = "none",
    config_hash: str = "",
    folds: Mapping[int, Sequence[Fold]] | None = None,
    subsets: Mapping[int, Sequence[str]] | None = None,
    evaluations: Sequence[str] = PROBES,
) -> Evaluation:
    """Score embeddings on every task by linear probes.

    With `folds` the protocol is cross-validation by subject, otherwise the held-out splits of the cohort. In
    cross-validation a seed draws the folds anew; on held-out splits it draws the recipe's head, and the converged
    solver, which draws nothing, is scored under the first seed only.

    Args:
        embeddings: of all windows of the labelled subjects.
        cohort: where they come from.
        config: tasks, seeds, penalties, recipe, bootstrap draws.
        features, pretraining, config_hash: written into every row.
        folds: by seed, the folds of one cross-validation.
        subsets: by size asked for, the training subjects; the whole training split if None (held out only).
        evaluations: which of `results.PROBES` to run.

    Raises:
        LookupMiss: an evaluation does not exist.
    """
    for name in evaluations:
        if name not in PROBES:
            raise LookupMiss(f"An evaluation must be one of {', '.join(PROBES)}, but got {name!r}.")
    context = _open_context(embeddings, cohort, config, features, pretraining, config_hash)
    plans = plan_folds(folds) if folds is not None else plan_holdout(cohort, subsets, config.seeds, context.note)
    rows = []
    broken = _find_breakage(embeddings)
    for name in config.tasks:
        task = find_task(name)
        reason = broken or _explain_absence(context, task, plans)
        for evaluation in evaluations:
            if reason:
                rows.append(_skip_row(context, task, evaluation, plans, reason))
            else:
                rows += _evaluate_task(context, task, evaluation, plans)
        if reason:
            context.note(f"{task.title} is skipped: {reason}.")
    rows += aggregate_rows(rows, config.tasks)
    tables = context.tables or [prediction_schema().empty_table()]
    return Evaluation(scores=rows, predictions=pa.concat_tables(tables), notes=context.notes)


def _open_context(
    embeddings: Embeddings, cohort: Cohort, config: ProbeConfig, features: str, pretraining: str, config_hash: str
) -> _Context:
    return _Context(
        embeddings=embeddings,
        cohort=cohort,
        config=config,
        common={"features": features, "pretraining": pretraining, "config_hash": config_hash},
        owners=map_owners(embeddings, cohort),
        numbers=cohort.read_column("window"),
        starts=cohort.read_column("start"),
    )


def _find_breakage(embeddings: Embeddings) -> str:
    try:
        embeddings.check_finite()
    except EmbeddingError as error:
        return str(error).rstrip(".")
    return ""


def _explain_absence(context: _Context, task: Task, plans: Sequence[Plan]) -> str:
    """Why a task cannot be probed at all, or an empty text."""
    if task.name not in context.embeddings.labels:
        return f"the embeddings carry labels of {', '.join(context.embeddings.labels) or 'no task'} only"
    labels = context.embeddings.find_labels(task.name)
    names = {name for plan in plans for fold in plan.folds for name in (*fold.train, *fold.validation, *fold.test)}
    used = [context.owners[name] for name in sorted(names) if name in context.owners]
    known = labels[np.concatenate(used)] if used else labels[:0]
    found = np.unique(known[known != UNKNOWN])
    if not len(found):
        return "no window has a label"
    if len(found) == 1:
        return f"all {int((known != UNKNOWN).sum())} labelled windows are of one class, {task.classes[int(found[0])]}"
    return ""


def _skip_row(context: _Context, task: Task, evaluation: str, plans: Sequence[Plan], reason: str) -> ScoreRow:
    return _make_row(
        context,
        task,
        evaluation,
        plans[0] if plans else Plan(split=TEST, seed=0, folds=()),
        metric=METRICS[0],
        value=None,
        note=f"skipped: {reason}",
    )


def _make_row(
    context: _Context,
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
    note: str = "",
) -> ScoreRow:
    return ScoreRow(
        **context.common,
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
        cohort_fingerprint=context.cohort.fingerprint,
        simulated=context.cohort.simulated,
        note=note,
    )


def _evaluate_task(context: _Context, task: Task, evaluation: str, plans: Sequence[Plan]) -> list[ScoreRow]:
    """All rows of one task and way to evaluate, for every plan."""
    if evaluation == CONVERGED and plans and plans[0].split == TEST:
        context.note(
            "On held-out splits the converged solver draws nothing at random: it is fitted once and has no spread "
            "over seeds."
        )
        plans = [plan for plan in plans if plan.seed == plans[0].seed]
    embeddings = context.embeddings
    jobs = [(plan, gather_parts(embeddings, context.owners, task, plan, context.note)) for plan in plans]
    if evaluation == RECIPE:
        fitted = _fit_recipes(context, task, jobs)
    else:
        fitted = [[_fit_converged(context, task, part) for part in parts] for _, parts in jobs]
    rows = []
    for (plan, parts), heads in zip(jobs, fitted, strict=True):
        pairs = [(part, head) for part, head in zip(parts, heads, strict=True) if head is not None]
        if pairs:
            rows += _score_plan(context, task, evaluation, plan, pairs)
        else:
            reason = "no part of the data could be fitted and tested; see the notes"
            rows.append(_skip_row(context, task, evaluation, [plan], reason))
    return rows


def _fit_converged(context: _Context, task: Task, part: Part) -> LinearHead:
    vectors, labels = context.embeddings.vectors, context.embeddings.find_labels(task.name)
    config = context.config
    heads = fit_path(
        vectors[part.train],
        labels[part.train],
        len(task.classes),
        config.penalties,
        class_weights=config.class_weights,
    )
    if not len(part.validation):
        middle = sorted(heads, key=lambda head: head.penalty or 0.0)[len(heads) // 2]
        context.note(
            f"{task.title}: no validation window has a label, so the middle penalty C = {middle.penalty} holds."
        )
        return middle
    return choose_head(heads, vectors[part.validation], labels[part.validation])


def _fit_recipes(context: _Context, task: Task, jobs: Sequence[tuple[Plan, Sequence[Part]]]) -> list[list[LinearHead]]:
    """All heads of the jobs; those with training sets of a like size side by side, as they share their steps."""
    labels = context.embeddings.find_labels(task.name)
    groups: dict[int, list[tuple[int, RecipeProblem]]] = {}
    for number, (plan, parts) in enumerate(jobs):
        size = max((len(part.train) for part in parts), default=0) if plan.split == TEST else 0
        for part in parts:
            problem = RecipeProblem(
                labels=labels,
                classes=len(task.classes),
                train=part.train,
                validation=part.validation,
                seed=plan.seed,
            )
            groups.setdefault(size, []).append((number, problem))
    fitted: list[list[LinearHead]] = [[] for _ in jobs]
    for group in groups.values():
        heads = fit_recipe(context.embeddings.vectors, [problem for _, problem in group], context.config)
        for (number, _), head in zip(group, heads, strict=True):
            fitted[number].append(head)
    return fitted


def _score_plan(
    context: _Context, task: Task, evaluation: str, plan: Plan, pairs: Sequence[tuple[Part, LinearHead]]
) -> list[ScoreRow]:
    embeddings = context.embeddings
    rows = np.concatenate([part.test for part, _ in pairs])
    probabilities = np.concatenate([head.predict(embeddings.vectors[part.test]) for part, head in pairs])
    order = np.argsort(embeddings.window_id[rows])
    rows, probabilities = rows[order], probabilities[order]
    true, predicted = embeddings.find_labels(task.name)[rows], probabilities.argmax(1)
    subject = embeddings.subject[rows]
    scores = score_predictions(task, true, predicted, probabilities)
    intervals = bootstrap_by_subject(
        task, true, predicted, probabilities, subject, context.config.bootstrap_draws, seed=0
    )
    reasons = explain_undefined(task, true, predicted)
    if plan.largest:
        context.tables.append(_tabulate(context, task, evaluation, plan, rows, true, predicted, probabilities))
    training_subjects = round(float(np.mean([part.training_subjects for part, _ in pairs])))
    return [
        _make_row(
            context,
            task,
            evaluation,
            plan,
            metric=metric,
            value=scores[metric],
            bounds=intervals[metric],
            training_subjects=training_subjects,
            windows=len(rows),
            subjects=len(np.unique(subject)),
            note=reasons.get(metric, ""),
        )
        for metric in METRICS
    ]


def _tabulate(
    context: _Context,
    task: Task,
    evaluation: str,
    plan: Plan,
    rows: Int64[np.ndarray, " n"],
    true: Int[np.ndarray, " n"],
    predicted: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> pa.Table:
    ids = context.embeddings.window_id[rows]
    recordings = context.cohort.recordings
    columns: dict[str, object] = {
        "recording": [recordings[number].name for number in context.embeddings.recording[rows]],
        "subject": [context.cohort.subjects[number] for number in context.embeddings.subject[rows]],
        "window_id": ids,
        "window": context.numbers[ids],
        "start": context.starts[ids],
        "true": true,
        "predicted": predicted.astype(np.int8),
        "seed": np.full(len(rows), plan.seed, np.int64),
    }
    for number in range(MOST_CLASSES):
        known = number < len(task.classes)
        columns[f"p{number}"] = probabilities[:, number].astype(np.float32) if known else [None] * len(rows)
    texts = {"task": task.name, "evaluation": evaluation, "split": plan.split, "features": context.common["features"]}
    columns |= {name: [text] * len(rows) for name, text in texts.items()}
    schema = prediction_schema()
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def aggregate_rows(rows: Iterable[ScoreRow], tasks: Sequence[str]) -> list[ScoreRow]:
    """One aggregate per seed and training size; over fewer tasks than asked for, the note says which."""
    groups: dict[tuple[str, int, int], dict[str, ScoreRow]] = {}
    headline = [row for row in rows if row.metric == METRICS[0] and row.value is not None]
    # The number of labelled training subjects may differ a little between tasks; they belong to one aggregate
    # if they stand at the same place in the order of sizes.
    sizes = {
        (row.evaluation, row.task): sorted(
            {
                other.training_subjects
                for other in headline
                if (other.evaluation, other.task) == (row.evaluation, row.task)
            }
        )
        for row in headline
    }
    for row in headline:
        place = 0 if row.split == CROSS_VALIDATION else sizes[row.evaluation, row.task].index(row.training_subjects)
        groups.setdefault((row.evaluation, row.seed, place), {})[row.task] = row
    found = []
    for members in groups.values():
        first = next(iter(members.values()))
        value = aggregate_score({task: row.value for task, row in members.items() if row.value is not None})
        note = "" if set(members) == set(tasks) else f"over {', '.join(members)} only"
        found.append(
            dataclasses.replace(
                first,
                task=AGGREGATE,
                metric=AGGREGATE,
                value=value,
                low=None,
                high=None,
                windows=max(row.windows for row in members.values()),
                subjects=max(row.subjects for row in members.values()),
                note=note,
            )
        )
    return found

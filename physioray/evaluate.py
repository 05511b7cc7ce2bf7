"""Scores embeddings by linear probes, on a held-out test split or by cross-validation over subjects.

Held out: the probe is trained on the training subjects (or a nested subset), its penalty chosen on the validation
subjects, and the test subjects are scored once. Cross-validation, for cohorts with too few people for that: every
labelled subject is in test once per seed, the penalty is chosen inside the fold, predictions are gathered over the
folds and then scored. What one task lacks never stops the others: it becomes a row without a value that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold
from physioray.divisions import Part, Plan, check_scored, gather_parts, map_owners, plan_folds, plan_holdout
from physioray.embeddings import EmbeddingError, Embeddings, embed_windows
from physioray.probe import LinearHead, Target, choose_head, fit_paths
from physioray.recipe import RecipeProblem, count_recipe_steps, fit_recipe
from physioray.results import (
    CONVERGED,
    CROSS_VALIDATIONS,
    PROBES,
    RECIPE,
    TEST,
    VALIDATION,
    ScoreRow,
    write_results,
)
from physioray.scoring import Answers, Evaluation, ScoreBoard, aggregate_rows
from physioray.signals import UNKNOWN, LookupMiss, Task, find_task

__all__ = [
    "Embeddings",
    "Evaluation",
    "ScoreRow",
    "aggregate_rows",
    "embed_windows",
    "evaluate_probe",
    "write_results",
]


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What one evaluation carries through its steps."""

    embeddings: Embeddings
    config: ProbeConfig
    owners: dict[str, Int64[np.ndarray, " rows"]]
    board: ScoreBoard


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
    scored: str = TEST,
) -> Evaluation:
    """Score embeddings on every task by linear probes.

    With `folds` the protocol is cross-validation by subject, otherwise the held-out splits of the cohort. In
    cross-validation a seed draws the folds anew; on held-out splits it draws the recipe's head, and the converged
    solver, which draws nothing, is scored under the first seed only.

    While settings are still chosen (`scored="validation"`) the validation subjects are scored, and a part of the
    training subjects chooses the penalty; or, with folds, everybody but the test subjects. Rows of test subjects
    among the embeddings are then dropped unseen.

    Args:
        embeddings: of all windows of the labelled subjects.
        cohort: where they come from; its test split may be locked, and must not be read if `scored` is validation.
        config: tasks, seeds, penalties, recipe, bootstrap draws.
        features, pretraining, config_hash: written into every row.
        folds: by seed, the folds of one cross-validation.
        subsets: by size asked for, the training subjects; the whole training split if None (held out only).
        evaluations: which of `results.PROBES` to run.
        scored: `test`, or `validation` while settings are still chosen.

    Raises:
        LookupMiss: an evaluation does not exist.
        EmbeddingError: the embeddings are of another cohort.
        LockedSplitError: test is to be scored and locked, or a fold holds a test subject while settings are chosen.
    """
    for name in evaluations:
        if name not in PROBES:
            raise LookupMiss(f"An evaluation must be one of {', '.join(PROBES)}, but got {name!r}.")
    check_scored(cohort, scored)
    embeddings.check_cohort(cohort)
    if scored == VALIDATION:
        cohort, embeddings = _hide_test(cohort, embeddings)
    board = ScoreBoard(cohort, config, features=features, pretraining=pretraining, config_hash=config_hash)
    context = _Context(embeddings=embeddings, config=config, owners=map_owners(embeddings, cohort), board=board)
    if folds is not None:
        plans = plan_folds(folds, cohort=cohort, scored=scored)
    else:
        plans = plan_holdout(cohort, subsets, config.seeds, board.note, scored=scored)
    tasks = _find_tasks(context, plans, evaluations, scored)
    for evaluation in evaluations:
        _evaluate_tasks(context, tasks, evaluation, plans)
    return board.finish()


def _hide_test(cohort: Cohort, embeddings: Embeddings) -> tuple[Cohort, Embeddings]:
    """The cohort with its test split locked, and the embeddings of everybody else."""
    reserved = [cohort.subjects.index(name) for name in cohort.list_subjects("test")]
    return cohort.lock_test(), embeddings.select(~np.isin(embeddings.subject, reserved))


def _find_tasks(context: _Context, plans: Sequence[Plan], evaluations: Sequence[str], scored: str) -> list[Task]:
    """The tasks that can be probed; the others get a row each that says why not."""
    board, config = context.board, context.config
    broken = _find_breakage(context.embeddings)
    tasks = []
    for name in config.tasks:
        task = find_task(name)
        reason = broken or _explain_absence(context, task, plans)
        if reason:
            board.note(f"{task.title} is skipped: {reason}.")
            for evaluation in evaluations:
                board.skip(task, evaluation, plans[0] if plans else Plan(split=scored, seed=0, folds=()), reason)
        else:
            tasks.append(task)
    return tasks


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


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One head to come: for which task and plan, on which rows."""

    task: Task
    plan: Plan
    part: Part


def _evaluate_tasks(context: _Context, tasks: Sequence[Task], evaluation: str, plans: Sequence[Plan]) -> None:
    """All scores of one way to evaluate: the heads of every task and plan are fitted together."""
    if evaluation == CONVERGED and plans and plans[0].split not in CROSS_VALIDATIONS and tasks:
        context.board.note(
            "On held-out splits the converged solver draws nothing at random: it is fitted once and has no spread "
            "over seeds."
        )
        plans = [plan for plan in plans if plan.seed == plans[0].seed]
    jobs, reasons = [], []
    for task in tasks:
        for plan in plans:
            told: list[str] = []
            parts = gather_parts(context.embeddings, context.owners, task, plan, told.append)
            for sentence in told:
                context.board.note(sentence)
            jobs.append([_Fit(task=task, plan=plan, part=part) for part in parts])
            reasons.append((task, plan, told))
    flat = [fit for job in jobs for fit in job]
    heads = iter(_fit_recipes(context, flat) if evaluation == RECIPE else _fit_converged(context, flat))
    for job, (task, plan, told) in zip(jobs, reasons, strict=True):
        if job:
            _score_plan(context, task, evaluation, plan, [(fit.part, next(heads)) for fit in job])
        else:
            why = told[0].rstrip(".") if told else "there is nobody to train on and to test"
            context.board.skip(task, evaluation, plan, f"no part of the data could be fitted and tested: {why}")


def _fit_converged(context: _Context, fits: Sequence[_Fit]) -> list[LinearHead]:
    """All heads of the fits, their penalties chosen; tasks that train on the same windows are fitted together."""
    groups: dict[bytes, list[int]] = {}
    for number, fit in enumerate(fits):
        groups.setdefault(fit.part.train.tobytes(), []).append(number)
    chosen: dict[int, LinearHead] = {}
    for numbers in groups.values():
        train = fits[numbers[0]].part.train
        targets = [
            Target(context.embeddings.find_labels(fits[number].task.name)[train], len(fits[number].task.classes))
            for number in numbers
        ]
        config = context.config
        paths = fit_paths(
            context.embeddings.vectors[train], targets, config.penalties, class_weights=config.class_weights
        )
        for number, heads in zip(numbers, paths, strict=True):
            chosen[number] = _choose(context, fits[number], heads)
    return [chosen[number] for number in range(len(fits))]


def _choose(context: _Context, fit: _Fit, heads: Sequence[LinearHead]) -> LinearHead:
    validation = fit.part.validation
    if not len(validation):
        middle = sorted(heads, key=lambda head: head.penalty or 0.0)[len(heads) // 2]
        context.board.note(
            f"{fit.task.title}: no validation window has a label, so the middle penalty C = {middle.penalty} holds."
        )
        return middle
    labels = context.embeddings.find_labels(fit.task.name)
    return choose_head(heads, context.embeddings.vectors[validation], labels[validation])


def _fit_recipes(context: _Context, fits: Sequence[_Fit]) -> list[LinearHead]:
    """All heads of the fits; those that take the same number of steps stand side by side."""
    config = context.config
    crossed = [len(fit.part.train) for fit in fits if fit.plan.split in CROSS_VALIDATIONS]
    groups: dict[tuple[int, int], list[int]] = {}
    for number, fit in enumerate(fits):
        # The folds of a cross-validation differ by a few windows only and take the steps of the largest.
        size = max(crossed) if crossed else len(fit.part.train)
        length = (count_recipe_steps(size, config), min(size, config.recipe_batch_size))
        groups.setdefault(length, []).append(number)
    found: dict[int, LinearHead] = {}
    for numbers in groups.values():
        problems = [
            RecipeProblem(
                labels=context.embeddings.find_labels(fits[number].task.name),
                classes=len(fits[number].task.classes),
                train=fits[number].part.train,
                validation=fits[number].part.validation,
                seed=fits[number].plan.seed,
            )
            for number in numbers
        ]
        heads = fit_recipe(context.embeddings.vectors, problems, config)
        found |= dict(zip(numbers, heads, strict=True))
    return [found[number] for number in range(len(fits))]


def _score_plan(
    context: _Context, task: Task, evaluation: str, plan: Plan, pairs: Sequence[tuple[Part, LinearHead]]
) -> None:
    embeddings = context.embeddings
    rows = np.concatenate([part.test for part, _ in pairs])
    answers = Answers(
        window_id=embeddings.window_id[rows],
        true=embeddings.find_labels(task.name)[rows],
        probabilities=np.concatenate([head.predict(embeddings.vectors[part.test]) for part, head in pairs]),
        subject=embeddings.subject[rows],
        training_subjects=round(float(np.mean([part.training_subjects for part, _ in pairs]))),
    )
    context.board.add(task, evaluation, plan, answers)

"""Gathers what a grid has computed: every score, the predictions behind the largest training sets, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from physioray.evaluate import Evaluation, aggregate_rows
from physioray.grid import Grid
from physioray.grid_plan import FLOORS
from physioray.journal import Screen
from physioray.metrics import AGGREGATE, METRICS
from physioray.results import ScoreRow, prediction_schema, subject_score_schema
from physioray.scoring import SubjectCounts, count_people
from physioray.signals import WINDOWS, find_task
from physioray.steps import Step, StepDamaged, StepStore
from physioray.strategies import find_strategy
from physioray.work import Work


@dataclass(frozen=True, kw_only=True)
class GridScores:
    """Everything a grid has computed so far.

    Attributes:
        rows: every score.
        predictions: by (pretraining or floor, evaluation), the test predictions at the largest training-set size.
        subject_scores: of every person alone, see `results.subject_score_schema`; of every training-set size.
        notes: sentences for the reader, for example what has not been run.
        steps: that the scores rest on.
    """

    rows: list[ScoreRow]
    predictions: dict[tuple[str, str], pa.Table] = field(default_factory=dict)
    subject_scores: list[pa.Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def collect_scores(grid: Grid, failures: Mapping[Work, str] | None = None, screen: Screen | None = None) -> GridScores:
    """Gather the scores of all work that is done; nothing is trained here.

    Args:
        grid: whose scores.
        failures: work that failed, and why.
        screen: where waiting is said.
    """
    store, plan = grid.open_store(), grid.plan
    found = GridScores(rows=[], notes=list(plan.notes))
    found.notes.extend(f"{work.title}: failed. {reason}" for work, reason in (failures or {}).items())
    broken = {work.strategy for work in failures or {} if work.kind == "pretrain"}
    pretrained = _list_pretrained(grid, store, broken, found.notes)
    for name in (*pretrained, *FLOORS):
        for size in plan.sizes:
            if any(work.kind == "probe" and (work.strategy, work.size) == (name, size) for work in failures or {}):
                continue
            item = Work(kind="probe", strategy=name, size=size)
            if fault := _find_fault(grid, item, store):
                found.notes.append(f"{item.title}: {fault}.")
                continue
            _take(found, grid.probe(store, name, size, screen), name, size == plan.sizes[-1])
    for name in (*plan.finetuned, *plan.scratch):
        if find_strategy(name).objective is None or name in pretrained:
            for size in plan.sizes if grid.config.whole else plan.sizes[-1:]:
                _take(
                    found,
                    _score_trainings(grid, store, name, size, failures or {}, found.notes),
                    name,
                    size == plan.sizes[-1],
                )
    found.steps.extend(store.used.values())
    return found


def _find_fault(grid: Grid, item: Work, store: StepStore) -> str:
    """Why there is no result of a piece of work; empty if it is done."""
    try:
        return "" if grid.is_done(item, store) else "not run"
    except StepDamaged as error:
        return str(error).removesuffix(".")


def _list_pretrained(grid: Grid, store: StepStore, broken: set[str], notes: list[str]) -> list[str]:
    """Strategies whose pretraining is there; a note for each of the others that has not failed just now."""
    found = []
    for name in grid.plan.pretrained:
        if name in broken:
            continue
        fault = _find_fault(grid, Work(kind="pretrain", strategy=name), store)
        if not fault:
            found.append(name)
        else:
            why = "not pretrained yet" if fault == "not run" else f"its pretraining cannot be used ({fault})"
            notes.append(f"{name}: {why}, so nothing that rests on it was run.")
    return found


def _take(found: GridScores, evaluation: Evaluation, name: str, largest: bool) -> None:
    found.rows.extend(evaluation.scores)
    found.subject_scores.append(evaluation.subject_scores)
    found.notes.extend(note for note in evaluation.notes if note not in found.notes)
    if largest and len(evaluation.predictions):
        for chosen in evaluation.predictions.column("evaluation").unique().to_pylist():
            table = evaluation.predictions.filter(pc.field("evaluation") == chosen)
            found.predictions[name, chosen] = table


def _score_trainings(
    grid: Grid, store: StepStore, name: str, size: int, failures: Mapping[Work, str], notes: list[str]
) -> Evaluation:
    """Scores of the trainings of one strategy and size, over the seeds and tasks whose every fold is done."""
    evaluations = []
    missing: dict[str, int] = {}
    work = [item for item in grid.list_work() if (item.kind, item.strategy, item.size) == ("train", name, size)]
    groups: dict[tuple[int, str], list[Work]] = {}
    for item in work:
        groups.setdefault((item.seed, item.task), []).append(item)
    for (seed, task), items in groups.items():
        if not any(item in failures for item in items) and all(not _find_fault(grid, item, store) for item in items):
            evaluations.append(grid.score_training(store, name, task=task, seed=seed, size=size))
        else:
            missing[task] = missing.get(task, 0) + 1
    for task, count in missing.items():
        notes.append(f"{name}, {task}, {size} subjects: {count} of {grid.config.finetune_seeds} repetitions not run.")
    rows = [row for item in evaluations for row in item.scores if row.task != AGGREGATE]
    tables = [prediction_schema().empty_table(), *(item.predictions for item in evaluations)]
    people = [subject_score_schema().empty_table(), *(item.subject_scores for item in evaluations)]
    tasks = tuple(dict.fromkeys(item.task for item in work))
    draws = grid.config.probe.bootstrap_draws
    return Evaluation(
        scores=rows + aggregate_rows(rows, tasks, _count_people(evaluations), draws),
        predictions=pa.concat_tables(tables),
        subject_scores=pa.concat_tables(people),
        notes=list(dict.fromkeys(note for item in evaluations for note in item.notes)),
    )


def _count_people(evaluations: Sequence[Evaluation]) -> dict[ScoreRow, SubjectCounts]:
    """Who was scored in each of some evaluations of one task and seed, by their row of balanced accuracy."""
    names = sorted({name for item in evaluations for name in item.predictions.column("subject").to_pylist()})
    return {
        row: count_people(item.predictions, find_task(row.task), names)
        for item in evaluations
        for row in item.scores
        if (row.metric, row.scope) == (METRICS[0], WINDOWS) and row.value is not None
    }

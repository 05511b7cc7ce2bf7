"""From a grid's scores to the paper's tables: what stands in their heading, and where they are written."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from physioray.config import list_assumptions
from physioray.grid import Grid
from physioray.grid_plan import GridConfig
from physioray.grid_scores import GridScores
from physioray.paper.claims import ClaimResult, check_claims
from physioray.paper.pages import TableFiles, write_tables
from physioray.paper.reference import read_paper
from physioray.paper.tables import FilledTable, TableContext, fill_tables
from physioray.protocol import describe_card
from physioray.results import (
    PREDICTIONS_FILE,
    RESULTS_FILE,
    SUBJECT_SCORES_FILE,
    write_predictions,
    write_results,
    write_subject_scores,
)
from physioray.scoring import count_confusions
from physioray.signals import find_task
from physioray.storage import Location, StorageError

CONFUSIONS_FILE = "confusions.csv"
GRID_FILE = "grid.json"
"""Whose tables stand in a folder."""


def narrow_grid(
    config: GridConfig, tasks: str | None, passes: int | None, finetune_seeds: int | None, whole: bool
) -> GridConfig:
    """The same grid with fewer tasks, other passes or repetitions; None keeps what it has."""
    if tasks is not None:
        config = replace(config, probe=replace(config.probe, tasks=tuple(name.strip() for name in tasks.split(","))))
    if passes is not None:
        config = replace(config, passes=passes)
    if finetune_seeds is not None:
        config = replace(config, finetune_seeds=finetune_seeds)
    return replace(config, whole=whole or config.whole)


def claim_folder(grid: Grid, out: Location) -> None:
    """Make sure that a folder holds no other tables than this grid's, and write down whose they are.

    Raises:
        StorageError: the tables there are of another cohort or preset.
    """
    cohort, preset = grid.plan.cohort, grid.config.name
    place = out / GRID_FILE
    if place.exists():
        known = place.read_json()
        if (known["cohort"], known["preset"]) != (cohort.fingerprint, preset):
            raise StorageError(
                f"A folder of tables must be of one cohort and preset, but {out} holds those of {known['preset']} on "
                f"cohort {known['cohort'][:12]}, and asked for are {preset} on {cohort.fingerprint[:12]} "
                f"({cohort.location}). Nothing was overwritten: choose another --out; steps can be shared (--steps)."
            )
    place.write_json({"cohort": cohort.fingerprint, "preset": preset})


def describe_grid(grid: Grid, scores: GridScores) -> TableContext:
    """What the heading of every table says."""
    plan = grid.plan
    jobs = [grid.make_job(name) for name in plan.pretrained]
    assumptions = dict(plan.cohort.manifest.get("assumptions", {}))
    for job in jobs:
        assumptions |= list_assumptions(job.model, job.objective, job.train)
    assumptions |= list_assumptions(grid.config.probe)
    return TableContext(
        cohort=plan.cohort.location.name,
        simulated=plan.cohort.simulated,
        subjects=len(plan.cohort.subjects),
        labelled=len(plan.protocol.labelled),
        sizes=plan.sizes,
        assumptions={name: str(text) for name, text in assumptions.items()},
        preset=grid.config.name,
        commit=grid.commit,
        notes=(plan.protocol.sentence, *scores.notes),
    )


@dataclass(frozen=True, kw_only=True)
class FilledGrid:
    """The paper's tables with a grid's scores, its claims checked on them, and what the headings say."""

    tables: list[FilledTable]
    claims: list[ClaimResult]
    context: TableContext


def fill_grid(
    grid: Grid, scores: GridScores, *, reconstruction_errors: Mapping[str, float] | None = None
) -> FilledGrid:
    """Fill the tables and check the claims.

    Args:
        grid: that was computed.
        scores: see `grid_scores.collect_scores`.
        reconstruction_errors: see `claims.check_claims`; their claim counts as not run without.
    """
    context = describe_grid(grid, scores)
    return FilledGrid(
        tables=fill_tables(scores.rows, read_paper(), context),
        claims=check_claims(scores.rows, predictions=scores.predictions, reconstruction_errors=reconstruction_errors),
        context=context,
    )


def write_grid(grid: Grid, scores: GridScores, out: Location, filled: FilledGrid | None = None) -> TableFiles:
    """Write tables.html, tables.md, scores.csv, confusions.csv and the result files of a run into a folder.

    The grid's steps are then referred to by the folder, so that `physioray steps` keeps them.
    """
    filled = filled or fill_grid(grid, scores)
    write_results(out / RESULTS_FILE, scores.rows)
    write_predictions(out / PREDICTIONS_FILE, list(scores.predictions.values()))
    write_subject_scores(out / SUBJECT_SCORES_FILE, scores.subject_scores)
    write_confusions(out / CONFUSIONS_FILE, scores.predictions)
    (out / "card.json").write_json(describe_card(grid.plan.cohort, grid.plan.protocol))
    (out / "notes.json").write_json(scores.notes)
    files = write_tables(out, scores.rows, filled.tables, filled.claims, filled.context)
    grid.open_store().refer(out, scores.steps)
    return files


def write_confusions(location: Location, predictions: Mapping[tuple[str, str], pa.Table]) -> None:
    """Write what is taken for what: test windows by true and predicted class, of the largest training sets.

    Args:
        location: the CSV file.
        predictions: by (strategy or floor, evaluation), see `GridScores`.
    """
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["strategy", "evaluation", "task", "seed", "true", "predicted", "windows"])
    for (name, _), table in sorted(predictions.items()):
        for (task, _, evaluation, seed), matrix in count_confusions(table).items():
            classes = find_task(task).classes
            for row, true in enumerate(classes):
                for column, predicted in enumerate(classes):
                    writer.writerow([name, evaluation, task, seed, true, predicted, int(matrix[row, column])])
    location.write_text(sink.getvalue())

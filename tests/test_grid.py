"""The grid of trainings behind the tables: each piece once, whatever asks for it, wherever it runs."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from physioray.config import ProbeConfig
from physioray.costs import estimate_cost
from physioray.data.splits import Fold, shrink_fold
from physioray.grid import Grid
from physioray.grid_plan import GRIDS, GridConfig, find_grid
from physioray.grid_scores import GridScores, collect_scores
from physioray.signals import LookupMiss
from physioray.spread import spread_work
from physioray.work import Work, run_work
from tests.written_cohorts import write_cohort

CONFIG = GridConfig(
    name="test",
    sizes="tiny",
    pretrained=("multimae_drop", "mae_eeg"),
    finetuned=("mae_eeg",),
    scratch=("scratch_eeg",),
    passes=1,
    finetune_passes=1,
    probe=ProbeConfig(
        tasks=("sleep", "age"), seeds=(0,), folds=2, bootstrap_draws=20, recipe_passes=2, recipe_min_steps=20
    ),
    finetune_seeds=1,
    finetune_tasks=("sleep",),
    sizes_asked=2,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("grid") / "cohort"
    write_cohort(folder, [24] * 10)
    return str(folder)


@pytest.fixture(scope="module")
def finished(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, GridScores]:
    grid = Grid(cohort=cohort, store=str(tmp_path_factory.mktemp("steps")), config=CONFIG)
    assert run_work(grid.do, grid.list_work()) == {}
    return grid, collect_scores(grid)


def list_made(grid: Grid) -> dict[str, set[str]]:
    made: dict[str, set[str]] = {}
    for record in grid.open_store().list_steps():
        made.setdefault(record.name, set()).add(record.identity)
    return made


def test_a_grid_fills_every_cell_that_was_asked_for(finished: tuple[Grid, GridScores]) -> None:
    grid, scores = finished
    smallest, largest = grid.plan.sizes
    assert smallest < largest
    cells = {
        (row.pretraining, row.features, row.evaluation, row.task)
        for row in scores.rows
        if row.metric in ("balanced_accuracy", "aggregate")
    }
    for name, features in (
        ("multimae_drop", "pretrained"),
        ("mae_eeg", "pretrained"),
        ("none", "untrained"),
        ("none", "band_powers"),
    ):
        for evaluation in ("probe_converged", "probe_recipe"):
            for task in ("sleep", "age", "aggregate"):
                assert (name, features, evaluation, task) in cells
    assert ("mae_eeg", "pretrained", "finetune", "sleep") in cells
    assert ("scratch_eeg", "untrained", "scratch", "sleep") in cells
    probed = {row.training_subjects for row in scores.rows if row.evaluation == "probe_converged"}
    assert len(probed) == 2, "every probe at the smallest and at the largest training-set size"
    assert all(row.value is not None for row in scores.rows if row.metric == "balanced_accuracy")
    assert ("scratch_eeg", "scratch") in scores.predictions


def test_asking_again_computes_nothing_and_takes_no_time(finished: tuple[Grid, GridScores]) -> None:
    grid, scores = finished
    before = {record.identity: record.created for record in grid.open_store().list_steps()}
    again = replace(grid)
    began = time.process_time()
    assert run_work(again.do, again.list_work()) == {}
    found = collect_scores(again)
    assert {record.identity: record.created for record in grid.open_store().list_steps()} == before
    assert found.rows == scores.rows
    assert time.process_time() - began < 10, "far more than it takes, far less than computing it again"


def test_changing_one_field_recomputes_what_depends_on_it_and_nothing_else(
    finished: tuple[Grid, GridScores],
) -> None:
    grid, _ = finished
    before = list_made(grid)
    probes = replace(grid, config=replace(CONFIG, probe=replace(CONFIG.probe, bootstrap_draws=21)))
    run_work(probes.do, [work for work in probes.list_work() if work.kind == "probe"])
    after = list_made(grid)
    assert {name for name in after if after[name] != before[name]} == {"probe"}
    longer = replace(grid, config=replace(CONFIG, passes=2, pretrained=("mae_eeg",), finetuned=()))
    run_work(longer.do, longer.list_work())
    last = list_made(grid)
    assert {name for name in last if last[name] != after[name]} == {"pretrain", "embed", "probe"}
    assert len(last["pretrain"] - after["pretrain"]) == 1


def test_a_failure_stops_only_what_rests_on_it_and_is_told(cohort: str, tmp_path: Path) -> None:
    grid = Grid(cohort=cohort, store=str(tmp_path), config=CONFIG)
    store = grid.open_store()
    pretraining = grid.pretrain(store, "mae_eeg")
    (pretraining.folder / "checkpoints" / "last.pt").write_text("damaged by hand")
    failures = run_work(grid.do, grid.list_work())
    assert {work.strategy for work in failures} == {"mae_eeg"}
    scores = collect_scores(grid, failures)
    assert {"multimae_drop", "scratch_eeg", "none"} == {row.pretraining for row in scores.rows}
    assert any(note.startswith("pretrain mae_eeg: failed") for note in scores.notes)
    told = " ".join(failures.values())
    assert "must hold the files it was finished with" in told
    assert (pretraining.folder / "checkpoints" / "last.pt").read_text() == "damaged by hand", "nothing was overwritten"


def test_what_is_not_run_by_the_deadline_is_said_to_be_missing(cohort: str, tmp_path: Path) -> None:
    grid = Grid(cohort=cohort, store=str(tmp_path), config=CONFIG)
    begun: list[Work] = []
    assert run_work(grid.do, grid.list_work(), begin=begun.append, deadline=time.monotonic() - 1) == {}
    assert begun == []
    run_work(grid.do, [work for work in grid.list_work() if work.strategy == "multimae_drop"])
    scores = collect_scores(grid)
    assert any(note.startswith("mae_eeg: not pretrained yet") for note in scores.notes)
    assert any(note.startswith("scratch_eeg, sleep") and "1 of 1 repetitions not run" in note for note in scores.notes)


@pytest.mark.ray
def test_work_spread_over_a_cluster_gives_the_scores_of_one_process(
    finished: tuple[Grid, GridScores], tmp_path: Path
) -> None:
    grid, scores = finished
    spread = replace(grid, store=str(tmp_path / "steps"))
    ended: list[Work] = []
    assert spread_work(spread, spread.list_work(), processes=2, end=ended.append) == {}
    assert sorted(work.title for work in ended) == sorted(work.title for work in spread.list_work())
    found = collect_scores(spread)

    def key(rows: GridScores) -> list[str]:
        return sorted(json.dumps(row.__dict__, sort_keys=True, default=float) for row in rows.rows)

    assert key(found) == key(scores)


def test_the_cost_counts_every_training_and_every_window(finished: tuple[Grid, GridScores]) -> None:
    grid, _ = finished
    work = grid.list_work()
    cost = estimate_cost(grid, work)
    trained = [item for item in work if item.kind != "probe"]
    assert cost.trainings == len(trained) == 2 + 2 * 2
    assert cost.windows == sum(item.windows for item in trained)
    assert cost.seconds > 0
    assert set(cost.by_work) == set(work)
    assert "6 trainings" in cost.describe(2)


def test_every_preset_names_strategies_that_exist_and_an_unknown_one_lists_them(cohort: str) -> None:
    for name in GRIDS:
        grid = Grid(cohort=cohort, store="nowhere", config=find_grid(name))
        assert {work.kind for work in grid.list_work()} == {"pretrain", "probe", "train"}
        assert grid.plan.notes == ()
    with pytest.raises(LookupMiss, match="smoke, small, paper"):
        find_grid("large")


def test_smaller_training_sets_begin_larger_ones_and_keep_both_ages() -> None:
    people = tuple(f"s{number:02d}" for number in range(20))
    fold = Fold(train=people, validation=("v",), test=("t",))
    strata = {name: str(number % 2) for number, name in enumerate(people)}
    chosen = [set(shrink_fold(fold, size, [3], strata).train) for size in (2, 5, 11, 20)]
    assert [len(names) for names in chosen] == [2, 5, 11, 20]
    assert all(small < large for small, large in itertools.pairwise(chosen))
    assert {strata[name] for name in chosen[0]} == {"0", "1"}
    assert shrink_fold(fold, 5, [4], strata).train != shrink_fold(fold, 5, [3], strata).train

"""What the process of a sweep's trials holds from trial to trial, with and without giving freed memory back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import physioray.sweep
from physioray.distribute import join_cluster
from physioray.memory import measure_own_memory
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.search_space import choice
from physioray.sweep_plan import Objective, SweepPlan
from physioray.sweep_trial import Trial
from tests.benchmarks.comparison import OURS, Comparison, Notebook
from tests.written_cohorts import write_cohort

TRIALS = 5


def pretrain_a_little(trial: Trial, cohort: str, keep: bool) -> None:
    """Some steps of the preset small; says first what the trials before have left in this process."""
    before = measure_own_memory()
    if keep:
        physioray.sweep.give_back_memory = do_nothing
    preset = find_preset("small")
    train = replace(preset.train, passes=1, warmup_passes=0.5, seed=trial.settings["seed"])
    job = PretrainJob.from_preset(preset, cohort=cohort, out=str(trial.folder), train=train, threads=1)
    pretrain(job)
    trial.report(epoch=1, before=before / 1e9, after=measure_own_memory() / 1e9)


def do_nothing() -> None:
    pass


@pytest.mark.benchmark_run
@pytest.mark.ray
def test_a_reused_process_does_not_grow_from_trial_to_trial(tmp_path: Path, notebook: Notebook) -> None:
    cohort = write_cohort(tmp_path / "cohort", [12] * 20)
    plan = SweepPlan(
        space={"seed": choice(list(range(TRIALS)))},
        base={"seed": 0},
        objectives=(Objective(metric="after", mode="min"),),
        sampler="grid",
    )
    found: dict[bool, list[float]] = {}
    for keep in (False, True):
        run: Callable[[Trial], None] = partial(pretrain_a_little, cohort=cohort.location.path, keep=keep)
        with join_cluster(cpus=2):
            result = physioray.sweep.run_sweep(plan, run, str(tmp_path / str(keep)), concurrent=1)
        found[keep] = [trial.last["before"] for trial in result.trials]
        after = [trial.last["after"] for trial in result.trials]
        print(
            f"\n{'kept' if keep else 'given back'}: own memory before each trial "
            f"{[f'{size:.2f}' for size in found[keep]]} GB, at its end {[f'{size:.2f}' for size in after]} GB"
        )
    # The first trial finds nothing imported yet; from the second on it must stand still.
    notebook.keep(
        Comparison(
            title="Own memory of a reused trial process before each trial",
            unit="GB",
            better="less",
            figures={OURS: found[False], "freed memory kept": found[True]},
            note="SIMULATED noise, preset small; a trial a turn, so the spread is growth",
        )
    )
    assert max(found[False][2:]) <= 1.1 * found[False][1]
    assert max(found[False][1:]) < max(found[True][1:])

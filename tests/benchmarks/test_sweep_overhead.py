"""Seconds that a sweep costs per trial beside the trial's own work."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from physioray.search_space import choice
from physioray.sweep_plan import Objective, SweepPlan
from physioray.sweep_trial import Trial
from tests.benchmarks.comparison import OURS, REPEATS, Comparison, Goal, Notebook

TRIALS = REPEATS + 1
ALLOWED = 1.0
TRAINER = "TorchTrainer in every trial"


@pytest.mark.benchmark_run
@pytest.mark.ray
def test_a_trial_in_a_warm_process_costs_less_than_a_second_beside_its_work(tmp_path: Path, notebook: Notebook) -> None:
    from physioray.distribute import join_cluster
    from physioray.sweep import run_sweep

    def note(trial: Trial) -> None:
        (trial.folder / "began").write_text(str(time.time()))
        trial.report(epoch=1, score=1.0)
        (trial.folder / "ended").write_text(str(time.time()))

    def note_under_train(trial: Trial) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        def loop(config: dict[str, Any]) -> None:
            (config["trial"].folder / "began").write_text(str(time.time()))
            config["trial"].report(epoch=1, score=1.0)
            (config["trial"].folder / "ended").write_text(str(time.time()))

        TorchTrainer(
            loop,
            train_loop_config={"trial": trial},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name="run", storage_path=trial.folder.path),
        ).fit()

    plan = SweepPlan(
        space={"x": choice(list(range(TRIALS)))}, base={"x": 0}, objectives=(Objective(metric="score"),), sampler="grid"
    )
    overheads = {}
    with join_cluster(cpus=4):
        for name, function in ((OURS, note), (TRAINER, note_under_train)):
            out = tmp_path / name
            began = time.time()
            run_sweep(plan, function, str(out), concurrent=1)
            moments = [
                [float((out / "trials" / f"{number:04d}" / "run" / word).read_text()) for word in ("began", "ended")]
                for number in range(TRIALS)
            ]
            first = moments[0][0] - began
            overheads[name] = [after[0] - before[1] for before, after in itertools.pairwise(moments)]
            print(f"\noverhead per trial, {name}: first {first:.2f} s")
    notebook.keep(
        Comparison(
            title="Overhead per trial after the first, one worker",
            unit="s",
            better="less",
            figures=overheads | {"allowed": [ALLOWED] * (TRIALS - 1)},
            goals=[Goal(against="allowed", ratio=1.0)],
            note="from the end of one trial's work to the beginning of the next one's",
        )
    )

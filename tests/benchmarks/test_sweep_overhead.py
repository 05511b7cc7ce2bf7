"""Seconds that a sweep costs per trial beside the trial's own work."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from physioray.search_space import choice
from physioray.sweep_plan import Objective, SweepPlan
from physioray.sweep_trial import Trial


@pytest.mark.benchmark_run
@pytest.mark.ray
def test_a_trial_in_a_warm_process_costs_less_than_a_second_beside_its_work(tmp_path: Path) -> None:
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
        space={"x": choice(list(range(6)))}, base={"x": 0}, objectives=(Objective(metric="score"),), sampler="grid"
    )
    with join_cluster(cpus=4):
        for name, function, trials in (("in process", note, 6), ("TorchTrainer", note_under_train, 3)):
            out = tmp_path / name
            began = time.time()
            run_sweep(replace(plan, trials=trials), function, str(out), concurrent=1)
            moments = [
                [float((out / "trials" / f"{number:04d}" / "run" / word).read_text()) for word in ("began", "ended")]
                for number in range(trials)
            ]
            gaps = [moments[0][0] - began]
            gaps += [after[0] - before[1] for before, after in itertools.pairwise(moments)]
            print(f"\noverhead per trial, {name}: first {gaps[0]:.2f} s, then {[f'{gap:.2f}' for gap in gaps[1:]]} s")
            if name == "in process":
                assert statistics.median(gaps[1:]) <= 1.0

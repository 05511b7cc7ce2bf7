"""One trial of a sweep: pretraining as a step, scores of validation subjects at the rungs and at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.presets import find_preset
from physioray.pretrainings import open_pretraining
from physioray.steps import StepStore
from physioray.storage import Location, open_location
from physioray.trials import TrialPlan, TrialSettings, make_base, run_trial
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")
SETTINGS = TrialSettings(
    model=TINY.model,
    objective=TINY.objective,
    train=replace(TINY.train, passes=3),
    probe=ProbeConfig(tasks=("sleep", "age"), seeds=(0,), folds=2, bootstrap_draws=10),
    finetune=replace(TINY.finetune, passes=1, warmup_passes=0.5),
)


class Stopped(Exception):
    """The scheduler has had enough."""


@dataclass
class Told:
    """A trial that writes down what it is told."""

    settings: dict[str, Any]
    folder: Location
    stop_at: int | None = None
    reports: list[dict[str, float]] = field(default_factory=list)

    def report(self, *, epoch: float, **metrics: float) -> None:
        self.reports.append({"epoch": epoch, **metrics})
        if epoch == self.stop_at:
            raise Stopped


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("trials") / "cohort", [12] * 20)


def make_trial(tmp_path: Path, name: str = "0", *, stop_at: int | None = None, **changes: Any) -> Told:
    return Told(make_base(replace(SETTINGS, **changes)), open_location(tmp_path / "trials" / name), stop_at)


def make_plan(cohort: Cohort, tmp_path: Path, **changes: Any) -> TrialPlan:
    return TrialPlan(cohort=cohort.location.path, store=str(tmp_path / "steps"), rungs=(1, 2), **changes)


def count_steps(plan: TrialPlan, name: str) -> int:
    return sum(item.name == name and item.state == "done" for item in StepStore(open_location(plan.store)).list_steps())


def test_a_trial_reports_at_every_rung_and_at_the_end(cohort: Cohort, tmp_path: Path) -> None:
    plan, trial = make_plan(cohort, tmp_path), make_trial(tmp_path)
    run_trial(trial, plan)
    assert [report["epoch"] for report in trial.reports] == [1, 2, 3]
    for report in trial.reports:
        assert {"sleep", "sleep_low", "sleep_high", "age", "aggregate"} <= set(report)
        assert 0 <= report["sleep_low"] <= report["sleep_high"] <= 1
    pretraining, _ = open_pretraining(str(tmp_path / "trials" / "0"))
    assert pretraining.name == "multimae_drop"


def test_trials_that_differ_after_pretraining_share_it(cohort: Cohort, tmp_path: Path) -> None:
    plan = make_plan(cohort, tmp_path)
    for size in (2, 3, None):
        run_trial(make_trial(tmp_path, str(size), training_subjects=size), plan)
    assert (count_steps(plan, "pretrain"), count_steps(plan, "embed"), count_steps(plan, "probe")) == (1, 1, 3)


def test_a_stopped_trial_goes_on_from_its_checkpoint(cohort: Cohort, tmp_path: Path) -> None:
    plan, trial = make_plan(cohort, tmp_path), make_trial(tmp_path, stop_at=2)
    with pytest.raises(Stopped):
        run_trial(trial, plan)
    assert count_steps(plan, "pretrain") == 0
    again = make_trial(tmp_path)
    run_trial(again, plan)
    assert [report["epoch"] for report in again.reports] == [2, 3], "pass 1 was not trained again"
    whole = make_trial(tmp_path, "whole")
    run_trial(whole, replace(plan, store=str(tmp_path / "others")))
    assert again.reports[-1] == whole.reports[-1], "the end is that of a trial that was never stopped"


def test_a_trial_can_be_scored_by_finetuning(cohort: Cohort, tmp_path: Path) -> None:
    plan, trial = make_plan(cohort, tmp_path, evaluation="finetune"), make_trial(tmp_path)
    run_trial(trial, plan)
    assert [report["epoch"] for report in trial.reports] == [3]
    assert count_steps(plan, "finetune") == 2 * 2

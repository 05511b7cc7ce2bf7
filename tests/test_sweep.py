"""Sweeps on a real local cluster: the same trials as by hand, warm processes, dead workers, freed places, buckets."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist
from ray._private.utils import get_system_memory, get_used_memory

from physioray.config import ProbeConfig
from physioray.distribute import Resources, join_cluster
from physioray.journal import AfterPass
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob
from physioray.search_space import choice
from physioray.storage import Location, StorageError, open_location
from physioray.sweep import run_sweep
from physioray.sweep_experiment import OnWorkers
from physioray.sweep_journal import read_sweep
from physioray.sweep_plan import AshaConfig, MedianConfig, Objective, SweepPlan
from physioray.sweep_trial import RunTrial, Trial
from physioray.trials import Here, TrialPlan, TrialSettings, Workplace, make_base, run_trial
from tests.buckets import serve_bucket
from tests.greedy_trial import NEEDED
from tests.sweep_trials import fit_logistic, make_plan, sweep_by_hand
from tests.test_experiments import FOLDER, load
from tests.test_sweep_driver import strip
from tests.written_cohorts import write_cohort

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket that the cluster's processes can open too, as they are started after it."""
    with serve_bucket("sweeps") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PHYSIORAY_MIRROR", str(tmp_path_factory.mktemp("mirror")))
        yield "s3://sweeps"


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: str) -> Iterator[None]:  # noqa: ARG001
    with join_cluster(cpus=4):
        yield


def test_a_serial_sweep_on_the_cluster_is_the_one_by_hand_and_keeps_its_process_warm(tmp_path: Path) -> None:
    class Lines:
        def __init__(self) -> None:
            self.counts: list[tuple[int, int, str]] = []
            self.said: list[str] = []

        def update(self, done: int, total: int, note: str = "") -> None:
            self.counts.append((done, total, note))

        def say(self, text: str) -> None:
            self.said.append(text)

    screen = Lines()
    found = run_sweep(make_plan(), fit_logistic, str(tmp_path / "cluster"), concurrent=1, screen=screen)
    assert strip(found) == strip(sweep_by_hand(make_plan(), fit_logistic, tmp_path / "hand"))
    processes = {path.read_text() for path in (tmp_path / "cluster").glob("trials/*/run/passes/*")}
    assert len({text.split('"process": ')[1].split(",")[0] for text in processes}) == 1
    assert screen.counts[0][:2] == (0, 6) and screen.counts[-1][:2] == (6, 6)
    assert "best SIMULATED score" in screen.counts[-1][2] and "stopped" in screen.counts[-1][2]
    assert any("given up by the scheduler" in line for line in screen.said)
    page = (tmp_path / "cluster" / "sweep.html").read_text()
    assert "SIMULATED SIGNALS" in page and "fit.learning_rate" in page and "<svg" in page


def test_a_second_call_runs_nothing_and_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    plan = make_plan("grid", trials=2, scheduler=None)
    sweep_by_hand(plan, fit_logistic, tmp_path)
    calls = sorted(tmp_path.glob("trials/*/run/calls/*"))
    assert len(run_sweep(plan, fit_logistic, str(tmp_path)).rank()) == 2
    assert sorted(tmp_path.glob("trials/*/run/calls/*")) == calls
    with pytest.raises(StorageError, match="seed was 0 and is now 1"):
        run_sweep(make_plan("grid", trials=2, scheduler=None, seed=1), fit_logistic, str(tmp_path))


def die_once(trial: Trial) -> None:
    calls = len((trial.folder / "calls").list())
    if trial.number == 2:
        (trial.folder / "calls" / str(calls)).write_text("")
        raise RuntimeError(f"no luck {calls}")
    report = trial.report

    def dying_report(**line: Any) -> None:
        report(**line)
        if trial.number == 1 and line["epoch"] == 2 and calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    trial.report = dying_report  # type: ignore[method-assign]
    fit_logistic(trial)


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint_and_a_failing_one_stops_nobody(tmp_path: Path) -> None:
    plan = make_plan("grid", trials=4, scheduler=None, max_failures=1)
    result = run_sweep(plan, die_once, str(tmp_path / "swept"), concurrent=2)
    assert [trial.state for trial in result.trials] == ["finished", "finished", "failed", "finished"]
    assert [reason[:16] for reason in result.trials[1].failures] == ["its process died"]
    assert result.trials[2].reason == "RuntimeError: no luck 1"
    # Passes 1 and 2 before the death, 3 and 4 after it: none twice.
    epochs = sorted(path.name.split("-")[0] for path in tmp_path.glob("swept/trials/0001/run/passes/*"))
    assert epochs == ["1", "2", "3", "4"]
    calm = sweep_by_hand(make_plan("grid", trials=2, scheduler=None), fit_logistic, tmp_path / "calm")
    assert strip(result)[1] == strip(calm)[1]


def test_a_trial_that_ray_kills_for_its_memory_is_tried_again_and_the_sweep_goes_on(tmp_path: Path) -> None:
    free = get_system_memory() - get_used_memory()
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GB of free memory, but there are {free / 2**30:.1f}")
    # A cluster of its own, as the memory that Ray allows is said when it starts.
    subprocess.run([sys.executable, "-m", "tests.greedy_trial", str(tmp_path / "swept")], check=True, timeout=240)
    trials = read_sweep(tmp_path / "swept").trials
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert trials[1].failures and all("running low on memory" in reason for reason in trials[1].failures)


def test_as_many_trials_as_fit_run_at_once_and_none_without_room(tmp_path: Path) -> None:
    def meet(trial: Trial) -> None:
        # Two trials of two CPUs fit into four: each waits until it sees the other.
        (trial.folder / "here").write_text("")
        others = Path(trial.folder.path).parent.parent
        until = time.monotonic() + 60
        while len(list(others.glob("*/run/here"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        trial.report(epoch=1, score=float(len(list(others.glob("*/run/here")))))

    plan = SweepPlan(
        space={"x": choice([1, 2])}, base={"x": 1}, objectives=(Objective(metric="score"),), sampler="grid"
    )
    result = run_sweep(plan, meet, str(tmp_path / "two"), resources=Resources(cpus_per_worker=2))
    assert [trial.last["score"] for trial in result.trials] == [2.0, 2.0]
    with pytest.raises(ValueError, match="room for one trial"):
        run_sweep(plan, meet, str(tmp_path / "none"), resources=Resources(cpus_per_worker=64))


def count_groups() -> int:
    return sum(group["state"] == "CREATED" for group in ray.util.placement_group_table().values())


@dataclass(frozen=True, kw_only=True)
class Troubled(OnWorkers):
    """The workers of a trial as an experiment has them, with a death in the one and a long wait in the other."""

    marks: Location

    def pretrain(self, job: PretrainJob, after_pass: AfterPass | None) -> object:
        assert after_pass is not None
        return super().pretrain(job, partial(meet_trouble, self.marks, job, after_pass))


def meet_trouble(marks: Location, job: PretrainJob, after_pass: AfterPass, passes: int, folder: Location) -> None:
    """In the first worker, after a pass: note it, die once after the second, wait where the trial is to be given up."""
    kind = "both" if "eeg" in job.model.modalities else "ecg"
    (marks / kind / f"{passes}-{os.getpid()}").write_text(str(dist.get_world_size()))
    after_pass(passes, folder)
    if kind == "ecg":
        time.sleep(30)
    elif passes == 2 and not (marks / "died").exists():
        (marks / "died").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> tuple[str, str]:
    """The same small cohort on disk and in the bucket."""
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(folder, [12] * 20, modalities=("eeg", "ecg"))
    there = open_location(f"{bucket}/cohort")
    for path in folder.rglob("*"):
        if path.is_file():
            (there / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    return str(folder), there.uri


def plan_real_trials(cohort: str, store: str, place: Workplace, **changes: Any) -> tuple[SweepPlan, RunTrial]:
    """A sweep of real pretrainings of the preset tiny, probed after every pass: first a good trial, then a bad one."""
    tiny = find_preset("tiny")
    base = make_base(
        TrialSettings(
            model=replace(tiny.model, modalities=("eeg", "ecg")),
            objective=tiny.objective,
            train=replace(tiny.train, passes=3),
            probe=ProbeConfig(tasks=("sleep",), seeds=(0,), folds=2, bootstrap_draws=10),
            finetune=tiny.finetune,
        )
    )
    # The signals are noise, but the amplitude of the EEG follows the stage.
    settings: dict[str, Any] = {
        "space": {"model.modalities": choice([("eeg", "ecg"), ("ecg",)])},
        "base": base,
        "objectives": (Objective(metric="sleep"),),
        "sampler": "grid",
        "scheduler": AshaConfig(grace_passes=1, most_passes=3),
        "simulated": True,
    }
    trials = TrialPlan(cohort=cohort, store=store, rungs=(1, 2), place=place)
    return SweepPlan(**(settings | changes)), partial(run_trial, plan=trials)


@pytest.mark.slow
def test_trials_with_two_workers_survive_a_dead_one_and_give_everything_back_when_given_up(
    cohort: tuple[str, str], tmp_path: Path
) -> None:
    resources = Resources(workers=2)
    place = Troubled(resources=resources, marks=open_location(tmp_path / "marks"))
    plan, run = plan_real_trials(cohort[0], str(tmp_path / "steps"), place)
    looks: list[tuple[float, int, float]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            looks.append((time.time(), count_groups(), ray.available_resources().get("CPU", 0.0)))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = run_sweep(plan, run, str(tmp_path / "two"), resources=resources, concurrent=1)
        stopped = (tmp_path / "two" / "trials" / "0001" / "outcome.json").stat().st_mtime
        time.sleep(max(0.0, stopped + 6 - time.time()))
    finally:
        done.set()
        watcher.join()
    good, bad = result.trials
    assert [trial.state for trial in result.trials] == ["finished", "stopped"], result.trials
    assert [line["epoch"] for line in good.reports] == [1, 2, 3] and bad.last["epoch"] == 1
    assert good.reports[0]["sleep"] > bad.last["sleep"]

    # The trial that was given up has no worker and no place left; its pretraining is not finished.
    assert max(groups for _, groups, _ in looks) >= 2, "the watcher saw no group of workers at all"
    freed = min(at for at, groups, cpus in looks if at > stopped and groups == 0 and cpus == 4.0)
    print(f"\nall placement groups gone and CPUs free {freed - stopped:.1f} s after the stop")
    assert freed - stopped <= 5.0
    workers = {int(mark.name.split("-")[1]) for mark in (tmp_path / "marks" / "ecg").iterdir()}
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)

    # The worker that died after pass 2 was replaced, and the other one went on from the checkpoint of that pass.
    marks = [mark for mark in (tmp_path / "marks" / "both").iterdir()]
    assert {mark.read_text() for mark in marks} == {"2"}, "it was trained by two workers"
    passes: dict[str, list[int]] = {}
    for mark in sorted(marks):
        passes.setdefault(mark.name.split("-")[1], []).append(int(mark.name.split("-")[0]))
    assert sorted(passes.values()) == [[1, 2], [2, 3]]
    assert not good.failures, "the trial itself did not fail"

    # Through the same steps: the same trial in one warm process finds the pretraining done, and scores the same.
    alone = Troubled(resources=Resources(), marks=open_location(tmp_path / "never"))
    plan, run = plan_real_trials(cohort[0], str(tmp_path / "steps"), alone, trials=1)
    again = run_sweep(plan, run, str(tmp_path / "one"), concurrent=1)
    assert again.trials[0].last["sleep"] == good.last["sleep"]
    assert not (tmp_path / "never").exists(), "it was pretrained again"


def test_an_experiment_runs_as_it_is_typed(
    cohort: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    typed = ["sweep_training_size.py", "--cohort", cohort[0], "--out", str(out), "--smoke", "--concurrent", "1"]
    monkeypatch.setattr("sys.argv", typed)
    load(FOLDER / "sweep_training_size.py").main()
    result = read_sweep(out)
    assert [trial.state for trial in result.trials] == ["finished"] * 2
    assert len([step for step in (tmp_path / "steps" / "pretrain").iterdir()]) == 1, "they share one pretraining"
    said = capsys.readouterr().out
    assert "SIMULATED SIGNALS" in said and f"physioray evaluate {out}/trials/" in said


def test_a_sweep_of_a_cohort_in_a_bucket_into_a_bucket_scores_as_on_a_disk(
    cohort: tuple[str, str], bucket: str, tmp_path: Path
) -> None:
    plan, run = plan_real_trials(cohort[1], f"{bucket}/steps", Here())
    there = run_sweep(plan, run, f"{bucket}/sweep", concurrent=1)
    plan, run = plan_real_trials(cohort[0], str(tmp_path / "steps"), Here())
    here = run_sweep(plan, run, str(tmp_path / "sweep"), concurrent=1)
    assert strip(there) == strip(here) == strip(read_sweep(f"{bucket}/sweep"))
    assert [trial.state for trial in there.trials] == ["finished", "stopped"]
    assert len(open_location(f"{bucket}/sweep/tensorboard/0001").list()) >= 1
    assert (open_location(bucket) / "sweep" / "sweep.html").exists()


@pytest.mark.parametrize("how", ["random, median", "score and time"])
def test_every_way_to_search_goes_through_on_the_cluster(tmp_path: Path, how: str) -> None:
    if how == "random, median":
        plan = make_plan("random", scheduler=MedianConfig(grace_passes=1, least_trials=2))
    else:
        sought = (Objective(metric="score"), Objective(metric="seconds", mode="min"))
        plan = make_plan("tpe", objectives=sought, scheduler=None)
    result = run_sweep(plan, fit_logistic, str(tmp_path / "swept"), concurrent=1)
    assert len(result.trials) == 6 and result.best is not None
    if how == "random, median":
        assert {trial.state for trial in result.trials} == {"finished", "stopped"}
        assert strip(result) == strip(sweep_by_hand(plan, fit_logistic, tmp_path / "hand"))
        assert "Median" in (tmp_path / "swept" / "sweep.html").read_text()
    else:
        assert result.count("finished") == 6 and all(trial.last["seconds"] > 0 for trial in result.trials)
        page = (tmp_path / "swept" / "sweep.html").read_text()
        assert "Trade-offs" in page and "tradeoff-score-seconds" in page

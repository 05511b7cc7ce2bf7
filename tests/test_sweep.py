"""Sweeps on a real local cluster: the same trials as by hand, warm processes, dead workers, freed places, buckets."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from physioray.search_space import choice
from physioray.storage import StorageError, open_location
from physioray.sweep_journal import read_sweep
from physioray.sweep_plan import AshaConfig, Objective, SweepPlan
from physioray.sweep_trial import Trial
from tests.sweep_trials import fit_logistic, make_plan, sweep_by_hand
from tests.test_sweep_driver import strip

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from physioray.distribute import join_cluster

    with join_cluster(cpus=4):
        yield


def test_a_serial_sweep_on_the_cluster_is_the_one_by_hand_and_keeps_its_process_warm(tmp_path: Path) -> None:
    from physioray.sweep import run_sweep

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
    from physioray.sweep import run_sweep

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
    from physioray.sweep import run_sweep

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


def test_as_many_trials_as_fit_run_at_once_and_none_without_room(tmp_path: Path) -> None:
    from physioray.distribute import Resources
    from physioray.sweep import run_sweep

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


def train_together(trial: Trial) -> None:
    """Two workers of Ray Train, of which the first reports."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        for epoch in range(1, 40):
            time.sleep(0.1)
            if ray.train.get_context().get_world_rank() == 0:
                config["trial"].report(epoch=epoch, score=config["trial"].settings["quality"] * epoch)
                (config["trial"].folder / "beat").write_text(str(time.time()))
            if config["trial"].settings["quality"] == 2.0 and epoch == 4:
                return
        raise AssertionError("a bad trial was never stopped")

    TorchTrainer(
        loop,
        train_loop_config={"trial": trial},
        scaling_config=ScalingConfig(num_workers=trial.workers, resources_per_worker={"CPU": trial.cpus_per_worker}),
        run_config=RunConfig(name="run", storage_path=trial.folder.path),
    ).fit()


@pytest.mark.slow
def test_a_stopped_trial_with_workers_gives_its_places_back_within_five_seconds(tmp_path: Path) -> None:
    from physioray.distribute import Resources
    from physioray.sweep import run_sweep

    def count_groups() -> int:
        return sum(group["state"] == "CREATED" for group in ray.util.placement_group_table().values())

    looks: list[tuple[float, int, float]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            looks.append((time.time(), count_groups(), ray.available_resources().get("CPU", 0.0)))

    watcher = threading.Thread(target=look)
    watcher.start()
    plan = SweepPlan(
        space={"quality": choice([2.0, 0.1])},
        base={"quality": 1.0},
        objectives=(Objective(metric="score"),),
        sampler="grid",
        scheduler=AshaConfig(grace_passes=2, most_passes=4),
    )
    resources = Resources(workers=2, reading_cpus=0)
    result = run_sweep(plan, train_together, str(tmp_path), resources=resources, concurrent=1)
    stopped = (tmp_path / "trials" / "0001" / "outcome.json").stat().st_mtime
    time.sleep(5.5)
    done.set()
    watcher.join()
    assert [trial.state for trial in result.trials] == ["finished", "stopped"]
    # Workers do not wait for the answer to a report, so some passes more may have been made.
    assert 2 <= result.trials[1].last["epoch"] < 39
    assert max(groups for _, groups, _ in looks) >= 2, "the watcher saw no group of workers at all"
    freed = min(at for at, groups, cpus in looks if at > stopped and groups == 0 and cpus == 4.0)
    beat = float((tmp_path / "trials" / "0001" / "run" / "beat").read_text())
    print(f"\nall placement groups gone and CPUs free {freed - stopped:.1f} s after the stop")
    assert freed - stopped <= 5.0 and beat - stopped <= 5.0


def test_a_bucket_works_as_a_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="sweeps")
        plan = make_plan("grid", trials=2, scheduler=None)
        once = sweep_by_hand(plan, fit_logistic, "s3://sweeps/one")
        assert strip(once) == strip(sweep_by_hand(plan, fit_logistic, tmp_path / "disk"))
        (open_location("s3://sweeps/one/trials/0001/outcome.json")).delete()
        again = sweep_by_hand(plan, fit_logistic, "s3://sweeps/one")
        assert strip(again) == strip(once) == strip(read_sweep("s3://sweeps/one"))
        assert len(open_location("s3://sweeps/one/trials/0001/run/calls").list()) == 1
        assert len(open_location("s3://sweeps/one/tensorboard/0001").list()) >= 1
    finally:
        server.stop()

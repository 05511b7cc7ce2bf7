"""A sweep whose driver is killed, terminated or interrupted three times ends up as one left in peace.

Three sweeps go through it side by side: one trial after the other on a cluster of its own, which is lost with the
driver; and two at a time, into a bucket and into a folder, on a cluster that runs on when the driver is gone.
"""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from physioray.storage import Location, open_location
from physioray.sweep_journal import read_sweep
from tests.buckets import serve_bucket
from tests.sweep_trials import PAUSE, drive, fit_logistic, list_changes, make_plan, sweep_by_hand
from tests.test_sweep_driver import strip

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Drivers are forked from a process that has imported everything: twelve starts would import for a minute otherwise.
FORKS = multiprocessing.get_context("forkserver")


class Trap:
    """Whoever unpickles it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, (str(self.trace),))


@dataclass
class Course:
    """A sweep that is interrupted again and again."""

    sampler: str
    concurrent: int
    out: str
    scratch: Path
    address: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    codes: list[int | None] = field(default_factory=list)

    @property
    def folder(self) -> Location:
        return open_location(self.out)

    @property
    def log(self) -> Path:
        return self.scratch / "log"

    def start(self) -> Any:
        settings = (self.out, self.sampler, self.concurrent, self.address, self.environment, str(self.log))
        process = FORKS.Process(target=drive, args=settings)
        process.start()
        return process

    def count(self, name: str) -> int:
        return sum((trial / name).exists() for trial in (self.folder / "trials").list())

    def wait_for(self, moment: Callable[["Course"], bool], process: Any, seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not moment(self):
            assert process.is_alive(), self.log.read_text()[-3000:]
            assert time.monotonic() < until, "the moment to interrupt never came"
            time.sleep(0.02)

    def set_traps(self) -> None:
        """Put pickles where Ray Tune would look for the state of an earlier run, and where a trial keeps its things."""
        trap = pickle.dumps(Trap(self.scratch / "unpickled"))
        for name in (
            "tuner.pkl",
            "trainable.pkl",
            "optimizer.pkl",
            "search_gen_state-now.json",
            "experiment_state.pkl",
        ):
            (self.folder / "ray" / "trials" / name).write_bytes(trap)
            (self.folder / "trials" / "0000" / "run" / name).write_bytes(trap)

    def go(self) -> None:
        """Interrupt three times, then leave in peace."""
        for how, moment in MOMENTS:
            process = self.start()
            self.wait_for(moment, process)
            if how == signal.SIGKILL:
                # With it goes the head of its cluster, if that is its own.
                os.killpg(process.pid, signal.SIGKILL)
                process.join(240)
                self.set_traps()
            else:
                os.kill(process.pid, how)
                process.join(240)
            self.codes.append(process.exitcode)
            for trial in (self.folder / "trials").list():
                if (trial / "outcome.json").exists():
                    self.ended[trial.name] = (trial / "outcome.json").read_text()
        process = self.start()
        process.join(240)
        self.codes.append(process.exitcode)


MOMENTS: list[tuple[signal.Signals, Callable[[Course], bool]]] = [
    # Planned, and nothing run yet or hardly; in the middle of a trial; with some trials ended.
    (signal.SIGKILL, lambda course: course.count("planned.json") >= 1),
    (signal.SIGTERM, lambda course: course.count("reports.json") >= 1),
    (signal.SIGINT, lambda course: course.count("outcome.json") >= 2 and course.count("running.json") >= 1),
]


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Course]]:
    from ray.cluster_utils import Cluster

    FORKS.set_forkserver_preload(["tests.sweep_trials", "physioray.sweep", "physioray.cli", "torch.utils.tensorboard"])
    places = {name: tmp_path_factory.mktemp(name) for name in ("alone", "bucket", "cluster")}
    with serve_bucket("sweeps") as bucket, pytest.MonkeyPatch.context() as environment:
        for name, value in bucket.items():
            environment.setenv(name, value)
        environment.setenv("RAY_worker_niceness", "0")
        environment.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        common = bucket | {PAUSE: "0.2"}
        joined = common | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        found = {
            "alone": Course("tpe", 1, str(places["alone"] / "sweep"), places["alone"], None, common),
            "bucket": Course("grid", 2, "s3://sweeps/one", places["bucket"], "auto", joined),
            "cluster": Course("tpe", 2, str(places["cluster"] / "sweep"), places["cluster"], "auto", joined),
        }
        try:
            with ThreadPoolExecutor(len(found)) as pool:
                list(pool.map(Course.go, found.values()))
            yield found
        finally:
            cluster.shutdown()


@pytest.mark.parametrize("name", ["alone", "bucket", "cluster"])
def test_three_interruptions_lose_nothing_and_repeat_nothing(
    courses: dict[str, Course], tmp_path: Path, name: str
) -> None:
    course = courses[name]
    assert 0 not in course.codes[:3] and course.codes[3] == 0, (course.codes, course.log.read_text()[-3000:])
    result = read_sweep(course.out)
    assert [trial.number for trial in result.trials] == list(range(6))
    assert {trial.state for trial in result.trials} <= {"finished", "stopped"}
    # What had ended was not touched; no pass whose checkpoint stood was run again, and nobody wrote beside the heir.
    assert len(course.ended) >= 2
    for trial_name, text in course.ended.items():
        assert (course.folder / "trials" / trial_name / "outcome.json").read_text() == text
    for trial in result.trials:
        places = (course.folder / "trials" / trial.name / "run" / "passes").list()
        passes = [(place.name.split("-")[0], place.read_json()) for place in places]
        numbers = [number for number, _ in passes]
        assert len(numbers) == len(set(numbers)), f"trial {trial.number} ran a pass twice: {sorted(numbers)}"
        order = [entry["process"] for _, entry in sorted(passes, key=lambda item: item[1]["time"])]
        turns = [process for place, process in enumerate(order) if not place or order[place - 1] != process]
        assert len(turns) == len(set(turns)), "two processes wrote to one trial in turns"
    assert not (course.scratch / "unpickled").exists(), "something in the sweep's folder was unpickled"
    assert not (course.folder / "owner.json").exists()
    if course.concurrent == 1 or course.sampler == "grid":
        plan = make_plan(course.sampler, **list_changes(course.sampler))
        assert strip(result) == strip(sweep_by_hand(plan, fit_logistic, tmp_path / "calm"))

"""Runs a sweep's trials on Ray Tune; the same call goes on after any interruption, and nothing is run twice.

The folder is the only memory (see sweep_journal). Ray Tune finds room for trials, keeps their processes warm and
carries their reports; what it stores itself is thrown away and never read.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
import ray.tune
import ray.util.metrics
from ray.air.execution._internal import RayActorManager
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from physioray.distribute import Resources, join_cluster
from physioray.journal import Screen
from physioray.leases import is_held, own, wait_until_free
from physioray.memory import give_back_memory
from physioray.storage import Location, open_location
from physioray.sweep_driver import SweepDriver
from physioray.sweep_journal import OWNER_FILE, RUNNING_FILE, SweepJournal, SweepResult, read_sweep
from physioray.sweep_plan import SweepPlan
from physioray.sweep_report import IMPORTANCE_FILE, write_sweep_report
from physioray.sweep_search import measure_importance
from physioray.sweep_trial import RunTrial, TrialStopped, run_attempt
from physioray.telemetry import export_sweep

LINE = "line/"
"""Reports travel under this prefix, apart from the metrics that Ray Tune adds by itself."""

GROUP = "workers_group"
"""Reports of a trial with workers of its own also say which placement group these stand in."""

SETTLE_SECONDS = 5.0
"""How long other workers of a trial may outlive its process; 0.2 to 0.8 s were measured."""

COUNT_SECONDS = 5.0
"""How often the cluster is asked how many trials fit: it may grow."""

_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ctrl-C is ours: Ray Tune would return as if the sweep were over.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_sweep(
    plan: SweepPlan,
    run_trial: RunTrial,
    out: str,
    *,
    resources: Resources = Resources(),  # noqa: B008 (frozen)
    address: str | None = None,
    concurrent: int | None = None,
    screen: Screen | None = None,
) -> SweepResult:
    """Run a sweep to its end, or go on with one: trials that have an outcome are kept, all others run.

    Args:
        plan: what is varied, sought and given up.
        run_trial: runs one trial. With one worker it is called in a process that earlier trials have warmed up; with
            more it starts a run on the cluster itself, whose first worker reports.
        out: path or URI of the sweep's folder, empty or of this sweep.
        resources: of each trial.
        address: of a running Ray cluster, `auto` for the one this machine belongs to; None takes the one that the
            environment names in RAY_ADDRESS (a submitted job's is its cluster), else starts one here.
        concurrent: trials at a time; as many as fit if None. With one at a time the search is repeatable.
        screen: where progress is shown.

    Returns:
        All trials; `sweep.html` in the folder shows them.

    Raises:
        StorageError: the folder holds another sweep, or another process sweeps it.
        ValueError: the cluster has no room for a single trial.
        KeyboardInterrupt: after all trials have been stopped; the same call goes on.
    """
    folder, address = open_location(out), address or os.environ.get("RAY_ADDRESS") or None
    if folder.is_local:
        folder.make_folder()
    journal = SweepJournal(folder=folder, space=plan.space)
    journal.claim(plan)
    with own(folder / OWNER_FILE) as token:
        driver = SweepDriver(plan, journal, screen)
        driver.show()
        if not driver.is_done:
            for number in driver.waiting:
                _wait_for_orphans(journal.find_trial(number) / RUNNING_FILE, resources)
            _run_trials(driver, run_trial, token, resources, address, concurrent)
        (folder / IMPORTANCE_FILE).write_json(measure_importance(plan, list(driver.records.values())))
        result = read_sweep(folder)
        write_sweep_report(folder)
    return result


def _wait_for_orphans(lease: Location, resources: Resources) -> None:
    """Wait until an interrupted trial's old process is gone: it sees within a second that the sweep has a new owner."""
    if not lease.exists():
        return
    wait_until_free(lease)
    if resources.workers > 1:
        time.sleep(SETTLE_SECONDS)
    lease.delete()


def _run_trials(
    driver: SweepDriver,
    run_trial: RunTrial,
    token: str,
    resources: Resources,
    address: str | None,
    concurrent: int | None,
) -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    grants = {name: count for name, count in asdict(resources).items() if name.endswith(("workers", "per_worker"))}
    with _join_cluster(address, resources), _tune_storage(driver.journal.folder, address) as storage:
        room = _Room(resources, concurrent, may_grow=address is not None)
        room.check()
        driver.tell = partial(export_sweep, ray.util.metrics, driver.journal.folder.name)
        attempt = ray.tune.with_parameters(
            _attempt, run_trial=run_trial, base=driver.plan.base, journal=driver.journal, token=token, grants=grants
        )
        alone = resources.workers == 1
        # The process that waits for its workers needs no CPU, but Ray Tune refuses to reserve nothing at all.
        wanted = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker} if alone else {"memory": 1}
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(attempt, {name: count for name, count in wanted.items() if count}),
            tune_config=ray.tune.TuneConfig(
                search_alg=_Search(driver, room), scheduler=_Scheduler(driver), num_samples=-1, reuse_actors=alone
            ),
            run_config=ray.tune.RunConfig(name="trials", storage_path=storage, verbose=0),
        )
        try:
            with _count_every_loss_as_a_death():
                tuner.fit()
        except SystemExit:
            # Ray's own answer to signals; here an interruption like any other.
            raise KeyboardInterrupt from None
        if not driver.is_done:
            raise RuntimeError("Ray Tune ended before the sweep did. Run the same command again: it goes on.")


@contextmanager
def _count_every_loss_as_a_death() -> Iterator[None]:
    """A trial whose process Ray itself has killed, as when memory runs low, is tried again like any that died.

    Ray Tune 2.60 takes only some of Ray's errors for the death of a trial, and at any other ends the whole sweep.
    """
    # Private, as Ray Tune offers no other place; the test with a greedy trial notices when it changes.
    manager: Any = RayActorManager
    trial: Any = ray.tune.experiment.Trial
    fail_before, ask_before = manager._actor_task_failed, trial._get_default_result_or_future

    def fail(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        known = (ray.exceptions.RayActorError, ray.exceptions.RayTaskError)
        if isinstance(exception, ray.exceptions.RayError) and not isinstance(exception, known):
            exception = ray.exceptions.RayActorError(error_msg=str(exception))
        fail_before(self, tracked_actor_task, exception)

    def ask(self: Any) -> dict[str, Any] | None:
        try:
            return ask_before(self)
        except ray.exceptions.RayError:
            self._default_result_or_future = None
            return None

    manager._actor_task_failed, trial._get_default_result_or_future = fail, ask
    try:
        yield
    finally:
        manager._actor_task_failed, trial._get_default_result_or_future = fail_before, ask_before


@contextmanager
def _join_cluster(address: str | None, resources: Resources) -> Iterator[None]:
    needed = resources.workers * resources.cpus_per_worker
    if resources.workers > 1:
        needed += resources.reading_cpus
    with join_cluster(address, cpus=needed):
        yield


@contextmanager
def _tune_storage(folder: Location, address: str | None) -> Iterator[str]:
    """Where Ray Tune keeps its own files meanwhile: here, or where all nodes of a cluster see them."""
    if address is None:
        place = tempfile.mkdtemp(prefix="physioray-tune-")
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return
    shared = folder / "ray"
    try:
        yield shared.path if shared.is_local else shared.uri
    finally:
        with suppress(OSError):
            shared.delete()


class _Room:
    """How many trials may run at once."""

    def __init__(self, resources: Resources, most: int | None, *, may_grow: bool) -> None:
        self.resources, self.most, self.may_grow = resources, most, may_grow
        self.counted, self.looked = 0, float("-inf")

    def _count_fitting(self) -> int:
        resources, total = self.resources, ray.cluster_resources()
        reading = resources.reading_cpus if resources.workers > 1 else 0
        needs = {
            "CPU": resources.workers * resources.cpus_per_worker + reading,
            "GPU": resources.workers * resources.gpus_per_worker,
        }
        return min(math.floor(total.get(name, 0) / need + 1e-9) for name, need in needs.items() if need)

    def check(self) -> None:
        """Refuse what would wait for ever."""
        if not self._count_fitting() and not self.may_grow:
            total = ray.cluster_resources()
            raise ValueError(
                f"The cluster must have room for one trial of {self.resources}, but it has {total.get('CPU', 0):.0f} "
                f"CPUs and {total.get('GPU', 0):.0f} GPUs. Use fewer workers, or a larger cluster."
            )

    def count(self) -> int:
        """Trials that may run now; at least one, for a cluster that grows on demand."""
        if time.monotonic() - self.looked > COUNT_SECONDS:
            self.looked, self.counted = time.monotonic(), max(1, self._count_fitting())
        return self.counted if self.most is None else min(self.most, self.counted)


class _Search(Searcher):
    """Hands the driver's next trial to Ray Tune whenever there is room."""

    def __init__(self, driver: SweepDriver, room: _Room) -> None:
        super().__init__()
        self.driver, self.room = driver, room
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        if self.driver.is_done:
            return Searcher.FINISHED
        if len(self.driver.running) >= self.room.count():
            return None
        number = self.driver.start_trial()
        if number is None:
            return None
        self.numbers[trial_id] = number
        return {"number": number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002
        self.driver.end_attempt(self.numbers.pop(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folder is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class _Scheduler(FIFOScheduler):
    """Hands reports to the driver, which says when a trial is given up."""

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        line = {name.removeprefix(LINE): value for name, value in result.items() if name.startswith(LINE)}
        if not line:
            return TrialScheduler.CONTINUE
        number = trial.config["number"]
        if number not in self.driver.stopped and not self.driver.take_report(number, line):
            return TrialScheduler.CONTINUE
        if result.get(GROUP) is not None:
            lease = self.driver.journal.find_trial(number) / RUNNING_FILE
            threading.Thread(target=_free_group, args=(result[GROUP], lease), daemon=True).start()
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        self.driver.deaths[trial.config["number"]] = _read_death(trial)


def _free_group(group: str, lease: Location) -> None:
    """Give back the places of a stopped trial's workers, once the trial's own process is gone.

    Ray Train leaves that to a helper which asks Ray's dashboard, and without one the places are lost. As long as the
    trial's process lives it would take the loss of its workers for a failure, and start others.
    """
    until = time.monotonic() + 3.0
    while time.monotonic() < until and is_held(lease, lease_seconds=3.0):
        time.sleep(0.1)
    time.sleep(0.5)
    try:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
    except (ray.exceptions.RayError, ValueError):
        # Somebody was faster.
        return


def _read_death(trial: Any) -> str:
    """Why a trial's process died, as far as Ray says."""
    try:
        with open(trial.error_file, encoding="utf-8") as source:
            lines = [line.strip() for line in source if line.strip()]
    except (OSError, TypeError):
        lines = []
    told = " ".join(line for line in lines if not line.startswith(("Failure #", "class_name", "actor_id", "namespace")))
    return f"its process died: {told[:300]}" if told else "its process died"


class _TuneChannel:
    """Reports from a trial's own process; another process of the same trial gets a queue into it."""

    def send(self, line: Mapping[str, float]) -> None:
        try:
            ray.tune.report({f"{LINE}{name}": value for name, value in line.items()})
        except SystemExit:
            raise TrialStopped from None

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        from ray.train._internal.session import get_session

        session: Any = get_session()
        # Private, but what Ray's own TuneReportCallback uses; public ways go through Ray Train's report alone.
        return (_QueueChannel, (session._get_or_create_inter_actor_queue(),))


class _QueueChannel:
    """Reports from a worker of a trial; the trial's process is ended together with its workers when it is given up."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def send(self, line: Mapping[str, float]) -> None:
        group = ray.util.get_current_placement_group()
        told = {GROUP: None if group is None else group.id.hex()}
        self.queue.put(told | {f"{LINE}{name}": value for name, value in line.items()})


def _attempt(
    config: dict[str, Any],
    *,
    run_trial: RunTrial,
    base: Mapping[str, Any],
    journal: SweepJournal,
    token: str,
    grants: Mapping[str, int],
) -> None:
    """What Ray Tune runs in a trial's process."""
    number, channel = config["number"], _TuneChannel()
    # A trial that is given up has so long to put its things away before its process is ended instead of reused.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "30")
    try:
        run_attempt(number, run_trial, base=base, journal=journal, channel=channel, token=token, grants=grants)
    except TrialStopped:
        sys.exit(0)
    finally:
        give_back_memory()

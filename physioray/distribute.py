"""Runs the training loop under Ray Train on any number of workers, fed by Ray Data."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from physioray.analysis import AnalysisJob, AnalysisSums, measure, merge_sums
from physioray.checkpoint import load_checkpoint, restore_state
from physioray.data.stream import StreamSource
from physioray.grid import Grid
from physioray.journal import AfterPass, Screen
from physioray.pretrain import PretrainJob, pretrain
from physioray.storage import open_location
from physioray.train import TrainResult
from physioray.work import Work, explain_block, run_work


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run asks of the cluster.

    Attributes:
        workers: processes that train together.
        gpus_per_worker: 0 or 1.
        cpus_per_worker: CPUs withheld from reading.
        reading_cpus: CPUs that Ray Data needs at the least, over all workers.
        retries: how often a failed worker group is started again from the last checkpoint.
    """

    workers: int = 1
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1
    reading_cpus: int = 2
    retries: int = 2


class _Board:
    """Carries progress from the first worker to the driver's terminal, wherever the worker runs."""

    def __init__(self) -> None:
        self.state: tuple[int, int, str] | None = None
        self.lines: list[str] = []

    def update(self, done: int, total: int, note: str) -> None:
        self.state = (done, total, note)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def read(self, first: int) -> tuple[tuple[int, int, str] | None, list[str]]:
        return self.state, self.lines[first:]


class _BoardScreen:
    """The worker's side of a board; at most one step a second is sent."""

    def __init__(self, board: Any) -> None:
        self.board, self.sent = board, float("-inf")

    def update(self, done: int, total: int, note: str = "") -> None:
        if done >= total or time.monotonic() - self.sent >= 1:
            self.sent = time.monotonic()
            self.board.update.remote(done, total, note)

    def say(self, text: str) -> None:
        self.board.say.remote(text)


@contextmanager
def _show_board(screen: Screen | None) -> Iterator[Any]:
    """A board whose content is shown on `screen` every second while the body runs."""
    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    stop, seen = threading.Event(), 0

    def show() -> None:
        nonlocal seen
        try:
            state, lines = ray.get(board.read.remote(seen), timeout=10)
        except ray.exceptions.RayError:  # a lost board must not end a run
            return
        seen += len(lines)
        if screen is not None:
            for line in lines:
                screen.say(line)
            if state is not None:
                screen.update(*state)

    def watch() -> None:
        while not stop.wait(1.0):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        stop.set()
        watcher.join()
        show()
        ray.kill(board)


@contextmanager
def join_cluster(address: str | None = None, *, cpus: int = 0) -> Iterator[None]:
    """Join a running Ray cluster, or start one on this machine and stop it afterwards.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to; None starts one here.
        cpus: logical CPUs that a cluster started here has at the least. Reading costs little beside training,
            so on two cores three or four logical CPUs only let Ray Data run beside the workers.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # A local cluster makes its own token and listens on this machine only; its advice on that is no news to a user.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        count = max(cpus, os.cpu_count() or 1)
        ray.init(
            address="local", num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
    try:
        yield
    finally:
        ray.shutdown()


def pretrain_on_cluster(
    job: PretrainJob,
    resources: Resources = Resources(),
    *,
    address: str | None = None,
    screen: Screen | None = None,
    after_pass: AfterPass | None = None,
) -> TrainResult:
    """Run a pretraining job on a Ray cluster; run again, it goes on from its last checkpoint.

    Args:
        job: what to train; cohort and out must lie where every node reaches them.
        resources: workers, their CPUs and GPUs.
        address: of a running cluster; None starts one here.
        screen: where progress is shown.
        after_pass: as for `pretrain.pretrain`; called in the first worker's process.

    Raises:
        ValueError: the cluster has no CPU left for reading beside the workers.
    """
    needed = resources.workers * resources.cpus_per_worker + resources.reading_cpus
    with join_cluster(address, cpus=needed):
        _check_resources(resources)
        out = open_location(job.out)
        # Workers have working folders of their own, so a relative path must not reach them.
        job = replace(job, cohort=open_location(job.cohort).uri, out=out.uri)
        # Ray keeps its own files of a run here; checkpoints and results are the job's own, in `out`.
        storage = f"{out.uri}/ray" if not out.is_local else os.path.join(out.path, "ray")
        per_worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
        with _show_board(screen) as board:
            trainer = TorchTrainer(
                _train_worker,
                train_loop_config={"job": job, "board": board, "after_pass": after_pass},
                scaling_config=ScalingConfig(
                    num_workers=resources.workers,
                    use_gpu=resources.gpus_per_worker > 0,
                    resources_per_worker={name: count for name, count in per_worker.items() if count},
                ),
                run_config=RunConfig(
                    name="train", storage_path=storage, failure_config=FailureConfig(max_failures=resources.retries)
                ),
            )
            try:
                trainer.fit()
            except SystemExit:
                # Ray Train answers ctrl-C by leaving the process; here it is an interruption like any other.
                raise KeyboardInterrupt from None
            except WorkerGroupError as error:
                _raise_cause(error)
                raise
    return _read_result(job)


def measure_on_cluster(
    job: AnalysisJob,
    workers: int,
    *,
    gpus_per_worker: int = 0,
    address: str | None = None,
    screen: Screen | None = None,
) -> AnalysisSums:
    """Look into a checkpoint with N readers, each with its share of the windows; merged, the sums are those of one."""
    job = replace(job, cohort=open_location(job.cohort).uri, checkpoint=open_location(job.checkpoint).uri)
    with join_cluster(address, cpus=workers):
        task: Any = ray.remote(num_cpus=1, num_gpus=gpus_per_worker)(measure)
        place = {"world_size": workers, "device": "cuda" if gpus_per_worker else "cpu"}
        parts = []
        for reference in [task.remote(job, rank=rank, **place) for rank in range(workers)]:
            try:
                parts.append(ray.get(reference))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            if screen is not None:
                screen.update(len(parts), workers, f"{job.name}: shares measured")
    return merge_sums(parts)


def _raise_cause(error: WorkerGroupError) -> None:
    """Raise what a worker raised, if it is something the user can mend; Ray wraps it in pages of its own frames."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, OSError | ValueError | LookupError | ArithmeticError):
            raise cause from None


def _train_worker(arguments: dict[str, Any]) -> None:
    """What every worker runs: the same function as in one process, with batches from Ray Data."""
    job: PretrainJob = arguments["job"]
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    result = pretrain(
        job,
        make_source=StreamSource,
        device=device,
        screen=_BoardScreen(arguments["board"]),
        after_pass=arguments["after_pass"],
    )
    last = result.history[-1]
    ray.train.report({"pass": last["pass"], "loss": last["loss"], "validation_loss": last["validation_loss"] or 0.0})


def _read_result(job: PretrainJob) -> TrainResult:
    content = load_checkpoint(open_location(job.out) / "checkpoints" / "last.pt")
    return TrainResult(history=restore_state(content).history)


def _check_resources(resources: Resources) -> None:
    """Refuse to start what would wait for ever: workers that take every CPU leave none to read with."""
    total = ray.cluster_resources()
    workers = resources.workers * resources.cpus_per_worker
    if total.get("CPU", 0) < workers + 1:
        raise ValueError(
            f"The cluster must have a CPU for reading beside the workers' {workers}, but it has "
            f"{total.get('CPU', 0):.0f} in all. Start Ray with more logical CPUs, or use fewer workers."
        )
    gpus = resources.workers * resources.gpus_per_worker
    if total.get("GPU", 0) < gpus:
        raise ValueError(f"The cluster must have {gpus} GPUs, but it has {total.get('GPU', 0):.0f}.")


def spread_work(
    grid: Grid,
    work: Sequence[Work],
    *,
    gpus: float = 0,
    address: str | None = None,
    processes: int | None = None,
    begin: Callable[[Work], None] = lambda _: None,
    end: Callable[[Work], None] = lambda _: None,
    deadline: float | None = None,
    retries: int = 2,
) -> dict[Work, str]:
    """Do a grid's pieces of work on a cluster, as many at once as fit; a piece starts when its pretraining is done.

    Args:
        grid: whose work; cohort and store must lie where every node reaches them.
        work: what to do.
        gpus: of a piece.
        address: of a running cluster; None starts one here.
        processes: at once at the most; as many as the cluster has CPUs (or GPUs) for if None.
        begin, end, deadline: as for `grid.run_work`.
        retries: for a piece whose process or machine is lost.

    Returns:
        What failed, and why.
    """
    failures: dict[Work, str] = {}
    threads = grid.threads or 1
    grid = replace(grid, cohort=open_location(grid.cohort).uri, store=open_location(grid.store).uri)
    with join_cluster(address):
        total = ray.cluster_resources()
        fitting = total.get("GPU", 0) / gpus if gpus else total.get("CPU", 1) / threads
        most = max(1, min(int(fitting), processes or int(fitting)))
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries)(_do_work)
        waiting, running = list(work), dict[Any, Work]()
        while waiting or running:
            late = deadline is not None and time.monotonic() > deadline
            unfinished = {item.strategy for item in (*waiting, *running.values()) if item.kind == "pretrain"}
            ready = [item for item in waiting if item.kind == "pretrain" or item.strategy not in unfinished]
            while ready and len(running) < most and not late:
                item = ready.pop(0)
                waiting.remove(item)
                begin(item)
                if reason := explain_block(item, failures):
                    failures[item] = reason
                    end(item)
                else:
                    running[remote.remote(grid, item)] = item
            if not running:
                break
            done, _ = ray.wait(list(running), timeout=1.0)
            for reference in done:
                item = running.pop(reference)
                if reason := ray.get(reference):
                    failures[item] = reason
                end(item)
    return failures


def _do_work(grid: Grid, item: Work) -> str:
    """One piece in a process of the cluster; why it failed, or nothing."""
    return run_work(grid.do, [item]).get(item, "")

"""Runs the training loop under Ray Train on any number of workers, fed by Ray Data."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.util.metrics
import torch
from ray.autoscaler.sdk import request_resources
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from physioray.checkpoint import load_checkpoint, restore_state
from physioray.data.stream import StreamSource
from physioray.journal import AfterPass, Screen
from physioray.local_cluster import start_local_cluster
from physioray.pretrain import PretrainJob, pretrain
from physioray.storage import open_location
from physioray.telemetry import RunTelemetry
from physioray.train import TrainResult


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run asks of the cluster.

    Attributes:
        workers: processes that train together.
        gpus_per_worker: 0 or 1.
        cpus_per_worker: CPUs withheld from reading.
        reading_cpus: CPUs that Ray Data needs at the least, over all workers.
        retries: how often a failed worker group is started again from the last checkpoint.
        spread: one worker a machine as far as there are machines, instead of as near together as possible.
        patience: minutes that a cluster which was joined is given to grow to what is asked.
    """

    workers: int = 1
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1
    reading_cpus: int = 2
    retries: int = 2
    spread: bool = False
    patience: float = 20.0


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
        address: of a running cluster, `auto` for the one this machine belongs to; None takes the one that the
            environment names in RAY_ADDRESS (a submitted job's is its cluster), else starts one here.
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
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        start_local_cluster(max(cpus, os.cpu_count() or 1), logging_level=logging.WARNING)
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
    joined = address is not None or "RAY_ADDRESS" in os.environ
    with join_cluster(address, cpus=needed):
        if joined:
            _await_resources(resources, screen)
        _check_resources(resources)
        if not resources.gpus_per_worker and (idle := ray.cluster_resources().get("GPU", 0)) and screen is not None:
            screen.say(f"The cluster has {idle:.0f} GPUs, but none was asked for: --gpus-per-worker 1 trains on them.")
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
                torch_config=_NodeTorchConfig(),
                scaling_config=ScalingConfig(
                    num_workers=resources.workers,
                    use_gpu=resources.gpus_per_worker > 0,
                    resources_per_worker={name: count for name, count in per_worker.items() if count},
                    placement_strategy="SPREAD" if resources.spread else "PACK",
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


class _NodeBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Lets the workers talk through the address by which the cluster knows their node."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


class _NodeTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_NodeBackend]:
        return _NodeBackend


def _name_interface() -> None:
    # PyTorch's gloo listens at the address of the machine's own name. Debian writes that down as the loopback, where
    # workers on other machines look in vain.
    name = find_interface(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def find_interface(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address, for example `eth0`; None if none has it."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


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
    telemetry = RunTelemetry(
        ray.util.metrics, open_location(job.out).name, passes=job.train.passes, batch_size=job.train.batch_size
    )
    result = pretrain(
        job,
        make_source=StreamSource,
        device=device,
        screen=_BoardScreen(arguments["board"]),
        after_pass=arguments["after_pass"],
        watcher=telemetry,
    )
    last = result.history[-1]
    ray.train.report({"pass": last["pass"], "loss": last["loss"], "validation_loss": last["validation_loss"] or 0.0})


def _read_result(job: PretrainJob) -> TrainResult:
    content = load_checkpoint(open_location(job.out) / "checkpoints" / "last.pt")
    return TrainResult(history=restore_state(content).history)


def _await_resources(resources: Resources, screen: Screen | None) -> None:
    """Ask a cluster that can grow for what is missing, say so, and wait; one that cannot is waited for in vain."""
    try:
        _check_resources(resources)
        return
    except ValueError as error:
        if screen is not None:
            screen.say(f"{error} Asking for more, and waiting up to {resources.patience:g} minutes.")
    wanted = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    worker = {name: count for name, count in wanted.items() if count}
    request_resources(bundles=[worker] * resources.workers + [{"CPU": 1}] * max(1, resources.reading_cpus))
    end = time.monotonic() + 60 * resources.patience
    try:
        while time.monotonic() < end:
            try:
                return _check_resources(resources)
            except ValueError:
                time.sleep(1)
    finally:
        # From here on the run itself holds what it needs; a standing request would keep machines for ever.
        request_resources(bundles=[])


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

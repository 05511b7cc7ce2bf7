"""Spreads work over a cluster that needs no talk between its pieces: a grid's trainings, shares of an analysis."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from physioray.analysis import AnalysisJob, AnalysisSums, measure, merge_sums
from physioray.distribute import join_cluster
from physioray.grid import Grid
from physioray.journal import Screen
from physioray.storage import open_location
from physioray.work import Work, explain_block, run_work


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
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries)(_do_work)
        waiting, running = list(work), dict[Any, Work]()
        while waiting or running:
            most = _count_places(threads, gpus, processes)
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


def _count_places(threads: int, gpus: float, processes: int | None) -> int:
    """Pieces that may run now; at least one, so that a cluster that has no machine yet sees what is wanted."""
    total = ray.cluster_resources()
    fitting = int(total.get("GPU", 0) / gpus if gpus else total.get("CPU", 0) / threads)
    return max(1, min(fitting, processes or fitting))


def _do_work(grid: Grid, item: Work) -> str:
    """One piece in a process of the cluster; why it failed, or nothing."""
    return run_work(grid.do, [item]).get(item, "")


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

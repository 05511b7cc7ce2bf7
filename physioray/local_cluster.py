"""Starts a Ray cluster on this machine for the time of a command."""

from __future__ import annotations

import os
from typing import Any

import ray


def start_local_cluster(cpus: int, **options: Any) -> None:
    """Start a cluster that nobody else joins; `ray.shutdown` ends it.

    Args:
        cpus: logical CPUs.
        options: others of `ray.init`.
    """
    # Ray's workers stand back behind every other program (niceness 15): beside any load they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, **options)

"""Starts a Ray cluster on this machine for the time of a command."""

from __future__ import annotations

import os
from typing import Any

import ray

_ATTEMPTS = 3
_TOO_SLOW = "timed out during startup"
"""What Ray says where its parts did not start within 30 s, which a busy machine brings about."""


def start_local_cluster(cpus: int, **options: Any) -> None:
    """Start a cluster that nobody else joins; `ray.shutdown` ends it.

    Args:
        cpus: logical CPUs.
        options: others of `ray.init`.
    """
    # Ray's workers stand back behind every other program (niceness 15): beside any load they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, **options)
            return
        except Exception as error:  # Ray 2.60 raises just that
            ray.shutdown()
            if _TOO_SLOW not in str(error) or attempt == _ATTEMPTS:
                raise

"""A sweep, run as a program with its own cluster, one of whose trials takes more memory than Ray allows, once."""

import os
import sys
import time

import numpy as np
from ray._private.utils import get_system_memory, get_used_memory

from physioray.sweep import run_sweep
from physioray.sweep_trial import Trial
from tests.sweep_trials import fit_logistic, make_plan

MORE = 5 * 2**30
"""Bytes that all programs together may still take before Ray kills a process: other tests run beside this one."""
NEEDED = 2 * MORE
PIECE = 2**28


def fit_greedily(trial: Trial) -> None:
    if trial.number == 1 and not (trial.folder / "calls").list():
        (trial.folder / "calls" / "greedy").write_text("")
        held = []
        for _ in range(NEEDED // PIECE):
            held.append(np.ones(PIECE // 8))
            time.sleep(0.02)
        time.sleep(30)
    fit_logistic(trial)


if __name__ == "__main__":
    # Ray's own numbers: inside a container its limit counts, not the machine's.
    allowed = (get_used_memory() + MORE) / get_system_memory()
    os.environ.update({"RAY_memory_usage_threshold": str(allowed), "RAY_memory_monitor_refresh_ms": "100"})
    run_sweep(make_plan("grid", trials=3, scheduler=None, max_failures=3), fit_greedily, sys.argv[1], concurrent=2)

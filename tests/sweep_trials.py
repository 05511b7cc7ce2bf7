"""A cheap trial that really learns, and sweeps over it: run by the tests of the sweep engine, also as a program."""

import json
import os
import signal
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from physioray.leases import own
from physioray.search_space import loguniform, uniform
from physioray.storage import open_location
from physioray.sweep_driver import SweepDriver
from physioray.sweep_journal import OWNER_FILE, SweepJournal, SweepResult, read_sweep
from physioray.sweep_plan import AshaConfig, Objective, SweepPlan
from physioray.sweep_trial import RunTrial, Trial, TrialStopped, run_attempt

PASSES = 4
PAUSE = "PHYSIORAY_TEST_PAUSE"


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    learning_rate: float = 0.1
    penalty: float = 0.01
    passes: int = PASSES

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"FitConfig.learning_rate must be positive, but got {self.learning_rate!r}.")


def make_plan(sampler: str = "tpe", **changes: Any) -> SweepPlan:
    space: Any = {"fit.learning_rate": loguniform(1e-3, 3.0), "fit.penalty": loguniform(1e-4, 1.0)}
    if sampler == "grid":
        space = {"fit.learning_rate": uniform(0.1, 0.9, step=0.4), "fit.penalty": uniform(0.01, 0.02, step=0.01)}
    settings: dict[str, Any] = {
        "space": space,
        "base": {"fit": FitConfig()},
        "objectives": (Objective(metric="score"),),
        "trials": 6,
        "scheduler": AshaConfig(grace_passes=1, most_passes=PASSES, reduction=2),
        "simulated": True,
    }
    return SweepPlan(sampler=sampler, **(settings | changes))


def fit_logistic(trial: Trial) -> None:
    """Logistic regression by gradient descent on made-up points, with a checkpoint after every pass.

    What was done is written down under names of its own, so that anything done twice shows.
    """
    config, generator = trial.settings["fit"], np.random.default_rng(0)
    points = generator.normal(size=(400, 5))
    labels = (points @ np.array([1.0, -2.0, 0.5, 0.0, 1.0]) + generator.normal(size=400) > 0).astype(float)
    (trial.folder / "calls" / uuid.uuid4().hex).write_text(str(time.time()))
    place = trial.folder / "weights.json"
    state = place.read_json() if place.exists() else {"epoch": 0, "weights": [0.0] * 5}
    weights = np.array(state["weights"])

    def report(epoch: int) -> None:
        guess = 1 / (1 + np.exp(-points[300:] @ weights))
        loss = -np.mean(labels[300:] * np.log(guess) + (1 - labels[300:]) * np.log(1 - guess))
        trial.report(epoch=epoch, score=-float(loss), accuracy=float(np.mean((guess > 0.5) == labels[300:])))

    if state["epoch"]:
        # The report of the pass that the checkpoint holds may have been lost.
        report(state["epoch"])
    for epoch in range(state["epoch"] + 1, config.passes + 1):
        time.sleep(float(os.environ.get(PAUSE, "0")))
        for _ in range(20):
            guess = 1 / (1 + np.exp(-points[:300] @ weights))
            weights -= config.learning_rate * (points[:300].T @ (guess - labels[:300]) / 300 + config.penalty * weights)
        place.write_json({"epoch": epoch, "weights": weights.tolist()})
        (trial.folder / "passes" / f"{epoch}-{uuid.uuid4().hex}").write_text(
            json.dumps({"process": os.getpid(), "time": time.time()})
        )
        report(epoch)


class ByHand:
    """Reports to a driver in this process."""

    def __init__(self, driver: SweepDriver, number: int) -> None:
        self.driver, self.number = driver, number

    def send(self, line: Any) -> None:
        if self.driver.take_report(self.number, line):
            raise TrialStopped


def sweep_by_hand(plan: SweepPlan, run_trial: RunTrial, out: Any) -> SweepResult:
    """One trial after the other in this process, without Ray: what a serial sweep must come to."""
    folder = open_location(out)
    journal = SweepJournal(folder=folder, space=plan.space)
    journal.claim(plan)
    with own(folder / OWNER_FILE) as token:
        driver = SweepDriver(plan, journal)
        while (number := driver.start_trial()) is not None:
            channel = ByHand(driver, number)
            # What a trial raises is in its folder; the driver reads it there.
            with suppress(Exception):
                run_attempt(number, run_trial, base=plan.base, journal=journal, channel=channel, token=token, grants={})
            driver.end_attempt(number)
    return read_sweep(folder)


def list_changes(sampler: str) -> dict[str, Any]:
    """Halving depends on who comes first, and of two grid trials at a time either may."""
    return {"scheduler": None} if sampler == "grid" else {}


def drive(out: str, sampler: str, concurrent: int, address: str | None, environment: dict[str, str], log: str) -> None:
    """The same command every time, in a process and a session of its own."""
    os.setsid()
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from physioray.cli import guard
    from physioray.sweep import run_sweep

    plan = make_plan(sampler, **list_changes(sampler))

    def run() -> None:
        run_sweep(plan, fit_logistic, out, concurrent=concurrent, address=address)

    sys.exit(guard(run))

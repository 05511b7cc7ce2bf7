"""One trial of a sweep as the function that runs it sees it: its settings, its folder, and where it reports to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from physioray.leases import Lease, end_if_lost, hold
from physioray.search_space import Settings, apply_parameters
from physioray.storage import Location
from physioray.sweep_journal import OWNER_FILE, RUNNING_FILE, SweepJournal
from physioray.sweep_plan import EPOCH, SECONDS

RUN = "run"


class TrialStopped(Exception):
    """The scheduler gives this trial up: let it pass, after putting away what must be."""


@runtime_checkable
class Channel(Protocol):
    """The way of a report to the sweep."""

    def send(self, line: Mapping[str, float]) -> None:
        """Hand a report over; raises TrialStopped if the trial is to end."""
        ...


@dataclass(kw_only=True)
class Trial:
    """A trial that runs. It may be sent to other processes of the trial, which report in its name.

    Attributes:
        number: from 0, in the order of planning.
        settings: named configs and plain values, the varied ones in their place.
        parameters: the varied ones alone, by dotted name.
        folder: for checkpoints and whatever the trial keeps; the same after every restart.
        workers, cpus_per_worker, gpus_per_worker: what the sweep's call grants to each trial.
    """

    number: int
    settings: Settings
    parameters: Mapping[str, Any]
    folder: Location
    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    journal: SweepJournal = field(repr=False)
    channel: Channel = field(repr=False)
    token: str = field(repr=False)
    reports: list[dict[str, float]] = field(default_factory=list, repr=False)
    began: float = field(default_factory=time.time, repr=False)
    before: float = field(default=0.0, repr=False)

    def report(self, *, epoch: float, **metrics: float) -> None:
        """Tell the sweep how well the trial does after so many passes. It is committed before this returns.

        A pass that was reported already, by this attempt or an earlier one, is not counted again. So a trial that goes
        on from a checkpoint reports first what the checkpoint holds: it may have been interrupted between the two.

        Args:
            epoch: passes over the data so far; must rise from report to report.
            metrics: scores by name; those that the plan seeks must be among the last report's. An interval of `score`
                is reported as `score_low` and `score_high`, and then drawn.

        Raises:
            TrialStopped: the scheduler gives the trial up.
            ValueError: a metric is not a finite number.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"A trial must report finite numbers, but got {name} = {value!r} at pass {epoch:g}.")
        if self.workers > 1:
            # Another process of the trial may have reported in its name, or this is the first worker, started again.
            self.reports = self.journal.read_reports(self.number)[0]
        if self.reports and epoch <= self.reports[-1][EPOCH]:
            return
        spent = self.before + max(0.0, time.time() - self.began)
        line = {name: float(value) for name, value in metrics.items()} | {EPOCH: float(epoch), SECONDS: spent}
        self.reports.append(line)
        end_if_lost(self.journal.folder / OWNER_FILE, self.token)
        self.journal.write_reports(self.number, self.reports, ended=False)
        self.channel.send(line)


RunTrial = Callable[[Trial], None]
"""Runs one trial: trains, keeps its checkpoints in `trial.folder`, and calls `trial.report` after passes."""


def run_attempt(
    number: int,
    run_trial: RunTrial,
    *,
    base: Settings,
    journal: SweepJournal,
    channel: Channel,
    token: str,
    grants: Mapping[str, int],
) -> None:
    """Run a trial, or go on with one that was interrupted.

    What earlier attempts reported is told again first, to be judged as before; a trial that had ended is not run again.

    Args:
        number: a planned trial.
        run_trial, base, journal, channel: the function, the settings that the trial changes, the sweep's folder, and
            what takes the reports.
        token: of the sweep's owner; this process ends itself when the sweep gets another.
        grants: `workers`, `cpus_per_worker` and `gpus_per_worker`.

    Raises:
        TrialStopped: the scheduler gave the trial up.
        Exception: what the trial raised; it is committed among the trial's failures.
    """
    record = journal.read_trial(number)
    assert record is not None, "a trial is planned before it starts"
    watch = partial(end_if_lost, journal.folder / OWNER_FILE, token)
    lease = Lease(journal.find_trial(number) / RUNNING_FILE, token=token)
    lease.write()
    with hold(lease, watch):
        reports, ended = journal.read_reports(number)
        for line in reports:
            channel.send(line)
        if ended:
            return
        trial = Trial(
            number=number,
            settings=apply_parameters(base, record.parameters),
            parameters=record.parameters,
            folder=journal.find_trial(number) / RUN,
            journal=journal,
            channel=channel,
            token=token,
            reports=reports,
            before=reports[-1][SECONDS] if reports else 0.0,
            **grants,
        )
        try:
            run_trial(trial)
        except TrialStopped:
            raise
        except Exception as error:
            watch()
            journal.write_failures(number, (*record.failures, f"{type(error).__name__}: {error}"))
            raise
        # Other processes of the trial may have reported in its name.
        reports, _ = journal.read_reports(number)
        watch()
        journal.write_reports(number, reports, ended=True)

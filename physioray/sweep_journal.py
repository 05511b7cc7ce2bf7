"""What of a sweep is committed: one folder per trial with small JSON files, from which everything is rebuilt.

    sweep.json                    what the sweep is (its plan)
    trials/0003/planned.json      the trial's parameters, written before it starts
    trials/0003/reports.json      what it has reported so far, and whether it came to its end
    trials/0003/outcome.json      finished, stopped or failed, with the reason; written once, last
    trials/0003/run/              the trial's own folder: its checkpoints, stable over restarts
    owner.json                    while it runs: which process sweeps (see leases)
    trials/0003/running.json      while it runs: which process runs the trial

Every file is written whole or not at all, on a folder as on a bucket. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from physioray.search_space import Choice, Distribution
from physioray.storage import Location, StorageError, list_differences, open_location
from physioray.sweep_plan import Objective, SweepPlan

SWEEP_FILE = "sweep.json"
OWNER_FILE = "owner.json"
RUNNING_FILE = "running.json"
TRIALS = "trials"
TENSORBOARD = "tensorboard"

TrialState = Literal["planned", "finished", "stopped", "failed"]
"""`planned` has no outcome yet: it waits, runs, or was interrupted."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as it stands in the folder.

    Attributes:
        number: from 0, in the order of planning.
        parameters: the varied settings, by dotted name.
        state: see TrialState.
        reports: metrics by pass, ascending; each has `epoch` (passes so far) and `seconds`.
        reason: why it was stopped or failed.
        failures: reasons of the attempts that failed.
    """

    number: int
    parameters: Mapping[str, Any]
    state: TrialState = "planned"
    reports: tuple[Mapping[str, float], ...] = ()
    reason: str = ""
    failures: tuple[str, ...] = ()

    @property
    def last(self) -> Mapping[str, float]:
        """The metrics reported last; empty if there are none."""
        return self.reports[-1] if self.reports else {}

    @property
    def name(self) -> str:
        """The trial's folder."""
        return name_trial(self.number)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep as it is committed; `settings` is its plan as plain values."""

    folder: Location
    settings: Mapping[str, Any]
    trials: tuple[TrialRecord, ...]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What was sought; the first orders the trials."""
        return tuple(Objective(**values) for values in self.settings["objectives"])

    @property
    def simulated(self) -> bool:
        """True if the scores are those of simulated signals."""
        return bool(self.settings["simulated"])

    def rank(self) -> list[TrialRecord]:
        """Finished trials by the first objective, best first."""
        sought = self.objectives[0]
        sign = -1.0 if sought.mode == "max" else 1.0
        finished = [trial for trial in self.trials if trial.state == "finished" and sought.metric in trial.last]
        return sorted(finished, key=lambda trial: (sign * trial.last[sought.metric], trial.number))

    @property
    def best(self) -> TrialRecord | None:
        """The finished trial with the best first objective, if any."""
        ranked = self.rank()
        return ranked[0] if ranked else None

    def count(self, state: TrialState) -> int:
        """Trials in a state."""
        return sum(trial.state == state for trial in self.trials)


def name_trial(number: int) -> str:
    """Name of a trial's folder and of its TensorBoard run."""
    return f"{number:04d}"


@dataclass(kw_only=True)
class SweepJournal:
    """Reads and writes a sweep's folder.

    Attributes:
        folder: the sweep's folder.
        space: turns JSON values back into those of the space (lists into tuples); may be empty for reading.
    """

    folder: Location
    space: Mapping[str, Distribution] = field(default_factory=dict)

    def claim(self, plan: SweepPlan) -> None:
        """Write a new sweep's plan, or check that the folder holds this very sweep.

        Raises:
            StorageError: the folder holds other things, or a sweep with another plan; the message says what differs.
        """
        place, wanted = self.folder / SWEEP_FILE, plan.describe()
        if place.exists():
            known = place.read_json()
            differing = list_differences(known["plan"], wanted)
            if differing:
                raise StorageError(
                    f"{self.folder} holds another sweep and is not mixed: {'; '.join(differing)}. "
                    "Name another folder, or sweep with the former settings."
                )
        else:
            strangers = [item.name for item in self.folder.list()[:3]]
            if strangers:
                raise StorageError(
                    f"A new sweep needs an empty folder, but {self.folder} holds {', '.join(strangers)}. "
                    "Name another folder."
                )
        place.write_json({"plan": wanted, "trials": plan.count_trials(), "evaluate_command": plan.evaluate_command})

    def find_trial(self, number: int) -> Location:
        """The trial's folder."""
        return self.folder / TRIALS / name_trial(number)

    def plan_trial(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Commit a trial's parameters, before anything of it runs."""
        (self.find_trial(number) / "planned.json").write_json({"number": number, "parameters": dict(parameters)})

    def write_reports(self, number: int, reports: list[dict[str, float]], *, ended: bool) -> None:
        """Commit what a trial has reported so far, and whether its function has returned."""
        (self.find_trial(number) / "reports.json").write_json({"reports": reports, "ended": ended})

    def read_reports(self, number: int) -> tuple[list[dict[str, float]], bool]:
        """Reports of a trial so far, and whether its function has returned."""
        place = self.find_trial(number) / "reports.json"
        if not place.exists():
            return [], False
        content = place.read_json()
        return content["reports"], content["ended"]

    def write_failures(self, number: int, failures: tuple[str, ...]) -> None:
        """Commit the reasons of a trial's failed attempts."""
        (self.find_trial(number) / "failures.json").write_json(list(failures))

    def write_outcome(self, number: int, state: TrialState, reason: str = "") -> None:
        """Commit how a trial ended."""
        (self.find_trial(number) / "outcome.json").write_json({"state": state, "reason": reason})

    def read_trial(self, number: int) -> TrialRecord | None:
        """A trial as it is committed; None if it was never planned."""
        folder = self.find_trial(number)
        if not (folder / "planned.json").exists():
            return None
        stored = (folder / "planned.json").read_json()["parameters"]
        outcome = (folder / "outcome.json").read_json() if (folder / "outcome.json").exists() else {}
        failures = (folder / "failures.json").read_json() if (folder / "failures.json").exists() else []
        return TrialRecord(
            number=number,
            parameters=self._restore(stored),
            state=outcome.get("state", "planned"),
            reports=tuple(self.read_reports(number)[0]),
            reason=outcome.get("reason", ""),
            failures=tuple(failures),
        )

    def _restore(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters in the order of the space, with the space's own values for those that JSON changes."""
        restored = {}
        for name in [*(name for name in self.space if name in stored), *(n for n in stored if n not in self.space)]:
            value, distribution = stored[name], self.space.get(name)
            if isinstance(value, list):
                value = tuple(value)
            if isinstance(distribution, Choice):
                value = next((known for known in distribution.values if known == value), value)
            restored[name] = value
        return restored

    def read_trials(self) -> list[TrialRecord]:
        """All planned trials by number."""
        names = [item.name for item in (self.folder / TRIALS).list()]
        records = [self.read_trial(int(name)) for name in names if name.isdigit()]
        return sorted((record for record in records if record is not None), key=lambda record: record.number)


def read_sweep(out: str | os.PathLike[str] | Location) -> SweepResult:
    """Read a sweep, running or ended, from its folder alone; neither Ray nor Optuna is needed.

    Args:
        out: path or URI of the sweep's folder.

    Raises:
        StorageError: there is no sweep.
    """
    folder = out if isinstance(out, Location) else open_location(out)
    if not (folder / SWEEP_FILE).exists():
        raise StorageError(f"A sweep must stand in {folder}, but it has no {SWEEP_FILE}. Has the sweep been started?")
    content = (folder / SWEEP_FILE).read_json()
    # Columns follow the order in which the plan names its settings.
    order: dict[str, Distribution] = {name: Choice(values=(None,)) for name in content["plan"]["order"]}
    trials = SweepJournal(folder=folder, space=order).read_trials()
    settings = content["plan"] | {"trials": content["trials"], "evaluate_command": content["evaluate_command"]}
    return SweepResult(folder=folder, settings=settings, trials=tuple(trials))

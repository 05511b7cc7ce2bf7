"""What a sweep is: what it varies, how it searches, what it calls better, and when it gives a trial up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from physioray.search_space import Settings, Space, check_space, flatten_settings, list_grid
from physioray.storage import as_json

EPOCH = "epoch"
"""Passes over the data at the time of a report."""

SECONDS = "seconds"
"""A metric that every trial reports by itself: seconds of work so far, over all attempts."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric that trials report, and whether more of it is better."""

    metric: str
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"Objective.mode must be max or min, but got {self.mode!r}.")


@dataclass(frozen=True, kw_only=True)
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): at every rung only the best 1/reduction go on.

    Rungs are at `grace_passes`, `grace_passes x reduction`, and so on up to `most_passes`, in passes over the data.
    """

    grace_passes: int = 1
    most_passes: int = 100
    reduction: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.grace_passes <= self.most_passes:
            raise ValueError(f"AshaConfig must have 1 <= grace_passes <= most_passes, but got {self}.")
        if self.reduction < 2:
            raise ValueError(f"AshaConfig.reduction must be at least 2, but got {self.reduction!r}.")


@dataclass(frozen=True, kw_only=True)
class MedianConfig:
    """Median stopping (Golovin et al. 2017): a trial whose best is below the others' median average so far is stopped.

    Attributes:
        grace_passes: no trial is stopped before so many passes.
        least_trials: others that must have come as far before any trial is stopped.
    """

    grace_passes: int = 1
    least_trials: int = 3

    def __post_init__(self) -> None:
        if self.grace_passes < 1 or self.least_trials < 1:
            raise ValueError(f"MedianConfig.grace_passes and least_trials must be at least 1, but got {self}.")


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep before it runs; building one checks every corner of its space.

    Attributes:
        space: what varies, see `search_space`.
        base: settings of which a trial changes those in `space`.
        objectives: what is sought; the first decides about stopping and the table's order.
        sampler: `tpe` (Bergstra et al. 2011), `grid` (every combination) or `random`.
        trials: how many; of a grid all if None. May grow between two runs of the same sweep.
        seed: of the search; a trial's parameters follow from it, its number and the trials before.
        scheduler: when a trial is given up; never if None.
        max_failures: how often a failing trial is tried again before it is recorded as failed; losses of its machine
            do not count, up to twenty.
        inputs: identities of what trials read (a cohort's fingerprint); another one is another sweep.
        simulated: whether scores are those of simulated signals: every table and page then says so.
        evaluate_command: the command that evaluates the best trial on test subjects, with `{number}` and `{folder}`
            where the trial's number and folder go; shown at the end, never run by the sweep.
    """

    space: Space
    base: Settings
    objectives: tuple[Objective, ...]
    sampler: Literal["tpe", "grid", "random"] = "tpe"
    trials: int | None = None
    seed: int = 0
    scheduler: AshaConfig | MedianConfig | None = None
    max_failures: int = 1
    inputs: Mapping[str, str] = field(default_factory=dict)
    simulated: bool = False
    evaluate_command: str = ""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("SweepPlan.objectives must name at least one metric, but got none.")
        if self.sampler not in ("tpe", "grid", "random"):
            raise ValueError(f"SweepPlan.sampler must be tpe, grid or random, but got {self.sampler!r}.")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"SweepPlan.trials must be given for {self.sampler}; only a grid has a size of its own.")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"SweepPlan.trials must be at least 1, but got {self.trials!r}.")
        if self.max_failures < 0:
            raise ValueError(f"SweepPlan.max_failures must not be negative, but got {self.max_failures!r}.")
        check_space(self.base, self.space)
        self.count_trials()

    def count_trials(self) -> int:
        """Trials in all."""
        if self.sampler != "grid":
            assert self.trials is not None
            return self.trials
        size = len(list_grid(self.space))
        return size if self.trials is None else min(self.trials, size)

    def describe(self) -> dict[str, Any]:
        """What makes this sweep this one, as plain JSON values.

        Numbers of trials and of retries and the command shown at the end may change between two runs.
        """
        return {
            # A grid is numbered in this order, and JSON keeps none.
            "order": list(self.space),
            "space": {name: distribution.describe() for name, distribution in self.space.items()},
            "base": as_json(flatten_settings(self.base)),
            "objectives": [asdict(objective) for objective in self.objectives],
            "sampler": self.sampler,
            "seed": self.seed,
            "scheduler": None
            if self.scheduler is None
            else {"kind": type(self.scheduler).__name__, **asdict(self.scheduler)},
            "inputs": dict(self.inputs),
            "simulated": self.simulated,
        }

"""Figures that a running cluster exports for Prometheus, beside those of Ray: how training, ingest and sweeps go.

The names stand here once; dashboards are made from them. Ray puts `ray_` before a name and `_total` after a counter's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

from physioray.signals import LookupMiss


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One exported figure: its kind, what it says, and the tags that tell its series apart."""

    name: str
    kind: Literal["gauge", "counter"] = "gauge"
    says: str
    tags: tuple[str, ...]

    @property
    def series(self) -> str:
        """Name in Prometheus."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


FIGURES: Mapping[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(name="physioray_windows", kind="counter", says="Windows trained on, over all workers", tags=("run",)),
        Figure(name="physioray_steps_done", says="Training steps taken", tags=("run",)),
        Figure(name="physioray_steps_planned", says="Training steps in all", tags=("run",)),
        Figure(name="physioray_wait_share", says="Share of a pass spent waiting for data, 0 to 1", tags=("run",)),
        Figure(name="physioray_loss", says="Loss of the last pass", tags=("run", "split", "modality")),
        Figure(name="physioray_ingest_recordings", says="Recordings by outcome", tags=("cohort", "outcome")),
        Figure(name="physioray_ingest_hours", says="Hours of signal converted", tags=("cohort",)),
        Figure(name="physioray_sweep_trials", says="Trials of a sweep by state", tags=("sweep", "state")),
        Figure(name="physioray_sweep_best", says="Best validation score of a sweep so far", tags=("sweep",)),
    )
}

ALL_MODALITIES = "all"
"""The tag of the loss over all modalities."""


@runtime_checkable
class Metrics(Protocol):
    """What makes figures known: `ray.util.metrics`, handed in so that this module knows no cluster."""

    @property
    def Gauge(self) -> Any:
        """Makes a figure that goes up and down."""
        ...

    @property
    def Counter(self) -> Any:
        """Makes a figure that only grows."""
        ...


@runtime_checkable
class Place(Protocol):
    """Where a run stands, as `train` tells it."""

    step: int


def find_figure(name: str) -> Figure:
    """Look an exported figure up by its name.

    Raises:
        LookupMiss: no such figure; the message lists those that exist.
    """
    if name not in FIGURES:
        raise LookupMiss(f"A figure must be one of {', '.join(FIGURES)}, but got {name!r}.")
    return FIGURES[name]


@cache
def _make(kind: Callable[..., Any], name: str) -> Any:
    """A process makes each figure once."""
    figure = find_figure(name)
    return kind(figure.name, description=figure.says, tag_keys=figure.tags)


def set_figure(metrics: Metrics, name: str, value: float, **tags: str) -> None:
    """Export a value of a gauge, or add it to a counter.

    Raises:
        LookupMiss: no such figure.
    """
    if find_figure(name).kind == "counter":
        _make(metrics.Counter, name).inc(value, tags=tags)
    else:
        _make(metrics.Gauge, name).set(value, tags=tags)


def export_ingest(metrics: Metrics, cohort: str, outcomes: Mapping[str, int], hours: float) -> None:
    """Export how many recordings are accepted, rejected and waiting, and the hours converted."""
    for outcome, count in outcomes.items():
        set_figure(metrics, "physioray_ingest_recordings", count, cohort=cohort, outcome=outcome)
    set_figure(metrics, "physioray_ingest_hours", hours, cohort=cohort)


def export_sweep(metrics: Metrics, sweep: str, states: Mapping[str, int], best: float | None) -> None:
    """Export how many trials are in each state, and the best validation score so far."""
    for state, count in states.items():
        set_figure(metrics, "physioray_sweep_trials", count, sweep=sweep, state=state)
    if best is not None:
        set_figure(metrics, "physioray_sweep_best", best, sweep=sweep)


class RunTelemetry:
    """A reporter for `train` that exports its figures; at most one step a second is told.

    Args:
        metrics: `ray.util.metrics`.
        run: the name under which the run is shown.
        passes: how many passes the run has.
        batch_size: windows of a global batch.
    """

    def __init__(self, metrics: Metrics, run: str, *, passes: int, batch_size: int) -> None:
        self.metrics, self.run, self.passes, self.batch_size = metrics, run, passes, batch_size
        self.told_step: int | None = None
        self.told_time = float("-inf")

    def report_step(self, state: Place, steps: int, waited: float, elapsed: float) -> None:
        """Export the run's place, the windows since the last time, and the share of time spent waiting for data."""
        if time.monotonic() - self.told_time < 1 and state.step < steps * self.passes:
            return
        # What a checkpoint brought was not done now.
        new = 1 if self.told_step is None else state.step - self.told_step
        self.told_step, self.told_time = state.step, time.monotonic()
        set_figure(self.metrics, "physioray_windows", new * self.batch_size, run=self.run)
        set_figure(self.metrics, "physioray_steps_done", state.step, run=self.run)
        set_figure(self.metrics, "physioray_steps_planned", steps * self.passes, run=self.run)
        set_figure(self.metrics, "physioray_wait_share", waited / max(elapsed, 1e-9), run=self.run)

    def report_pass(self, history: list[dict[str, Any]], step_losses: list[float]) -> None:  # noqa: ARG002
        """Export the last pass's losses, of training and validation, over all modalities and by modality."""
        record = history[-1]
        for split, prefix in (("train", ""), ("validation", "validation_")):
            losses = dict(record.get(f"{prefix}loss_by_modality") or {})
            if record.get(f"{prefix}loss") is not None:
                losses[ALL_MODALITIES] = record[f"{prefix}loss"]
            for modality, value in losses.items():
                set_figure(self.metrics, "physioray_loss", value, run=self.run, split=split, modality=modality)

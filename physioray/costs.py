"""What a grid of trainings will cost, before it starts: windows to train on, at the rate measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from physioray.grid import Grid
from physioray.models.heads import Classifier
from physioray.objectives.classification import WeightedCrossEntropy
from physioray.progress import format_seconds
from physioray.signals import find_modality, find_task
from physioray.strategies import build_model, build_objective
from physioray.tensors import Draw, WindowTensors
from physioray.train import Objective
from physioray.work import Work

MEASURED_WINDOWS = 16
PROBE_SECONDS = 5.0
"""Assumed for a probe at one training-set size, for the time left alone."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What some work asks for.

    Attributes:
        trainings: pretrainings and trainings on tasks.
        passes: that they make, all together.
        windows: that trainings go over, all passes together.
        seconds: of one process at the measured rates; by piece of work in `by_work`.
        by_work: seconds of every piece.
    """

    trainings: int
    passes: int
    windows: int
    seconds: float
    by_work: Mapping[Work, float]

    def describe(self, processes: int) -> str:
        """The cost in words."""
        probes = sum(work.kind == "probe" for work in self.by_work)
        return (
            f"{self.trainings} trainings of {self.passes:,} passes over {self.windows:,} windows in all, and {probes} "
            f"probes: about {format_seconds(self.seconds)} of one process at the rates just measured here, "
            f"{format_seconds(self.seconds / max(1, processes))} on {processes} at once."
        )


def estimate_cost(grid: Grid, work: Iterable[Work]) -> Cost:
    """Judge the cost of some work by a few training steps of every kind that occurs in it."""
    rates: dict[tuple[str, str], float] = {}
    by_work: dict[Work, float] = {}
    trainings = passes = windows = 0
    for item in work:
        if item.kind == "probe":
            by_work[item] = PROBE_SECONDS
            continue
        key = (item.kind, item.strategy)
        if key not in rates:
            rates[key] = measure_rate(grid, item)
        trainings, passes, windows = trainings + 1, passes + item.passes, windows + item.passes * item.windows
        by_work[item] = item.passes * item.windows / rates[key]
    return Cost(trainings=trainings, passes=passes, windows=windows, seconds=sum(by_work.values()), by_work=by_work)


def measure_rate(grid: Grid, work: Work, *, steps: int = 2) -> float:
    """Windows per second of a training's forward and backward pass, on signals of noise."""
    if grid.threads is not None:
        torch.set_num_threads(grid.threads)
    model, objective = _build(grid, work)
    device = torch.device(grid.device)
    model.to(device).train()
    windows = _make_windows(grid, grid.fit_model(work.strategy).modalities, device)
    first = _step(model, objective, windows, 0)
    began = time.perf_counter()
    for number in range(steps):
        _step(model, objective, windows, number + 1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.isfinite(first)
    return steps * MEASURED_WINDOWS / (time.perf_counter() - began)


def _build(grid: Grid, work: Work) -> tuple[nn.Module, Objective]:
    if work.kind == "pretrain":
        job = grid.make_job(work.strategy)
        return build_model(job.model, 0), build_objective(job.objective)
    classes = len(find_task(work.task).classes)
    trunk = build_model(grid.fit_model(work.strategy), 0).encoder
    return Classifier(trunk, classes, frozen=False), WeightedCrossEntropy(work.task, [1.0] * classes)


def _make_windows(grid: Grid, names: Sequence[str], device: torch.device) -> WindowTensors:
    generator = torch.Generator().manual_seed(0)
    rows = MEASURED_WINDOWS
    labels = {task: torch.arange(rows, device=device) % 2 for task in grid.config.probe.tasks}
    return WindowTensors(
        signals={
            name: torch.randn(rows, find_modality(name).samples, generator=generator).to(device) for name in names
        },
        present={name: torch.ones(rows, dtype=torch.bool) for name in names},
        labels=labels,
        window_id=np.arange(rows, dtype=np.int64),
    )


def _step(model: nn.Module, objective: Objective, windows: WindowTensors, step: int) -> Tensor:
    parts = objective(model, windows, Draw(seed=0, pass_number=0, step=step))
    loss = parts.combine(parts.stack()[1])
    model.zero_grad()
    loss.backward()
    return loss.detach()

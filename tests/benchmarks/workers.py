"""Several workers that train one model, in processes of their own that talk through gloo."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from physioray.checkpoint import TrainState
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import Preset
from physioray.pretrain import build_autoencoder
from physioray.train import WorkerGroup, train
from tests.benchmarks.training import RepeatedBatch, make_train_config


class _WallClock:
    """A reporter that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def report_step(self, state: TrainState, steps: int, waited: float, elapsed: float) -> None:  # noqa: ARG002
        self.ends.append(time.perf_counter())

    def report_pass(self, history: list, step_losses: list) -> None:
        pass


def measure_workers(sizes: Preset, *, workers: int, steps: int, talking: bool = True) -> float:
    """Windows per second of all workers, from the end of the first step to the end of the last.

    Those that do not talk train models of their own, side by side: what the machine allows.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (workers, talking and workers > 1, sizes, steps, folder), nprocs=workers)
        return sum(float(place.read_text()) for place in Path(folder).glob("rate*"))


def _work(rank: int, workers: int, talking: bool, sizes: Preset, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    if talking:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    clock, batch = _WallClock(), sizes.train.batch_size
    train(
        model=build_autoencoder(sizes.model, 0),
        objective=MaskedReconstruction(sizes.objective),  # type: ignore[arg-type]
        source=RepeatedBatch(sizes.model.modalities, batch // workers, steps + 1, rank=rank),
        config=make_train_config(sizes, "fp32"),
        reporter=clock,
        group=WorkerGroup(),
    )
    if clock.ends:  # of workers that talk, the first alone reports
        rows = batch if talking else batch // workers
        (Path(folder) / f"rate{rank}").write_text(str(rows * steps / (clock.ends[-1] - clock.ends[0])))
    if talking:
        dist.destroy_process_group()

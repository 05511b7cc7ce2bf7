"""Measures a training step: the project's own loop, a plain PyTorch loop, and the rate of a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from physioray.checkpoint import TrainState
from physioray.config import TrainConfig
from physioray.data.batches import Batch
from physioray.data.cohort import StoredModality
from physioray.data.held import HeldSignals
from physioray.objectives.masking import draw_visible
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import Preset
from physioray.signals import find_modality
from physioray.tensors import Draw
from physioray.train import WorkerGroup, train
from tests.benchmarks.plain_model import PlainAutoencoder, measure_plain_loss

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_clock(device: torch.device, wall: bool = False) -> float:
    """Seconds: of this process's CPU on a CPU, which others who are busy disturb little; of the wall on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.perf_counter() if wall else time.process_time()


class RepeatedBatch:
    """A source that gives one batch of noise again and again, with other masks every time as its window ids grow."""

    def __init__(
        self, names: tuple[str, ...], rows: int, steps: int, device: torch.device | None = None, rank: int = 0
    ) -> None:
        generator = np.random.default_rng(rank)
        self.modalities: dict[str, StoredModality] = {}
        self.signals: dict[str, np.ndarray] = {}
        for name in names:
            item = find_modality(name)
            self.modalities[name] = StoredModality(name=name, rate=item.rate, samples=item.samples, step=1 / 1000)
            self.signals[name] = generator.normal(0, 1000, (rows, item.samples)).astype(np.int16)
        self.held = None
        if device is not None:
            self.held = HeldSignals({name: torch.from_numpy(s).to(device) for name, s in self.signals.items()})
        self.rows, self.steps, self.fingerprint = rows, steps, "noise"

    def count_steps(self) -> int:
        return self.steps

    def iterate_pass(self, number: int, first_step: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        for step in range(first_step, self.steps):
            ids = np.arange(self.rows) + step * self.rows
            yield Batch(
                signals=self.signals if self.held is None else self.held,
                present={name: np.ones(self.rows, bool) for name in self.signals},
                labels={},
                window_id=ids,
                recording=ids,
                subject=ids,
            )

    def iterate_all(self) -> Iterator[Batch]:
        return self.iterate_pass(0)


@dataclass
class StepClock:
    """A reporter that reads the clock after step `first` and after step `last` of a pass."""

    first: int
    last: int
    device: torch.device
    wall: bool = False
    began: float = 0.0
    seconds: float = 0.0

    def report_step(self, state: TrainState, steps: int, waited: float, elapsed: float) -> None:  # noqa: ARG002
        if state.step == self.first:
            self.began = read_clock(self.device, self.wall)
        if state.step == self.last:
            self.seconds = read_clock(self.device, self.wall) - self.began

    def report_pass(self, history: list, step_losses: list) -> None:
        pass


def measure_ours(
    model: nn.Module,
    sizes: Preset,
    *,
    precision: str,
    rows: int,
    steps: int,
    device: torch.device,
    held: bool = False,
    warm: int = 1,
) -> float:
    """Windows per second of the project's loop, whole: masks, loss, clipping, optimiser; a first step not counted."""
    source = RepeatedBatch(sizes.model.modalities, rows, steps + warm, device if held else None)
    clock = StepClock(warm, steps + warm, device)
    train(
        model=model,
        objective=MaskedReconstruction(sizes.objective),  # type: ignore[arg-type]
        source=source,
        config=make_train_config(sizes, precision),
        reporter=clock,
        group=WorkerGroup(),
        device=device,
    )
    return rows * steps / clock.seconds


def make_train_config(sizes: Preset, precision: str) -> TrainConfig:
    return replace(sizes.train, passes=1, warmup_passes=0, precision=precision)


def make_plain_measure(
    plain: PlainAutoencoder,
    sizes: Preset,
    *,
    precision: str,
    rows: int,
    device: torch.device,
) -> Callable[[int], float]:
    """A function that gives the windows per second of so many steps of a plain loop; masks are drawn beforehand."""
    names = sizes.model.modalities
    batch = next(RepeatedBatch(names, rows, 1).iterate_pass(0))
    present = {name: torch.ones(rows, dtype=torch.bool) for name in names}
    drawn = draw_visible(
        present, plain.counts, batch.window_id, Draw(seed=0, pass_number=0, step=0), sizes.objective.mask
    )
    visible = {name: shown.to(device) for name, shown in drawn.items()}
    together = torch.cat(list(visible.values()), 1)
    plain.to(device).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=sizes.train.learning_rate)

    def step() -> None:
        signals = {name: torch.from_numpy(s).to(device).float() / 1000 for name, s in batch.signals.items()}
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=KINDS["bf16"], enabled=precision == "bf16"):
            loss = measure_plain_loss(plain(signals, together), signals, visible)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), sizes.train.clip_norm)
        optimizer.step()

    step()

    def measure(steps: int) -> float:
        began = read_clock(device)
        for _ in range(steps):
            step()
        return rows * steps / (read_clock(device) - began)

    return measure


def measure_matrix_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations per second of a large square matrix product."""
    size, times = (8192, 20) if device.type == "cuda" else (2048, 4)
    one = torch.randn(size, size, device=device).to(KINDS[precision])
    product = one @ one
    began = read_clock(device)
    for _ in range(times):
        torch.mm(one, one, out=product)
    return 2 * size**3 * times / (read_clock(device) - began)

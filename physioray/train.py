"""The one training loop. It is handed batches, a model, an objective and a reporter, and knows no cluster.

Pretraining, finetuning and training from scratch are this loop with another objective and another trunk. The
same code runs in one process and on many workers: what workers must agree on goes through a `WorkerGroup`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from physioray.checkpoint import TrainState, check_identity, load_checkpoint, restore_state, save_checkpoint
from physioray.config import TrainConfig, to_dict
from physioray.data.batches import Batch, BatchSource
from physioray.data.cohort import StoredModality
from physioray.data.held import HeldSignals
from physioray.objectives.loss import LossParts, average, combine_sums
from physioray.storage import Location
from physioray.tensors import VALIDATION_PASS, Draw, WindowTensors, move_array

Objective = Callable[[nn.Module, WindowTensors, Draw], LossParts]


class TrainingDiverged(ArithmeticError):
    """The loss stopped being a number; the message names the step and the part."""


@runtime_checkable
class Reporter(Protocol):
    """Whoever wants to know how training goes; only the first worker's is called."""

    def report_step(self, state: TrainState, steps: int, waited: float, elapsed: float) -> None:
        """After a step: `steps` in a pass, seconds waited for data and seconds in all since the pass began."""
        ...

    def report_pass(self, history: list[dict[str, Any]], step_losses: list[float]) -> None:
        """After a pass: one record per finished pass, and the losses of the last pass's steps."""
        ...


class WorkerGroup:
    """The workers that train one model: adds tensors up over them. Alone, nothing happens."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training leaves: one record per pass, and every step's loss of the passes run by this call."""

    history: list[dict[str, Any]]
    step_losses: list[float] = field(default_factory=list)


def train(
    *,
    model: nn.Module,
    objective: Objective,
    source: BatchSource,
    config: TrainConfig,
    validation: BatchSource | None = None,
    validate_mixed: bool = False,
    folder: Location | None = None,
    keep_passes: frozenset[int] = frozenset(),
    identity: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
    group: WorkerGroup | None = None,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Train a model for `config.passes` passes, or go on where a checkpoint in `folder` stands.

    The loss of a step is that of the global batch: every part is divided by its count over all workers, so
    one, two or four workers take the same step to rounding (with dropout, in distribution only).

    Args:
        model: trained in place; every worker must start from the same weights.
        objective: gives the loss parts of a batch.
        source, validation: this worker's batches.
        validate_mixed: see `validate`.
        config: passes, batch size, schedule, precision.
        folder: for `last.pt`, `best.pt` (lowest validation loss) and `pass-NNNN.pt`; nothing is kept if None.
        keep_passes: after which passes a `pass-NNNN.pt` with the model alone is kept.
        identity: what the run is made of beside config and cohort; recorded, and must match on resuming.
        reporter: is told how it goes.
        group: the workers; found from torch.distributed if None.
        device: where the model lives.

    Raises:
        TrainingDiverged: a loss is not finite. No checkpoint is written from then on.
        StorageError: the checkpoint in `folder` belongs to another run.
    """
    # --- Set up: optimiser, schedule, gradients in one buffer ---------------------------------------------------
    device, group = torch.device(device), group or WorkerGroup()
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    gradients = _GradientBuffer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    steps = source.count_steps()
    whole_identity = {"train": to_dict(config), "cohort": source.fingerprint, **(identity or {})}

    # --- Resume: the run's own last checkpoint, else start from the beginning -----------------------------------
    state = TrainState()
    if folder is not None and (folder / "last.pt").exists():
        content = load_checkpoint(folder / "last.pt", device)
        check_identity(content, whole_identity, folder / "last.pt")
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        state = restore_state(content)
        if reporter is not None and group.rank == 0 and state.history:
            reporter.report_pass(state.history, [])

    def write(name: str, *, whole: bool = True) -> None:
        if folder is None or group.rank != 0:
            return
        tensors: dict[str, Any] = {"model": model.state_dict()}
        if whole:
            tensors |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_checkpoint(folder / name, state=state, tensors=tensors, identity=whole_identity)

    if state.step == 0 and 0 in keep_passes:
        write("pass-0000.pt", whole=False)

    # --- Loop: passes over the data, steps of a pass ------------------------------------------------------------
    all_losses: list[float] = []
    while state.pass_number < config.passes:
        names: list[str] = list(source.modalities)
        began = last_saved = time.monotonic()
        waited, windows = 0.0, 0
        watched: dict[str, Tensor] = {}
        for batch, wait in _time_waits(source.iterate_pass(state.pass_number, state.step_in_pass)):
            # The random state of a step is a function of the step, so that a resumed run draws the same.
            torch.manual_seed(_step_seed(config.seed, state.step, group.rank))
            _set_learning_rate(optimizer, config, state.step, steps)
            draw = Draw(seed=config.seed, pass_number=state.pass_number, step=state.step, rank=group.rank)
            gradients.clear()
            with _autocast(device, config.precision):
                parts = objective(model, to_tensors(batch, source.modalities, device), draw)
            watched = {name: watched.get(name, 0) + value.detach() for name, value in parts.watched.items()}
            parts, names = _complete(parts, names)
            totals = group.add_up(parts.stack())
            scaler.scale(parts.combine(totals[1])).backward()
            gradients.add_up(group)
            scaler.unscale_(optimizer)
            gradients.clip(config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            state.partial.append(totals)
            state.step += 1
            state.step_in_pass += 1
            waited, windows = waited + wait, windows + len(batch)
            now = time.monotonic()
            if reporter is not None and group.rank == 0:
                reporter.report_step(state, steps, waited, now - began)
            if now - last_saved >= 60 * config.checkpoint_minutes and state.step_in_pass < steps:
                _check_finite(state, parts.weighting, names)
                state.seconds += now - last_saved
                write("last.pt")
                last_saved = now

        # --- After a pass: its losses, validation, checkpoints, report ------------------------------------------
        losses = _check_finite(state, parts.weighting, names)
        all_losses += losses
        elapsed = time.monotonic() - began
        state.seconds += time.monotonic() - last_saved
        state.pass_number, state.step_in_pass = state.pass_number + 1, 0
        record = _summarise_pass(state, names, parts.weighting, optimizer)
        record |= {"watched": {name: _divide(group.add_up(value)) for name, value in watched.items()}}
        record |= {"windows_per_second": windows * group.world_size / elapsed, "wait_share": waited / elapsed}
        if validation is not None and (state.pass_number % config.validate_every == 0 or _is_last(state, config)):
            record |= validate(model, objective, validation, config, mixed=validate_mixed, group=group, device=device)
        state.history.append(record)
        state.partial = []
        if record.get("validation_loss") is not None and record["validation_loss"] < state.best:
            state.best = record["validation_loss"]
            write("best.pt", whole=False)
        if state.pass_number in keep_passes:
            write(f"pass-{state.pass_number:04d}.pt", whole=False)
        write("last.pt")
        if reporter is not None and group.rank == 0:
            reporter.report_pass(state.history, losses)
    return TrainResult(history=state.history, step_losses=all_losses)


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    source: BatchSource,
    config: TrainConfig,
    *,
    mixed: bool = False,
    group: WorkerGroup | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The loss on held-out windows, with the same masks every time it is asked.

    Args:
        model, objective, source, config, group, device: as for `train`.
        mixed: take the windows in one fixed shuffled order, whole batches only, instead of in ascending order: for
            losses that compare the windows of a batch.

    Returns:
        `validation_loss` and `validation_loss_by_modality`.
    """
    device, group = torch.device(device), group or WorkerGroup()
    was_training = model.training
    model.eval()
    names = list(source.modalities)
    total = torch.zeros(2, len(names), device=device)
    weighting: Any = "part"
    for step, batch in enumerate(source.iterate_pass(VALIDATION_PASS) if mixed else source.iterate_all()):
        if len(batch) == 0:
            continue
        draw = Draw(seed=config.seed, pass_number=VALIDATION_PASS, step=step, rank=group.rank)
        with _autocast(device, config.precision):
            parts = objective(model, to_tensors(batch, source.modalities, device), draw)
        parts, completed = _complete(parts, names)
        if len(completed) != len(names):
            total = torch.cat([total, total.new_zeros(2, len(completed) - len(names))], 1)
            names = completed
        total += parts.stack()
        weighting = parts.weighting
    group.add_up(total)
    model.train(was_training)
    means = average(total[0], total[1]).tolist()
    counted = (total[1] > 0).tolist()
    return {
        "validation_loss": float(combine_sums(total[0], total[1], weighting)),
        "validation_loss_by_modality": {n: v for n, v, ok in zip(names, means, counted, strict=True) if ok},
    }


def to_tensors(
    batch: Batch, modalities: dict[str, StoredModality] | Any, device: torch.device | str = "cpu"
) -> WindowTensors:
    """A batch on the device; int16 travels, and becomes floats in scales of the recording there."""
    device = torch.device(device)
    if isinstance(batch.signals, HeldSignals):
        stored = {name: signal.to(device) for name, signal in batch.signals.tensors.items()}
    else:
        stored = {name: move_array(signal, device) for name, signal in batch.signals.items()}
    return WindowTensors(
        signals={name: signal.float().mul_(modalities[name].step) for name, signal in stored.items()},
        present={name: torch.from_numpy(here) for name, here in batch.present.items()},
        labels={task: move_array(label, device).long() for task, label in batch.labels.items()},
        window_id=batch.window_id,
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and learned vectors (all that has one dimension) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def find_learning_rate(config: TrainConfig, step: int, steps_per_pass: int) -> float:
    """Linear warm-up to the learning rate, then a cosine to its final value (Fang et al. 2024, section 3.5)."""
    warmup, total = config.warmup_passes * steps_per_pass, config.passes * steps_per_pass
    if step < warmup:
        return config.learning_rate * (step + 1) / max(1.0, warmup)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


class _GradientBuffer:
    """All gradients in one tensor: parameters unused in a step have gradient zero, and one sum serves all."""

    def __init__(self, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in trained), device=trained[0].device, dtype=trained[0].dtype)
        first = 0
        for parameter in trained:
            parameter.grad = self.flat[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()

    def clear(self) -> None:
        self.flat.zero_()

    def add_up(self, group: WorkerGroup) -> None:
        group.add_up(self.flat)

    def clip(self, limit: float) -> None:
        if limit > 0:
            self.flat.mul_((limit / (self.flat.norm() + 1e-6)).clamp(max=1.0))


def _time_waits(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - asked


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=precision != "fp32")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> None:
    for entry in optimizer.param_groups:
        entry["lr"] = find_learning_rate(config, step, steps)


def _complete(parts: LossParts, names: list[str]) -> tuple[LossParts, list[str]]:
    """The same parts in the same order on every worker and step; one that is missing here counts nothing."""
    names = names + [name for name in parts.sums if name not in names]
    like = next(iter(parts.sums.values()))
    zero = like.new_zeros(())
    return LossParts(
        sums={name: parts.sums.get(name, zero) for name in names},
        counts={name: parts.counts.get(name, zero) for name in names},
        weighting=parts.weighting,
    ), names


def _check_finite(state: TrainState, weighting: Any, names: list[str]) -> list[float]:
    """The losses of the pass's steps so far; refuses the first that is not a number."""
    stacked: Float[Tensor, "steps 2 parts"] = torch.stack([item.cpu() for item in state.partial])
    losses = combine_sums(stacked[:, 0], stacked[:, 1], weighting)
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        part = next(n for n, value in zip(names, stacked[bad[0], 0], strict=True) if not math.isfinite(value))
        raise TrainingDiverged(
            f"The loss must be finite, but that of {part} is not at step {state.step - len(losses) + bad[0]} "
            f"(pass {state.pass_number}). Lower the learning rate, or train with precision='fp32' or 'bf16'."
        )
    return losses.tolist()


def _summarise_pass(
    state: TrainState, names: list[str], weighting: Any, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    stacked = torch.stack([item.cpu() for item in state.partial]).sum(0)
    means = average(stacked[0], stacked[1]).tolist()
    counted = (stacked[1] > 0).tolist()
    return {
        "pass": state.pass_number,
        "step": state.step,
        "loss": float(combine_sums(stacked[0], stacked[1], weighting)),
        "loss_by_modality": {n: v for n, v, ok in zip(names, means, counted, strict=True) if ok},
        "validation_loss": None,
        "validation_loss_by_modality": {},
        "learning_rate": optimizer.param_groups[0]["lr"],
        "seconds": state.seconds,
    }


def _divide(total: Float[Tensor, "2"]) -> float:
    """The mean from a sum and a count; 0 if nothing was counted."""
    return float(total[0] / total[1].clamp(min=1))


def _is_last(state: TrainState, config: TrainConfig) -> bool:
    return state.pass_number >= config.passes

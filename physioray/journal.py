"""Writes down how a run goes: a line per pass in training.jsonl, TensorBoard events, progress on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from physioray.checkpoint import TrainState
from physioray.progress import format_seconds
from physioray.storage import Location


@runtime_checkable
class Screen(Protocol):
    """Where progress is shown: this process's terminal, or that of the driver of a cluster run."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps are finished."""
        ...

    def say(self, text: str) -> None:
        """Print a line that stays."""
        ...


AfterPass = Callable[[int, Location], None]
"""Told after every pass how many are finished, and the run's folder."""


class Journal:
    """A reporter for `train`: it is called by the first worker only.

    Args:
        folder: where training.jsonl goes, and TensorBoard's events if it is a local folder.
        passes: how many passes the run has.
        settings: flat names and values that TensorBoard shows beside the run.
        screen: where progress is shown; nowhere if None.
        after_pass: called with the number of finished passes and `folder`, also when a run is taken up again.
        watcher: another reporter, which is told the same.
    """

    def __init__(
        self,
        folder: Location,
        passes: int,
        settings: dict[str, Any] | None = None,
        screen: Screen | None = None,
        after_pass: AfterPass | None = None,
        watcher: Any = None,
    ) -> None:
        self.watcher = watcher
        self.folder, self.passes, self.settings, self.screen = folder, passes, settings or {}, screen
        self.after_pass = after_pass

    def report_step(self, state: TrainState, steps: int, waited: float, elapsed: float) -> None:
        """Show the run's place among all its steps, and the share of time that went into waiting for data."""
        if self.screen is not None:
            share = 100 * waited / max(elapsed, 1e-9)
            note = f"pass {min(state.pass_number + 1, self.passes)}/{self.passes}, {share:.0f} % waiting for data"
            self.screen.update(state.step, steps * self.passes, note)
        if self.watcher is not None:
            self.watcher.report_step(state, steps, waited, elapsed)

    def report_pass(self, history: list[dict[str, Any]], step_losses: list[float]) -> None:
        """Rewrite training.jsonl with all passes so far, and append the new one to TensorBoard's events."""
        text = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in history)
        (self.folder / "training.jsonl").write_text(text)
        if self.watcher is not None:
            self.watcher.report_pass(history, step_losses)
        if step_losses:
            if self.screen is not None:
                self.screen.say(describe_pass(history[-1], self.passes))
            self._write_events(history[-1], step_losses)
        if self.after_pass is not None:
            self.after_pass(len(history), self.folder)

    def _write_events(self, record: dict[str, Any], step_losses: list[float]) -> None:
        if not self.folder.is_local:
            return
        # TensorBoard is slow to import and only the first worker needs it.
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(os.path.join(self.folder.path, "tensorboard"))
        first = record["step"] - len(step_losses)
        for number, loss in enumerate(step_losses):
            writer.add_scalar("train/loss", loss, first + number)
        step = record["step"]
        for name in ("validation_loss", "learning_rate", "windows_per_second", "wait_share"):
            if record[name] is not None:
                writer.add_scalar(f"train/{name}", record[name], step)
        for part in ("loss_by_modality", "validation_loss_by_modality", "watched"):
            for name, value in record.get(part, {}).items():
                writer.add_scalar(f"{part}/{name}", value, step)
        if record["pass"] == 1 and self.settings:
            writer.add_text("settings", "\n".join(f"    {key} = {value}" for key, value in self.settings.items()), 0)
        writer.close()


def describe_pass(record: dict[str, Any], passes: int) -> str:
    """One pass as a line: losses, speed, and the share of time spent waiting for data."""
    held_out = "" if record["validation_loss"] is None else f", validation {record['validation_loss']:.4f}"
    parts = ", ".join(f"{name} {value:.3f}" for name, value in record["loss_by_modality"].items())
    return (
        f"pass {record['pass']}/{passes}: loss {record['loss']:.4f} ({parts}){held_out}, "
        f"{record['windows_per_second']:.0f} windows/s, {100 * record['wait_share']:.0f} % waiting for data, "
        f"{format_seconds(record['seconds'])}"
    )

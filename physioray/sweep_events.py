"""Writes a sweep's TensorBoard runs: one per trial, with scalars per pass and all settings beside the final scores.

`tensorboard --logdir FOLDER` then shows the curves of all trials, and the HPARAMS tab the table to sort them by.
Only the driver writes here, so a run is never written by two.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from physioray.search_space import Settings, apply_parameters, flatten_settings
from physioray.storage import Location
from physioray.sweep_journal import TENSORBOARD, TrialRecord
from physioray.sweep_plan import EPOCH, SECONDS

FINAL = "final/"


class SweepEvents:
    """The TensorBoard runs of a sweep's trials.

    Args:
        folder: the sweep's folder; runs go to `tensorboard/0003` in it. Those for a bucket are written beside and
            uploaded when a trial ends, because TensorBoard's files grow.
        base: settings of which every trial changes some.
    """

    def __init__(self, folder: Location, base: Settings) -> None:
        self.folder, self.base = folder, base
        self.local = folder.path if folder.is_local else tempfile.mkdtemp(prefix="physioray-events-")
        self.writers: dict[int, Any] = {}

    def _find(self, record: TrialRecord) -> str:
        return os.path.join(self.local, TENSORBOARD, record.name)

    def start(self, record: TrialRecord, metrics: tuple[str, ...]) -> None:
        """Begin a trial's run anew, with its settings; what an interrupted attempt wrote is dropped."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.close(record.number)
        shutil.rmtree(self._find(record), ignore_errors=True)
        writer = SummaryWriter(self._find(record))
        flat = flatten_settings(apply_parameters(self.base, record.parameters))
        # Without values TensorBoard would not know the columns before the first trial ends.
        experiment, begin, _ = hparams(
            {name: _to_cell(value) for name, value in flat.items()}, dict.fromkeys((FINAL + name for name in metrics))
        )
        for part in (experiment, begin):
            writer.file_writer.add_summary(part)
        writer.flush()
        self.writers[record.number] = writer

    def add(self, number: int, line: Mapping[str, float]) -> None:
        """A report of a trial that runs."""
        writer = self.writers[number]
        for name, value in line.items():
            if name != EPOCH:
                writer.add_scalar(name, value, round(line[EPOCH]))
        writer.flush()

    def finish(self, record: TrialRecord) -> None:
        """The final scores of a trial, and how it ended."""
        from torch.utils.tensorboard.summary import hparams

        writer = self.writers.get(record.number)
        if writer is None:
            return
        if record.last:
            for name, value in record.last.items():
                if name != EPOCH:
                    writer.add_scalar(FINAL + name, value, round(record.last[EPOCH]))
            writer.add_scalar(FINAL + "passes", record.last[EPOCH], round(record.last[EPOCH]))
        writer.add_text("ended", f"{record.state}. {record.reason}".strip())
        writer.file_writer.add_summary(hparams({}, {})[2])
        self.close(record.number)
        if not self.folder.is_local:
            for name in os.listdir(self._find(record)):
                with open(os.path.join(self._find(record), name), "rb") as source:
                    (self.folder / TENSORBOARD / record.name / name).write_bytes(source.read())

    def rewrite(self, record: TrialRecord, metrics: tuple[str, ...]) -> None:
        """Write an ended trial's run from what is committed, for example after the driver was killed over it."""
        self.start(record, metrics)
        for line in record.reports:
            self.add(record.number, line)
        self.finish(record)

    def close(self, number: int | None = None) -> None:
        """Close a trial's run, or all."""
        for key in [number] if number is not None else list(self.writers):
            if key in self.writers:
                self.writers.pop(key).close()


def list_metrics(objectives: tuple[str, ...]) -> tuple[str, ...]:
    """Final metrics that every trial shows: those sought, passes and seconds."""
    return tuple(dict.fromkeys((*objectives, "passes", SECONDS)))


def _to_cell(value: Any) -> bool | float | str:
    """A setting as TensorBoard can hold it: numbers, truth values, and words for all else."""
    return value if isinstance(value, bool | int | float) else str(value)

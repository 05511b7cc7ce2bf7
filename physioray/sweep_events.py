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

SCORES = "scores/"
BOUNDS = "bounds/"
FINAL = "final/"
SIMULATED = "SIMULATED SIGNALS"


class SweepEvents:
    """The TensorBoard runs of a sweep's trials.

    Args:
        folder: the sweep's folder; runs go to `tensorboard/0003` in it. Those for a bucket are written beside and
            uploaded when a trial ends, because TensorBoard's files grow.
        base: settings of which every trial changes some.
        simulated: whether scores are those of simulated signals: the table then says so in a column of its own.
    """

    def __init__(self, folder: Location, base: Settings, *, simulated: bool) -> None:
        self.folder, self.base, self.simulated = folder, base, simulated
        # Removed together with this object.
        self.beside = None if folder.is_local else tempfile.TemporaryDirectory(prefix="physioray-events-")
        self.local = folder.path if self.beside is None else self.beside.name
        self.writers: dict[int, Any] = {}

    def _find(self, record: TrialRecord) -> str:
        return os.path.join(self.local, TENSORBOARD, record.name)

    def start(self, record: TrialRecord, metrics: tuple[str, ...]) -> None:
        """Begin a trial's run anew, with its settings; what an interrupted attempt wrote is dropped."""
        # TensorBoard is slow to import, and only a sweep that runs needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.close(record.number)
        shutil.rmtree(self._find(record), ignore_errors=True)
        # Typed as anything: the summaries of the HPARAMS tab go through a part that torch does not describe.
        writer: Any = SummaryWriter(self._find(record))
        flat = flatten_settings(apply_parameters(self.base, record.parameters))
        cells = {name: _to_cell(value) for name, value in flat.items()}
        first = tuple(record.parameters)
        if self.simulated:
            cells, first = {SIMULATED: True, **cells}, (SIMULATED, *first)
        writer.file_writer.add_summary(_describe_columns(cells, first, metrics))
        writer.file_writer.add_summary(_describe_start(cells, record.name))
        writer.flush()
        self.writers[record.number] = writer

    def add(self, number: int, line: Mapping[str, float]) -> None:
        """A report of a trial that runs."""
        writer = self.writers[number]
        for name, value in line.items():
            if name != EPOCH:
                writer.add_scalar(_place_scalar(name, line), value, round(line[EPOCH]))
        writer.flush()

    def finish(self, record: TrialRecord) -> None:
        """The final scores of a trial, and how it ended."""
        from tensorboard.plugins.hparams import api_pb2

        writer = self.writers.get(record.number)
        if writer is None:
            return
        if record.last:
            for name, value in record.last.items():
                if name != EPOCH:
                    writer.add_scalar(FINAL + name, value, round(record.last[EPOCH]))
            writer.add_scalar(FINAL + "passes", record.last[EPOCH], round(record.last[EPOCH]))
        writer.add_text("ended", f"{record.state}. {record.reason}".strip())
        status = api_pb2.STATUS_FAILURE if record.state == "failed" else api_pb2.STATUS_SUCCESS
        writer.file_writer.add_summary(_wrap("end", status=status))
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


def _place_scalar(name: str, line: Mapping[str, float]) -> str:
    """A metric's name in TensorBoard, where what stands before the stroke is a section of the page."""
    is_bound = name.removesuffix("_low") in line or name.removesuffix("_high") in line
    return f"{BOUNDS if is_bound and name.endswith(('_low', '_high')) else SCORES}{name}"


def _describe_columns(cells: Mapping[str, bool | float | str], first: tuple[str, ...], metrics: tuple[str, ...]) -> Any:
    """Columns of the HPARAMS table: without them TensorBoard would know none before the first trial has ended."""
    from tensorboard.plugins.hparams import api_pb2

    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = [
        # TensorBoard shows a handful of columns at first: those that differ.
        api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in first)
        for name, value in sorted(cells.items(), key=lambda item: item[0] not in first)
    ]
    scores = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=FINAL + name)) for name in metrics]
    return _wrap("columns", hparam_infos=columns, metric_infos=scores)


def _describe_start(cells: Mapping[str, bool | float | str], name: str) -> Any:
    """A trial's row of the HPARAMS table."""
    from google.protobuf import struct_pb2

    kinds = {bool: "bool_value", str: "string_value"}
    row = {key: struct_pb2.Value(**{kinds.get(type(cell), "number_value"): cell}) for key, cell in cells.items()}
    return _wrap("start", hparams=row, group_name=f"trial {name}")


def _wrap(part: str, **content: Any) -> Any:
    """A summary as TensorBoard's HPARAMS tab reads it; its own makers of these need TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if part == "columns":
        tag, data = metadata.EXPERIMENT_TAG, {"experiment": api_pb2.Experiment(**content)}
    elif part == "start":
        tag, data = metadata.SESSION_START_INFO_TAG, {"session_start_info": plugin_data_pb2.SessionStartInfo(**content)}
    else:
        tag, data = metadata.SESSION_END_INFO_TAG, {"session_end_info": plugin_data_pb2.SessionEndInfo(**content)}
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
    return Summary(value=[Summary.Value(tag=tag, metadata=described)])


def _to_cell(value: Any) -> bool | float | str:
    """A setting as TensorBoard can hold it: numbers, truth values, and words for all else."""
    return value if isinstance(value, bool | int | float) else str(value)

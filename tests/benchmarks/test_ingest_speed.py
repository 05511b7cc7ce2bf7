"""Seconds of one core per SIMULATED night of 7.7 h, 4 of 13 channels at 200 Hz, beside a peer's steps and the limit.

The peer's steps are those of SleepFM's extraction as its public code is described (Thapa et al. 2024, arXiv
2405.17766): the whole night's 13 channels go through FFT resampling from 200 to 256 Hz, and every window of 30 s
becomes an array file of its own, with a pickle of labels. Single precision throughout, to its advantage.
"""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy import signal as scipy_signal
from threadpoolctl import threadpool_limits

from physioray.config import IngestConfig
from physioray.data.convert import convert_recording
from physioray.data.preprocess import design_filter
from physioray.data.records import RecordEntry
from physioray.data.shards import write_shard
from physioray.signals import PAPER_MODALITIES, find_modality
from physioray.storage import open_location
from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook, take_turns
from tests.benchmarks.nights import RATE, simulate_nights

CHANNELS = 13
PEER_RATE = 256
STAGES = ("wake", "nonrem1", "nonrem2", "nonrem3", "rem")


@dataclass(frozen=True)
class _Work:
    folder: Path
    entry: RecordEntry

    def time(self, work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def read_signals(self) -> NDArray[np.int16]:
        samples = np.fromfile(self.folder / f"{self.entry.path}.mat", "<i2", offset=24)
        return samples.reshape(-1, CHANNELS)

    def read_labels(self) -> dict[str, NDArray[np.float64]]:
        names = ["arousals", *(f"sleep_stages/{stage}" for stage in (*STAGES, "undefined"))]
        with h5py.File(self.folder / f"{self.entry.path}-arousal.mat") as file:
            return {name: file[f"data/{name}"][:].reshape(-1) for name in names if f"data/{name}" in file}

    def convert(self) -> None:
        """What a task of ingest does with a recording."""
        converted = convert_recording(open_location(self.folder), self.entry, IngestConfig(), subject=None)
        write_shard(open_location(self.folder / "out"), "night.arrow", converted.table)
        assert converted.table.num_rows >= 924

    def extract(self) -> None:
        """The peer's steps."""
        samples, labels = self.read_signals(), self.read_labels()
        undefined = labels.get("sleep_stages/undefined", 1 - sum(labels[f"sleep_stages/{name}"] for name in STAGES))
        first = int(np.flatnonzero(np.diff(undefined.astype(np.int8)))[0]) + 1 if len(undefined) else 0
        length = round((len(samples) - first) * PEER_RATE / RATE)
        windows = length // (30 * PEER_RATE)
        night = np.empty((windows, CHANNELS, 30 * PEER_RATE), np.float32)
        for channel in range(CHANNELS):
            column = samples[first:, channel].astype(np.float32)
            resampled = scipy_signal.resample(column, length)
            night[:, channel] = resampled[: windows * 30 * PEER_RATE].reshape(windows, -1)
        out = self.folder / "peer"
        out.mkdir()
        stages = np.stack([labels[f"sleep_stages/{name}"][first :: 30 * RATE][:windows] for name in STAGES])
        for number in range(windows):
            np.save(out / f"{number}.npy", night[number])
        (out / "labels.pickle").write_bytes(pickle.dumps(dict(enumerate(stages.argmax(0).tolist()))))
        shutil.rmtree(out)

    def do_least(self) -> None:
        """Read, one overlap-add FIR per channel used, and write: what no conversion can do without."""
        samples, settings = self.read_signals(), IngestConfig()
        self.read_labels()
        columns = {}
        for name, channel in zip(PAPER_MODALITIES, (2, 6, 7, 12), strict=True):
            modality = find_modality(name)
            kernel = design_filter(RATE, modality.rate, modality.band, settings).kernel.astype(np.float32)
            filtered = scipy_signal.oaconvolve(samples[:, channel].astype(np.float32), kernel, mode="same")[::2]
            whole = filtered[: len(filtered) // modality.samples * modality.samples].astype(np.int16)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(whole), modality.samples)
        table = pa.table(columns)
        with pa.OSFile(str(self.folder / "least.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[_Work]:
    with threadpool_limits(1):
        yield _Work(tmp_path, simulate_nights(tmp_path, 1)[0])


@pytest.mark.benchmark_run
def test_a_night_is_converted_near_the_limit(work: _Work, notebook: Notebook) -> None:
    work.convert()  # libraries are loaded
    figures = take_turns(
        {
            OURS: lambda: work.time(work.convert),
            "SleepFM's steps (resample, a file per window)": lambda: work.time(work.extract),
            "read + overlap-add FIR x 4 + write": lambda: work.time(work.do_least),
        }
    )
    notebook.keep(
        Comparison(
            title="Ingest, one core per full night",
            unit="s",
            better="less",
            figures=figures,
            goals=[
                Goal(against="read + overlap-add FIR x 4 + write", ratio=1 / 1.3),
                Goal(against="SleepFM's steps (resample, a file per window)", ratio=4.0),
            ],
            note="SIMULATED night, CPU time; ours also hashes all it reads and writes, judges, scales and labels; the "
            "peer keeps all 13 channels",
        )
    )

"""Opens a cohort that ingest has written: which recordings it holds, where their windows lie, whose they are."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from physioray.signals import MODALITIES, SPLITS, UNKNOWN, Split, label_column, present_column
from physioray.storage import Location, StorageError, open_location

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StoredModality:
    """How a modality lies in the shards: rate in Hz, samples in a window, and the size of one int16 step."""

    name: str
    rate: int
    samples: int
    step: float


@dataclass(frozen=True, kw_only=True)
class StoredRecording:
    """One recording's shard: `first` is the window id of its first row, `rows` the number of its windows.

    `discontinuities` are the times in seconds of the first samples after a jump.
    """

    name: str
    index: int
    subject: str
    subject_index: int
    split: Split
    file: str
    rows: int
    first: int
    discontinuities: tuple[float, ...] = ()


class LockedSplitError(StorageError):
    """Code that chooses between models asked for test subjects, who must not have a say in it."""


class Cohort:
    """A finished cohort: an ordered list of recordings whose windows are numbered through.

    A window id is the row's number over all recordings in the order of the manifest.

    Attributes:
        test_locked: True for a view that gives nothing of the test subjects away, see `lock_test`.
    """

    test_locked: bool = False

    def __init__(self, location: Location) -> None:
        self.location = location
        if not (location / MANIFEST).exists():
            raise StorageError(
                f"A cohort must hold {MANIFEST}, but {location} has none. Run: physioray ingest SOURCE {location}"
            )
        self.manifest: dict[str, Any] = (location / MANIFEST).read_json()
        if self.manifest["format"] != FORMAT:
            raise StorageError(
                f"{location} must have format {FORMAT}, but has {self.manifest['format']}. Ingest it again."
            )
        self.fingerprint: str = self.manifest["fingerprint"]
        self.simulated: bool = self.manifest["simulated"]
        self.modalities = {
            name: StoredModality(name=name, rate=entry["rate"], samples=entry["samples"], step=entry["step"])
            for name, entry in sorted(
                self.manifest["modalities"].items(), key=lambda item: list(MODALITIES).index(item[0])
            )
        }
        subjects = sorted({row["subject"] for row in self.manifest["recordings"]})
        numbers = {subject: number for number, subject in enumerate(subjects)}
        self.subjects = tuple(subjects)
        recordings, first = [], 0
        for index, row in enumerate(self.manifest["recordings"]):
            recordings.append(
                StoredRecording(
                    name=row["recording"],
                    index=index,
                    subject=row["subject"],
                    subject_index=numbers[row["subject"]],
                    split=row["split"],
                    file=row["file"],
                    rows=row["rows"],
                    first=first,
                    discontinuities=tuple(row["discontinuities"]),
                )
            )
            first += row["rows"]
        self.recordings: tuple[StoredRecording, ...] = tuple(recordings)
        self.windows = first

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, anonymous: bool = False) -> Cohort:
        """Open a cohort by path or URI.

        Raises:
            StorageError: no finished cohort stands there.
        """
        return cls(open_location(uri, anonymous=anonymous))

    def lock_test(self) -> Cohort:
        """The same cohort for code that selects: test subjects' windows, labels and signals cannot be read through it.

        Their recordings keep their place, so that windows have the same numbers; their labels are unknown, no
        modality of theirs is present, and their shards are never opened.
        """
        view = copy.copy(self)
        view.test_locked = True
        return view

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that may be read."""
        return tuple(name for name in SPLITS if not (self.test_locked and name == "test"))

    def _is_locked(self, recording: StoredRecording) -> bool:
        return self.test_locked and recording.split == "test"

    def _refuse(self, what: str) -> LockedSplitError:
        return LockedSplitError(
            f"Code that chooses between models must not read test subjects, but it asked for {what} of "
            f"{self.location}. Choose on the validation subjects; test scores are for what has been chosen."
        )

    def find_windows(
        self, splits: Iterable[Split] | None = None, subjects: Iterable[str] | None = None
    ) -> NDArray[np.int64]:
        """Window ids `(N,)` of some splits or subjects (all of them if None), in ascending order.

        Raises:
            LockedSplitError: test subjects are locked away and asked for by name (among all they are left out).
        """
        allowed_splits = None if splits is None else set(splits)
        allowed_subjects = None if subjects is None else set(subjects)
        if self.test_locked:
            locked = {item.subject for item in self.recordings if item.split == "test"}
            if allowed_splits is not None and "test" in allowed_splits:
                raise self._refuse("the split test")
            if allowed_subjects is not None and (asked := sorted(locked & allowed_subjects)):
                raise self._refuse(f"the subjects {', '.join(asked[:5])}")
        parts = [
            np.arange(item.first, item.first + item.rows, dtype=np.int64)
            for item in self.recordings
            if not self._is_locked(item)
            and (allowed_splits is None or item.split in allowed_splits)
            and (allowed_subjects is None or item.subject in allowed_subjects)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def locate(self, window_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Recording index `(N,)` and row in its shard `(N,)` of window ids `(N,)`."""
        firsts = np.array([item.first for item in self.recordings], np.int64)
        recording = np.searchsorted(firsts, window_ids, side="right") - 1
        return recording, window_ids - firsts[recording]

    def open_shard(self, recording: StoredRecording) -> pa.ipc.RecordBatchFileReader:
        """The shard of a recording; memory-mapped if it is a local file.

        Raises:
            LockedSplitError: it is a test subject's, and they are locked away.
        """
        if self._is_locked(recording):
            raise self._refuse(f"the recording {recording.name}")
        place = self.location / recording.file
        source = pa.memory_map(place.path) if place.is_local else place.filesystem.open_input_file(place.path)
        return pa.ipc.open_file(source)

    def read_column(self, column: str) -> NDArray[Any]:
        """One small column `(windows,)` over all recordings, for example `label_sleep` or `start`."""
        parts = []
        for recording in self.recordings:
            if self._is_locked(recording):
                parts.append(_hide(column, recording.rows))
                continue
            reader = self.open_shard(recording)
            number = reader.schema.get_field_index(column)
            if number < 0:
                raise StorageError(f"A shard must have {column}, but {recording.file} has {reader.schema.names}.")
            parts += [
                reader.get_batch(i).column(number).to_numpy(zero_copy_only=False)
                for i in range(reader.num_record_batches)
            ]
        return np.concatenate(parts) if parts else np.empty(0)

    def read_labels(self, task: str) -> NDArray[np.int8]:
        """Labels `(windows,)` of a task over all recordings, `UNKNOWN` (-1) where there is none."""
        return self.read_column(label_column(task)).astype(np.int8)

    def has_task(self, task: str) -> bool:
        """True if at least two classes of a task occur in the cohort."""
        counts = self.manifest["class_counts"].get(task, [])
        return sum(count > 0 for count in counts) >= 2


def _hide(column: str, rows: int) -> NDArray[Any]:
    """What a locked recording shows of a column: unknown labels, nothing present, no times."""
    if column.startswith(label_column("")):
        return np.full(rows, UNKNOWN, np.int8)
    if column.startswith(present_column("")):
        return np.zeros(rows, bool)
    return np.full(rows, -1)

"""Opens a cohort that ingest has written: which recordings it holds, where their windows lie, whose they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from physioray.data.mirror import Mirror
from physioray.signals import MODALITIES, SPLITS, UNKNOWN, Split, label_column
from physioray.storage import Location, StorageError, open_location

MANIFEST = "manifest.json"
FORMAT = 1


class LockedSplitError(PermissionError):
    """Something asked for test subjects while the test split is locked; the message says what to do."""


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
    sha256: str | None = None


class Cohort:
    """A finished cohort: an ordered list of recordings whose windows are numbered through.

    A window id is the row's number over all recordings in the order of the manifest.

    With `test_locked` it is a view for choosing settings: the test subjects are listed, but their shards are never
    opened. Asking for their windows, labels or signals raises a LockedSplitError; where a column over all windows is
    read, theirs are unknown (-1, False, NaN). The manifest's totals over everybody stay what they are.
    """

    def __init__(self, location: Location, *, test_locked: bool = False) -> None:
        self.location, self.test_locked = location, test_locked
        if not (location / MANIFEST).exists():
            place = "COHORT" if location.exists() and location.list() else location
            raise StorageError(
                f"A cohort must hold {MANIFEST}, but {location} has none. Run: physioray ingest SOURCE {place}"
            )
        self.manifest: dict[str, Any] = (location / MANIFEST).read_json()
        if self.manifest["format"] != FORMAT:
            raise StorageError(
                f"{location} must have format {FORMAT}, but has {self.manifest['format']}. Ingest it again."
            )
        self._mirror: Mirror | None = None
        self._columns: dict[str, NDArray[Any]] = {}
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
                    sha256=row.get("sha256"),
                )
            )
            first += row["rows"]
        self.recordings: tuple[StoredRecording, ...] = tuple(recordings)
        self.windows = first

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, anonymous: bool = False, test_locked: bool = False) -> Cohort:
        """Open a cohort by path or URI.

        Raises:
            StorageError: no finished cohort stands there.
        """
        return cls(open_location(uri, anonymous=anonymous), test_locked=test_locked)

    def lock_test(self) -> Cohort:
        """The same cohort, its test split locked; for code that chooses settings."""
        return self if self.test_locked else Cohort(self.location, test_locked=True)

    @property
    def readable_splits(self) -> tuple[Split, ...]:
        """The splits that can be read: all, or all but test where that is locked."""
        return tuple(split for split in SPLITS if not (self.test_locked and split == "test"))

    def list_subjects(self, split: Split) -> tuple[str, ...]:
        """Subjects of a split, sorted; those of a locked test split too, without their labels."""
        return tuple(sorted({item.subject for item in self.recordings if item.split == split}))

    def check_unlocked(self, window_ids: NDArray[np.int64]) -> None:
        """Refuse windows of a locked test split.

        Raises:
            LockedSplitError: names how many there are and the first of their recordings.
        """
        if not self.test_locked or not len(window_ids):
            return
        locked = np.array([item.split == "test" for item in self.recordings])
        owner = self.locate(window_ids)[0]
        if locked[owner].any():
            self._refuse(
                f"{int(locked[owner].sum())} windows of {self.recordings[owner[locked[owner]][0]].name} and others"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise LockedSplitError(
            f"The test split must not be read while settings are chosen, but {what} was asked for. Choose by the "
            "validation subjects (evaluate_probe with scored='validation'); to score test at the very end, open the "
            "cohort without test_locked."
        )

    def find_windows(
        self, splits: Iterable[Split] | None = None, subjects: Iterable[str] | None = None
    ) -> NDArray[np.int64]:
        """Window ids `(N,)` of some splits or subjects (all that can be read if None), in ascending order.

        Raises:
            LockedSplitError: the test split or one of its subjects was asked for by name, and is locked.
        """
        allowed_splits = None if splits is None else set(splits)
        allowed_subjects = None if subjects is None else set(subjects)
        if self.test_locked:
            named = sorted((allowed_subjects or set()) & set(self.list_subjects("test")))
            if "test" in (allowed_splits or ()) or named:
                self._refuse(f"subject {named[0]}" if named else "its windows")
        parts = [
            np.arange(item.first, item.first + item.rows, dtype=np.int64)
            for item in self.recordings
            if item.split in self.readable_splits
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
        """The shard of a recording, memory-mapped; of a bucket, its local copy, and by range where there is no room.

        Raises:
            LockedSplitError: it is a test subject's, and the test split is locked.
        """
        if recording.split not in self.readable_splits:
            self._refuse(f"the shard of {recording.name}")
        place = self.location / recording.file
        if place.is_local:
            return pa.ipc.open_file(pa.memory_map(place.path))
        if self._mirror is None:
            self._mirror = Mirror.open(self.fingerprint)
        copy = self._mirror.fetch(place, recording.sha256)
        source = place.filesystem.open_input_file(place.path) if copy is None else pa.memory_map(str(copy))
        return pa.ipc.open_file(source)

    def read_column(self, column: str) -> NDArray[Any]:
        """One small column `(windows,)` over all recordings, for example `label_sleep` or `start`.

        Of a locked test split the values are unknown: -1, False or NaN. Every shard is opened for it, so what was
        read is kept.
        """
        if column not in self._columns:
            self._columns[column] = self._read_column(column)
        return self._columns[column].copy()

    def _read_column(self, column: str) -> NDArray[Any]:
        parts: list[NDArray[Any]] = []
        locked: list[int] = []
        for recording in self.recordings:
            if recording.split not in self.readable_splits:
                locked.append(len(parts))
                parts.append(np.empty(recording.rows))
                continue
            reader = self.open_shard(recording)
            number = reader.schema.get_field_index(column)
            if number < 0:
                raise StorageError(f"A shard must have {column}, but {recording.file} has {reader.schema.names}.")
            parts += [
                reader.get_batch(i).column(number).to_numpy(zero_copy_only=False)
                for i in range(reader.num_record_batches)
            ]
        known = [part.dtype for number, part in enumerate(parts) if number not in locked]
        for number in locked:
            kind = known[0] if known else np.dtype(np.float64)
            filler = {"b": False, "f": np.nan}.get(kind.kind, UNKNOWN)
            parts[number] = np.full(len(parts[number]), filler, kind)
        return np.concatenate(parts) if parts else np.empty(0)

    def read_labels(self, task: str) -> NDArray[np.int8]:
        """Labels `(windows,)` of a task over all recordings, `UNKNOWN` (-1) where there is none."""
        return self.read_column(label_column(task)).astype(np.int8)

    def has_task(self, task: str) -> bool:
        """True if at least two classes of a task occur in the cohort."""
        counts = self.manifest["class_counts"].get(task, [])
        return sum(count > 0 for count in counts) >= 2

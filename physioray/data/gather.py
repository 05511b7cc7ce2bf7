"""Batches straight from the memory map, in process: one machine, tests, a GPU without a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int16, Int64
from numpy.typing import NDArray

from physioray.data.batches import Batch, BatchPlan, PlannedSource
from physioray.data.cohort import Cohort, StoredModality, StoredRecording
from physioray.signals import BATCH_ROWS, TASKS, label_column, present_column
from physioray.storage import StorageError


class _Shard:
    """One open shard, and the record batches of it that have been asked for, which keep its memory in place."""

    def __init__(self, cohort: Cohort, recording: StoredRecording, modalities: Sequence[str]) -> None:
        self.reader = cohort.open_shard(recording)
        missing = [name for name in modalities if self.reader.schema.get_field_index(name) < 0]
        if missing:
            raise StorageError(f"{recording.file} must hold {missing}, but holds {self.reader.schema.names}.")
        self.held: dict[int, pa.RecordBatch] = {}
        self.copied_bytes = 0
        self.recording = recording

    def find_signals(self, number: int, samples: Mapping[str, int]) -> list[int]:
        """Where in memory the signals of record batch `number` begin, modality by modality."""
        before = pa.total_allocated_bytes()
        self.held[number] = self.reader.get_batch(number)
        # Nothing where the shard is mapped; the whole record batch where it is read by range from a bucket.
        self.copied_bytes += max(0, pa.total_allocated_bytes() - before)
        rows = min(BATCH_ROWS, self.recording.rows - number * BATCH_ROWS)
        if len(self.held[number]) != rows:
            # Rows are copied by their place in memory: one too many would lie outside of the shard.
            raise StorageError(
                f"Record batch {number} of {self.recording.file} must hold {rows} windows, as the manifest says, but "
                f"holds {len(self.held[number])}. Ingest the recording again."
            )
        return [
            view_tensor(self.held[number].column(name), samples[name]).__array_interface__["data"][0]
            for name in samples
        ]


def view_tensor(column: pa.Array, samples: int) -> NDArray[np.int16]:
    """A tensor column as an array `(rows, samples)` that shares its memory."""
    flat = column.storage.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), samples)


_CACHED_ROWS = 32
"""Rows that numpy copies at a time: twice, so the first copy should still lie in the processor's cache."""
MOST_COPIED_BYTES = 2**30
"""Of record batches that are read by range from a bucket, what a reader keeps for the next batch."""
_MOST_KEPT = 4
"""Buffers of one modality that are kept for the next batch; a loop has one or two batches in hand."""


class _Memory:
    """This process's memory from one address on as overlapping rows `(count, samples)`, one at every second byte."""

    def __init__(self, lowest: int, count: int, samples: int) -> None:
        # Declared writable for PyTorch, which warns otherwise; nobody writes.
        self.__array_interface__: dict[str, Any] = {
            "shape": (count, samples),
            "typestr": np.dtype(np.int16).str,
            "strides": (2, 2),
            "data": (lowest, False),
            "version": 3,
        }


def gather_rows(addresses: Int64[np.ndarray, "b"], out: Int16[np.ndarray, "b samples"]) -> None:
    """Copy rows of int16 numbers that lie anywhere in this process's memory into `out`.

    A few calls for the rows of many maps: between them lies much that is no memory, but it is never looked at. Whoever
    calls keeps the maps open.
    """
    if not len(addresses):
        return
    lowest = int(addresses.min())
    place = (addresses - lowest) >> 1
    memory = np.asarray(_Memory(lowest, int(place.max()) + 1, out.shape[1]))
    torch = sys.modules.get("torch")
    if torch is not None:
        # Used where it is loaded anyway: numpy cannot pick overlapping rows straight into an array.
        torch.index_select(torch.from_numpy(memory), 0, torch.from_numpy(place), out=torch.from_numpy(out))
        return
    for first in range(0, len(place), _CACHED_ROWS):
        out[first : first + _CACHED_ROWS] = memory[place[first : first + _CACHED_ROWS]]


class _Buffers:
    """Arrays for signals, each given out again once nobody holds it or a part of it.

    New memory for every batch would cost more than copying the signals into it: the system gives it out in pages that
    it has to clear first.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.kept: list[NDArray[np.int16]] = []

    def take(self, rows: int) -> Int16[np.ndarray, "rows samples"]:
        for number in range(len(self.kept)):
            if _count_holders(self.kept, number) == _NOBODY and len(self.kept[number]) >= rows:
                return self.kept[number][:rows]
        array = np.empty((rows, self.samples), np.int16)
        self.kept = [*self.kept[1 - _MOST_KEPT :], array]
        return array[:rows]


def _count_holders(arrays: list[NDArray[np.int16]], number: int) -> int:
    return sys.getrefcount(arrays[number])


_NOBODY = _count_holders([np.empty(1, np.int16)], 0)
"""What is counted for an array that only a list holds, which depends on the interpreter."""


def count_files_allowed() -> int:
    """How many files this process may hold open, after asking for all that it may have."""
    if sys.platform == "win32":
        return 512
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems say "unlimited" and then refuse large numbers.
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):
            pass
    return 65536 if soft == resource.RLIM_INFINITY else soft


class WindowReader:
    """Reads any windows of a cohort by id, only the modalities asked for.

    The small columns (labels, presence) of all recordings are read once and kept; signals stay on disk.
    """

    def __init__(self, cohort: Cohort, modalities: Sequence[str] | None = None) -> None:
        self.cohort = cohort
        names = tuple(cohort.modalities) if modalities is None else tuple(modalities)
        unknown = [name for name in names if name not in cohort.modalities]
        if unknown:
            raise StorageError(
                f"The cohort holds {', '.join(cohort.modalities)}, but {', '.join(unknown)} was asked for. "
                "Ingest with --modalities to add it."
            )
        self.names = names
        self.shards: dict[int, _Shard] = {}
        self.most_open = count_files_allowed() // 2
        self.firsts = np.array([item.first for item in cohort.recordings], np.int64)
        batches = [-(-item.rows // BATCH_ROWS) for item in cohort.recordings]
        self.first_batches = np.cumsum([0, *batches[:-1]])
        self.samples = {name: cohort.modalities[name].samples for name in names}
        self.buffers = {name: _Buffers(samples) for name, samples in self.samples.items()}
        # Where the signals of each record batch begin, by modality; zero where it has not been looked up.
        self.addresses = np.zeros((len(names), sum(batches)), np.int64)
        self.subjects = np.array([item.subject_index for item in cohort.recordings], np.int64)
        # Labels by task, then presence by modality: one walk over all for every batch.
        columns = [*(label_column(task) for task in TASKS), *(present_column(name) for name in names)]
        self.small = np.stack([cohort.read_column(column).astype(np.int8) for column in columns])
        self.present = dict(zip(names, self.small[len(TASKS) :].view(np.bool_), strict=True))

    def _hold(self, recordings: NDArray[np.int64]) -> None:
        """Open the shards of some recordings; of more than a process may hold, the longest unused are closed."""
        if len(self.firsts) > self.most_open:
            for index in recordings.tolist():
                if index in self.shards:
                    self.shards[index] = self.shards.pop(index)
        missing = [index for index in recordings.tolist() if index not in self.shards]
        while missing and self.shards and len(self.shards) + len(missing) > self.most_open:
            self._close(next(iter(self.shards)))
        for index in missing:
            self.shards[index] = _Shard(self.cohort, self.cohort.recordings[index], self.names)

    def _close(self, index: int) -> None:
        first = self.first_batches[index]
        self.addresses[:, [first + number for number in self.shards.pop(index).held]] = 0

    def _give_back(self) -> None:
        """Close the shards opened first, while more is kept of shards read by range than may be."""
        copied = {index: shard.copied_bytes for index, shard in self.shards.items() if shard.copied_bytes}
        kept = sum(copied.values())
        for index, size in copied.items():
            if kept <= MOST_COPIED_BYTES:
                return
            self._close(index)
            kept -= size

    def _gather(
        self, recording: NDArray[np.int64], row: NDArray[np.int64]
    ) -> dict[str, Int16[np.ndarray, "b samples"]]:
        """Signals of rows of at most `most_open` recordings."""
        number, offset = np.divmod(row, BATCH_ROWS)
        batch = self.first_batches[recording] + number
        addresses = self.addresses[:, batch]
        # An address is known as long as its shard is open. Of more than may be open, those used last are kept.
        if len(self.firsts) > self.most_open or not addresses[0].all():
            self._hold(np.unique(recording))
            for place in np.flatnonzero(self.addresses[0, batch] == 0).tolist():
                if self.addresses[0, batch[place]] == 0:
                    shard = self.shards[int(recording[place])]
                    self.addresses[:, batch[place]] = shard.find_signals(int(number[place]), self.samples)
            addresses = self.addresses[:, batch]
        signals = {}
        for begin, (name, samples) in zip(addresses, self.samples.items(), strict=True):
            signals[name] = self.buffers[name].take(len(row))
            gather_rows(begin + offset * (2 * samples), signals[name])
        if not self.cohort.location.is_local:
            self._give_back()
        return signals

    def _gather_any(
        self, recording: NDArray[np.int64], row: NDArray[np.int64]
    ) -> dict[str, Int16[np.ndarray, "b samples"]]:
        if len(self.firsts) <= self.most_open:
            return self._gather(recording, row)
        owners, which = np.unique(recording, return_inverse=True)
        if len(owners) <= self.most_open:
            return self._gather(recording, row)
        signals = {name: np.empty((len(row), samples), np.int16) for name, samples in self.samples.items()}
        for first in range(0, len(owners), self.most_open):
            rows = np.flatnonzero((which >= first) & (which < first + self.most_open))
            for name, part in self._gather(recording[rows], row[rows]).items():
                signals[name][rows] = part
        return signals

    def read(self, window_ids: Int64[np.ndarray, "b"]) -> Batch:
        """The batch of some windows, in the order given.

        Raises:
            LockedSplitError: a window is of a locked test split.
            IndexError: the cohort has no such window.
        """
        recording, row = self._locate(window_ids)
        return self._complete(window_ids, recording, self._gather_any(recording, row))

    def describe(
        self, window_ids: Int64[np.ndarray, "b"], signals: Mapping[str, Int16[np.ndarray, "b samples"]]
    ) -> Batch:
        """The batch of some windows whose signals are there already: the small columns are added.

        Raises:
            LockedSplitError: a window is of a locked test split.
        """
        return self._complete(window_ids, self._locate(window_ids)[0], signals)

    def _complete(
        self, window_ids: Int64[np.ndarray, "b"], recording: Int64[np.ndarray, "b"], signals: Mapping[str, Any]
    ) -> Batch:
        small = self.small[:, window_ids]
        return Batch(
            signals=signals,
            present=dict(zip(self.names, small[len(TASKS) :].view(np.bool_), strict=True)),
            labels=dict(zip(TASKS, small, strict=False)),
            window_id=window_ids,
            recording=recording,
            subject=self.subjects[recording],
        )

    def _locate(self, window_ids: Int64[np.ndarray, "b"]) -> tuple[Int64[np.ndarray, "b"], Int64[np.ndarray, "b"]]:
        lowest, highest = window_ids.min(initial=0), window_ids.max(initial=0)
        if lowest < 0 or highest >= self.cohort.windows:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"Windows must be 0 to {self.cohort.windows - 1}, but {wrong} was asked for.")
        self.cohort.check_unlocked(window_ids)
        recording = np.searchsorted(self.firsts, window_ids, side="right") - 1
        return recording, window_ids - self.firsts[recording]


class GatherSource(PlannedSource):
    """Batches of some windows of a cohort, read in this process.

    Args:
        cohort: the cohort.
        window_ids: `(N,)` which windows.
        batch_size: of the global batch, over all workers.
        seed: of the order.
        modalities: which to read; all that the cohort holds if None.
        rank, world_size: this worker's number and the number of workers.
        reader: to share between sources of one cohort.
        pairs: rows 2i and 2i + 1 of every batch are adjacent windows of one recording; see BatchPlan.
    """

    def __init__(
        self,
        cohort: Cohort,
        window_ids: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int = 0,
        modalities: Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        reader: WindowReader | None = None,
        pairs: bool = False,
    ) -> None:
        self.plan = BatchPlan(
            cohort, window_ids, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, pairs=pairs
        )
        self.reader = reader or WindowReader(cohort, modalities)
        self.fingerprint = cohort.fingerprint
        self.modalities: dict[str, StoredModality] = {name: cohort.modalities[name] for name in self.reader.names}

    def _deliver(self, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        for share in shares:
            yield self.reader.read(share)

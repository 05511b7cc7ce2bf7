"""Batches straight from the memory map, in process: one machine, tests, a GPU without a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int16, Int64
from numpy.typing import NDArray

from physioray.data.batches import Batch, BatchPlan
from physioray.data.cohort import Cohort, StoredModality, StoredRecording
from physioray.signals import BATCH_ROWS, TASKS, label_column, present_column
from physioray.storage import StorageError


class _Shard:
    """Views into one memory-mapped shard; a record batch's columns are looked up once, when first used."""

    def __init__(self, cohort: Cohort, recording: StoredRecording, modalities: Sequence[str]) -> None:
        self.reader = cohort.open_shard(recording)
        self.modalities = tuple(modalities)
        missing = [name for name in modalities if self.reader.schema.get_field_index(name) < 0]
        if missing:
            raise StorageError(f"{recording.file} must hold {missing}, but holds {self.reader.schema.names}.")
        self.samples = {name: cohort.modalities[name].samples for name in modalities}
        self.views: dict[int, dict[str, NDArray[np.int16]]] = {}

    def view(self, number: int) -> dict[str, NDArray[np.int16]]:
        """Signals `(rows, samples)` per modality of record batch `number`, without a copy."""
        if number not in self.views:
            record_batch = self.reader.get_batch(number)
            self.views[number] = {
                name: view_tensor(record_batch.column(name), self.samples[name]) for name in self.modalities
            }
        return self.views[number]


def view_tensor(column: pa.Array, samples: int) -> NDArray[np.int16]:
    """A tensor column as an array `(rows, samples)` that shares its memory."""
    flat = column.storage.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), samples)


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
        self.subjects = np.array([item.subject_index for item in cohort.recordings], np.int64)
        self.labels = {task: cohort.read_column(label_column(task)).astype(np.int8) for task in TASKS}
        self.present = {name: cohort.read_column(present_column(name)).astype(bool) for name in names}

    def _open(self, index: int) -> _Shard:
        """The shard of a recording; of more than a process may hold open, the longest unused are closed."""
        shard = self.shards.pop(index, None)
        if shard is None:
            while len(self.shards) >= self.most_open:
                del self.shards[next(iter(self.shards))]
            shard = _Shard(self.cohort, self.cohort.recordings[index], self.names)
        self.shards[index] = shard
        return shard

    def read(self, window_ids: Int64[np.ndarray, "b"]) -> Batch:
        """The batch of some windows, in the order given.

        Raises:
            LockedSplitError: a window is of a locked test split.
        """
        recording, row = self._locate(window_ids)
        signals = {
            name: np.empty((len(window_ids), self.cohort.modalities[name].samples), np.int16) for name in self.names
        }
        # Rows are copied one by one: a row is one contiguous run of bytes in the map.
        for place, (index, line) in enumerate(zip(recording.tolist(), row.tolist(), strict=True)):
            views = self._open(index).view(line // BATCH_ROWS)
            inside = line % BATCH_ROWS
            for name in self.names:
                signals[name][place] = views[name][inside]
        return self.describe(window_ids, signals)

    def describe(
        self, window_ids: Int64[np.ndarray, "b"], signals: Mapping[str, Int16[np.ndarray, "b samples"]]
    ) -> Batch:
        """The batch of some windows whose signals are there already: the small columns are added.

        Raises:
            LockedSplitError: a window is of a locked test split.
        """
        recording, _ = self._locate(window_ids)
        return Batch(
            signals=signals,
            present={name: self.present[name][window_ids] for name in self.names},
            labels={task: self.labels[task][window_ids] for task in self.labels},
            window_id=window_ids,
            recording=recording,
            subject=self.subjects[recording],
        )

    def _locate(self, window_ids: Int64[np.ndarray, "b"]) -> tuple[Int64[np.ndarray, "b"], Int64[np.ndarray, "b"]]:
        self.cohort.check_unlocked(window_ids)
        recording = np.searchsorted(self.firsts, window_ids, side="right") - 1
        return recording, window_ids - self.firsts[recording]


class GatherSource:
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

    @property
    def pairs_per_recording(self) -> int | None:
        """The most pairs of one recording in a global batch; None without pairs."""
        return self.plan.pairs_per_recording

    def count_steps(self) -> int:
        """Steps of one training pass."""
        return self.plan.count_steps()

    def iterate_pass(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """This worker's share of every global batch of training pass `number`, from `first_step` on."""
        for share in self.plan.share_pass(number, first_step):
            yield self.reader.read(share)

    def iterate_all(self) -> Iterator[Batch]:
        """This worker's share of all windows, the same every time; see BatchPlan.share_all."""
        for share in self.plan.share_all():
            yield self.reader.read(share)

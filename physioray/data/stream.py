"""The same batches in the same order as `data/gather`, through Ray Data, for any number of workers.

Each worker runs a dataset of its own over its share of the order: a custom datasource whose read tasks gather
rows from the shards and emit them as Arrow blocks, on whatever node has a CPU free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, Datasource
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from physioray.data.batches import Batch, BatchPlan, PlannedSource
from physioray.data.cohort import Cohort, StoredModality
from physioray.data.gather import WindowReader
from physioray.signals import TASKS, label_column, present_column

BLOCK_BYTES = 96 * 2**20
"""Bytes of windows that a read task hands over at once: a block costs Ray tens of milliseconds, however small it is.
Below the size at which Ray Data cuts blocks (128 MiB)."""
FIRST_SHARE = 4
"""The first block of a pass is so much shorter than the others."""
LOOK_SECONDS = 0.02
"""How often Ray Data asks what of the cluster it may use, until it is told."""
MOST_TASKS = 128
"""Read tasks of one pass: all are made before the first batch comes, so a long pass has longer ones."""


class _OrderedWindows(Datasource):
    """Emits given windows in the given order; consecutive batches are gathered by one read task."""

    def __init__(self, cohort: Cohort, modalities: Sequence[str], batches: list[NDArray[np.int64]]) -> None:
        super().__init__()
        self.uri, self.fingerprint = cohort.location.uri, cohort.fingerprint
        self.test_locked = cohort.test_locked
        self.modalities, self.batches = tuple(modalities), batches
        self.row_bytes = sum(2 * cohort.modalities[name].samples for name in modalities) + 64
        each = max(1, BLOCK_BYTES // self.row_bytes // max(1, len(batches[0])))
        # A short first block, so that the first batch need not wait for a whole one.
        edges = [0, *range(max(1, each // FIRST_SHARE), len(batches), each), len(batches)]
        blocks = [np.concatenate(batches[i:j]) for i, j in itertools.pairwise(edges) if i < j]
        length = -(-len(blocks) // MOST_TASKS)
        self.chunks = [blocks[first : first + length] for first in range(0, len(blocks), length)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all windows together."""
        return self.row_bytes * sum(len(batch) for batch in self.batches)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Read tasks in order, each of one block or more."""
        tasks = []
        for chunk in self.chunks:
            rows = sum(len(block) for block in chunk)
            metadata = BlockMetadata(num_rows=rows, size_bytes=rows * self.row_bytes, input_files=None, exec_stats=None)
            read = partial(_read, self.uri, self.fingerprint, self.test_locked, self.modalities, chunk)
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _read(
    uri: str, fingerprint: str, test_locked: bool, modalities: tuple[str, ...], blocks: list[NDArray[np.int64]]
) -> Iterator[pa.Table]:
    reader = _open_reader(uri, fingerprint, test_locked, modalities)
    for window_ids in blocks:
        yield _to_table(reader.read(window_ids))


@lru_cache(maxsize=4)
def _open_reader(uri: str, fingerprint: str, test_locked: bool, modalities: tuple[str, ...]) -> WindowReader:
    """One reader per process and cohort: its maps and small columns serve all read tasks that come by.

    The fingerprint is part of the key, so that a cohort made anew under the same path is opened anew.
    """
    reader = WindowReader(Cohort.open(uri, test_locked=test_locked), modalities)
    if reader.cohort.fingerprint != fingerprint:
        raise ValueError(f"The cohort at {uri} must stay the same during a run, but it was made anew. Start again.")
    return reader


def _to_table(batch: Batch) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "window_id": pa.array(batch.window_id),
        "recording": pa.array(batch.recording),
        "subject": pa.array(batch.subject),
    }
    columns |= {present_column(name): pa.array(here) for name, here in batch.present.items()}
    columns |= {label_column(task): pa.array(label) for task, label in batch.labels.items()}
    for name, signal in batch.signals.items():
        flat = pa.array(signal.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, signal.shape[1])
    return pa.table(columns)


def _to_batch(table: pa.RecordBatch, modalities: Sequence[str]) -> Batch:
    """The windows of a record batch, which share its memory."""

    def column(name: str) -> np.ndarray:
        return table.column(name).to_numpy(zero_copy_only=False)

    signals = {}
    for name in modalities:
        tensor = table.column(name)
        signals[name] = tensor.flatten().to_numpy(zero_copy_only=True).reshape(len(tensor), -1)
    return Batch(
        signals=signals,
        present={name: column(present_column(name)) for name in modalities},
        labels={task: column(label_column(task)) for task in TASKS},
        window_id=column("window_id"),
        recording=column("recording"),
        subject=column("subject"),
    )


def _cut(pieces: Iterator[Batch], sizes: Iterable[int]) -> Iterator[Batch]:
    """Batches of given sizes out of longer or shorter ones; a part of one piece shares its memory."""
    piece, first = next(pieces), 0
    for size in sizes:
        parts = []
        while size > 0:
            if first == len(piece):
                piece, first = next(pieces), 0
            part = piece[first : first + size]
            parts.append(part)
            first, size = first + len(part), size - len(part)
        yield parts[0] if len(parts) == 1 else Batch.join(parts)


class StreamSource(PlannedSource):
    """Batches of some windows of a cohort, read by Ray tasks; arguments as for `GatherSource`."""

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
        pairs: bool = False,
    ) -> None:
        self.plan = BatchPlan(
            cohort, window_ids, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, pairs=pairs
        )
        names = tuple(cohort.modalities) if modalities is None else tuple(modalities)
        self.cohort, self.fingerprint = cohort, cohort.fingerprint
        self.modalities: dict[str, StoredModality] = {name: cohort.modalities[name] for name in names}

    def _deliver(self, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        if not shares:
            return
        _settle_ray_data()
        source = _OrderedWindows(self.cohort, tuple(self.modalities), shares)
        # Told fewer or nothing, Ray Data cuts the blocks of few tasks into many small ones.
        dataset = ray.data.read_datasource(source, override_num_blocks=len(source.chunks))
        tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        names = tuple(self.modalities)
        blocks = (_to_batch(part, names) for table in tables for part in table.to_batches())
        for expected, batch in zip(shares, _cut(blocks, [len(share) for share in shares]), strict=True):
            if not np.array_equal(batch.window_id, expected):
                raise RuntimeError("Ray Data must keep the order of windows, but changed it: report this as a bug.")
            yield batch


def _choose_pause(manager: ResourceManager) -> float:
    """Seconds until Ray Data asks again what of the cluster it may use: a moment while it knows of nothing."""
    return 1.0 if manager._global_limits.cpu else LOOK_SECONDS


def _settle_ray_data() -> None:
    """Settings of Ray Data in this process: blocks in order, no bars, no idle first second."""
    # A new dataset is told its share of the cluster a moment after it has asked. Ray Data 2.60 looks again after a
    # second only, and until then runs one read task at a time: most of a short pass.
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = property(_choose_pause)  # type: ignore[assignment]
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

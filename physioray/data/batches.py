"""The contract of a batch, and the order of windows as a pure function of (seed, pass).

`data/gather` and `data/stream` both deliver these batches in this order; neither the way nor the number of
workers changes what the global batch of a step holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int8, Int16, Int64
from numpy.typing import NDArray

from physioray.data.cohort import Cohort, StoredModality
from physioray.data.pairs import count_pair_steps, find_runs, limit_pairs, order_pairs


@dataclass(frozen=True)
class Batch:
    """Some windows, as they lie in the shards.

    Attributes:
        signals: `(B, samples)` int16 per modality, in steps of the cohort's `step`.
        present: `(B,)` per modality; where False the signal means nothing and is zero.
        labels: `(B,)` per task, -1 where unknown.
        window_id: `(B,)` numbers of the windows in the cohort.
        recording: `(B,)` index of each window's recording.
        subject: `(B,)` index of each window's subject.
    """

    signals: Mapping[str, Int16[np.ndarray, "b samples"]]
    present: Mapping[str, Bool[np.ndarray, "b"]]
    labels: Mapping[str, Int8[np.ndarray, "b"]]
    window_id: Int64[np.ndarray, "b"]
    recording: Int64[np.ndarray, "b"]
    subject: Int64[np.ndarray, "b"]

    def __len__(self) -> int:
        return len(self.window_id)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the windows, sharing this batch's memory."""
        parts: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            shared = isinstance(value, Mapping)
            parts[item.name] = {key: array[rows] for key, array in value.items()} if shared else value[rows]
        return Batch(**parts)

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """The windows of several batches, one after the other."""
        joined: dict[str, Any] = {}
        for item in fields(cls):
            values = [getattr(batch, item.name) for batch in batches]
            if isinstance(values[0], Mapping):
                joined[item.name] = {key: np.concatenate([value[key] for value in values]) for key in values[0]}
            else:
                joined[item.name] = np.concatenate(values)
        return cls(**joined)


@runtime_checkable
class BatchSource(Protocol):
    """Whatever delivers batches: in process, or through Ray Data."""

    @property
    def modalities(self) -> Mapping[str, StoredModality]:
        """The modalities that the batches hold, and how they are stored."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the cohort that the batches come from."""
        ...

    def count_steps(self) -> int:
        """Steps of one training pass."""
        ...

    def iterate_pass(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of this worker for training pass `number`, from step `first_step` on."""
        ...

    def iterate_all(self) -> Iterator[Batch]:
        """Every window of the source once, in ascending order, the last batch ragged.

        A source of pairs gives the pairs of one pass instead, the same ones every time.
        """
        ...


def order_windows(
    cohort: Cohort, window_ids: Int64[np.ndarray, "n"], seed: int, pass_number: int
) -> Int64[np.ndarray, "n"]:
    """Shuffle windows for one pass so that every stretch of the order mixes all recordings.

    Each recording's windows are shuffled and then spread evenly over the pass, each at a random place of
    its own share: window k of n lies at (k + u) / n with u uniform in [0, 1). A batch therefore holds
    windows of nearly as many recordings as it can, which a plain permutation only does on average.

    Args:
        cohort: whose windows they are.
        window_ids: `(N,)` the windows of the pass, in any order.
        seed, pass_number: the same pair always gives the same order.

    Returns:
        `(N,)` the same window ids, ordered.
    """
    ids = np.sort(np.asarray(window_ids, np.int64))
    return ids[spread_recordings(cohort.locate(ids)[0], seed, pass_number)]


def spread_recordings(recording: Int64[np.ndarray, "n"], seed: int, pass_number: int) -> Int64[np.ndarray, "n"]:
    """The permutation `(N,)` behind `order_windows`, for windows that belong to `recording` `(N,)`."""
    generator = np.random.default_rng([seed, pass_number])
    shuffle = generator.permutation(len(recording))
    owner = recording[shuffle]
    grouped = np.argsort(owner, kind="stable")
    counts = np.bincount(owner)
    rank = np.empty(len(owner), np.int64)
    rank[grouped] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (rank + generator.random(len(owner))) / counts[owner]
    return shuffle[np.argsort(place, kind="stable")]


def count_steps(windows: int, batch_size: int) -> int:
    """Steps of a pass: whole batches only, or one smaller batch if there are fewer windows than one."""
    return max(1, windows // batch_size)


def take_share(
    order: Int64[np.ndarray, "n"], batch_size: int, step: int, rank: int, world_size: int, together: int = 1
) -> Int64[np.ndarray, "b"]:
    """Window ids of one worker at one step: every `world_size`-th row of the global batch.

    Rows that belong `together`, 2 for pairs, go to the same worker.
    """
    return order[step * batch_size : (step + 1) * batch_size].reshape(-1, together)[rank::world_size].reshape(-1)


class BatchPlan:
    """Which windows one worker reads at every step; what `GatherSource` and `StreamSource` have in common.

    Args:
        cohort: the cohort.
        window_ids: `(N,)` which windows.
        batch_size: of the global batch, over all workers.
        seed: of the order.
        rank, world_size: this worker's number and the number of workers.
        pairs: rows 2i and 2i + 1 of every batch, of every worker, are adjacent windows of one recording.

    Attributes:
        pairs_per_recording: the most pairs of one recording in a global batch; None without pairs.

    Raises:
        ValueError: there are fewer windows or pairs than workers, or the batch size is odd.
        StorageError: no two windows are adjacent.
        LockedSplitError: a window is of a locked test split.
    """

    def __init__(
        self,
        cohort: Cohort,
        window_ids: Int64[np.ndarray, "n"],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        pairs: bool,
    ) -> None:
        if len(window_ids) < world_size:
            raise ValueError(f"There must be at least {world_size} windows, one a worker, but got {len(window_ids)}.")
        if batch_size < world_size:
            raise ValueError(f"A global batch must have a window for each of {world_size} workers, got {batch_size}.")
        cohort.check_unlocked(window_ids)
        self.cohort, self.window_ids = cohort, np.sort(np.asarray(window_ids, np.int64))
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.runs, self.pairs_per_recording = None, None
        if not pairs:
            return
        if batch_size % 2:
            raise ValueError(f"The batch size must be even for batches of pairs, but got {batch_size}.")
        self.runs = find_runs(cohort, self.window_ids)
        self.pairs_per_recording = limit_pairs(self.runs, batch_size)
        each = count_pair_steps(self.runs, batch_size)[1]
        if each < world_size:
            raise ValueError(
                f"A batch must have a pair for each of the {world_size} workers, but it has {each}. "
                "Use fewer workers, larger batches, or more windows."
            )

    def count_steps(self) -> int:
        """Steps of one training pass."""
        if self.runs is not None:
            return count_pair_steps(self.runs, self.batch_size)[0]
        return count_steps(len(self.window_ids), self.batch_size)

    def share_pass(self, number: int, first_step: int = 0) -> list[Int64[np.ndarray, "b"]]:
        """This worker's window ids at every step of training pass `number`, from `first_step` on."""
        if self.runs is not None:
            order = order_pairs(self.runs, self.batch_size, self.seed, number)
        else:
            order = order_windows(self.cohort, self.window_ids, self.seed, number)
        steps = range(first_step, self.count_steps())
        together = 1 if self.runs is None else 2
        return [take_share(order, self.batch_size, step, self.rank, self.world_size, together) for step in steps]

    def share_all(self) -> list[Int64[np.ndarray, "b"]]:
        """This worker's share of all windows, in batches that each worker has the same number of.

        Ascending, the last batch ragged; a last batch with fewer windows than workers joins the one before, so
        that no worker stands idle while others wait for it. With pairs, the batches of pass 0: pairs of one night
        in ascending order would be compared with hardly anything but that night.
        """
        if self.runs is not None:
            return self.share_pass(0)
        total = len(self.window_ids)
        starts = list(range(0, total, self.batch_size))
        if len(starts) > 1 and total - starts[-1] < self.world_size:
            starts.pop()
        ends = [*starts[1:], total]
        return [
            self.window_ids[start:end][self.rank :: self.world_size] for start, end in zip(starts, ends, strict=True)
        ]


class PlannedSource:
    """What all ways of delivering a plan's batches share; each says how the windows of the steps come (`_deliver`)."""

    plan: BatchPlan

    @property
    def pairs_per_recording(self) -> int | None:
        """The most pairs of one recording in a global batch; None without pairs."""
        return self.plan.pairs_per_recording

    def count_steps(self) -> int:
        """Steps of one training pass."""
        return self.plan.count_steps()

    def iterate_pass(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """This worker's share of every global batch of training pass `number`, from `first_step` on."""
        return self._deliver(self.plan.share_pass(number, first_step))

    def iterate_all(self) -> Iterator[Batch]:
        """This worker's share of all windows, the same every time; see BatchPlan.share_all."""
        return self._deliver(self.plan.share_all())

    def _deliver(self, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        raise NotImplementedError

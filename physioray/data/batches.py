"""The contract of a batch, and the order of windows as a pure function of (seed, pass).

`data/gather` and `data/stream` both deliver these batches in this order; neither the way nor the number of
workers changes what the global batch of a step holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int8, Int16, Int64

from physioray.data.cohort import Cohort, StoredModality


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
        """Every window of the source once, in ascending order, the last batch ragged."""
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
    order: Int64[np.ndarray, "n"], batch_size: int, step: int, rank: int, world_size: int
) -> Int64[np.ndarray, "b"]:
    """Window ids of one worker at one step: every `world_size`-th row of the global batch."""
    return order[step * batch_size : (step + 1) * batch_size][rank::world_size]

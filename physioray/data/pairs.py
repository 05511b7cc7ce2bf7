"""Pairs of adjacent windows of one recording, and their order as a pure function of (seed, pass).

Two windows are adjacent if the second starts when the first ends and the recording does not jump within or between
them: a jump exactly at their boundary separates them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from physioray.data.cohort import Cohort
from physioray.signals import WINDOW_SECONDS
from physioray.storage import StorageError

_TOLERANCE = 1e-3
"""Seconds by which times may differ and still be the same: far less than a sample at any rate of a night."""


@dataclass(frozen=True)
class Runs:
    """Windows in ascending order, and the uninterrupted stretches that they form.

    Attributes:
        window_ids: `(N,)` ascending.
        recording: `(N,)` index of each window's recording.
        position: `(N,)` place in its run, from 0.
        length: `(N,)` windows in its run.
    """

    window_ids: Int64[np.ndarray, "n"]
    recording: Int64[np.ndarray, "n"]
    position: Int64[np.ndarray, "n"]
    length: Int64[np.ndarray, "n"]


def find_runs(cohort: Cohort, window_ids: Int64[np.ndarray, "n"]) -> Runs:
    """Group windows into stretches in which each is adjacent to the next.

    Raises:
        StorageError: no two of them are adjacent.
    """
    ids = np.sort(np.asarray(window_ids, np.int64))
    recording = cohort.locate(ids)[0]
    starts = cohort.read_column("start").astype(np.float64)[ids]
    together = find_adjacent(starts, recording, [item.discontinuities for item in cohort.recordings])
    if not together.any():
        raise StorageError(
            f"Pairs must be made of adjacent windows of one recording, but among the {len(ids)} windows of "
            f"{cohort.location} there are no two. Use an objective that needs no pairs, or more windows."
        )
    run = np.concatenate([[0], np.cumsum(~together)])
    lengths = np.bincount(run)
    firsts = np.cumsum(lengths) - lengths
    return Runs(window_ids=ids, recording=recording, position=np.arange(len(ids)) - firsts[run], length=lengths[run])


def find_adjacent(
    starts: Float[np.ndarray, "n"],
    recording: Int64[np.ndarray, "n"],
    discontinuities: list[tuple[float, ...]],
) -> Bool[np.ndarray, "m"]:
    """Which windows are adjacent to the next one, `(N - 1,)`.

    Args:
        starts: seconds from the start of the recording, ascending within a recording.
        recording: `(N,)` index of each window's recording.
        discontinuities: for every recording the times in seconds at which it jumps (first sample after the jump).
    """
    same = recording[1:] == recording[:-1]
    together = same & (np.abs(np.diff(starts) - WINDOW_SECONDS) < _TOLERANCE)
    jumping = {index for index in np.unique(recording).tolist() if discontinuities[index]}
    for index in jumping:
        here = np.flatnonzero(recording == index)
        if len(here) < 2:
            continue
        jumps = np.sort(np.asarray(discontinuities[index], np.float64))
        # A jump at the first window's own start does no harm, nor one at the second window's end.
        before = np.searchsorted(jumps, starts[here[:-1]] + _TOLERANCE, side="right")
        until = np.searchsorted(jumps, starts[here[1:]] + WINDOW_SECONDS - _TOLERANCE, side="left")
        together[here[:-1]] &= before == until
    return together


def order_pairs(runs: Runs, batch_size: int, seed: int, pass_number: int) -> Int64[np.ndarray, "ordered"]:
    """Window ids of one pass; 2i and 2i + 1 are a pair, each window stands in one pair at most.

    Every run is cut into pairs from its first or its second window on, at random, so that each window meets both
    its neighbours over the passes. The pairs are dealt to the batches like cards, recording after recording: no
    batch holds more pairs of a recording than `limit_pairs` says, which is the fewest possible.

    Args:
        runs: of the windows of the pass.
        batch_size: windows of the global batch, even.
        seed, pass_number: the same two always give the same order.

    Returns:
        `(steps x batch_size,)`, the same length in every pass: pairs beyond the last whole batch are left out,
        others in other passes.
    """
    generator = np.random.default_rng([seed, pass_number])
    steps, each = count_pair_steps(runs, batch_size)
    limit = limit_pairs(runs, batch_size)
    # --- Cut: a run of two has one pair only, longer ones start at their first or second window -----------------
    first = np.flatnonzero(runs.position == 0)
    late = np.repeat(generator.integers(0, 2, len(first)), runs.length[first]) * (runs.length > 2)
    pairs = np.flatnonzero(
        ((runs.position - late) % 2 == 0) & (runs.position >= late) & (runs.position + 1 < runs.length)
    )
    # --- Choose: at most steps x limit of a recording, steps x each in all --------------------------------------
    pairs = generator.permutation(pairs)
    pairs = pairs[_rank_in_group(runs.recording[pairs]) < steps * limit][: steps * each]
    # --- Deal: recording after recording, one pair to each batch in turn ----------------------------------------
    turn = generator.permutation(int(runs.recording.max()) + 1)
    pairs = pairs[np.argsort(turn[runs.recording[pairs]], kind="stable")]
    batch = generator.permutation(steps)[np.arange(len(pairs)) % steps]
    pairs = pairs[np.lexsort([generator.random(len(pairs)), batch])]
    return np.stack([runs.window_ids[pairs], runs.window_ids[pairs + 1]], 1).reshape(-1)


def count_pairs(runs: Runs) -> Int64[np.ndarray, "recordings"]:
    """Pairs that every pass can make, per recording: about half the windows, however a run is cut."""
    first = runs.position == 0
    length = runs.length[first]
    counts = np.where(length == 2, 1, (length - 1) // 2)
    return np.bincount(runs.recording[first], weights=counts).astype(np.int64)


def count_pair_steps(runs: Runs, batch_size: int) -> tuple[int, int]:
    """Steps of a pass and pairs of each: whole batches, or one smaller batch if there are fewer pairs."""
    total, wanted = int(count_pairs(runs).sum()), batch_size // 2
    return (total // wanted, wanted) if total >= wanted else (1, total)


def limit_pairs(runs: Runs, batch_size: int) -> int:
    """The most pairs of one recording that a batch holds: the smallest number with which all batches can be filled.

    Adjacent windows of the same night are near-positives, so 1 is wanted; it is reached if there are at least as
    many recordings of similar length as pairs in a batch.
    """
    counts = count_pairs(runs)
    steps, each = count_pair_steps(runs, batch_size)
    limit = 1
    while np.minimum(counts, steps * limit).sum() < steps * each:
        limit += 1
    return limit


def _rank_in_group(group: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """How many earlier entries are of the same group."""
    grouped = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    rank = np.empty(len(group), np.int64)
    rank[grouped] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank

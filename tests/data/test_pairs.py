"""Pairs of adjacent windows: what is adjacent, how pairs are mixed, and how workers share them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.pairs import (
    Runs,
    count_pair_steps,
    count_pairs,
    find_adjacent,
    find_runs,
    limit_pairs,
    order_pairs,
)
from physioray.storage import StorageError, open_location
from tests.written_cohorts import write_cohort


def make_runs(lengths: list[list[int]]) -> Runs:
    """Runs of the given lengths, a list per recording."""
    flat = [(index, length) for index, recording in enumerate(lengths) for length in recording]
    sizes = np.array([length for _, length in flat])
    position = np.concatenate([np.arange(length) for length in sizes])
    recording = np.repeat([index for index, _ in flat], sizes)
    return Runs(
        window_ids=np.arange(len(position)), recording=recording, position=position, length=np.repeat(sizes, sizes)
    )


LENGTHS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, batch=st.sampled_from([2, 4, 8, 32]), seed=st.integers(0, 5), number=st.integers(0, 5))
def test_every_row_and_the_next_are_adjacent_windows_of_one_run(
    lengths: list[list[int]], batch: int, seed: int, number: int
) -> None:
    runs = make_runs(lengths)
    assume(count_pairs(runs).sum() > 0)
    order = order_pairs(runs, batch, seed, number)
    steps, each = count_pair_steps(runs, batch)
    assert len(order) == 2 * steps * each == len(np.unique(order)) > 0
    first, second = order[::2], order[1::2]
    assert np.array_equal(second, first + 1) and (runs.position[second] == runs.position[first] + 1).all()
    assert np.array_equal(order, order_pairs(runs, batch, seed, number))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, batch=st.sampled_from([2, 4, 8, 32]), seed=st.integers(0, 5))
def test_a_batch_holds_as_few_pairs_of_a_recording_as_the_cohort_allows(
    lengths: list[list[int]], batch: int, seed: int
) -> None:
    runs = make_runs(lengths)
    counts = count_pairs(runs)
    assume(counts.sum() > 0)
    steps, each = count_pair_steps(runs, batch)
    limit = limit_pairs(runs, batch)
    order = order_pairs(runs, batch, seed, 0)
    found = [
        np.bincount(runs.recording[order[2 * step * each : 2 * (step + 1) * each : 2]]).max() for step in range(steps)
    ]
    assert max(found) <= limit
    # With a limit one lower the recordings have too few pairs to fill all batches.
    assert limit == 1 or sum(min(count, steps * (limit - 1)) for count in counts.tolist()) < steps * each


def test_one_pair_of_a_recording_is_enough_where_there_are_recordings_enough() -> None:
    assert limit_pairs(make_runs([[41]] * 16), 32) == 1
    assert limit_pairs(make_runs([[41]] * 15), 32) == 2
    assert limit_pairs(make_runs([[41]]), 32) == 16


def test_over_the_passes_every_window_meets_both_neighbours() -> None:
    runs = make_runs([[7], [6], [2], [1]])
    met = {int(first) for number in range(40) for first in order_pairs(runs, 4, 0, number)[::2]}
    assert met == {0, 1, 2, 3, 4, 5} | {7, 8, 9, 10, 11} | {13}


def test_passes_and_seeds_differ() -> None:
    runs = make_runs([[40]] * 10)
    assert not np.array_equal(order_pairs(runs, 8, 0, 0), order_pairs(runs, 8, 0, 1))
    assert not np.array_equal(order_pairs(runs, 8, 0, 0), order_pairs(runs, 8, 1, 0))


@settings(max_examples=200, deadline=None)
@given(
    kept=st.sets(st.integers(0, 20), min_size=2, max_size=15),
    jumps=st.lists(st.integers(0, 84).map(lambda quarter: 7.5 * quarter), max_size=5),
)
def test_windows_are_adjacent_if_the_next_begins_where_one_ends_and_nothing_jumps(
    kept: set[int], jumps: list[float]
) -> None:
    starts = np.array(sorted(kept)) * 30.0
    found = find_adjacent(starts, np.zeros(len(starts), np.int64), [tuple(jumps)])
    for place in range(len(starts) - 1):
        begin, middle, end = starts[place], starts[place] + 30, starts[place] + 60
        # A jump at the very beginning of the pair is before both, one at the boundary lies between them.
        expected = starts[place + 1] == middle and not any(begin < jump < end for jump in jumps)
        assert found[place] == expected


def test_windows_of_two_recordings_are_never_adjacent() -> None:
    starts = np.array([0.0, 30.0, 60.0, 90.0])
    assert find_adjacent(starts, np.array([0, 0, 1, 1]), [(), ()]).tolist() == [True, False, True]
    assert find_adjacent(starts, np.array([0, 0, 1, 1]), [(), (90.0,)]).tolist() == [True, False, False]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, [40, 33, 3, 60, 21, 2, 1])
    place = open_location(str(folder / "manifest.json"))
    manifest: dict[str, Any] = place.read_json()
    manifest["recordings"][0]["discontinuities"] = [300.0]
    manifest["recordings"][3]["discontinuities"] = [60.0, 900.0]
    place.write_json(manifest)
    return Cohort.open(str(folder))


def test_pairs_of_a_cohort_do_not_span_jumps_or_windows_that_were_left_out(cohort: Cohort) -> None:
    ids = np.setdiff1d(cohort.find_windows(), [5, 45])
    runs = find_runs(cohort, ids)
    firsts = {item.name: item.first for item in cohort.recordings}
    lengths = [int(length) for length, position in zip(runs.length, runs.position, strict=True) if position == 0]
    assert lengths == [5, 4, 30, 5, 27, 3, 2, 28, 30, 21, 2, 1] and firsts["rec003"] == 76
    for number in range(5):
        pairs = order_pairs(runs, 16, 0, number).reshape(-1, 2)
        crossed = {(4, 5), (5, 6), (9, 10), (77, 78), (105, 106)}
        assert not crossed & {(int(one), int(other)) for one, other in pairs}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_the_pairs_of_the_global_batch_and_never_split_one(cohort: Cohort, workers: int) -> None:
    ids = cohort.find_windows()
    arguments: dict[str, Any] = {"batch_size": 16, "seed": 2, "modalities": ["ecg"], "pairs": True}
    alone = GatherSource(cohort, ids, **arguments)
    sources = [GatherSource(cohort, ids, rank=rank, world_size=workers, **arguments) for rank in range(workers)]
    assert {source.count_steps() for source in sources} == {alone.count_steps()}
    assert {source.pairs_per_recording for source in sources} == {alone.pairs_per_recording}
    for whole, *shares in zip(alone.iterate_pass(1, 2), *(s.iterate_pass(1, 2) for s in sources), strict=True):
        assert len(whole) == 16
        for batch in (whole, *shares):
            assert np.array_equal(batch.window_id[1::2], batch.window_id[::2] + 1)
            assert np.array_equal(batch.recording[1::2], batch.recording[::2])
            assert np.array_equal(batch.subject[1::2], batch.subject[::2])
        together = np.concatenate([batch.window_id for batch in shares])
        assert np.array_equal(np.sort(together), np.sort(whole.window_id))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
def test_no_worker_ever_stands_before_an_empty_batch(cohort: Cohort, workers: int, pairs: bool) -> None:
    # 160 windows in batches of 53 leave one over: two workers could not share it, and would wait for each other.
    batch_size = 16 if pairs else 53
    shares = []
    for rank in range(workers):
        source = GatherSource(
            cohort, cohort.find_windows(), batch_size=batch_size, rank=rank, world_size=workers, pairs=pairs
        )
        shares.append([batch.window_id for batch in source.iterate_all()])
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) for share in shares for batch in share)
    if not pairs:
        everything = np.concatenate([batch for share in shares for batch in share])
        assert np.array_equal(np.sort(everything), cohort.find_windows())


def test_fewer_pairs_than_a_batch_make_one_smaller_batch(cohort: Cohort) -> None:
    source = GatherSource(cohort, np.arange(40, 47), batch_size=64, pairs=True)
    assert [len(batch) for number in range(4) for batch in source.iterate_pass(number)] == [6] * 4


def test_what_cannot_be_paired_or_shared_is_refused(cohort: Cohort) -> None:
    with pytest.raises(StorageError, match="there are no two"):
        GatherSource(cohort, np.arange(0, 40, 2), batch_size=8, pairs=True)
    with pytest.raises(ValueError, match="must be even for batches of pairs, but got 9"):
        GatherSource(cohort, cohort.find_windows(), batch_size=9, pairs=True)
    with pytest.raises(ValueError, match="each of the 4 workers, but it has 3"):
        GatherSource(cohort, np.arange(40, 47), batch_size=64, pairs=True, world_size=4)


def test_a_window_that_starts_elsewhere_than_its_number_says_is_taken_at_its_word(tmp_path: Path) -> None:
    # The shard's start column decides, not the row: here the second half of the night begins 10 s late.
    cohort = write_cohort(tmp_path, [8])
    table = cohort.open_shard(cohort.recordings[0]).read_all()
    starts = np.arange(8) * 30.0 + np.where(np.arange(8) >= 4, 10.0, 0.0)
    table = table.set_column(table.schema.get_field_index("start"), "start", pa.array(starts))
    # Written beside and renamed: the old file is still mapped.
    shard, beside = tmp_path / "shards" / "rec000.arrow", tmp_path / "beside.arrow"
    with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    beside.replace(shard)
    assert find_runs(Cohort.open(str(tmp_path)), np.arange(8)).length.tolist() == [4] * 8


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("pairs", [True, False])
def test_streamed_batches_are_the_gathered_ones_with_pairs_and_with_a_last_batch_that_is_larger(
    cohort: Cohort, pairs: bool
) -> None:
    from physioray.data.stream import StreamSource
    from physioray.distribute import join_cluster

    batch_size = 16 if pairs else 53
    with join_cluster(cpus=3):
        for rank in range(2):
            arguments: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world_size": 2, "pairs": pairs}
            gathered = GatherSource(cohort, cohort.find_windows(), modalities=["eeg"], **arguments)
            streamed = StreamSource(cohort, cohort.find_windows(), modalities=["eeg"], **arguments)
            assert streamed.count_steps() == gathered.count_steps()
            assert streamed.pairs_per_recording == gathered.pairs_per_recording
            passes = zip(gathered.iterate_pass(1, 1), streamed.iterate_pass(1, 1), strict=True)
            everything = zip(gathered.iterate_all(), streamed.iterate_all(), strict=True)
            for one, other in (*passes, *everything):
                assert np.array_equal(one.window_id, other.window_id)
                assert np.array_equal(one.signals["eeg"], other.signals["eeg"])

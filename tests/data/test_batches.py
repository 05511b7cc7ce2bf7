"""The order of windows, and batches by gather."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physioray.data.batches import Batch, count_steps, order_windows, spread_recordings, take_share
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource, WindowReader
from physioray.signals import TASKS, find_modality
from physioray.storage import StorageError
from tests.written_cohorts import STEP, write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), [40, 70, 3, 129, 64], absent={"emg": 0.3})


def test_the_order_holds_every_window_once_and_depends_only_on_seed_and_pass(cohort: Cohort) -> None:
    ids = cohort.find_windows()
    first = order_windows(cohort, ids, 3, 7)
    assert np.array_equal(np.sort(first), ids)
    assert np.array_equal(first, order_windows(cohort, ids[::-1].copy(), 3, 7))
    assert not np.array_equal(first, order_windows(cohort, ids, 3, 8))
    assert not np.array_equal(first, order_windows(cohort, ids, 4, 7))


@settings(max_examples=40, deadline=None)
@given(
    recordings=st.integers(1, 120),
    rows=st.integers(30, 200),
    batch=st.sampled_from([16, 64, 256]),
    seed=st.integers(0, 9),
)
def test_every_batch_mixes_recordings(recordings: int, rows: int, batch: int, seed: int) -> None:
    # Recordings of equal length: every whole batch must hold windows of min(64, batch / 4, all) of them.
    owner = np.repeat(np.arange(recordings), rows)
    ordered = owner[spread_recordings(owner, seed, 0)]
    for step in range(count_steps(len(ordered), batch)):
        found = np.unique(ordered[step * batch : (step + 1) * batch])
        wanted = min(64, batch // 4, recordings)
        assert len(found) >= min(wanted, len(ordered[step * batch : (step + 1) * batch]))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(cohort: Cohort, workers: int) -> None:
    ids = cohort.find_windows()
    ordered = order_windows(cohort, ids, 0, 0)
    for step in range(count_steps(len(ids), 32)):
        shares = [take_share(ordered, 32, step, rank, workers) for rank in range(workers)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(ordered[step * 32 : (step + 1) * 32]))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gathered_rows_are_those_of_the_shards(cohort: Cohort) -> None:
    source = GatherSource(cohort, cohort.find_windows(), batch_size=32, seed=1)
    batch = next(source.iterate_pass(0))
    recording, row = cohort.locate(batch.window_id)
    for place in range(0, 32, 5):
        shard = cohort.open_shard(cohort.recordings[recording[place]]).read_all()
        for name in cohort.modalities:
            stored = shard.column(name).chunk(row[place] // 64)[int(row[place]) % 64].as_py()
            assert np.array_equal(batch.signals[name][place], stored)
        for task in TASKS:
            assert batch.labels[task][place] == shard.column(f"label_{task}")[int(row[place])].as_py()
    assert np.array_equal(batch.recording, recording)


def test_a_window_that_is_not_there_is_refused_before_memory_is_read(cohort: Cohort, tmp_path: Path) -> None:
    reader = WindowReader(cohort)
    for number in (-1, cohort.windows):
        with pytest.raises(IndexError, match=f"0 to {cohort.windows - 1}, but {number} "):
            reader.read(np.array([0, number]))
    # A shard that is shorter than the manifest says: one of a smaller cohort in its place.
    damaged = write_cohort(tmp_path / "damaged", [12, 12])
    shorter = write_cohort(tmp_path / "shorter", [5, 12])
    file = damaged.recordings[0].file
    Path(damaged.location.path, file).write_bytes(Path(shorter.location.path, file).read_bytes())
    with pytest.raises(StorageError, match="must hold 12 windows, as the manifest says, but holds 5"):
        WindowReader(damaged).read(np.array([11]))


def test_a_pass_taken_up_at_a_step_gives_the_rest_of_its_batches(cohort: Cohort) -> None:
    source = GatherSource(cohort, cohort.find_windows(), batch_size=32, seed=1)
    whole = [batch.window_id for batch in source.iterate_pass(2)]
    rest = [batch.window_id for batch in source.iterate_pass(2, first_step=4)]
    assert len(whole) == source.count_steps() == 9
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_iterating_over_all_gives_every_window_once_in_order(cohort: Cohort) -> None:
    source = GatherSource(cohort, cohort.find_windows(), batch_size=50)
    together = np.concatenate([batch.window_id for batch in source.iterate_all()])
    assert np.array_equal(together, cohort.find_windows())


def test_only_the_modalities_asked_for_are_read(cohort: Cohort) -> None:
    batch = WindowReader(cohort, ["ecg"]).read(np.arange(5))
    assert list(batch.signals) == list(batch.present) == ["ecg"]


def test_a_modality_that_the_cohort_lacks_is_an_error_that_lists_what_it_holds(cohort: Cohort) -> None:
    with pytest.raises(StorageError, match=r"eeg, eog, emg, ecg, but airflow"):
        WindowReader(cohort, ["airflow"])


def test_fewer_windows_than_a_batch_make_one_smaller_batch(cohort: Cohort) -> None:
    source = GatherSource(cohort, np.arange(5), batch_size=32)
    assert [len(batch) for batch in source.iterate_pass(0)] == [5]


def test_airflow_at_25_hz_has_its_own_length(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, [10], modalities=("eeg", "airflow"))
    batch = WindowReader(cohort).read(np.arange(3))
    assert batch.signals["airflow"].shape == (3, 750) and batch.signals["eeg"].shape == (3, 3000)
    assert find_modality("airflow").rate == 25 and cohort.modalities["airflow"].step == STEP


def test_a_folder_without_a_manifest_is_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="physioray ingest"):
        Cohort.open(str(tmp_path))


@pytest.mark.parametrize("torch_loaded", [False, True])
def test_a_batch_that_is_still_held_is_never_written_over(
    cohort: Cohort, torch_loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    if not torch_loaded:
        monkeypatch.delitem(sys.modules, "torch")
    ids = np.random.default_rng(0).permutation(cohort.windows)
    reader, places = WindowReader(cohort), [ids[i : i + 8] for i in range(0, len(ids) - 7, 8)]
    held, addresses = [], set()
    for number, place in enumerate(places * 4):
        signal = reader.read(place).signals["eeg"]
        addresses.add(signal.ctypes.data)
        if number % 3 == 0:  # a part alone keeps its batch in place
            held.append((number, signal[3, 100:200]))
    assert len(addresses) < len(places * 4), "memory that nobody holds is used again"
    for number, part in held:
        again = WindowReader(cohort).read(places[number % len(places)])
        assert np.array_equal(part, again.signals["eeg"][3, 100:200])


def test_batches_are_cut_and_joined_without_changing_a_window(cohort: Cohort) -> None:
    whole = WindowReader(cohort).read(np.arange(10))
    again = Batch.join([whole[:3], whole[3:4], whole[4:]])
    assert np.shares_memory(whole[2:5].signals["eeg"], whole.signals["eeg"])
    for name in ("signals", "present", "labels"):
        for key, array in getattr(whole, name).items():
            assert np.array_equal(getattr(again, name)[key], array)
    assert again.window_id.tolist() == list(range(10)) and np.array_equal(again.subject, whole.subject)

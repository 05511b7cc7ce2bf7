"""Ingest on a real local Ray cluster: whole, resumable, never mixed, and one bad recording harms no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from physioray.config import IngestConfig, SplitConfig
from physioray.data.cohort import Cohort
from physioray.data.ledger import IngestError
from physioray.data.shards import Progress, ingest_cohort
from physioray.data.splits import read_division
from physioray.local_cluster import start_local_cluster
from physioray.signals import BATCH_ROWS, shard_schema
from physioray.storage import StorageError, hash_bytes

from .recordings_written import list_in_records, write_recording, write_source

pytestmark = pytest.mark.ray

REAL_DATA = os.environ.get("PHYSIORAY_REAL_DATA")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_local_cluster(2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory) -> Path:
    """A cohort of the source, made without disturbance; tests that change one copy it."""
    cohort = tmp_path_factory.mktemp("finished") / "cohort"
    ingest_cohort(str(source), str(cohort))
    return cohort


def _read_all(cohort: Path) -> dict[str, bytes]:
    """Every file of a cohort, by its place in it."""
    return {str(path.relative_to(cohort)): path.read_bytes() for path in sorted(cohort.rglob("*")) if path.is_file()}


def _copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cohort"))


def test_a_cohort_opens_and_holds_every_window_of_every_recording(finished: Path) -> None:
    cohort = Cohort.open(finished)
    assert [item.name for item in cohort.recordings] == [f"te00-000{i}" for i in (6, 7)] + [
        f"tr00-000{i}" for i in range(6)
    ]
    assert cohort.windows == 64 and not cohort.simulated
    assert {item.split for item in cohort.recordings if item.name.startswith("te")} == {"pretrain"}
    # The first window stands before the first stage note; the others go through the five stages.
    assert cohort.manifest["class_counts"]["sleep"] == [12, 12, 6, 6, 6]
    assert cohort.manifest["priors"]["sleep"][0] == pytest.approx(12 / 42, abs=1e-6)
    assert cohort.has_task("sleep") and cohort.has_task("age")


def test_a_shard_has_the_agreed_columns_in_uncompressed_batches_of_64_rows(tmp_path: Path) -> None:
    write_recording(tmp_path / "source", "tr00-0000", windows=70)
    ingest_cohort(str(tmp_path / "source"), str(tmp_path / "cohort"))
    cohort = Cohort.open(tmp_path / "cohort")
    reader = cohort.open_shard(cohort.recordings[0])
    assert reader.schema.equals(shard_schema(IngestConfig().modalities))
    assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [BATCH_ROWS, 6]
    # Uncompressed columns come out of the memory map without a copy.
    mapped = pa.memory_map(str(tmp_path / "cohort/shards/tr00-0000.arrow"))
    before = pa.total_allocated_bytes()
    column = pa.ipc.open_file(mapped).get_batch(0).column("eeg")
    assert column.to_numpy_ndarray().std() > 0
    assert pa.total_allocated_bytes() - before < 10_000


def test_the_manifest_names_every_shard_with_its_hash_and_sums_up(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    for row in manifest["recordings"]:
        content = (finished / row["file"]).read_bytes()
        assert (len(content), hash_bytes(content)) == (row["bytes"], row["sha256"])
    counts = manifest["counts"]
    assert counts == {"hours": pytest.approx(64 / 120, abs=1e-4), "recordings": 8, "rejected": 0} | {
        "subjects": 8,
        "windows": 64,
    }
    assert manifest["modalities"]["eeg"] == {
        "rate": 100,
        "samples": 3000,
        "step": pytest.approx(8 / 32767),
        "token_seconds": 1,
        "unit": "uV",
    }
    assert manifest["channels"]["eeg"] == {"F3-M2": 8}
    assert manifest["present_share"]["ecg"] == 1.0
    assert manifest["amplitude_checks"]["eeg"]["implausible"] == []
    assert 1 < manifest["amplitude_checks"]["eeg"]["median"] < 200
    by_split = [manifest["class_counts_by_split"][name]["sleep"] for name in manifest["class_counts_by_split"]]
    assert np.sum(by_split, axis=0).tolist() == manifest["class_counts"]["sleep"]
    assert "IngestConfig.clip" in manifest["assumptions"]


def test_splits_and_tables_are_readable_files(finished: Path) -> None:
    division = read_division(Cohort.open(finished).location)
    assert {name: len(members) for name, members in division.splits.items()} == {
        "pretrain": 2,
        "train": 3,
        "validation": 1,
        "test": 2,
    }
    subjects = pq.read_table(finished / "subjects.parquet").to_pylist()
    assert subjects[0] == {"subject": "te00-0006", "age": 70.0, "sex": "M", "site": None} | {
        "split": "pretrain",
        "labelled": False,
        "recordings": 1,
    }
    ledger = pq.read_table(finished / "ledger.parquet").to_pylist()
    assert len(ledger) == 8 and all(row["accepted"] for row in ledger)
    assert json.loads(ledger[0]["facts"])["channels"]["eeg"]["scale"] > 0


def test_a_finished_cohort_is_left_alone_in_two_seconds_and_without_a_cluster(finished: Path, source: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    # In a process of its own, where connecting to this address would fail.
    code = f"""
import ray, time
from physioray.data.shards import ingest_cohort
began = time.monotonic()
summary = ingest_cohort({str(source)!r}, {str(finished)!r}, address="127.0.0.1:1")
assert summary.converted == 0 and not ray.is_initialized()
print(time.monotonic() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_lost_row_a_cut_shard_and_a_lost_manifest_are_made_again_byte_for_byte(
    finished: Path, source: Path, tmp_path: Path
) -> None:
    cohort = _copy(finished, tmp_path)
    (cohort / "ledger/tr00-0001.json").unlink()
    cut = cohort / "shards/tr00-0002.arrow"
    cut.write_bytes(cut.read_bytes()[:-100])
    (cohort / "ledger/tr00-0003.json").write_text('{"half')
    (cohort / "shards/tr00-0004.arrow.12345678.part").write_bytes(b"left by a killed task")
    (cohort / "manifest.json").unlink()
    assert ingest_cohort(str(source), str(cohort)).converted == 3
    assert _read_all(cohort) == _read_all(finished)


def test_other_settings_or_another_source_are_never_mixed_in(finished: Path, source: Path, tmp_path: Path) -> None:
    before = _read_all(finished)
    with pytest.raises(IngestError, match=r"settings\.clip was 8\.0 and is now 4\.0"):
        ingest_cohort(str(source), str(finished), replace(IngestConfig(), clip=4.0))
    with pytest.raises(IngestError, match=r"splits\.seed"):
        ingest_cohort(str(source), str(finished), replace(IngestConfig(), splits=SplitConfig(seed=1)))
    other = write_source(tmp_path / "other", labelled=1, unlabelled=0)
    with pytest.raises(IngestError, match="source was"):
        ingest_cohort(str(other), str(finished))
    assert _read_all(finished) == before


def test_a_folder_of_other_things_is_not_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(IngestError, match=r"thesis\.txt"):
        ingest_cohort(str(source), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_or_empty_source_is_named_and_no_cohort_begun(tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path / "empty"):
        if place.name == "empty":
            place.mkdir()
        with pytest.raises(StorageError, match=place.name):
            ingest_cohort(str(place), str(tmp_path / "cohort"))
    assert not (tmp_path / "cohort").exists()


def test_a_bad_recording_is_a_row_and_the_others_are_as_without_it(finished: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    signal_file = source / "training/tr00-0001/tr00-0001.mat"
    content = signal_file.read_bytes()
    signal_file.write_bytes(content[:5000])
    (source / "training/tr00-0002/tr00-0002.mat").unlink()
    cohort = tmp_path / "cohort"
    summary = ingest_cohort(str(source), str(cohort))
    assert set(summary.rejected) == {"training/tr00-0001/tr00-0001", "training/tr00-0002/tr00-0002"}
    assert "Rejected training/tr00-0001/tr00-0001" in summary.describe()
    assert not any("\n" in reason or "Traceback" in reason for reason in summary.rejected.values())
    for path in cohort.glob("shards/*.arrow"):
        assert path.read_bytes() == (finished / "shards" / path.name).read_bytes()
    assert len(Cohort.open(cohort).recordings) == 6

    known = ingest_cohort(str(source), str(cohort))
    assert known.converted == 0 and known.rejected == summary.rejected
    with pytest.raises(IngestError, match="2 of 8"):
        ingest_cohort(str(source), str(cohort), strict=True)

    signal_file.write_bytes(content)
    mended = ingest_cohort(str(source), str(cohort))
    assert mended.converted == 1 and len(mended.rejected) == 1
    assert len(Cohort.open(cohort).recordings) == 7


def test_if_every_recording_is_rejected_there_is_no_cohort(tmp_path: Path) -> None:
    place = write_recording(tmp_path / "source", "tr00-0000")
    (place / "tr00-0000.mat").unlink()
    with pytest.raises(IngestError, match="all 1 were rejected: training/tr00-0000/tr00-0000"):
        ingest_cohort(str(tmp_path / "source"), str(tmp_path / "cohort"))
    with pytest.raises(StorageError, match="physioray ingest"):
        Cohort.open(tmp_path / "cohort")


def test_an_unforeseen_error_is_the_row_of_that_recording_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", labelled=2, unlabelled=0)
    cohort = tmp_path / "cohort"
    # The shard's place is taken by a folder: writing it fails in a way nobody has foreseen.
    (cohort / "shards/tr00-0001.arrow").mkdir(parents=True)
    (cohort / "settings.json").write_text(_settings_of(source, tmp_path))
    summary = ingest_cohort(str(source), str(cohort))
    assert list(summary.rejected) == ["training/tr00-0001/tr00-0001"]
    assert "internal error" in summary.rejected["training/tr00-0001/tr00-0001"]
    assert [item.name for item in Cohort.open(cohort).recordings] == ["tr00-0000"]
    (cohort / "shards/tr00-0001.arrow").rmdir()
    assert not ingest_cohort(str(source), str(cohort)).rejected


def _settings_of(source: Path, tmp_path: Path) -> str:
    ingest_cohort(str(source), str(tmp_path / "first"))
    return (tmp_path / "first/settings.json").read_text()


def test_the_same_recording_twice_is_taken_once_and_the_row_names_the_first(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_recording(source, "night1", seed=1, folder="a")
    write_recording(source, "night1", seed=2, folder="b")
    write_recording(source, "night2", seed=3, folder="a")
    write_recording(source, "other", seed=3, folder="c")
    list_in_records(source)
    summary = ingest_cohort(str(source), str(tmp_path / "cohort"))
    assert set(summary.rejected) == {"b/night1/night1", "c/other/other"}
    assert "a/night1/night1" in summary.rejected["b/night1/night1"]
    assert "a/night2/night2" in summary.rejected["c/other/other"]
    assert sorted(path.name for path in (tmp_path / "cohort/shards").iterdir()) == ["night1.arrow", "night2.arrow"]
    again = ingest_cohort(str(source), str(tmp_path / "cohort"))
    assert again.converted == 0 and again.rejected == summary.rejected


def test_several_nights_of_a_subject_share_one_split(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", labelled=8, unlabelled=0, windows=4)
    lines = [f"tr00-{number:04d},person{number // 2}" for number in range(8)]
    (source / "record-subject.csv").write_text("record,subject\n" + "\n".join(lines) + "\n")
    ingest_cohort(str(source), str(tmp_path / "cohort"))
    cohort = Cohort.open(tmp_path / "cohort")
    assert cohort.subjects == ("person0", "person1", "person2", "person3")
    splits = {(item.subject, item.split) for item in cohort.recordings}
    assert len(splits) == 4


def test_what_changes_in_the_source_later_is_taken_up_for_those_recordings_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", labelled=4, unlabelled=0, windows=4)
    ages = (source / "age-sex.csv").read_text()
    (source / "age-sex.csv").unlink()
    assert ingest_cohort(str(source), str(tmp_path / "cohort")).converted == 4
    assert set(Cohort.open(tmp_path / "cohort").read_labels("age")) == {-1}
    (source / "age-sex.csv").write_text("\n".join(ages.splitlines()[:3]) + "\n")  # ages of the first two
    (source / "training" / "tr00-0003" / "tr00-0003.arousal").unlink()
    assert ingest_cohort(str(source), str(tmp_path / "cohort")).converted == 3
    cohort = Cohort.open(tmp_path / "cohort")
    assert (cohort.read_labels("age") >= 0).tolist() == [True] * 8 + [False] * 8
    assert cohort.recordings[3].split == "pretrain"
    assert ingest_cohort(str(source), str(tmp_path / "cohort")).converted == 0


def test_progress_counts_recordings_and_hours_up_to_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    ingest_cohort(str(source), str(tmp_path / "cohort"), progress=seen.append)
    assert [state.done for state in seen] == list(range(9))
    assert seen[-1].hours == pytest.approx(64 / 120, abs=1e-3)
    assert seen[0].seconds_left is None and seen[4].seconds_left > 0 and seen[-1].seconds_left == 0
    assert all(state.total == 8 and state.rejected == 0 for state in seen)


def test_a_full_disk_ends_ingest_with_one_line_and_a_rerun_continues(
    finished: Path, source: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(IngestError, match="became full") as caught:
            ingest_cohort(str(source), str(disk / "cohort"))
        assert "\n" not in str(caught.value)
        assert not list(disk.rglob("*.part"))
        kept = {path.stem for path in disk.glob("cohort/ledger/*.json")}
        assert 0 < len(kept) < 8
        for name in kept:
            whole = (finished / f"shards/{name}.arrow").read_bytes()
            assert (disk / f"cohort/shards/{name}.arrow").read_bytes() == whole
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert ingest_cohort(str(source), str(disk / "cohort")).converted == 8 - len(kept)
        assert _read_all(disk / "cohort") == _read_all(finished)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.real
@pytest.mark.skipif(not REAL_DATA, reason="PHYSIORAY_REAL_DATA names no folder")
def test_the_real_excerpts_are_21_recordings_of_2016_windows(tmp_path: Path) -> None:
    source = Path(REAL_DATA or "") / "cinc2018_excerpts"
    summary = ingest_cohort(str(source), str(tmp_path / "cohort"), strict=True)
    cohort = Cohort.open(tmp_path / "cohort")
    assert len(cohort.recordings) == 21 and cohort.windows == 2016 and not cohort.simulated
    segments = (source / "SEGMENTS.csv").read_text().splitlines()
    totals = np.sum([[int(value) for value in line.split(",")[2:7]] for line in segments[1:]], axis=0)
    assert summary.manifest["class_counts"]["sleep"] == (2 * totals).tolist()
    assert summary.manifest["channels"]["eeg"] == {"O2-M1": 21}
    assert not cohort.has_task("age") and not cohort.has_task("arousal")
    assert "cross-validation" in " ".join(summary.manifest["splits"]["notes"])

"""Hypnograms beside and inside recordings: found, named, brought to the 30 s grid."""

from __future__ import annotations

import datetime
import random
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from physioray.config import IngestConfig, Montage
from physioray.data.convert import convert_recording
from physioray.data.edf_notes import Note, Stretch
from physioray.data.montage import read_montage
from physioray.data.records import RejectedRecording, list_records, read_header
from physioray.data.stage_rows import StageRun, label_by_majority, name_runs
from physioray.signals import STAGES
from physioray.storage import Location, open_location

from .edf_files import START, make_trace, move_records, set_field, write_edf, write_hypnogram
from .record_files import make_signal, write_record

ROWS = [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage 2"), (60, 30, "Sleep stage 4"), (90, 30, "Movement time")]
EEG = [make_trace("EEG F3-M2")]


def convert_all(folder: Path, config: IngestConfig = IngestConfig()) -> dict[str, tuple[list[int], dict]]:  # noqa: B008
    """Sleep labels and facts of every recording."""
    source = open_location(folder)
    found = {}
    for entry in list_records(source):
        converted = convert_recording(source, entry, config, subject=None)
        found[entry.name] = (converted.table.column("label_sleep").to_pylist(), converted.facts)
    return found


def label_slowly(rows: list[tuple[float, float, int]], windows: int) -> list[int]:
    """The rule in its own words: each tenth of a second votes; most of the window must agree."""
    labels = []
    for window in range(windows):
        votes = [0] * 6
        for tenth in range(300):
            time = window * 30 + (tenth + 0.5) / 10
            stage = next((stage for onset, seconds, stage in rows if onset <= time < onset + seconds), -1)
            votes[stage] += 1
        best = max(votes)
        labels.append(votes.index(best) if votes.count(best) == 1 and votes.index(best) < 5 else -1)
    return labels


@pytest.mark.parametrize(
    ("recording", "hypnogram"),
    [
        ("n1.edf", "n1-Hypnogram.edf"),
        ("n1-PSG.edf", "n1-Hypnogram.edf"),
        ("N1_psg.EDF", "n1_hypnogram.edf"),
        ("SC4001E0-PSG.edf", "SC4001EC-Hypnogram.edf"),
    ],
)
def test_an_edf_hypnogram_beside_its_recording_is_part_of_it(tmp_path: Path, recording: str, hypnogram: str) -> None:
    write_edf(tmp_path / recording, EEG)
    write_hypnogram(tmp_path / hypnogram, ROWS)
    ((labels, facts),) = convert_all(tmp_path).values()
    assert labels == [0, 2, 3, -1] and facts["label_source"] == "edf hypnogram"
    assert facts["stage_names"] == {
        "Movement time": "undefined",
        "Sleep stage 2": "N2",
        "Sleep stage 4": "N3",
        "Sleep stage W": "W",
    }
    assert facts["class_counts"]["arousal"] == [0, 0] and facts["warnings"] == []


def test_names_that_differ_are_paired_by_patient_and_start_only_if_that_is_unique(tmp_path: Path) -> None:
    later = START + datetime.timedelta(days=1)
    write_edf(tmp_path / "one-a.edf", EEG, patient="p1")
    write_edf(tmp_path / "two-a.edf", EEG, patient="p1", start=later)
    write_hypnogram(tmp_path / "one-b-Hypnogram.edf", ROWS, patient="p1")
    write_hypnogram(tmp_path / "two-b-Hypnogram.edf", ROWS[:2], patient="p1", start=later)
    found = convert_all(tmp_path)
    assert found["one-a"][0] == [0, 2, 3, -1] and found["two-a"][0] == [0, 2, -1, -1]
    set_field(tmp_path / "two-a.edf", "date", START.strftime("%d.%m.%y"))
    names = [entry.name for entry in list_records(open_location(tmp_path)) if not entry.hypnogram]
    assert names == ["one-a", "one-b-Hypnogram", "two-a", "two-b-Hypnogram"]


def test_a_hypnogram_without_its_recording_is_listed_and_refused(tmp_path: Path) -> None:
    write_hypnogram(tmp_path / "x-Hypnogram.edf", ROWS)
    (entry,) = list_records(open_location(tmp_path))
    with pytest.raises(
        RejectedRecording, match=r"holds annotations only\. A hypnogram is used if its recording stands"
    ):
        read_header(open_location(tmp_path), entry)


def test_annotations_inside_a_recording_are_its_hypnogram(tmp_path: Path) -> None:
    events = [(3, 2, "Lights off"), (40, 12, "Obstructive apnea")]
    write_edf(tmp_path / "n1.edf", EEG, notes=[*ROWS, *events], record_seconds=10)
    write_edf(tmp_path / "n2.edf", EEG, notes=events)
    found = convert_all(tmp_path)
    labels, facts = found["n1"]
    assert labels == [0, 2, 3, -1] and facts["label_source"] == "edf annotations" and facts["warnings"] == []
    labels, facts = found["n2"]
    assert labels == [-1] * 4 and facts["label_source"] == "none"
    assert "'Lights off' (1), 'Obstructive apnea' (1)" in facts["warnings"][0]


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path) -> None:
    """A sub-tree is no local file system to the code that reads, so files are fetched as from a bucket."""
    write_edf(tmp_path / "night" / "n1.edf", EEG, notes=ROWS)
    write_edf(tmp_path / "night" / "n2.edf", EEG, record_seconds=10)
    write_hypnogram(tmp_path / "night" / "n2-Hypnogram.edf", ROWS)
    (tmp_path / "night" / "montage.toml").write_text('[channels]\neeg = "F3-M2"\n')
    remote = Location(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "night", "s3://bucket/night")
    assert not remote.is_local and read_montage(remote).choices == (("eeg", "F3-M2", ""),)
    assert [entry.hypnogram for entry in list_records(remote)] == ["", "n2-Hypnogram.edf"]
    for entry in list_records(remote):
        here = convert_recording(open_location(tmp_path / "night"), entry, IngestConfig(), subject=None)
        there = convert_recording(remote, entry, IngestConfig(), subject=None)
        assert there.table.equals(here.table) and there.facts == here.facts
        assert there.facts["class_counts"]["sleep"] == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t"), ("csv", ";")])
def test_a_table_of_onset_duration_and_stage_serves_edf_and_wfdb(tmp_path: Path, ending: str, between: str) -> None:
    rows = [
        ["Stage", "Onset", "Duration", "note"],
        ["W", "0", "30", ""],
        ["N2", "30", "30", "x"],
        ["R", "60", "60", ""],
    ]
    text = "\n".join(between.join(row) for row in rows) + "\n"
    write_edf(tmp_path / "n1.edf", EEG)
    write_record(tmp_path, "n2", make_signal())
    (tmp_path / f"n1-hypnogram.{ending}").write_text(text)
    (tmp_path / f"n2.{ending}").write_text(text)
    for labels, facts in convert_all(tmp_path).values():
        assert labels == [0, 2, 4, 4] and facts["label_source"] == "hypnogram table"


def test_another_table_of_that_name_is_left_alone_and_a_broken_hypnogram_is_a_reason(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", EEG)
    (tmp_path / "n1.csv").write_text("time,pressure\n0,3\n")
    assert convert_all(tmp_path)["n1"][1]["label_source"] == "none"
    (tmp_path / "n1-hypnogram.csv").write_text("time,pressure\n0,3\n")
    with pytest.raises(RejectedRecording, match="with the columns onset, duration, stage"):
        convert_all(tmp_path)
    (tmp_path / "n1-hypnogram.csv").write_text("onset,duration,stage\n0,30,W\nlater,30,W\n")
    with pytest.raises(RejectedRecording, match="line 3 has 'later'"):
        convert_all(tmp_path)


def test_st_annotations_hold_a_stage_and_events_for_thirty_seconds(tmp_path: Path) -> None:
    write_record(tmp_path, "slp", make_signal())
    # At sample 1, as in the database: notes at sample 0 are definitions to wfdb, which does not hand them out.
    notes = ["W", "2 HA", "4 X L", "MT"]
    wfdb.wrann("slp", "st", 1 + np.arange(4) * 6000, symbol=['"'] * 4, aux_note=notes, fs=200, write_dir=str(tmp_path))
    labels, facts = convert_all(tmp_path)["slp"]
    assert labels == [0, 2, 3, -1] and facts["label_source"] == "st"
    assert facts["stage_names"] == {"Movement time": "undefined", "S2": "N2", "S4": "N3", "W": "W"}


def test_names_of_stages_can_be_given_and_unknown_ones_are_undefined_and_told(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", EEG)
    (tmp_path / "n1.csv").write_text("onset,duration,stage\n0,30,SLEEP-S0\n30,30,SLEEP-S2\n60,30,4\n90,30,W\n")
    labels, facts = convert_all(tmp_path)["n1"]
    assert labels == [-1, -1, -1, 0] and "'SLEEP-S0' (1), 'SLEEP-S2' (1), '4' (1)" in facts["warnings"][0]
    montage = Montage(stages=(("sleep-s0", "W"), ("SLEEP-S2", "N2"), ("4", "REM"), ("W", "undefined")))
    labels, facts = convert_all(tmp_path, IngestConfig(montage=montage))["n1"]
    assert labels == [0, 2, 4, -1] and facts["stage_names"]["4"] == "REM" and facts["warnings"] == []


def test_twenty_second_epochs_come_to_the_grid_by_majority(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", EEG)
    stages = ["W", "W", "N1", "N2", "N2", "REM", "REM"]
    rows = "".join(f"{20 * i},20,{stage}\n" for i, stage in enumerate(stages))
    (tmp_path / "n1.csv").write_text("onset,duration,stage\n" + rows)
    labels, facts = convert_all(tmp_path)["n1"]
    assert labels == [0, 1, 2, 4]
    assert facts["warnings"] == [
        "the hypnogram reaches to 140 s and the recording to 120 s; what is beyond is not used"
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_majority_is_that_of_counting_tenths_of_a_second(seed: int) -> None:
    chance = random.Random(seed)
    runs, time = [], chance.randrange(-300, 600) / 10
    for _ in range(chance.randrange(1, 12)):
        seconds = chance.choice([10, 15, 20, 30, 60, chance.randrange(1, 900) / 10])
        runs.append((time, float(seconds), chance.randrange(-1, 5)))
        time = round(time + seconds + chance.choice([0, 0, 0, 15, 40]), 1)
    expected = label_slowly(runs, 8)
    got = label_by_majority(
        [StageRun(onset=a, seconds=b, stage=c) for a, b, c in runs], [Stretch(clock=0, signal=0, seconds=240)], 8
    )
    assert got.tolist() == expected


def test_a_tie_and_a_window_that_is_mostly_unscored_are_undefined() -> None:
    runs = [StageRun(onset=0, seconds=15, stage=0), StageRun(onset=15, seconds=15, stage=2)]
    runs += [StageRun(onset=30, seconds=14, stage=0), StageRun(onset=60, seconds=16, stage=0)]
    whole = [Stretch(clock=0, signal=0, seconds=90)]
    assert label_by_majority(runs, whole, 3).tolist() == [-1, -1, 0]


def test_a_period_lasts_to_the_next_and_never_into_it() -> None:
    notes = [Note(onset=0, duration=None, text="W"), Note(onset=50, duration=100, text="s3")]
    notes += [Note(onset=70, duration=None, text=" sleep  Stage r")]
    named = name_runs(notes, {})
    assert [(run.onset, run.seconds, STAGES[run.stage]) for run in named.runs] == [
        (0, 50, "W"),
        (50, 20, "N3"),
        (70, 30, "REM"),
    ]


def test_after_a_gap_stages_follow_the_clock_and_not_the_samples(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2", 180)], record_seconds=30)
    move_records(tmp_path / "n1.edf", ["0", "30", "60", "1090", "1120", "1150"])
    (tmp_path / "n1.csv").write_text("onset,duration,stage\n0,90,W\n90,1000,N1\n1090,30,N2\n1120,60,N3\n")
    labels, facts = convert_all(tmp_path)["n1"]
    assert labels == [0, 0, 0, 2, 3, 3] and facts["discontinuities"] == [90.0]


@pytest.mark.parametrize(("seconds", "expected"), [(30, [-1, 0, 2, 3]), (-30, [2, 3, -1, -1]), (90000, [0, 2, 3, -1])])
def test_a_hypnogram_that_began_at_another_time_is_shifted(tmp_path: Path, seconds: int, expected: list[int]) -> None:
    write_edf(tmp_path / "n1.edf", EEG)
    write_hypnogram(tmp_path / "n1-Hypnogram.edf", ROWS, start=START + datetime.timedelta(seconds=seconds))
    labels, facts = convert_all(tmp_path)["n1"]
    assert labels == expected and "the hypnogram" in facts["warnings"][0]


@settings(max_examples=60, deadline=10_000)
@given(
    changes=st.lists(st.tuples(st.integers(0, 739), st.binary(min_size=1, max_size=9)), max_size=8),
    cut=st.one_of(st.just(0), st.integers(1, 700)),
)
def test_whatever_stands_in_a_hypnogram_is_labels_or_a_reason(
    broken_night: tuple[Path, bytes], changes: list[tuple[int, bytes]], cut: int
) -> None:
    folder, content = broken_night
    broken = bytearray(content)
    for place, value in changes:
        broken[place : place + len(value)] = value
    (folder / "n1-Hypnogram.edf").write_bytes(bytes(broken[: len(broken) - cut]))
    try:
        labels, _ = convert_all(folder)["n1"]
        assert set(labels) <= {-1, 0, 1, 2, 3, 4}
    except RejectedRecording as error:
        assert "n1-Hypnogram.edf" in str(error)


@pytest.fixture(scope="module")
def broken_night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("broken")
    write_edf(folder / "n1.edf", [make_trace("F3-M2", 60, rate=100)])
    path = write_hypnogram(folder / "n1-Hypnogram.edf", ROWS[:2])
    return folder, path.read_bytes()

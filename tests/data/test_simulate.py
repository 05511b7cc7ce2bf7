from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import wfdb

from physioray.data import simulate
from physioray.data.challenge_layout import CHANNELS, RATE, STAGE_FIELDS, STAGE_NOTES
from physioray.data.night import EVENT_RATES, UNDEFINED, mark_arousals, simulate_night
from physioray.data.simulate import MARKER, list_records, simulate_cohort, simulate_record
from physioray.signals import STAGES

WINDOW = 6000
W, N1, N2, N3, REM = range(5)
ARGUMENTS = {"subjects": 5, "hours": 0.2, "seed": 3}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "cohort"
    simulate_cohort(str(out), **ARGUMENTS)
    return out


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_in(cohort: Path, half: str) -> list[str]:
    return sorted(path.name for path in (cohort / half).iterdir())


def test_the_folder_has_the_layout_of_the_challenge(cohort: Path) -> None:
    assert sorted(path.name for path in cohort.iterdir()) == sorted(
        ["training", "test", "age-sex.csv", "RECORDS", MARKER]
    )
    assert names_in(cohort, "training") == ["tr03-0001", "tr04-0002", "tr05-0003", "tr06-0004"]
    assert names_in(cohort, "test") == ["te03-0001"]
    assert sorted(path.name for path in (cohort / "training" / "tr03-0001").iterdir()) == [
        "tr03-0001-arousal.mat",
        "tr03-0001.arousal",
        "tr03-0001.hea",
        "tr03-0001.mat",
    ]
    assert sorted(path.name for path in (cohort / "test" / "te03-0001").iterdir()) == ["te03-0001.hea", "te03-0001.mat"]
    lines = (cohort / "RECORDS").read_text().splitlines()
    assert lines[0] == "training/tr03-0001/tr03-0001" and lines[-1] == "test/te03-0001/te03-0001" and len(lines) == 5
    with open(cohort / "age-sex.csv") as table:
        rows = list(csv.DictReader(table))
    assert list(rows[0]) == ["Record", "Sex", "Age"]
    assert {row["Record"] for row in rows} == {Path(line).name for line in lines}
    assert all(row["Sex"] in "FM" and 18 <= int(row["Age"]) <= 93 for row in rows)


def test_headers_and_signals_read_back_with_right_checksums_units_and_first_values(cohort: Path) -> None:
    for half in ("training", "test"):
        for name in names_in(cohort, half):
            path = str(cohort / half / name / name)
            header = wfdb.rdheader(path)
            record = wfdb.rdrecord(path, physical=False)
            assert record.fs == 200 and record.sig_name == list(CHANNELS)
            assert header.fmt == ["16"] * 13 and header.byte_offset == [24] * 13
            assert record.units == ["uV"] * 11 + ["%", "mV"]
            assert record.adc_gain == [1.0] * 11 + [655.35, 1000.0]
            assert record.baseline == [0] * 11 + [-32768, 0]
            # The published headers write checksums as signed 16-bit numbers; wfdb computes them unsigned.
            assert [number % 65536 for number in header.checksum] == record.calc_checksum()
            assert all(-32768 <= number < 32768 for number in header.checksum)
            assert header.init_value == list(record.d_signal[0])
            assert header.comments == ["simulated by physioray (seed 3)"]
            saturation = wfdb.rdrecord(path, channel_names=["SaO2"]).p_signal
            assert 50 <= saturation.min() <= saturation.max() <= 100
            raw = (cohort / half / name / f"{name}.mat").read_bytes()
            assert len(raw) == 24 + 26 * header.sig_len
            assert np.frombuffer(raw, "<i4", 5).tolist() == [30, 13, header.sig_len, 0, 4] and raw[20:24] == b"val\0"
            assert 0.2 * 3600 * 200 <= header.sig_len < 0.2 * 3600 * 200 + WINDOW


def test_the_two_label_files_of_a_record_agree_window_by_window(cohort: Path) -> None:
    for name in names_in(cohort, "training"):
        path = cohort / "training" / name / name
        notes = wfdb.rdann(str(path), "arousal")
        assert set(notes.symbol) == {'"'} and notes.fs == 200
        samples = wfdb.rdheader(str(path)).sig_len
        windows = samples // WINDOW
        by_notes = np.full(windows, UNDEFINED)
        changes = [(int(s), n) for s, n in zip(notes.sample, notes.aux_note, strict=True) if n in STAGE_NOTES]
        assert changes[0][0] >= WINDOW and all(sample % WINDOW == 0 for sample, _ in changes)
        assert all(before[1] != after[1] for before, after in itertools.pairwise(changes))
        for sample, note in changes:
            by_notes[sample // WINDOW :] = STAGE_NOTES.index(note)
        with h5py.File(f"{path}-arousal.mat") as labels:
            assert labels["data/arousals"].shape == (samples, 1) and labels["data/arousals"].dtype == np.float64
            stages = labels["data/sleep_stages"]
            assert set(stages) == {*STAGE_FIELDS, "undefined"}
            hot = np.stack([stages[field][0] for field in (*STAGE_FIELDS, "undefined")])
            assert hot.shape == (6, samples) and hot.dtype == np.uint8 and (hot.sum(axis=0) == 1).all()
            values = np.unique(labels["data/arousals"][:])
            lead = labels["data/arousals"][: WINDOW - 2 - 10 * RATE - 1, 0]
        numbers = np.argmax(hot, axis=0)
        # Boundaries stand one sample early: window = floor((sample + 1) / 6000).
        grid = numbers[: windows * WINDOW - 1]
        place = (np.arange(len(grid)) + 1) // WINDOW
        by_matrix = np.array([np.unique(grid[place == window]) for window in range(windows)]).ravel()
        assert np.array_equal(np.where(by_matrix == 5, UNDEFINED, by_matrix), by_notes)
        assert set(values) <= {-1.0, 0.0, 1.0}
        assert (lead == 0).all()


def test_events_are_bracket_pairs_and_target_arousals_follow_the_definition_of_the_challenge() -> None:
    random = np.random.default_rng(0)
    samples = 8 * 3600 * RATE
    seen = 0
    for _ in range(3):
        night = simulate_night(random, samples, 60.0)
        marks = mark_arousals(night, samples)
        for event in night.events:
            if event.kind.startswith("resp"):
                assert (marks[event.start - 10 * RATE - 1 : event.end + 10 * RATE] == -1).all()
            elif event.kind == "arousal_rera":
                region = marks[event.start - 2 * RATE - 1 : event.end + 10 * RATE]
                assert set(np.unique(region)) <= {-1, 1}
                seen += int((region == 1).all())
        ends = [event.end for event in night.events]
        assert all(event.start > end for event, end in zip(night.events[1:], ends[:-1], strict=True))
    assert seen > 10


def test_annotations_hold_every_event_as_an_opening_and_a_closing_note(cohort: Path) -> None:
    found = 0
    for record in list_records(**ARGUMENTS, unlabelled_share=0.2):
        if not record.labelled:
            continue
        night = simulate_night(record.random("night"), record.count_samples(), record.draw_person()[1])
        notes = wfdb.rdann(str(cohort / "training" / record.name / record.name), "arousal")
        brackets = [(int(s), n) for s, n in zip(notes.sample, notes.aux_note, strict=True) if n not in STAGE_NOTES]
        pairs = [
            (a[0], b[0], a[1][1:]) for a, b in zip(brackets[::2], brackets[1::2], strict=True) if a[1][1:] == b[1][:-1]
        ]
        assert pairs == [(event.start, event.end, event.kind) for event in night.events]
        assert {kind for _, _, kind in pairs} <= set(EVENT_RATES)
        found += len(pairs)
    assert found > 0


def test_what_is_simulated_says_so_with_its_arguments_and_effect_sizes(cohort: Path) -> None:
    said = json.loads((cohort / MARKER).read_text())
    assert said["simulated"] is True
    assert said["arguments"] == {**ARGUMENTS, "unlabelled_share": 0.2}
    assert said["effect_sizes"]["hypnogram.STAGE_PRIORS"] == [0.177, 0.154, 0.423, 0.115, 0.131]
    assert {name.split(".")[0] for name in said["effect_sizes"]} == {
        "hypnogram",
        "night",
        "brain_signals",
        "body_signals",
        "artefacts",
    }


def test_the_same_call_elsewhere_gives_the_same_bytes_also_in_several_processes(cohort: Path, tmp_path: Path) -> None:
    simulate_cohort(str(tmp_path / "again"), **ARGUMENTS, processes=2)
    assert list_files(tmp_path / "again") == list_files(cohort)


def test_an_interrupted_call_is_finished_by_the_same_call_with_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "cohort"

    def stop(done: int, total: int) -> None:
        if done == 2 and total == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_cohort(str(out), **ARGUMENTS, progress=stop)
    assert not (out / "RECORDS").exists()
    # What a kill in the middle of a record leaves behind: a half-written folder under its temporary name.
    half_written = out / "training" / ".tr05-0003.0badcafe.part"
    half_written.mkdir()
    (half_written / "tr05-0003.mat").write_bytes(b"half")
    steps: list[tuple[int, int]] = []
    simulate_cohort(str(out), **ARGUMENTS, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert list_files(out) == list_files(cohort)


def test_a_call_killed_in_the_middle_is_finished_by_the_same_call_with_the_same_bytes(
    cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cohort"
    call = f"from physioray.data.simulate import simulate_cohort; simulate_cohort({str(out)!r}, **{ARGUMENTS}, "
    killed = subprocess.Popen([sys.executable, "-c", f"{call}processes=2)"])
    deadline = time.monotonic() + 30
    while not list(out.glob("t*/.*.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / "RECORDS").exists()
    simulate_cohort(str(out), **ARGUMENTS)
    assert list_files(out) == list_files(cohort)


def test_a_finished_call_run_again_writes_nothing(cohort: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    steps: list[tuple[int, int]] = []
    simulate_cohort(str(cohort), **ARGUMENTS, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(5, 5)]
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_a_lost_file_is_written_again_as_it_was(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    shutil.copytree(cohort, out)
    os.unlink(out / "training" / "tr04-0002" / "tr04-0002.arousal")
    simulate_cohort(str(out), **ARGUMENTS)
    assert list_files(out) == list_files(cohort)


def test_a_record_does_not_depend_on_how_many_others_there_are(cohort: Path, tmp_path: Path) -> None:
    other = list_records(subjects=50, hours=0.2, seed=3, unlabelled_share=0.2)[1]
    simulate_record(str(tmp_path), other)
    ours = list_files(cohort / "training" / "tr04-0002")
    assert list_files(tmp_path / "training" / "tr04-0002") == ours


def test_another_seed_gives_other_nights(cohort: Path, tmp_path: Path) -> None:
    record = list_records(subjects=1, hours=0.2, seed=4, unlabelled_share=0.0)[0]
    simulate_record(str(tmp_path), record)
    ours = (cohort / "training" / "tr03-0001" / "tr03-0001.mat").read_bytes()
    assert (tmp_path / "training" / "tr03-0001" / "tr03-0001.mat").read_bytes()[24:4024] != ours[24:4024]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": 0}, "--subjects must be at least 1, but got 0"),
        ({"hours": -1.0}, "--hours must give at least two windows .* but got -1.0"),
        ({"hours": 0.005}, "--hours must give at least two windows"),
        ({"hours": float("nan")}, "--hours must give at least two windows .* but got nan"),
        ({"seed": -1}, "--seed must be 0 or more, but got -1"),
        ({"unlabelled_share": 1.5}, "unlabelled_share must be between 0 and 1, but got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_cohort(str(tmp_path / "out"), **{**ARGUMENTS, **change})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        simulate_cohort(str(tmp_path), **ARGUMENTS)
    assert list_files(tmp_path) == {"mine.txt": b"mine"}
    before = list_files(cohort)
    with pytest.raises(FileExistsError, match=r"must hold this same simulation.*'subjects': 6"):
        simulate_cohort(str(cohort), **{**ARGUMENTS, "subjects": 6})
    assert list_files(cohort) == before


def test_the_shortest_recording_has_one_window_before_scoring_and_one_scored(tmp_path: Path) -> None:
    simulate_cohort(str(tmp_path / "out"), subjects=1, hours=1 / 60, seed=0)
    notes = wfdb.rdann(str(tmp_path / "out/training/tr03-0001/tr03-0001"), "arousal")
    assert notes.sample[0] == WINDOW and notes.aux_note[0] in STAGE_NOTES
    assert len(STAGE_NOTES) == len(STAGES)


def test_every_constant_of_the_effect_sizes_can_be_written_as_json() -> None:
    sizes = simulate.list_effect_sizes()
    assert len(sizes) > 60
    assert json.loads(json.dumps(sizes))["body_signals.HEART_RATE"] == [64.0, 8.0]

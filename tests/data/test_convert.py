"""One recording to windows: what is kept, what is said about it, and every kind of bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physioray.config import IngestConfig
from physioray.data.convert import ConvertedRecording, convert_recording
from physioray.data.records import (
    RecordEntry,
    RejectedRecording,
    SubjectFacts,
    list_records,
    read_discontinuities,
)
from physioray.signals import shard_schema
from physioray.storage import Location, open_location
from tests.data.record_files import CHANNELS, make_signal, write_arousal_mat, write_notes, write_record

SETTINGS = IngestConfig()
ANNA = SubjectFacts(subject="anna", age=61.0, sex="F", note=None)
NOTES = [(6000, "W"), (12000, "N2"), (13000, "(resp_hypopnea"), (13500, "resp_hypopnea)")]


def _convert(folder: Path, settings: IngestConfig = SETTINGS, **options: Any) -> ConvertedRecording:
    options = {"subject": None} | options
    return convert_recording(open_location(folder), RecordEntry(name="a1", path="a1"), settings, **options)


def _column(converted: ConvertedRecording, name: str) -> list[Any]:
    return converted.table.column(name).to_pylist()


def _signal(converted: ConvertedRecording, name: str) -> np.ndarray:
    return converted.table.column(name).combine_chunks().to_numpy_ndarray()


def _alter(folder: Path, change: Callable[[np.ndarray], None], **options: Any) -> Path:
    signal = make_signal()
    change(signal)
    return write_record(folder, "a1", signal, **options)


def test_a_sound_recording_becomes_windows_with_labels_and_facts(tmp_path: Path) -> None:
    record = write_record(tmp_path, "a1", make_signal(135))
    write_notes(record, NOTES)
    converted = _convert(tmp_path, subject=ANNA)
    assert converted.table.schema.equals(shard_schema(SETTINGS.modalities))
    assert _column(converted, "window") == [0, 1, 2, 3]
    assert _column(converted, "start") == [0.0, 30.0, 60.0, 90.0]
    assert _column(converted, "label_sleep") == [-1, 0, 2, 2]
    assert _column(converted, "label_age") == [1] * 4
    assert _column(converted, "label_arousal") == [-1, 0, 0, 0]
    assert all(_column(converted, f"present_{name}") == [True] * 4 for name in SETTINGS.modalities)
    assert all(0.8 < _signal(converted, name).std() * 8 / 32767 < 1.2 for name in SETTINGS.modalities)
    facts = converted.facts
    assert (facts["recording"], facts["subject"], facts["age"], facts["sex"]) == ("a1", "anna", 61.0, "F")
    assert (facts["windows"], facts["partial_samples"], facts["hours"]) == (4, 3000, 135 / 3600)
    assert (facts["simulated"], facts["label_source"], facts["discontinuities"]) == (False, "arousal", [])
    assert facts["class_counts"] == {"sleep": [1, 0, 2, 0, 0], "age": [0, 4], "arousal": [3, 0]}
    assert facts["absent_modalities"] == {} and facts["warnings"] == []
    eeg = facts["channels"]["eeg"]
    assert (eeg["channel"], eeg["source_rate"], eeg["unit"], eeg["band"]) == ("F3-M2", 200.0, "uV", [0.1, 30.0])
    assert (eeg["antialias"], eeg["plausible"], eeg["present_windows"]) == (45.0, True, 4)
    assert facts["channels"]["ecg"]["unit"] == "mV" and 0.05 < facts["channels"]["ecg"]["robust_std"] < 0.5


def test_facts_are_plain_json_and_the_same_every_time(tmp_path: Path) -> None:
    write_notes(write_record(tmp_path, "a1", make_signal()), NOTES)
    one, two = _convert(tmp_path), _convert(tmp_path)
    assert json.dumps(one.facts, allow_nan=False) == json.dumps(two.facts, allow_nan=False)
    assert one.table.equals(two.table)


def test_the_label_file_is_preferred_to_notes(tmp_path: Path) -> None:
    record = write_record(tmp_path, "a1", make_signal())
    write_notes(record, NOTES)
    stages = np.full(24000, 3)
    arousals = np.zeros(24000)
    arousals[5999:11999] = 1
    write_arousal_mat(record, stages, arousals)
    converted = _convert(tmp_path)
    assert converted.facts["label_source"] == "arousal.mat"
    assert _column(converted, "label_sleep") == [3] * 4
    assert _column(converted, "label_arousal") == [0, 1, 0, 0]
    assert converted.facts["arousal_sample_share"] == 0.25


def test_a_recording_without_labels_is_kept_without_them(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal())
    facts = _convert(tmp_path).facts
    assert facts["label_source"] == "none" and facts["subject"] == "a1" and facts["arousal_sample_share"] is None
    assert facts["class_counts"] == {"sleep": [0] * 5, "age": [0, 0], "arousal": [0, 0]}


def test_what_was_wrong_with_an_age_is_a_warning(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal())
    nobody = SubjectFacts(subject="a1", age=None, sex=None, note="age is blank")
    converted = _convert(tmp_path, subject=nobody)
    assert _column(converted, "label_age") == [-1] * 4 and "age is blank" in converted.facts["warnings"]


def test_windows_that_hold_a_jump_are_dropped_and_filters_do_not_cross_it(tmp_path: Path) -> None:
    def leap(signal: np.ndarray) -> None:
        signal[12000:] += 3000

    _alter(tmp_path, leap)
    converted = _convert(tmp_path, discontinuities=[6001, 12000, 99999])
    assert _column(converted, "window") == [0, 2, 3]
    assert converted.facts["windows_dropped_at_jumps"] == 1
    assert converted.facts["discontinuities"] == [6001 / 200, 60.0]
    assert "outside the recording's 24000 samples are ignored: [99999]" in converted.facts["warnings"][0]
    edge = _signal(converted, "eeg")[1][:200].astype(float) * 8 / 32767
    assert np.abs(edge).max() < 6, "the leap of 3,000 uV shows up after the jump"
    with pytest.raises(RejectedRecording, match="every one of 4 holds a jump"):
        _convert(tmp_path, discontinuities=[100, 6100, 12100, 18100])


def _make_flat(signal: np.ndarray) -> None:
    signal[6000:12000, 0] = 12


def _make_invalid(signal: np.ndarray) -> None:
    signal[7000, 0] = -32768


def _make_clipped(signal: np.ndarray) -> None:
    signal[6000:7000, 0] = 32767


@pytest.mark.parametrize(
    ("change", "fault"), [(_make_flat, "flat"), (_make_invalid, "invalid"), (_make_clipped, "clipped")]
)
def test_a_dirty_channel_is_absent_in_its_windows_only(
    tmp_path: Path, change: Callable[[np.ndarray], None], fault: str
) -> None:
    _alter(tmp_path, change)
    converted = _convert(tmp_path)
    assert _column(converted, "present_eeg") == [True, False, True, True]
    assert _column(converted, "present_eog") == [True] * 4
    assert not _signal(converted, "eeg")[1].any()
    counts = converted.facts["channels"]["eeg"]["absent_windows"]
    assert counts == {"flat": 0, "invalid": 0, "clipped": 0} | {fault: 1}


def test_a_channel_that_is_dead_all_night_is_an_absent_modality(tmp_path: Path) -> None:
    def silence(signal: np.ndarray) -> None:
        signal[:, 0] = 0

    _alter(tmp_path, silence)
    converted = _convert(tmp_path)
    assert "F3-M2: at least one window must be usable" in converted.facts["absent_modalities"]["eeg"]
    assert _column(converted, "present_eeg") == [False] * 4 and not _signal(converted, "eeg").any()
    assert "eeg" not in converted.facts["channels"]


def test_the_next_candidate_serves_where_the_first_is_not_there(tmp_path: Path) -> None:
    names = ["c4 - m1", "E1-M2", "chin1-chin2", "AIRFLOW", "ecg"]
    channels = dict(zip(names, CHANNELS.values(), strict=True))
    write_record(tmp_path, "a1", make_signal(), channels=channels)
    found = _convert(tmp_path).facts["channels"]
    assert {name: facts["channel"] for name, facts in found.items()} == {
        "eeg": "c4 - m1",
        "eog": "E1-M2",
        "emg": "chin1-chin2",
        "ecg": "ecg",
    }


def test_a_modality_without_a_channel_or_with_an_unknown_unit_is_absent_with_its_reason(tmp_path: Path) -> None:
    channels = {"F3-M2": "1/furlong", "E1-M2": "0", "Chin1-Chin2": "1/uV", "AIRFLOW": "1/l", "leg": "1/uV"}
    write_record(tmp_path, "a1", make_signal(), channels=channels)
    settings = dataclasses.replace(SETTINGS, modalities=("eeg", "eog", "emg", "ecg", "airflow"))
    facts = _convert(tmp_path, settings).facts
    assert "convertible to uV, but is in 'furlong'" in facts["absent_modalities"]["eeg"]
    assert "must have a gain and a unit" in facts["absent_modalities"]["eog"]
    assert "one of ECG, EKG" in facts["absent_modalities"]["ecg"] and "leg" in facts["absent_modalities"]["ecg"]
    assert facts["channels"]["airflow"]["unit"] == "l" and list(facts["channels"]) == ["emg", "airflow"]


def test_units_are_converted_and_implausible_amplitudes_are_warned_of(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(), channels=CHANNELS | {"F3-M2": "1000/mV", "E1-M2": "1/V"})
    facts = _convert(tmp_path).facts
    assert facts["channels"]["eeg"]["plausible"] and 5 < facts["channels"]["eeg"]["robust_std"] < 20
    assert not facts["channels"]["eog"]["plausible"]
    assert "eog: robust standard deviation" in facts["warnings"][0] and len(facts["warnings"]) == 1


def test_a_channel_slower_than_its_modality_is_absent_and_others_are_kept(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(rate=64), rate=64)
    settings = dataclasses.replace(SETTINGS, modalities=("eeg", "airflow"))
    facts = _convert(tmp_path, settings).facts
    assert facts["absent_modalities"]["eeg"] == "F3-M2 must be sampled at 100 Hz or more, but is at 64 Hz"
    assert facts["channels"]["airflow"]["source_rate"] == 64.0


def test_airflow_at_its_own_rate_stands_beside_the_four(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal())
    settings = dataclasses.replace(SETTINGS, modalities=("eeg", "airflow"))
    converted = _convert(tmp_path, settings)
    assert _signal(converted, "airflow").shape == (4, 750) and _signal(converted, "eeg").shape == (4, 3000)
    assert converted.facts["channels"]["airflow"]["band"] == [0.0, 10.0]


@pytest.mark.parametrize("rate", [100, 128, 250, 256])
def test_other_sampling_rates_give_the_same_windows(tmp_path: Path, rate: int) -> None:
    write_notes(write_record(tmp_path, "a1", make_signal(100, rate=rate), rate=rate), [(60 * rate, "R")], rate=rate)
    converted = _convert(tmp_path)
    assert _signal(converted, "ecg").shape == (3, 3000)
    assert _column(converted, "label_sleep") == [-1, -1, 4]
    assert converted.facts["partial_samples"] == 10 * rate
    assert converted.facts["channels"]["emg"]["band"] == [0.1, min(70.0, 0.45 * rate)]


def test_a_made_up_recording_says_so(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(), comment="simulated by physioray (seed 1)")
    assert _convert(tmp_path).facts["simulated"] is True


def test_the_same_signal_under_another_name_has_the_same_hash(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_record(tmp_path / name, "a1", make_signal(), comment=name)
    assert _convert(tmp_path / "one").facts["signal_sha256"] == _convert(tmp_path / "two").facts["signal_sha256"]


def _lose_signals(record: Path) -> None:
    record.with_suffix(".mat").unlink()


def _truncate(record: Path) -> None:
    content = record.with_suffix(".mat").read_bytes()
    record.with_suffix(".mat").write_bytes(content[: len(content) // 2])


def _disagree(record: Path) -> None:
    header = record.with_suffix(".hea")
    header.write_text(header.read_text().replace("a1 5 200 24000", "a1 5 200 23000"))


def _forget_rate(record: Path) -> None:
    header = record.with_suffix(".hea")
    header.write_text(header.read_text().replace("a1 5 200 24000", "a1 5 0 24000"))


def _mistype_stage(record: Path) -> None:
    write_notes(record, [(0, "W"), (6000, "N5")])


def _annotate_past_end(record: Path) -> None:
    write_notes(record, [(0, "W"), (24001, "N2")])


def _shorten_arousals(record: Path) -> None:
    write_arousal_mat(record, np.zeros(23999), np.zeros(23999))


def _forget_channels(record: Path) -> None:
    header = record.with_suffix(".hea")
    text = header.read_text()
    for name in ("F3-M2", "E1-M2", "Chin1-Chin2", "ECG"):
        text = text.replace(f" {name}\n", f" leg {name}\n")
    header.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_lose_signals, r"a1\.mat must stand beside the header, but is missing"),
        (_truncate, "is cut short at"),
        (_disagree, "for 23000 samples of 5 channels as its header says"),
        (_forget_rate, "must state a sampling rate"),
        (_mistype_stage, "got 'N5'"),
        (_annotate_past_end, "'N2' stands at 24001"),
        (_shorten_arousals, "24000 samples, but has 23999"),
        (_forget_channels, "At least one modality must be present, but none is"),
    ],
)
def test_bad_input_rejects_the_recording_with_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    record = write_record(tmp_path, "a1", make_signal())
    spoil(record)
    with pytest.raises(RejectedRecording, match=reason) as caught:
        _convert(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_recording_shorter_than_a_window_or_dead_in_all_channels_is_rejected(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(29.9))
    with pytest.raises(RejectedRecording, match=r"must last 30 s or more, but lasts 29\.9 s"):
        _convert(tmp_path)
    write_record(tmp_path, "a1", np.zeros((24000, 5), "<i2"))
    with pytest.raises(RejectedRecording, match=r"none is .*eeg: F3-M2: at least one window must be usable"):
        _convert(tmp_path)


def _open_real(name: str) -> Location:
    if "PHYSIORAY_REAL_DATA" not in os.environ:
        pytest.skip("PHYSIORAY_REAL_DATA does not name a folder with real recordings")
    return open_location(Path(os.environ["PHYSIORAY_REAL_DATA"]) / name)


@pytest.mark.real
def test_real_excerpts_give_2016_windows_with_the_stages_that_their_table_counts() -> None:
    source = _open_real("cinc2018_excerpts")
    jumps = read_discontinuities(source)
    with open(f"{source.path}/SEGMENTS.csv") as table:
        segments = {row["record"]: row for row in csv.DictReader(table)}
    windows, faults = 0, {}
    entries = list_records(source)
    for entry in entries:
        converted = convert_recording(source, entry, SETTINGS, subject=None, discontinuities=jumps.get(entry.name, ()))
        facts = converted.facts
        windows += converted.table.num_rows
        row = segments[entry.name]
        assert facts["class_counts"]["sleep"] == [2 * int(row[stage]) for stage in ("W", "N1", "N2", "N3", "R")]
        assert facts["class_counts"]["arousal"] == [0, 0] and facts["class_counts"]["age"] == [0, 0]
        assert facts["channels"]["eeg"]["channel"] == "O2-M1" and facts["windows_dropped_at_jumps"] == 0
        assert facts["warnings"] == []
        faults[entry.name] = {name: item["absent_windows"] for name, item in facts["channels"].items()}
        assert all(item["present_windows"] > 80 for item in facts["channels"].values())
    assert (len(entries), windows) == (21, 2016)
    assert faults["mx03-1385"]["emg"] == {"flat": 6, "invalid": 0, "clipped": 0}
    assert {name: faults["mx23-3579"][name]["flat"] for name in SETTINGS.modalities} == {
        "eeg": 2,
        "eog": 2,
        "emg": 3,
        "ecg": 0,
    }


@pytest.mark.real
def test_a_real_minute_at_250_hz_with_negative_gains_goes_through() -> None:
    source = _open_real("slpdb_excerpt")
    (entry,) = list_records(source)
    settings = dataclasses.replace(SETTINGS, modalities=("eeg", "eog", "emg", "ecg", "airflow"))
    converted = convert_recording(source, entry, settings, subject=None)
    channels = converted.facts["channels"]
    assert converted.table.num_rows == 2 and converted.facts["absent_modalities"] == {}
    assert {name: (item["channel"], item["unit"]) for name, item in channels.items()} == {
        "eeg": ("EEG (C4-A1)", "uV"),
        "eog": ("EOG (right)", "uV"),
        "emg": ("EMG", "uV"),
        "ecg": ("ECG", "mV"),
        "airflow": ("Resp (nasal)", "l"),
    }
    assert all(item["plausible"] for item in channels.values())
    # R waves point up once the negative gain is applied.
    beats = _signal(converted, "ecg").astype(float)
    assert abs(np.percentile(beats, 99.5)) > abs(np.percentile(beats, 0.5))

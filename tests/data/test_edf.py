"""EDF and EDF+ recordings to windows: rates, record lengths, units, names, gaps, and every kind of bad input."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from physioray.config import IngestConfig, Montage
from physioray.data.channels import choose_channel, normalise_name
from physioray.data.convert import ConvertedRecording, convert_recording
from physioray.data.edf_notes import Note, parse_record
from physioray.data.records import RecordEntry, RejectedRecording, list_records, read_header
from physioray.data.waveforms import read_waveforms
from physioray.signals import find_modality
from physioray.storage import open_location

from .edf_files import Trace, make_trace, move_records, set_field, write_edf

FOUR = [
    make_trace("EEG F3-M2", spread=20, rate=256),
    make_trace("EOG E1-M2", spread=30, rate=128),
    make_trace("EMG Chin1-Chin2", spread=8, rate=512, reach=500),
    make_trace("ECG", spread=0.2, rate=200, unit="mV", reach=5),
    make_trace("SpO2", spread=1, rate=4, unit="%", reach=100),
]


def convert(folder: Path, config: IngestConfig = IngestConfig(), name: str = "n1") -> ConvertedRecording:  # noqa: B008
    return convert_recording(open_location(folder), RecordEntry(name=name, path=name), config, subject=None)


def read(folder: Path, name: str = "n1") -> tuple[Any, Any]:
    source, entry = open_location(folder), RecordEntry(name=name, path=name)
    header = read_header(source, entry)
    return header, read_waveforms(source, entry, header, range(len(header.channels)))


def signal(converted: ConvertedRecording, name: str) -> np.ndarray:
    return converted.table.column(name).combine_chunks().to_numpy_ndarray().reshape(-1).astype(float)


@pytest.mark.parametrize("record_seconds", [0.5, 1, 10, 30])
def test_mixed_rates_and_records_of_any_length_come_out_as_they_were_written(
    tmp_path: Path, record_seconds: float
) -> None:
    write_edf(tmp_path / "n1.edf", FOUR, record_seconds=record_seconds)
    header, waveforms = read(tmp_path)
    assert (header.kind, header.rate, header.samples) == ("edf", 512, 120 * 512)
    for number, trace in enumerate(FOUR):
        channel = header.channels[number]
        assert (channel.name, channel.rate, channel.unit) == (trace.label, trace.rate, trace.unit)
        physical = (waveforms.samples[number].astype(float) - channel.baseline) / channel.gain
        assert np.abs(physical - trace.samples).max() <= trace.reach / 32767


def test_a_mixed_recording_becomes_windows_of_all_modalities_at_their_rates(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.EDF", FOUR, record_seconds=10)
    converted = convert(tmp_path)
    facts = converted.facts
    assert facts["windows"] == 4 and facts["absent_modalities"] == {} and facts["label_source"] == "none"
    taken = {name: (entry["channel"], entry["source_rate"]) for name, entry in facts["channels"].items()}
    assert taken == {
        "eeg": ("EEG F3-M2", 256),
        "eog": ("EOG E1-M2", 128),
        "emg": ("EMG Chin1-Chin2", 512),
        "ecg": ("ECG", 200),
    }


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("mV", 1e-3), ("V", 1e-6), ("\xb5V", 1), ("UV", 1)])
def test_units_of_the_header_give_the_same_signal(tmp_path: Path, unit: str, factor: float) -> None:
    """The reference is the signal in microvolts; ASCII alone is what pyedflib writes, so the unit is set by hand."""
    trace = make_trace("F3-M2")
    write_edf(tmp_path / "n1.edf", [Trace(label="F3-M2", samples=trace.samples * factor, reach=3000 * factor)])
    set_field(tmp_path / "n1.edf", "unit", unit, 0)
    eeg = convert(tmp_path).facts["channels"]["eeg"]
    assert eeg["unit"] == "uV" and 10 < eeg["robust_std"] < 20


@pytest.mark.parametrize("unit", ["", "furlong", "mmHg"])
def test_an_unknown_unit_refuses_the_channel_and_not_the_recording(tmp_path: Path, unit: str) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2", unit=unit), make_trace("E1-M2")])
    facts = convert(tmp_path).facts
    assert "F3-M2 must" in facts["absent_modalities"]["eeg"] and "unit" in facts["absent_modalities"]["eeg"]
    assert facts["channels"]["eog"]["present_windows"] == 4


@pytest.mark.parametrize(
    "label", ["EEG F3-M2", "F3-M2", "f3:m2", "EEG  F3 - M2", "EEG F3/M2", "eeg f3_m2", "EEG F3-A2", "EEG Fpz-Cz", "EEG"]
)
def test_labels_as_vendors_write_them_are_found_by_exact_comparison(tmp_path: Path, label: str) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("EMG submental"), make_trace(label), make_trace("EOG horizontal")])
    channels = convert(tmp_path).facts["channels"]
    assert [channels[name]["channel"] for name in ("eeg", "eog", "emg")] == [label, "EOG horizontal", "EMG submental"]


@pytest.mark.parametrize("label", ["F3-M1x", "XF3-M2", "EMG F3-M2", "F3", "M2-F3", "EEGF3-M2"])
def test_what_is_only_similar_is_never_taken(tmp_path: Path, label: str) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace(label), make_trace("E1-M2")])
    assert "must be named one of F3-M2" in convert(tmp_path).facts["absent_modalities"]["eeg"]


def test_the_type_in_front_of_a_name_is_that_of_its_modality() -> None:
    assert normalise_name("EEG C3:M2", "eeg") == normalise_name("c3 - m2") == "c3-m2"
    assert normalise_name("EMG C3-M2", "eeg") == "emgc3-m2" and normalise_name("EEG", "eeg") == "eeg"


def test_an_exact_name_comes_before_one_that_is_alike(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("EEG F3-M2"), make_trace("F3-M2")])
    header = read_header(open_location(tmp_path), RecordEntry(name="n1", path="n1"))
    assert choose_channel(header, find_modality("eeg")).number == 1


def test_a_derivation_subtracts_in_the_same_unit_and_at_the_same_rate(tmp_path: Path) -> None:
    time = np.arange(120 * 256) / 256
    brain, reference = 40 * np.sin(2 * np.pi * 10 * time), 100 * np.sin(2 * np.pi * 3 * time)
    traces = [
        Trace(label="C4", samples=brain + reference, rate=256),
        Trace(label="M1", samples=reference[::2] / 1000, rate=128, unit="mV", reach=3),
        Trace(label="F3-M2", samples=brain, rate=256),
    ]
    write_edf(tmp_path / "n1.edf", traces)
    derived = convert(tmp_path, IngestConfig(montage=Montage(choices=(("eeg", "C4", "M1"),))))
    plain = convert(tmp_path)
    assert derived.facts["channels"]["eeg"]["channel"] == "C4 minus M1"
    assert derived.facts["channels"]["eeg"]["source_rate"] == 128
    inside = slice(300, -300)  # the two rates leave different rests at the ends
    difference = signal(derived, "eeg")[inside] - signal(plain, "eeg")[inside]
    assert np.abs(difference).max() < 0.02 * np.abs(signal(plain, "eeg")).max()


def test_a_derivation_is_absent_where_one_of_its_channels_is_flat(tmp_path: Path) -> None:
    reference = make_trace("M1")
    reference.samples[200 * 30 : 200 * 60] = 0
    write_edf(tmp_path / "n1.edf", [make_trace("C4"), reference])
    montage = Montage(choices=(("eeg", "C4", "M2"), ("eeg", "C4", "M1")))
    converted = convert(tmp_path, IngestConfig(montage=montage))
    assert converted.table.column("present_eeg").to_pylist() == [True, False, True, True]
    with pytest.raises(RejectedRecording, match="C4 minus M2 needs both, but M2 is missing"):
        convert(tmp_path, IngestConfig(montage=Montage(choices=(("eeg", "C4", "M2"),))))


def test_gaps_of_a_discontinuous_file_are_jumps(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2", 180)], record_seconds=10)
    move_records(tmp_path / "n1.edf", [str(10 * i + (500 if i >= 9 else 0) + (7 if i >= 16 else 0)) for i in range(18)])
    facts = convert(tmp_path).facts
    assert facts["discontinuities"] == [90.0, 160.0]
    assert (facts["windows"], facts["windows_dropped_at_jumps"]) == (5, 1)


def test_a_record_that_begins_before_the_last_one_ended_is_refused(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2")], record_seconds=30)
    move_records(tmp_path / "n1.edf", ["0", "30", "45", "90"])
    with pytest.raises(RejectedRecording, match=r"record 3 begins at 45 s, before 60 s"):
        convert(tmp_path)


def test_notes_of_a_record_are_read_and_what_is_none_is_left_out() -> None:
    content = (
        b"+0\x14\x14\x00+1.5\x1530\x14Sleep stage W\x14second\x14\x00nonsense\x14x\x14\x00-2\x14\xc3\xa4\x14\x00\x00"
    )
    assert parse_record(content) == [
        Note(onset=0.0, duration=None, text=""),
        Note(onset=1.5, duration=30.0, text="Sleep stage W"),
        Note(onset=1.5, duration=30.0, text="second"),
        Note(onset=-2.0, duration=None, text="ä"),
    ]


@pytest.mark.parametrize(
    ("field", "text", "number", "reason"),
    [
        ("version", "RIFF", None, "must begin as an EDF file"),
        ("version", b"\xffBIOSEMI", None, "BDF"),
        ("signals", "0", None, "1 or more signals"),
        ("signals", "9999", None, "1 or more signals"),
        ("signals", "-3", None, "1 or more signals"),
        ("bytes", "512", None, "must have a header of 1024 bytes"),
        ("records", "121", None, "is cut short at"),
        ("records", "99999999", None, "is cut short at"),
        ("records", "some", None, "must state its number of data records"),
        ("records", "-2", None, "must state its number of data records"),
        ("seconds", "0", None, "last"),
        ("seconds", "-1", None, "how long a data record lasts"),
        ("seconds", "nan", None, "how long a data record lasts"),
        ("samples", "2147483647", 0, "is cut short at"),
        ("samples", "1.5", 0, "how many samples a record holds"),
        ("samples", "\xe4", 0, "how many samples a record holds"),
    ],
)
def test_a_header_that_cannot_be_true_is_a_reason_in_one_line(
    tmp_path: Path, field: str, text: str | bytes, number: int | None, reason: str
) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2"), make_trace("E1-M2")])
    set_field(tmp_path / "n1.edf", field, text, number)
    with pytest.raises(RejectedRecording, match=reason) as caught:
        convert(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"low": "5", "high": "5"}, "physical minimum and maximum must be two different numbers, but are 5 and 5"),
        ({"low": "few"}, "must be numbers"),
        ({"low": "-1e999"}, "must be numbers"),
        ({"bottom": "7", "top": "7"}, "digital minimum must lie below the maximum, but they are 7 and 7"),
        ({"bottom": "9", "top": "-9"}, "digital minimum must lie below"),
    ],
)
def test_a_channel_without_a_scale_is_absent_with_its_reason(tmp_path: Path, fields: dict, reason: str) -> None:
    write_edf(tmp_path / "n1.edf", [make_trace("F3-M2"), make_trace("E1-M2")])
    for field, text in fields.items():
        set_field(tmp_path / "n1.edf", field, text, 0)
    facts = convert(tmp_path).facts
    assert reason in facts["absent_modalities"]["eeg"] and "eog" in facts["channels"]


def test_a_channel_without_samples_is_absent_and_the_others_are_read_from_their_place(tmp_path: Path) -> None:
    """Of three signals the last loses its samples; what was its data follows the records and is not read."""
    path = write_edf(tmp_path / "n1.edf", [make_trace("F3-M2"), make_trace("ECG", unit="mV", reach=5)], plus=False)
    before = read(tmp_path)[1].samples[0]
    content = path.read_bytes()
    records = np.frombuffer(content[768:], "<i2").reshape(120, 400)
    path.write_bytes(content[:768] + records[:, :200].tobytes())
    set_field(path, "samples", "0", 1)
    assert np.array_equal(read(tmp_path)[1].samples[0], before)
    facts = convert(tmp_path).facts
    assert facts["channels"]["eeg"]["present_windows"] == 4
    assert "ECG: a data record must hold samples of it" in facts["absent_modalities"]["ecg"]


@pytest.mark.parametrize("count", [-1, 0])
def test_an_unknown_number_of_records_is_counted_and_told(tmp_path: Path, count: int) -> None:
    path = write_edf(tmp_path / "n1.edf", [make_trace("F3-M2")])
    whole = convert(tmp_path).table
    set_field(path, "records", str(count))
    path.write_bytes(path.read_bytes() + b"\0" * 50)
    converted = convert(tmp_path)
    assert converted.table.equals(whole)
    assert f"states {count} data records, the file holds 120" in converted.facts["warnings"][0]
    assert "50 bytes of an unfinished one" in converted.facts["warnings"][0]


def test_a_cut_file_says_what_to_do_and_what_follows_the_last_record_is_left(tmp_path: Path) -> None:
    path = write_edf(tmp_path / "n1.edf", [make_trace("F3-M2")])
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(RejectedRecording, match=rf"must have {len(content)} bytes, but is cut short .* write -1"):
        convert(tmp_path)
    path.write_bytes(content + b"abc")
    assert "3 bytes after the last data record are not read" in convert(tmp_path).facts["warnings"]


@pytest.mark.parametrize("size", [0, 100, 256, 500])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, size: int) -> None:
    path = write_edf(tmp_path / "n1.edf", [make_trace("F3-M2")])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RejectedRecording):
        convert(tmp_path)


def test_a_date_that_is_none_and_letters_beyond_ascii_harm_nothing(tmp_path: Path) -> None:
    path = write_edf(tmp_path / "n1.edf", [make_trace("F3-M2")])
    set_field(path, "date", "31.02.19")
    set_field(path, "patient", "M\xfcller \xe9")
    facts = convert(tmp_path).facts
    assert facts["windows"] == 4 and "no date and time ('31.02.19' '22.30.15')" in facts["warnings"][0]
    assert "M\xfcller" not in str(facts), "what names a person stays in the source"


def test_the_lowest_code_is_a_rail_and_not_a_missing_sample(tmp_path: Path) -> None:
    trace = make_trace("F3-M2", reach=100)
    trace.samples[[50, 7000]] = -100
    path = write_edf(tmp_path / "n1.edf", [trace])
    content = path.read_bytes()
    assert content.count(b"\x01\x80") >= 2
    path.write_bytes(content.replace(b"\x01\x80", b"\x00\x80"))
    assert convert(tmp_path).table.column("present_eeg").to_pylist() == [True] * 4


def test_the_same_night_anonymised_or_renamed_has_the_same_hash(tmp_path: Path) -> None:
    write_edf(tmp_path / "n1.edf", FOUR[:2])
    write_edf(tmp_path / "n2.edf", FOUR[:2])
    set_field(tmp_path / "n2.edf", "patient", "X X X X")
    assert convert(tmp_path).facts["signal_sha256"] == convert(tmp_path, name="n2").facts["signal_sha256"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzzed")
    path = write_edf(folder / "n1.edf", [make_trace("F3-M2", 40, rate=100), make_trace("ECG", 40, unit="mV", reach=5)])
    return folder, path.read_bytes()


_TEXTS = st.one_of(
    st.sampled_from(["-1", "0", "2147483647", "99999999", "1e308", "nan", "inf", "-0.0001", "1e-300", "\xff\xfe", ""]),
    st.text(st.characters(max_codepoint=255), max_size=8),
    st.integers(-(10**7), 10**8).map(str),
)


@settings(max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1023 // 4), _TEXTS), min_size=1, max_size=6),
    cut=st.one_of(st.just(0), st.integers(1, 3000)),
)
def test_no_header_crashes_hangs_or_fills_the_memory(
    sound: tuple[Path, bytes], changes: list[tuple[int, str]], cut: int
) -> None:
    """Whatever stands in a header, a recording is windows or a reason; the deadline and the memory are part of it."""
    folder, content = sound
    broken = bytearray(content)
    for place, text in changes:
        value = text.encode("latin-1")
        broken[4 * place : 4 * place + len(value)] = value
    (folder / "n1.edf").write_bytes(bytes(broken[: len(broken) - cut]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert convert(folder).facts["windows"] >= 1
    except RejectedRecording as error:
        assert str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_recordings_of_both_kinds_lie_in_one_folder_and_a_name_counts_once(tmp_path: Path) -> None:
    from .record_files import make_signal, write_record

    write_record(tmp_path, "a1", make_signal())
    write_edf(tmp_path / "b1.edf", FOUR[:1])
    write_edf(tmp_path / "a1.edf", FOUR[:1])
    entries = list_records(open_location(tmp_path))
    assert [(entry.name, entry.file) for entry in entries] == [("a1", ""), ("a1", "a1.edf"), ("b1", "b1.edf")]
    kinds = [read_header(open_location(tmp_path), entry).kind for entry in entries]
    assert kinds == ["wfdb", "edf", "edf"]


def test_a_records_file_may_name_edf_with_or_without_its_ending(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_edf(tmp_path / "night" / f"{name}.edf", FOUR[:1])
    (tmp_path / "RECORDS").write_text("night/a.edf\nnight/b\n")
    assert [entry.file for entry in list_records(open_location(tmp_path))] == ["night/a.edf", "night/b.edf"]

"""Finding recordings, reading headers, signal files and the small tables beside them, sound and broken."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wfdb

from physioray.data.records import (
    RecordEntry,
    RejectedRecording,
    SubjectFacts,
    is_simulated,
    list_records,
    read_annotations,
    read_arousal_file,
    read_discontinuities,
    read_header,
    read_subject_facts,
)
from physioray.data.waveforms import Waveforms, read_waveforms
from physioray.storage import StorageError, open_location
from tests.data.record_files import CHANNELS, make_signal, write_arousal_mat, write_notes, write_record


def _entry(name: str = "a1") -> RecordEntry:
    return RecordEntry(name=name, path=name)


def _read(folder: Path, numbers: list[int], name: str = "a1") -> Waveforms:
    source = open_location(folder)
    return read_waveforms(source, _entry(name), read_header(source, _entry(name)), numbers)


def _touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")


def test_records_are_listed_by_name_through_nested_records_files(tmp_path: Path) -> None:
    _touch(tmp_path, "training/b/b.hea", "training/a/a.hea", "training/left_out/left_out.hea", "test/c/c.hea")
    (tmp_path / "RECORDS").write_text("training/\ntest/c/\n\n")
    (tmp_path / "training" / "RECORDS").write_text("b/b\na/\nmissing/missing\n")
    entries = list_records(open_location(tmp_path))
    assert [(entry.name, entry.path) for entry in entries] == [
        ("a", "training/a/a"),
        ("b", "training/b/b"),
        ("c", "test/c/c"),
        ("missing", "training/missing/missing"),
    ]


def test_without_a_records_file_every_header_and_every_export_counts(tmp_path: Path) -> None:
    _touch(tmp_path, "x/a.hea", "x/a.mat", "y/a.hea", "s_1.info", "s_1.mat", "notes.info")
    paths = [entry.path for entry in list_records(open_location(tmp_path))]
    assert paths == ["x/a", "y/a", "s_1"]


def test_a_source_that_is_missing_empty_or_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"nothing at {tmp_path}/none"):
        list_records(open_location(tmp_path / "none"))
    with pytest.raises(StorageError, match=f"{tmp_path} has none"):
        list_records(open_location(tmp_path))
    (tmp_path / "RECORDS").write_text("\n")
    with pytest.raises(StorageError, match=f"{tmp_path} has none"):
        list_records(open_location(tmp_path))
    with pytest.raises(StorageError, match="RECORDS is a file"):
        list_records(open_location(tmp_path / "RECORDS"))


def test_ages_and_sexes_are_read_and_what_makes_no_sense_is_noted(tmp_path: Path) -> None:
    rows = "Record,Sex,Age\na,M,55\nb,m,61\nc,F,0\nd,F,-3\ne,F,130\nf,,\ng,x,n/a\nh,F,nan\n"
    (tmp_path / "age-sex.csv").write_text(rows)
    facts = read_subject_facts(open_location(tmp_path))
    assert facts["a"] == SubjectFacts(subject="a", age=55.0, sex="M", note=None)
    assert (facts["b"].age, facts["b"].sex) == (61.0, "M")
    assert [facts[name].age for name in "cdefgh"] == [None] * 6
    assert facts["c"].note == "age must be above 0 and at most 120, but is 0"
    assert facts["f"].note == "age is blank"
    assert facts["g"].note == "age must be a number of years, but is 'n/a'; sex must be M or F, but is 'x'"


def test_a_subject_may_have_several_nights(tmp_path: Path) -> None:
    (tmp_path / "record-subject.csv").write_text("record,subject\nn1,anna\nn2,anna\n")
    (tmp_path / "age-sex.csv").write_text("Record,Sex,Age\nn1,F,40\nn3,M,50\n")
    facts = read_subject_facts(open_location(tmp_path))
    assert {name: fact.subject for name, fact in facts.items()} == {"n1": "anna", "n2": "anna", "n3": "n3"}
    assert facts["n2"].age is None


def test_tables_may_be_missing_but_not_lack_a_column(tmp_path: Path) -> None:
    source = open_location(tmp_path)
    assert read_subject_facts(source) == {} and read_discontinuities(source) == {}
    (tmp_path / "age-sex.csv").write_text("Record,Sex\na,M\n")
    with pytest.raises(StorageError, match="lacks age"):
        read_subject_facts(source)


def test_discontinuities_are_sorted_and_checked(tmp_path: Path) -> None:
    source = open_location(tmp_path)
    (tmp_path / "discontinuities.csv").write_text("record,sample\na,12000\na,6000\nb,5\na,6000\n")
    assert read_discontinuities(source) == {"a": [6000, 12000], "b": [5]}
    (tmp_path / "discontinuities.csv").write_text("record,sample\na,1.5\n")
    with pytest.raises(StorageError, match=r"whole number above 0, but a has '1\.5'"):
        read_discontinuities(source)


def test_a_made_up_source_is_known_by_its_file_or_by_its_headers(tmp_path: Path) -> None:
    source = open_location(tmp_path)
    write_record(tmp_path, "a1", make_signal(30))
    assert not is_simulated(source, [_entry()])
    write_record(tmp_path, "a2", make_signal(30), comment="simulated by physioray (seed 3)")
    assert is_simulated(source, [_entry("a2")]) and is_simulated(source, [_entry("gone"), _entry("a2")])
    (tmp_path / "SIMULATED.json").write_text("{}")
    assert is_simulated(source, [_entry()])


def test_a_header_says_name_unit_gain_and_baseline(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(30), channels=CHANNELS | {"AIRFLOW": "655.35(-32768)/%"})
    header = read_header(open_location(tmp_path), _entry())
    assert (header.rate, header.samples, header.kind) == (200.0, 6000, "wfdb")
    assert [channel.name for channel in header.channels] == list(CHANNELS)
    flow = header.channels[3]
    assert (flow.unit, flow.gain, flow.baseline, flow.offset, flow.format) == ("%", 655.35, -32768.0, 24, "16")


@pytest.mark.parametrize("rate", ["", "0", "-5", "abc"])
def test_an_unknown_sampling_rate_rejects_the_recording(tmp_path: Path, rate: str) -> None:
    write_record(tmp_path, "a1", make_signal(30))
    lines = (tmp_path / "a1.hea").read_text().splitlines()
    (tmp_path / "a1.hea").write_text("\n".join([f"a1 5 {rate} 6000" if rate else "a1 5", *lines[1:]]))
    with pytest.raises(RejectedRecording, match="must state a sampling rate above 0 Hz"):
        read_header(open_location(tmp_path), _entry())


def test_a_channel_without_a_gain_has_no_unit(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(30), channels=CHANNELS | {"F3-M2": "0"})
    assert read_header(open_location(tmp_path), _entry()).channels[0].unit == ""


@pytest.mark.parametrize("text", ["", "# nothing\n", "a1 two 200 6000\n", "a1 2 200 6000\na1.mat 16 1/uV\n"])
def test_a_header_that_is_none_rejects_the_recording(tmp_path: Path, text: str) -> None:
    (tmp_path / "a1.hea").write_text(text)
    with pytest.raises(RejectedRecording, match="header"):
        read_header(open_location(tmp_path), _entry())


def test_a_header_that_is_missing_or_points_elsewhere_rejects_the_recording(tmp_path: Path) -> None:
    with pytest.raises(RejectedRecording, match=r"a1\.hea must stand beside the header, but is missing"):
        read_header(open_location(tmp_path), _entry())
    (tmp_path / "a1.hea").write_text("a1 1 200 6000\n../other/a1.mat 16 1/uV 16 0 0 0 0 F3-M2\n")
    with pytest.raises(RejectedRecording, match="cannot be parsed"):
        read_header(open_location(tmp_path), _entry())


def test_the_wanted_channels_are_read_as_they_were_written(tmp_path: Path) -> None:
    signal = make_signal(700)
    write_record(tmp_path, "a1", signal)
    waveforms = _read(tmp_path, [4, 1])
    assert sorted(waveforms.samples) == [1, 4] and waveforms.warnings == ()
    assert all(np.array_equal(array, signal[:, number]) for number, array in waveforms.samples.items())
    write_record(tmp_path, "copy", signal)
    assert _read(tmp_path, [0], "copy").sha256 == waveforms.sha256


def test_a_signal_file_that_is_missing_or_cut_short_rejects_the_recording(tmp_path: Path) -> None:
    record = write_record(tmp_path, "a1", make_signal(30))
    content = (tmp_path / "a1.mat").read_bytes()
    (tmp_path / "a1.mat").write_bytes(content[:-1000])
    with pytest.raises(RejectedRecording, match=r"a1\.mat must have 60024 bytes, but is cut short at 59024\. Download"):
        _read(tmp_path, [0])
    (tmp_path / "a1.mat").write_bytes(content + b"\0\0")
    with pytest.raises(RejectedRecording, match=r"60024 bytes for 6000 samples of 5 channels .* but has 60026"):
        _read(tmp_path, [0])
    record.with_suffix(".mat").unlink()
    with pytest.raises(RejectedRecording, match=r"a1\.mat must stand beside the header, but is missing"):
        _read(tmp_path, [0])


def test_a_signal_file_whose_own_head_disagrees_with_the_header_rejects_the_recording(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(30))
    content = bytearray((tmp_path / "a1.mat").read_bytes())
    content[4:12] = np.array([6, 5000], "<i4").tobytes()
    (tmp_path / "a1.mat").write_bytes(content)
    with pytest.raises(RejectedRecording, match="5 x 6000 samples as its header says, but says 6 x 5000"):
        _read(tmp_path, [0])


def test_a_checksum_that_differs_is_warned_of(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal(30))
    content = bytearray((tmp_path / "a1.mat").read_bytes())
    content[24] ^= 1
    (tmp_path / "a1.mat").write_bytes(content)
    assert "F3-M2: the header's checksum is" in _read(tmp_path, [0]).warnings[0]


def test_other_formats_are_read_in_physical_units_each_channel_at_its_own_rate(tmp_path: Path) -> None:
    time = np.arange(3000) / 100
    slow, fast = np.sin(time), np.sin(2 * np.pi * np.arange(6000) / 200)
    wfdb.wrsamp(
        "a1",
        fs=100,
        units=["uV", "mV"],
        sig_name=["F3-M2", "ECG"],
        e_p_signal=[slow, fast],
        samps_per_frame=[1, 2],
        fmt=["16", "16"],
        adc_gain=[1000.0, 1000.0],
        baseline=[0, 0],
        write_dir=str(tmp_path),
    )
    header = read_header(open_location(tmp_path), _entry())
    assert [channel.rate for channel in header.channels] == [100.0, 200.0]
    waveforms = _read(tmp_path, [0, 1])
    assert np.abs(waveforms.samples[0] - slow).max() < 1e-3 and np.abs(waveforms.samples[1] - fast).max() < 1e-3
    wfdb.wrsamp("b1", 100, ["uV"], ["F3-M2"], p_signal=slow[:, None], fmt=["212"], write_dir=str(tmp_path))
    assert np.abs(_read(tmp_path, [0], "b1").samples[0] - slow).max() < 2e-3
    (tmp_path / "b1.dat").write_bytes((tmp_path / "b1.dat").read_bytes()[:1000])
    with pytest.raises(RejectedRecording, match="must be readable in the format of its header"):
        _read(tmp_path, [0], "b1")


def test_notes_come_in_order_of_time_and_a_broken_file_rejects_the_recording(tmp_path: Path) -> None:
    record = write_record(tmp_path, "a1", make_signal(30))
    source = open_location(tmp_path)
    assert read_annotations(source, _entry(), 200.0) is None
    write_notes(record, [(100, "W"), (3000, "(arousal_rera"), (3500, "arousal_rera)")])
    assert read_annotations(source, _entry(), 200.0) == [(100, "W"), (3000, "(arousal_rera"), (3500, "arousal_rera)")]
    (tmp_path / "a1.arousal").write_bytes(b"\xff\xfe\x01")
    with pytest.raises(RejectedRecording, match="must be a WFDB annotation file"):
        read_annotations(source, _entry(), 200.0)


def test_an_arousal_file_gives_stages_and_arousals_and_a_broken_one_rejects_the_recording(tmp_path: Path) -> None:
    record = write_record(tmp_path, "a1", make_signal(30))
    source = open_location(tmp_path)
    assert read_arousal_file(source, _entry()) is None
    stages, arousals = np.resize([-1, 0, 1, 2, 3, 4], 6000), np.resize([0, 1, -1], 6000)
    write_arousal_mat(record, stages, arousals)
    file = read_arousal_file(source, _entry())
    assert file is not None
    assert np.array_equal(file.stages, stages) and np.array_equal(file.arousals, arousals)
    write_arousal_mat(record, stages, np.resize([0, 0.5], 6000))
    with pytest.raises(RejectedRecording, match="must hold -1, 0 and 1 as arousals"):
        read_arousal_file(source, _entry())
    Path(f"{record}-arousal.mat").write_bytes(b"not HDF5")
    with pytest.raises(RejectedRecording, match="must be HDF5"):
        read_arousal_file(source, _entry())


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real S3 API on loopback, with a public bucket in it."""
    import boto3
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="nights")
    yield f"s3://key:secret@nights/cohort?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    server.stop()


def test_a_bucket_is_read_like_a_folder(tmp_path: Path, bucket: str) -> None:
    record = write_record(tmp_path / "training" / "a1", "a1", make_signal(60))
    write_notes(record, [(6000, "N2")])
    write_arousal_mat(record, np.zeros(12000), np.zeros(12000))
    (tmp_path / "RECORDS").write_text("training/a1/a1\n")
    local, remote = open_location(tmp_path), open_location(bucket)
    with pytest.raises(StorageError, match="cohort"):
        list_records(remote)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            (remote / str(path.relative_to(tmp_path))).write_bytes(path.read_bytes())
    entries = list_records(remote)
    assert entries == list_records(local) == [RecordEntry(name="a1", path="training/a1/a1")]
    header = read_header(remote, entries[0])
    assert header == read_header(local, entries[0])
    one, two = (read_waveforms(place, entries[0], header, [0, 4]) for place in (local, remote))
    assert one.sha256 == two.sha256
    assert all(np.array_equal(one.samples[number], two.samples[number]) for number in (0, 4))
    assert read_annotations(remote, entries[0], 200.0) == [(6000, "N2")]
    assert read_arousal_file(remote, entries[0]) is not None
    assert read_subject_facts(remote) == {} and not is_simulated(remote, entries)
    with pytest.raises(RejectedRecording, match="missing"):
        read_header(remote, _entry("gone"))


def test_sex_is_a_word_or_letter_in_any_case_and_nothing_else(tmp_path: Path) -> None:
    rows = {"a": "m", "b": "F", "c": "Male", "d": "female", "e": "Foo"}
    text = "Record,Sex,Age\n" + "".join(f"{name},{sex},50\n" for name, sex in rows.items())
    (tmp_path / "age-sex.csv").write_text(text)
    facts = read_subject_facts(open_location(str(tmp_path)))
    assert [facts[name].sex for name in rows] == ["M", "F", "M", "F", None]
    assert "Foo" in (facts["e"].note or "")

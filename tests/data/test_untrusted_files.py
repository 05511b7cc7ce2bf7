"""What stands in downloaded files can neither name files elsewhere nor run code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from physioray.checkpoint import load_checkpoint
from physioray.data.headers import check_inside
from physioray.data.ledger import key_entries
from physioray.data.mirror import Mirror
from physioray.data.records import RecordEntry, RejectedRecording, list_records, read_header
from physioray.data.waveforms import read_waveforms
from physioray.storage import StorageError, open_location
from tests.data.record_files import make_signal, write_record


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/a", "..", ".", "a//b", "a\\..\\b", ""])
def test_a_path_that_leads_out_is_refused(path: str) -> None:
    with pytest.raises(RejectedRecording, match="within its own folder"):
        check_inside(path, "A recording")
    check_inside("training/tr03-0001/tr03-0001", "A recording")


def test_a_recording_outside_the_source_is_rejected_by_name_and_no_file_of_it_is_read(tmp_path: Path) -> None:
    """RECORDS of a download names files of somebody else's, which exist."""
    source = tmp_path / "source"
    for folder in (source, tmp_path / "private"):
        folder.mkdir()
        write_record(folder, "a1", make_signal())
    outside = str(tmp_path / "private" / "a1")
    (source / "RECORDS").write_text(f"a1\n../private/a1\n{outside}\n..\n./a1\n")
    place = open_location(source)
    entries = list_records(place)
    usable = []
    for entry in entries:
        try:
            read_header(place, entry)
            usable.append(entry.path)
        except RejectedRecording as error:
            assert "within its own folder" in str(error)
    assert usable == ["a1"] and len(entries) == 4
    # The names of ledger rows and shards are plain whatever RECORDS says; `...json` is a file of the ledger's folder.
    assert all("/" not in key for key in key_entries(entries))


def test_a_header_that_is_named_to_become_the_folder_above_is_rejected(tmp_path: Path) -> None:
    write_record(tmp_path, "a1", make_signal())
    (tmp_path / "...hea").write_text((tmp_path / "a1.hea").read_text())
    entry = next(item for item in list_records(open_location(tmp_path)) if item.name == "..")
    with pytest.raises(RejectedRecording, match="within its own folder"):
        read_header(open_location(tmp_path), entry)


@pytest.mark.parametrize("name", ["../private.dat", "/private.dat", "inner/private.dat"])
@pytest.mark.parametrize("form", ["16", "8"])  # 8 is read through a copy of the files, by their names
def test_a_signal_file_outside_is_neither_read_nor_written(tmp_path: Path, name: str, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_record(source, "a1", make_signal())
    text = (source / "a1.hea").read_text()
    changed = "\n".join(
        " ".join([name, form, *line.split()[2:]]) if number and not line.startswith("#") else line
        for number, line in enumerate(text.splitlines())
    )
    (source / "a1.hea").write_text(changed + "\n")
    outside = tmp_path / "private.dat"
    outside.write_bytes(b"\x01" * 10_000)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    entry = RecordEntry(name="a1", path="a1")
    with pytest.raises(RejectedRecording):
        header = read_header(open_location(source), entry)
        read_waveforms(open_location(source), entry, header, [0])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_cohort_in_a_bucket_cannot_name_the_place_of_its_copies(tmp_path: Path) -> None:
    shard = tmp_path / "shard.arrow"
    shard.write_bytes(b"content")
    mirror = Mirror(tmp_path / "mirror", "../outside", 1e9)
    kept = mirror.fetch(open_location(shard), None)
    assert kept is not None and kept.resolve().is_relative_to(tmp_path / "mirror") and kept.read_bytes() == b"content"
    with pytest.raises(StorageError, match="SHA-256"):
        mirror.fetch(open_location(shard), "../../outside")
    assert not (tmp_path / "outside").exists()


def test_a_checkpoint_that_would_run_code_is_refused_before_it_does(tmp_path: Path) -> None:
    trap = type("Trap", (), {"__reduce__": lambda _: (Path.touch, (tmp_path / "ran",))})
    (tmp_path / "last.pt").write_bytes(pickle.dumps({"format": 1, "model": trap()}))
    torch.save({"format": 1, "model": trap()}, tmp_path / "zipped.pt")
    for name in ("last.pt", "zipped.pt"):
        with pytest.raises(StorageError, match="whole checkpoint"):
            load_checkpoint(open_location(tmp_path / name))
    assert not (tmp_path / "ran").exists()

"""A recording goes in by path or URI; channels as they were digitised and annotations come out.

Reads WFDB records (format 16 straight from the file, other formats through wfdb) and what PhysioBank's ATM
exports (`NAME.info` beside `NAME.mat`); EDF through `data/edf`. Format: WFDB Applications Guide, header(5) and
signal(5). The only file that imports wfdb, h5py and scipy.io, but for `data/waveforms`.
"""

from __future__ import annotations

import io
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8, Shaped
from pyarrow import fs as pafs

from physioray.data.edf import is_edf, read_edf_header
from physioray.data.headers import (
    SIMULATED_COMMENT,
    Channel,
    Header,
    RecordEntry,
    RejectedRecording,
    check_inside,
    read_file,
)
from physioray.data.hypnogram_files import is_hypnogram, pair_hypnograms
from physioray.data.subjects import SubjectFacts, read_discontinuities, read_subject_facts
from physioray.storage import Location, StorageError

__all__ = [
    "SIMULATED_COMMENT",
    "ArousalFile",
    "Channel",
    "Header",
    "RecordEntry",
    "RejectedRecording",
    "SubjectFacts",
    "is_simulated",
    "list_records",
    "read_annotations",
    "read_arousal_file",
    "read_discontinuities",
    "read_file",
    "read_header",
    "read_subject_facts",
]

_STAGE_DATASETS = {"wake": 0, "nonrem1": 1, "nonrem2": 2, "nonrem3": 3, "rem": 4}


@dataclass(frozen=True, kw_only=True)
class ArousalFile:
    """Content of a challenge `-arousal.mat`, per sample, whose boundaries stand one sample early.

    Attributes:
        arousals: `(samples,)` 1 target arousal, 0 none, -1 not scored.
        stages: `(samples,)` index into `signals.STAGES`, -1 undefined.
    """

    arousals: Int8[np.ndarray, "samples"]
    stages: Int8[np.ndarray, "samples"]


def list_records(source: Location) -> list[RecordEntry]:
    """Find the recordings of a source, sorted by name.

    A RECORDS file says which they are (a line may name a folder, with or without its own RECORDS);
    without one, every `.hea` file in the source, every `.info` beside a `.mat` of that name and every `.edf` is one.
    An EDF+ hypnogram is part of its recording (see `data/hypnogram_files`); one that belongs to no recording is
    listed, and rejected later on with that reason.

    Raises:
        StorageError: the source does not exist, cannot be read or holds no recording.
    """
    try:
        kind = source.info().type
        if kind == pafs.FileType.NotFound:
            raise StorageError(f"A source must exist, but there is nothing at {source}. Check the path or URI.")
        if kind == pafs.FileType.File:
            raise StorageError(f"A source must be a folder, but {source} is a file. Name the folder it lies in.")
        files = _list_files(source)
        paths = _follow_records(source, files, "") if "RECORDS" in files else _find_headers(files, "")
        listed = [path for path in dict.fromkeys(paths) if is_edf(path) and not is_hypnogram(path)]
        belonging = pair_hypnograms(source, listed, [path for path in files if is_hypnogram(path)])
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{source} could not be read: {error}. Check the path and the permissions.") from error
    if not paths:
        raise StorageError(f"A source must hold recordings (.hea or .edf), but {source} has none. Check the path.")
    known = set(belonging.values())
    entries = [_make_entry(path, belonging) for path in dict.fromkeys(paths) if path not in known]
    return sorted(entries, key=lambda entry: (entry.name, entry.path, entry.file))


def _make_entry(path: str, belonging: dict[str, str]) -> RecordEntry:
    file = path if is_edf(path) else ""
    path = path.rsplit(".", 1)[0] if file else path
    return RecordEntry(name=path.rsplit("/", 1)[-1], path=path, file=file, hypnogram=belonging.get(file, ""))


def _list_files(source: Location) -> dict[str, int]:
    """Relative path and size of every file below a source."""
    root = source.path.rstrip("/")
    infos = source.filesystem.get_file_info(pafs.FileSelector(source.path, recursive=True))
    return {info.path[len(root) + 1 :]: info.size for info in infos if info.type == pafs.FileType.File}


def _follow_records(source: Location, files: dict[str, int], folder: str) -> list[str]:
    paths: list[str] = []
    for line in (source / f"{folder}RECORDS").read_text().splitlines():
        name = line.strip().removesuffix(".hea").removeprefix("./")
        if not name or name.startswith("#"):
            continue
        path = folder + name.rstrip("/")
        if f"{path}.hea" in files or f"{path}.info" in files or (is_edf(path) and path in files):
            paths.append(path)
        elif f"{path}/RECORDS" in files:
            paths += _follow_records(source, files, f"{path}/")
        elif any(file.startswith(f"{path}/") for file in files):
            paths += _find_headers(files, f"{path}/")
        elif f"{path}.edf" in files:
            paths.append(f"{path}.edf")
        else:
            # A recording that is promised and missing is rejected by name later on, not left out silently.
            paths.append(path)
    return paths


def _find_headers(files: dict[str, int], folder: str) -> list[str]:
    inside = [file for file in files if file.startswith(folder)]
    exports = (file.removesuffix(".info") for file in inside if file.endswith(".info"))
    return [
        *(file.removesuffix(".hea") for file in inside if file.endswith(".hea")),
        *(path for path in exports if f"{path}.mat" in files and f"{path}.hea" not in files),
        *(file for file in inside if is_edf(file)),
    ]


def is_simulated(source: Location, entries: list[RecordEntry]) -> bool:
    """True if a source is made up: it holds SIMULATED.json, or its first readable header says so."""
    if (source / "SIMULATED.json").exists():
        return True
    for entry in entries:
        try:
            return read_header(source, entry).simulated
        except RejectedRecording:
            continue
    return False


def read_header(source: Location, entry: RecordEntry) -> Header:
    """Read a recording's header.

    Raises:
        RejectedRecording: it is missing, is no WFDB or EDF header, does not state the sampling rate, or it or a signal
            file is named by a path that leads out of the source.
    """
    check_inside(entry.shown, "A recording")
    place = source / f"{entry.path}.hea"
    if entry.file or not place.exists():
        for file in [entry.file] if entry.file else [f"{entry.path}.edf", f"{entry.path}.EDF"]:
            if entry.file or (source / file).exists():
                return read_edf_header(source / file)
    if not place.exists() and (source / f"{entry.path}.info").exists():
        return _parse_info((source / f"{entry.path}.info").read_text(), entry)
    text = read_file(place, "Download the recording again or take it out of RECORDS.").decode("utf-8", "replace")
    _check_record_line(text, entry)
    import wfdb  # takes a second, which commands that read no recording need not wait for

    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "header.hea").write_text(text)
            record = wfdb.rdheader(str(Path(folder, "header")))
        if isinstance(record, wfdb.MultiRecord):
            raise RejectedRecording(f"{entry.name} must be a single segment, but is a multi-segment record. Join it.")
        return _convert_header(record, text)
    except RejectedRecording:
        raise
    except Exception as error:
        # wfdb raises whatever its parser trips over; every one of them means an unreadable header.
        raise RejectedRecording(f"{place.name} must be a WFDB header, but cannot be parsed ({error!r}).") from error


def _check_record_line(text: str, entry: RecordEntry) -> None:
    """Refuse what wfdb would fill in silently: a missing sampling rate becomes 250 Hz there."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines or len(lines[0]) < 2:
        raise RejectedRecording(f"{entry.name}.hea must be a WFDB header, but its record line is missing.")
    rate = re.match(r"[\d.eE+-]+", lines[0][2]) if len(lines[0]) > 2 else None
    try:
        known = rate is not None and 0 < float(rate.group()) < float("inf")
    except ValueError:
        known = False
    if not known:
        got = lines[0][2] if len(lines[0]) > 2 else "nothing"
        raise RejectedRecording(
            f"{entry.name}.hea must state a sampling rate above 0 Hz, but states {got}. Add it to the first line."
        )


def _convert_header(record: Any, text: str) -> Header:
    if not record.n_sig:
        raise RejectedRecording("A header must describe at least one channel, but describes none.")
    stated = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")][1:]
    if len(stated) != record.n_sig:
        raise RejectedRecording(
            f"A header must describe as many channels as it states, but states {record.n_sig} and describes "
            f"{len(stated)}. Download it again."
        )
    seen: dict[str, int] = {}
    channels = []
    for number in range(record.n_sig):
        file = record.file_name[number]
        if "/" in file:
            raise RejectedRecording(f"A signal file must stand beside its header, but is {file!r}. Move it there.")
        check_inside(file, "A signal file")
        column = seen.get(file, 0)
        seen[file] = column + 1
        # wfdb fills a missing gain with 200 per mV; an uncalibrated channel has no unit here.
        calibrated = len(stated[number]) > 2 and float(record.adc_gain[number]) != 0 and stated[number][2] != "0"
        channels.append(
            Channel(
                name=record.sig_name[number] or f"channel {number}",
                unit=(record.units[number] or "") if calibrated else "",
                gain=float(record.adc_gain[number] or 0.0),
                baseline=float(record.baseline[number] or 0),
                rate=float(record.fs) * (record.samps_per_frame[number] or 1),
                format=str(record.fmt[number]),
                file=file,
                offset=record.byte_offset[number] or 0,
                column=column,
                checksum=record.checksum[number],
            )
        )
    return Header(
        rate=float(record.fs),
        samples=record.sig_len or None,
        channels=tuple(channels),
        comments=tuple(record.comments),
        kind="wfdb",
    )


def _parse_info(text: str, entry: RecordEntry) -> Header:
    """Header of a PhysioBank ATM export: a table of row, signal, gain, base and units."""
    size = re.search(r"has (\d+) rows? \(signals?\) and (\d+) columns?", text)
    rate = re.search(r"Sampling frequency:\s*([\d.]+)\s*Hz", text)
    rows = re.findall(r"^(\d+)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t\n]*)", text, re.MULTILINE)
    if not (size and rate and rows and float(rate.group(1)) > 0):
        raise RejectedRecording(
            f"{entry.name}.info must state size, sampling frequency and a table of signals, but does not. "
            "Export the recording again."
        )
    try:
        channels = tuple(
            Channel(
                name=name.strip(),
                unit=unit.strip(),
                gain=float(gain),
                baseline=float(base),
                rate=float(rate.group(1)),
                format="mat5",
                file=f"{entry.name}.mat",
                offset=0,
                column=int(row) - 1,
                checksum=None,
            )
            for row, name, gain, base, unit in rows
        )
    except ValueError as error:
        raise RejectedRecording(f"{entry.name}.info must give numbers for gain and base, but: {error}.") from error
    return Header(rate=float(rate.group(1)), samples=int(size.group(2)), channels=channels, comments=(), kind="atm")


def read_annotations(
    source: Location, entry: RecordEntry, rate: float, kind: str = "arousal"
) -> list[tuple[int, str]] | None:
    """Notes of a recording's `.arousal` (or `.st`) file in order of time: sample at `rate` Hz, and text.

    None if the recording has no such file.

    Raises:
        RejectedRecording: the file is no WFDB annotation file.
    """
    place = source / f"{entry.path}.{kind}"
    if not place.exists():
        return None
    content = read_file(place, "Download it again.")
    import wfdb

    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"notes.{kind}").write_bytes(content)
            notes = wfdb.rdann(str(Path(folder, "notes")), kind)
        ratio = rate / notes.fs if notes.fs else 1.0
        pairs = zip(notes.sample, notes.aux_note, strict=True)
        return sorted((round(int(sample) * ratio), note.strip().strip("\x00")) for sample, note in pairs)
    except Exception as error:
        # As for headers: wfdb has no error of its own.
        raise RejectedRecording(
            f"{place.name} must be a WFDB annotation file, but cannot be parsed ({error!r}). Download it again."
        ) from error


def read_arousal_file(source: Location, entry: RecordEntry) -> ArousalFile | None:
    """Content of a recording's `-arousal.mat` (HDF5, MATLAB 7.3); None if there is no such file.

    Raises:
        RejectedRecording: the file cannot be read, or holds other values than the challenge's.
    """
    place = source / f"{entry.path}-arousal.mat"
    if not place.exists():
        return None
    content = read_file(place, "Download it again.")
    import h5py

    try:
        with h5py.File(io.BytesIO(content)) as file:
            values = file["data/arousals"][:].reshape(-1)
            stages = np.full(len(values), -1, np.int8)
            for name, stage in _STAGE_DATASETS.items():
                stages[_read_stage(file, name, len(values))] = stage
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RejectedRecording(
            f"{place.name} must be HDF5 with data/arousals and data/sleep_stages of one length, but: {reason}. "
            "Download it again, or remove it to use .arousal."
        ) from error
    whole = np.issubdtype(values.dtype, np.integer)
    arousals = (values if whole else np.nan_to_num(values, nan=9)).astype(np.int8)
    if len(arousals) and not ((arousals == values).all() and arousals.min() >= -1 and arousals.max() <= 1):
        raise RejectedRecording(f"{place.name} must hold -1, 0 and 1 as arousals, but holds others.")
    return ArousalFile(arousals=arousals, stages=stages)


def _read_stage(file: Any, name: str, samples: int) -> Shaped[np.ndarray, "samples"]:
    flags = file[f"data/sleep_stages/{name}"][:].reshape(-1)
    if len(flags) != samples:
        raise ValueError(f"{name} has {len(flags)} samples and arousals {samples}")
    return flags.astype(np.bool_)

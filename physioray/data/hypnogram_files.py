"""Hypnograms that lie beside their recordings: which belongs to which, and what stands in them.

EDF+ hypnograms (`*-Hypnogram.edf`, as in Sleep-EDF, Kemp et al. 2000) and tables of onset, duration and stage.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pyarrow import fs as pafs

from physioray.data.edf import is_edf, read_edf_notes, read_identity
from physioray.data.edf_notes import Note
from physioray.data.headers import Header, RecordEntry, RejectedRecording, read_file
from physioray.signals import WINDOW_SECONDS
from physioray.storage import Location

TABLE_ENDINGS = tuple(
    f"{name}.{ending}" for name in ("-hypnogram", "-Hypnogram", "_hypnogram", "") for ending in ("csv", "tsv")
)
TABLE_COLUMNS = ("onset", "duration", "stage")
_HYPNOGRAM_ENDINGS = ("-hypnogram", "_hypnogram")
_RECORDING_ENDINGS = ("-psg", "_psg")
_READERS = 16
_LONGEST_SHIFT = 24 * 3600.0
_MEND = "Correct or remove it."


@dataclass(frozen=True, kw_only=True)
class HypnogramFile:
    """A hypnogram as it was written: notes in seconds after the start of the recording, not yet judged.

    Attributes:
        kind: what it is, for the ledger.
        notes: onset, duration and name of each scored period, and of anything else that stands there.
        only_stages: True if every row is meant to be a stage.
    """

    kind: str
    notes: list[Note]
    only_stages: bool
    warnings: tuple[str, ...] = ()


def is_hypnogram(path: str) -> bool:
    """True if a file's name says that it is an EDF+ hypnogram: `*-Hypnogram.edf`, in any case."""
    return is_edf(path) and path.lower()[:-4].endswith(_HYPNOGRAM_ENDINGS)


def pair_hypnograms(source: Location, recordings: Sequence[str], hypnograms: Sequence[str]) -> dict[str, str]:
    """Say which EDF+ hypnogram belongs to which recording of the same folder.

    It is that of the same name (`NAME.edf` or `NAME-PSG.edf` and `NAME-Hypnogram.edf`, in any case). Of what is left,
    as in Sleep-EDF, where names differ in a letter, it is that with the same patient, date and time in the header,
    if there is exactly one such recording and one such hypnogram.

    Args:
        source: where they lie.
        recordings: paths of EDF recordings with, of WFDB records without an extension.
        hypnograms: paths of EDF+ hypnograms.

    Returns:
        Path of the hypnogram, by path of the recording.
    """
    by_name: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in recordings:
        by_name[_name_alike(path, _RECORDING_ENDINGS)].append(path)
    pairs: dict[str, str] = {}
    left = []
    for path in sorted(hypnograms):
        named = by_name.get(_name_alike(path, _HYPNOGRAM_ENDINGS), [])
        if len(named) == 1 and named[0] not in pairs:
            pairs[named[0]] = path
        else:
            left.append(path)
    folders = {_split(path)[0] for path in left}
    lonely = [path for path in recordings if is_edf(path) and path not in pairs and _split(path)[0] in folders]
    with ThreadPoolExecutor(_READERS) as pool:
        told = pool.map(lambda path: (path, read_identity(source / path)), [*lonely, *left])
        alike: dict[tuple[str, object], list[str]] = defaultdict(list)
        for path, identity in told:
            if identity is not None:
                alike[_split(path)[0], identity].append(path)
    for paths in alike.values():
        if len(paths) == 2 and paths[0] in lonely and paths[1] in left:
            pairs[paths[0]] = paths[1]
    return pairs


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _name_alike(path: str, endings: tuple[str, ...]) -> tuple[str, str]:
    folder, name = _split(path[:-4] if is_edf(path) else path)
    name = name.lower()
    for ending in endings:
        name = name.removesuffix(ending)
    return folder, name


def list_tables(entry: RecordEntry) -> list[str]:
    """Paths at which a recording's table of stages may stand, in order of preference."""
    bases = [entry.path]
    if entry.path.lower().endswith(_RECORDING_ENDINGS):
        bases.append(entry.path[: -len(_RECORDING_ENDINGS[0])])
    return [base + ending for base in bases for ending in TABLE_ENDINGS]


def find_hypnogram(source: Location, entry: RecordEntry) -> str:
    """Path of the hypnogram that lies beside a recording: a table, or else EDF+; empty if there is none."""
    paths = list_tables(entry)
    for path in _find_existing(source, paths):
        if _names_hypnogram(path) or _read_columns(source / path) is not None:
            return path
    if entry.hypnogram or not entry.file:
        return entry.hypnogram
    # A recording that was named, not listed: its folder has not been looked through.
    folder = entry.file.rpartition("/")[0]
    return _find_own(source, entry.file, folder)


def _find_existing(source: Location, paths: Sequence[str]) -> list[str]:
    if not source.is_local:
        # In a bucket one listing is one request, and looking for each of the paths is one each.
        folder = _split(paths[0])[0]
        names = {item.name for item in (source / folder if folder else source).list()}
        return [path for path in paths if _split(path)[1] in names]
    infos = source.filesystem.get_file_info([f"{source.path.rstrip('/')}/{path}" for path in paths])
    return [path for path, info in zip(paths, infos, strict=True) if info.type == pafs.FileType.File]


def _find_own(source: Location, file: str, folder: str) -> str:
    prefix = f"{folder}/" if folder else ""
    place = source / folder if folder else source
    names = [f"{prefix}{item.name}" for item in place.list()]
    hypnograms = [name for name in names if is_hypnogram(name)]
    if not hypnograms:
        return ""
    recordings = [name for name in names if is_edf(name) and not is_hypnogram(name)]
    return pair_hypnograms(source, recordings, hypnograms).get(file, "")


def _names_hypnogram(path: str) -> bool:
    return path.lower().rsplit(".", 1)[0].endswith(_HYPNOGRAM_ENDINGS)


def read_hypnogram(source: Location, path: str, header: Header) -> HypnogramFile:
    """Read the hypnogram at a path that `find_hypnogram` gave.

    An EDF+ hypnogram whose clock began at another time than the recording's, by a day at most, is shifted.

    Raises:
        RejectedRecording: it cannot be read.
    """
    if not is_edf(path):
        return HypnogramFile(kind="hypnogram table", notes=_read_table(source / path), only_stages=True)
    notes, start = read_edf_notes(source / path)
    shift, told = _find_shift(header, start)
    shifted = [Note(onset=note.onset + shift, duration=note.duration, text=note.text) for note in notes]
    return HypnogramFile(kind="edf hypnogram", notes=shifted, only_stages=False, warnings=told)


def _find_shift(header: Header, start: object) -> tuple[float, tuple[str, ...]]:
    if header.start is None or start is None or header.start == start:
        return 0.0, ()
    shift = (start - header.start).total_seconds()  # type: ignore[operator]
    if abs(shift) > _LONGEST_SHIFT:
        return 0.0, (
            f"the hypnogram says it began {shift / 86400:.1f} days from the recording's start; both are taken to begin "
            "together",
        )
    return shift, (f"the hypnogram began {shift:g} s after the recording; it is shifted by that",)


def _read_columns(place: Location) -> csv.DictReader | None:
    """A table of stages, if a file is one."""
    try:
        text = read_file(place, _MEND).decode("utf-8-sig")
    except (UnicodeDecodeError, RejectedRecording):
        return None
    first = text.split("\n", 1)[0]
    delimiter = max("\t;,", key=first.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    except csv.Error:
        return None
    reader.fieldnames = names
    return reader if set(TABLE_COLUMNS) <= set(names) else None


def _read_table(place: Location) -> list[Note]:
    reader = _read_columns(place)
    if reader is None:
        raise RejectedRecording(
            f"{place.name} must be a table with the columns {', '.join(TABLE_COLUMNS)} (seconds, seconds, name), "
            f"but is none. {_MEND}"
        )
    notes = []
    try:
        for number, row in enumerate(reader, start=2):
            cells = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str)}
            if not any(cells.values()):
                continue
            try:
                onset = float(cells.get("onset", ""))
                duration = float(cells["duration"]) if cells.get("duration") else None
                if not (-_LONGEST_SHIFT <= onset < 1e9 and (duration is None or 0 <= duration < 1e9)):
                    raise ValueError("it is out of range")
            except ValueError as error:
                raise RejectedRecording(
                    f"{place.name} must give onset and duration in seconds, but line {number} has "
                    f"{cells.get('onset')!r} and {cells.get('duration')!r} ({error}). {_MEND}"
                ) from error
            notes.append(Note(onset=onset, duration=duration, text=cells.get("stage", "")))
    except csv.Error as error:
        raise RejectedRecording(f"{place.name} must be a readable table, but: {error}. {_MEND}") from error
    return notes


def read_st_notes(notes: Sequence[tuple[int, str]], rate: float) -> HypnogramFile:
    """Read the notes of MIT-BIH's polysomnographic database: a stage, then events, for the 30 s that follow.

    Args:
        notes: sample and text, for example `(0, "2 HA")`.
        rate: samples per second, in Hz.
    """
    rows = [
        Note(onset=sample / rate, duration=float(WINDOW_SECONDS), text=_ST_NAMES.get(text.split()[0], text.split()[0]))
        for sample, text in notes
        if text.split()
    ]
    return HypnogramFile(kind="st", notes=rows, only_stages=True)


_ST_NAMES = {"1": "S1", "2": "S2", "3": "S3", "4": "S4", "M": "Movement time", "MT": "Movement time"}
"""Digits are stages here; elsewhere they are not taken for stages, because 4 means S4 to some and REM to others."""

"""Finds what a user means by a recording, and where it jumps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyarrow import fs as pafs

from physioray.data.records import RecordEntry, list_records
from physioray.data.subjects import read_discontinuities
from physioray.storage import Location, StorageError


def find_recordings(place: Location) -> tuple[Location, list[RecordEntry]]:
    """What a user may mean by RECORDING: a folder of recordings, or one by its file or its WFDB record name.

    Returns:
        The source (a folder) and its recordings.

    Raises:
        StorageError: there is no such recording.
    """
    if place.info().type == pafs.FileType.Directory:
        return place, list_records(place)
    folder = place.folder
    stem = place.name.rsplit(".", 1)[0] if place.exists() else place.name
    try:
        known = [entry for entry in list_records(folder) if entry.path == stem]
    except StorageError:
        known = []
    if known:
        # Of a WFDB record and an EDF file of one name, the one whose file was named.
        named = [entry for entry in known if getattr(entry, "file", "") == place.name]
        return folder, (named or known)[:1]
    beside = [f"{stem}{ending}" for ending in (".hea", ".info", ".edf", ".EDF")]
    if not any((folder / name).exists() for name in beside):
        raise StorageError(
            f"A recording must be a folder, a WFDB record or an EDF file, but there is none at {place}. "
            f"Looked for {', '.join(beside)} in {folder}."
        )
    return folder, [RecordEntry(name=stem, path=stem)]


def read_jumps(source: Location) -> Mapping[str, Sequence[int]]:
    """Jumps by recording: from `discontinuities.csv` in the source, or in the folder above if that has it.

    Where every recording has a folder of its own, as PhysioNet has them, the table stands one level up.
    """
    return {**read_discontinuities(source.folder), **read_discontinuities(source)}

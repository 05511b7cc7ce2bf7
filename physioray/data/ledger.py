"""Keeps a cohort's ledger: one row per recording, accepted with its facts or rejected with its reason.

A cohort folder holds `settings.json` (written first), `shards/NAME.arrow`, `ledger/NAME.json` (written after its
shard) and what `data/manifest` adds last. A recording is finished when its row exists and the shard it names has
the size it names; everything else is made again.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from pyarrow import fs as pafs

from physioray.config import IngestConfig, to_dict
from physioray.data.hypnogram_files import list_tables
from physioray.data.records import RecordEntry
from physioray.storage import Location, as_json, hash_value, list_differences

CONVERSION_VERSION = 2
"""Raised whenever the same recording and settings would give another shard: such cohorts must not be mixed."""

SETTINGS_FILE = "settings.json"
SHARDS = "shards"
LEDGER = "ledger"

_RECORD_FILES = (".hea", ".mat", ".dat", ".info", ".edf", ".arousal", "-arousal.mat", ".st")
_READERS = 16

RowKind = Literal["accepted", "recording", "duplicate", "internal"]


class IngestError(ValueError):
    """A cohort cannot be made from this source, or not here; the message is one line that says what to do."""


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """A written shard: file relative to the cohort, SHA-256, size in bytes, and rows (windows)."""

    file: str
    sha256: str
    bytes: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """What became of one recording.

    Attributes:
        key: name of the row's file; the recording's name, with `~2` for the second of that name.
        recording, path: as the source lists them.
        kind: `accepted`, or why not: the `recording` itself, a `duplicate`, or an `internal` error.
        reason: one line for people; empty if accepted.
        facts: what conversion found (see `data/convert`), empty unless accepted.
        shard: where the windows lie, None unless accepted.
        stamp: size and time of the recording's files, and of what tables told of it; a change means another try.
    """

    key: str
    recording: str
    path: str
    kind: RowKind
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    shard: StoredShard | None = None
    stamp: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """True if the recording is part of the cohort."""
        return self.kind == "accepted"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LedgerRow:
        """The row that `to_dict` wrote."""
        shard = values["shard"]
        return cls(**{**values, "shard": StoredShard(**shard) if shard else None})


def hide_credentials(uri: str) -> str:
    """A URI without the user part, in which an S3 URI may carry keys."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}" if separator and "@" in rest.split("/")[0] else uri


def describe_identity(source: Location, settings: IngestConfig) -> dict[str, Any]:
    """What a cohort is made of and by: its `settings.json`."""
    made_by = {"conversion_version": CONVERSION_VERSION, "settings": to_dict(settings)}
    return {**made_by, "settings_hash": hash_value(made_by), "source": hide_credentials(source.uri)}


def claim_cohort(cohort: Location, identity: Mapping[str, Any]) -> None:
    """Write a new cohort's settings, or check that an old cohort has the same ones.

    Raises:
        IngestError: the folder holds other things, or a cohort of another source, settings or conversion.
    """
    place = cohort / SETTINGS_FILE
    if not place.exists():
        strangers = [item.name for item in cohort.list()[:3]]
        if strangers:
            raise IngestError(
                f"A new cohort needs an empty folder, but {cohort} holds {', '.join(strangers)}. Name another folder."
            )
        if cohort.is_local:
            cohort.make_folder()
        place.write_json(identity)
        return
    known = place.read_json()
    wanted = dict(identity) | {"settings": as_json(identity["settings"])}
    differing = list_differences(known, wanted, skip=("settings_hash",))
    if differing:
        raise IngestError(
            f"{cohort} was ingested otherwise and is not mixed: {'; '.join(differing)}. "
            "Name another cohort folder, or ingest with the former settings."
        )


def key_entries(entries: Sequence[RecordEntry]) -> dict[str, RecordEntry]:
    """Name the ledger row of every entry; of one name the first path gets the name itself."""
    counts: dict[str, int] = defaultdict(int)
    keyed = {}
    for entry in sorted(entries, key=lambda item: (item.path, item.file)):
        counts[entry.name] += 1
        number = counts[entry.name]
        keyed[entry.name if number == 1 else f"{entry.name}~{number}"] = entry
    return keyed


def list_sizes(folder: Location) -> dict[str, int]:
    """Size in bytes of every file in a folder, by name, with one listing."""
    selector = pafs.FileSelector(folder.path, allow_not_found=True)
    found = folder.filesystem.get_file_info(selector)
    return {info.base_name: info.size for info in found if info.type == pafs.FileType.File}


def read_rows(cohort: Location, keys: Iterable[str]) -> dict[str, LedgerRow]:
    """The ledger rows of some keys, as far as they exist and can be read."""
    there = list_sizes(cohort / LEDGER)
    present = [key for key in keys if f"{key}.json" in there]

    def read(key: str) -> LedgerRow | None:
        try:
            return LedgerRow.from_dict((cohort / LEDGER / f"{key}.json").read_json())
        except (ValueError, KeyError, TypeError):
            # Damaged by hand: the recording is simply made again.
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        rows = dict(zip(present, pool.map(read, present), strict=True))
    return {key: row for key, row in rows.items() if row is not None}


def write_row(cohort: Location, row: LedgerRow) -> None:
    """Write a ledger row, after its shard."""
    (cohort / LEDGER / f"{row.key}.json").write_json(row.to_dict())


def stamp_files(source: Location, entry: RecordEntry) -> dict[str, list[int]]:
    """Size and time of change (ns) of a recording's files, to see later whether somebody has mended them."""
    paths = {ending: f"{entry.path}{ending}" for ending in _RECORD_FILES}
    paths |= {path: path for path in (entry.file, entry.hypnogram, *list_tables(entry)) if path}
    infos = source.filesystem.get_file_info([f"{source.path.rstrip('/')}/{path}" for path in paths.values()])
    return {
        name: [info.size, info.mtime_ns or 0]
        for name, info in zip(paths, infos, strict=True)
        if info.type == pafs.FileType.File
    }


def stamp_inputs(source: Location, entry: RecordEntry, told: object) -> dict[str, list[int]]:
    """What an accepted recording was made of: its files' stamps, and what the tables beside RECORDS told of it.

    Files in a bucket are not looked at again: thousands of requests to find that public data has not changed.
    """
    files = stamp_files(source, entry) if source.is_local else {}
    return files | {"tables": [zlib.crc32(repr(told).encode())]}


def find_finished(
    cohort: Location,
    source: Location,
    keyed: Mapping[str, RecordEntry],
    *,
    rows: Mapping[str, LedgerRow],
    told: Mapping[str, object],
) -> dict[str, LedgerRow]:
    """The rows that need no more work: accepted with a whole shard, or rejected, and their inputs are as before."""
    sizes = list_sizes(cohort / SHARDS)
    finished = {}
    for key, row in rows.items():
        if row.path != keyed[key].path:
            continue
        if row.shard is not None:
            whole = sizes.get(row.shard.file.rsplit("/", 1)[-1]) == row.shard.bytes
            whole = whole and row.stamp == stamp_inputs(source, keyed[key], told[key])
        else:
            whole = row.kind != "internal" and row.stamp == stamp_files(source, keyed[key])
        if whole:
            finished[key] = row
    return finished


def reject(
    key: str, entry: RecordEntry, kind: RowKind, reason: str, stamp: Mapping[str, list[int]] | None = None
) -> LedgerRow:
    """The row of a recording that is not part of the cohort; the reason is kept to one line."""
    line = " ".join(reason.split())
    return LedgerRow(key=key, recording=entry.name, path=entry.path, kind=kind, reason=line, stamp=stamp or {})


def reject_same_name(source: Location, keyed: Mapping[str, RecordEntry]) -> list[LedgerRow]:
    """Rows for every recording whose name another one, earlier by path, already has."""
    rows = []
    for key, entry in keyed.items():
        if key != entry.name:
            first = keyed[entry.name].shown
            reason = f"A recording's name must be unique, but {first} has the same; rename or remove {entry.shown}."
            rows.append(reject(key, entry, "duplicate", reason, stamp_files(source, entry)))
    return rows


def reject_same_signal(
    source: Location, keyed: Mapping[str, RecordEntry], rows: Iterable[LedgerRow]
) -> list[LedgerRow]:
    """Rows for every accepted recording whose signal is that of another accepted one, earlier by path."""
    first: dict[str, LedgerRow] = {}
    rejected = []
    for row in sorted((row for row in rows if row.accepted), key=lambda item: item.path):
        known = first.setdefault(row.facts.get("signal_sha256") or row.key, row)
        if known is not row:
            reason = f"The same signal must not come twice, but it is that of {known.path}; remove one of the two."
            entry = keyed[row.key]
            rejected.append(reject(row.key, entry, "duplicate", reason, stamp_files(source, entry)))
    return rejected


def remove_leftovers(cohort: Location, rows: Iterable[LedgerRow]) -> None:
    """Delete half-written files of killed tasks and shards that no accepted row names."""
    kept = {row.shard.file.rsplit("/", 1)[-1] for row in rows if row.shard is not None}
    for folder in (SHARDS, LEDGER):
        for name in list_sizes(cohort / folder):
            if name.endswith(".part") or (folder == SHARDS and name not in kept):
                (cohort / folder / name).delete()

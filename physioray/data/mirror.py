"""Keeps shards of a bucket in a local folder of bounded size, so that every pass but the first reads the local disk.

Two thousand passes over 36 GB would otherwise be 72 TB of requests. A shard is known by the hash of its content, so
the copy of a cohort that was made anew is another one. Shards that no longer fit are read from the bucket, by range:
nothing of the cohort in use is thrown out for another part of it, which the next pass would only fetch again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from filelock import FileLock

from physioray.storage import Location, StorageError, is_disk_full

FOLDER_VARIABLE, SIZE_VARIABLE = "PHYSIORAY_MIRROR", "PHYSIORAY_MIRROR_GB"
DEFAULT_GB = 100.0
SPARE_SHARE = 0.1
"""Share of the disk that is never filled."""

IDLE_SECONDS = 3600.0
"""Copies of other cohorts that nobody has used for so long may be thrown out to make room."""

_CHUNK = 8 << 20


class Mirror:
    """Local copies of the shards of one cohort.

    Args:
        folder: of all mirrored cohorts on this machine; shared by its processes.
        cohort: name of the cohort's folder in it, its fingerprint.
        max_bytes: of all cohorts together.
    """

    def __init__(self, folder: str | os.PathLike[str], cohort: str, max_bytes: float) -> None:
        self.root = Path(folder)
        # The name comes from the bucket's manifest, and must not lead out of the folder.
        plain = re.fullmatch(r"[\w-]+", cohort)
        self.folder = self.root / (cohort if plain else hashlib.sha256(cohort.encode()).hexdigest())
        self.max_bytes = max_bytes

    @classmethod
    def open(cls, cohort: str) -> Mirror:
        """The mirror that the environment names: PHYSIORAY_MIRROR (a folder) and PHYSIORAY_MIRROR_GB (default 100).

        Raises:
            StorageError: the size is not a number.
        """
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(cache, "physioray", "shards")
        text = os.environ.get(SIZE_VARIABLE, str(DEFAULT_GB))
        try:
            size = float(text) * 1e9
        except ValueError:
            raise StorageError(f"{SIZE_VARIABLE} must be a number of GB, but is {text!r}.") from None
        return cls(folder, cohort, size)

    def fetch(self, source: Location, sha256: str | None) -> Path | None:
        """The local copy of a shard, made now if there is none; None if there is no room for it.

        Args:
            source: where the shard lies.
            sha256: of its content; unchecked, and the name is used instead, if None.

        Raises:
            StorageError: what was read is not what the manifest lists.
        """
        if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise StorageError(f"{source} must have a SHA-256 in the manifest, but it has {sha256!r}. Ingest it again.")
        place = self.folder / f"{sha256 or hashlib.sha256(source.uri.encode()).hexdigest()}.arrow"
        if place.exists():
            return place
        self.folder.mkdir(parents=True, exist_ok=True)
        # One process of a machine copies, the others wait for it.
        with FileLock(f"{place}.lock"):
            if place.exists():
                return place
            part = self._reserve(place, source.info().size or 0)
            if part is None:
                return None
            try:
                self._copy(source, part, sha256)
                os.replace(part, place)
            except OSError as error:
                part.unlink(missing_ok=True)
                if is_disk_full(error):
                    return None
                raise
        os.utime(self.folder)
        return place

    def _copy(self, source: Location, part: Path, sha256: str | None) -> None:
        digest = hashlib.sha256()
        with source.filesystem.open_input_stream(source.path) as stream, open(part, "r+b") as sink:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise StorageError(
                f"{source} must be what the cohort's manifest lists, but its content differs. Ingest the cohort again."
            )

    def _reserve(self, place: Path, size: int) -> Path | None:
        """An empty file that counts with its full size, so that processes which copy at once stay within the bound."""
        with FileLock(str(self.root / "room.lock")):
            if not self._make_room(size):
                return None
            part = place.with_suffix(f".{uuid.uuid4().hex[:8]}.part")
            with open(part, "wb") as file:
                file.truncate(size)
            return part

    def _make_room(self, size: int) -> bool:
        """True if `size` more bytes fit, after throwing out idle copies of other cohorts, the longest unused first."""
        for part in self.root.glob("*/*.part"):
            if time.time() - part.stat().st_mtime > IDLE_SECONDS:  # its process has died
                part.unlink(missing_ok=True)
        disk = shutil.disk_usage(self.root)
        used = {folder: measure_folder(folder) for folder in self.root.iterdir() if folder.is_dir()}
        room = min(self.max_bytes - sum(used.values()), disk.free - SPARE_SHARE * disk.total)
        idle = sorted((folder for folder in used if folder != self.folder), key=lambda folder: folder.stat().st_mtime)
        for folder in idle:
            if room >= size or time.time() - folder.stat().st_mtime < IDLE_SECONDS:
                break
            shutil.rmtree(folder, ignore_errors=True)
            room += used[folder]
        return room >= size


def measure_folder(folder: Path) -> int:
    """Bytes of all files of a folder."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:  # a part that has just become whole
            continue
    return total

"""Reads and writes by URI, on a folder or a bucket alike, and never leaves half a file behind.

Everything goes through `pyarrow.fs`. On a local disk a file is written beside its place and renamed; on a
bucket one upload is whole or absent by itself. A folder counts as finished when its `done.json`, written
last, lists every file with size and hash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

DONE = "done.json"

ATTEMPTS = 10
"""How often a request to a bucket is made before it counts as failed; the pauses are random, and double up to 20 s."""


class StorageError(OSError):
    """A place could not be read or written; the message names it and says what to do."""


@dataclass(frozen=True)
class Location:
    """A file or folder somewhere: a file system and a path in it."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def folder(self) -> Location:
        """The folder that this lies in."""
        return Location(
            self.filesystem, self.path.rstrip("/").rsplit("/", 1)[0], self.uri.rstrip("/").rsplit("/", 1)[0]
        )

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine, which can be memory-mapped."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self) -> bool:
        """True if a file or folder stands here."""
        return self.info().type != pafs.FileType.NotFound

    def info(self) -> pafs.FileInfo:
        """Type and size of what stands here."""
        return self.filesystem.get_file_info(self.path)

    def list(self, recursive: bool = False) -> list[Location]:
        """What lies in this folder, sorted by name; empty if the folder does not exist."""
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        root = self.path.rstrip("/")
        names = sorted(info.path[len(root) + 1 :] for info in self.filesystem.get_file_info(selector))
        return [self / name for name in names]

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: no file stands here.
        """
        with self.filesystem.open_input_file(self.path) as source:
            return source.read()

    def read_text(self) -> str:
        """The whole file as UTF-8 text."""
        return self.read_bytes().decode("utf-8")

    def read_json(self) -> Any:
        """The whole file as JSON."""
        return json.loads(self.read_bytes())

    def make_folder(self) -> None:
        """Create this folder and its parents where the file system has folders."""
        self.filesystem.create_dir(self.path, recursive=True)

    def write_bytes(self, content: bytes | pa.Buffer) -> None:
        """Write the file whole or not at all; an older file is replaced in one step."""
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as sink:
                sink.write(content)
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # The name is unique so that two writers never share a half-written file.
        beside = f"{self.path}.{uuid.uuid4().hex[:8]}.part"
        try:
            with open(beside, "wb") as sink:
                sink.write(content)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(beside, self.path)
        except BaseException:
            if os.path.exists(beside):
                os.unlink(beside)
            raise

    def write_text(self, text: str) -> None:
        """Write UTF-8 text whole or not at all."""
        self.write_bytes(text.encode("utf-8"))

    def write_json(self, value: Any) -> None:
        """Write JSON with sorted keys, whole or not at all."""
        self.write_text(dump_json(value))

    def delete(self) -> None:
        """Remove the file or folder that stands here, if any."""
        kind = self.info().type
        if kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)
        elif kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)


def open_location(uri: str | os.PathLike[str], *, anonymous: bool = False) -> Location:
    """Open a folder or bucket: a path, `file:///path` or `s3://bucket/prefix`.

    Args:
        uri: where it is. A path without a scheme is made absolute.
        anonymous: read a public bucket without credentials (there is no URI form for this).

    Raises:
        StorageError: the scheme is unknown or the place cannot be opened.
    """
    text = os.fspath(uri)
    scheme = urlsplit(text).scheme
    if scheme in ("", "file"):
        path = os.path.abspath(text if scheme == "" else urlsplit(text).path)
        return Location(pafs.LocalFileSystem(), path, path)
    if scheme != "s3":
        raise StorageError(f"A place must be a path, file:// or s3:// URI, but got {text!r}.")
    try:
        return _open_bucket(text, anonymous)
    except (OSError, ValueError) as error:
        raise StorageError(f"{text} could not be opened: {error}. Check the URI, region and credentials.") from error


def _open_bucket(text: str, anonymous: bool) -> Location:
    parts = urlsplit(text)
    query = dict(parse_qsl(parts.query))
    unknown = sorted(set(query) - {"region", "scheme", "endpoint_override"})
    if unknown:
        raise ValueError(f"it may say region, scheme and endpoint_override, but says {', '.join(unknown)}")
    bucket = parts.netloc.rpartition("@")[2]
    options: dict[str, Any] = {name: query[name] for name in ("scheme", "endpoint_override") if name in query}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in query:
        options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
    region = query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not anonymous and "endpoint_override" not in options:
        region = pafs.resolve_s3_region(bucket)
    if anonymous:
        options["anonymous"] = True
    elif parts.username and parts.password:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password)}
    # A bucket that is asked by many machines at once answers "slow down" or 5xx for a while.
    options["retry_strategy"] = pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    filesystem = pafs.S3FileSystem(region=region or "us-east-1", **options)
    return Location(filesystem, f"{bucket}{unquote(parts.path)}".rstrip("/"), text.split("?")[0])


def is_disk_full(error: BaseException) -> bool:
    """True if an error says that no space, or no quota, is left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def dump_json(value: Any) -> str:
    """JSON text that is the same for the same value: sorted keys, one line per field."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def hash_bytes(content: bytes | pa.Buffer) -> str:
    """SHA-256 of a file's content, as hexadecimal text."""
    return hashlib.sha256(content).hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 of a value's JSON form, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def list_differences(
    known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "", *, skip: Sequence[str] = ()
) -> list[str]:
    """What differs between two nested mappings, a phrase per entry; the names in `skip` may differ."""
    found = []
    for key in sorted(set(known) | set(wanted)):
        if key in skip or known.get(key) == wanted.get(key):
            continue
        before, now = known.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += list_differences(before, now, f"{prefix}{key}.", skip=skip)
        else:
            found.append(f"{prefix}{key} was {before!r} and is now {now!r}")
    return found


def commit_folder(folder: Location, names: Iterable[str] | None = None, **facts: Any) -> None:
    """Declare a folder finished: write its `done.json` with the size and hash of every file, last.

    Args:
        folder: the folder.
        names: its files; all that stand there if None.
        facts: plain values to be kept beside the list of files.
    """
    if names is None:
        names = [item.path[len(folder.path) + 1 :] for item in folder.list(recursive=True)]
        names = [name for name in names if name != DONE and (folder / name).info().type == pafs.FileType.File]
    files = {}
    for name in sorted(names):
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hash_bytes(content)}
    (folder / DONE).write_json(facts | {"files": files})


def is_committed(folder: Location) -> bool:
    """True if the folder's `done.json` exists and every file it lists is there in its full size."""
    done = folder / DONE
    if not done.exists():
        return False
    files = done.read_json()["files"]
    return all((folder / name).info().size == entry["bytes"] for name, entry in files.items())

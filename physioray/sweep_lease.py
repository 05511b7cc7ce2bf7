"""Makes sure that one process sweeps a folder, and that nobody else still writes to a trial that is started again.

Buckets have no locks, so a lease is a small file that its holder rewrites every `BEAT_SECONDS`. On one machine a
holder is gone when its process is; elsewhere when its file has not changed for `LEASE_SECONDS` of the onlooker's own
clock. Whoever works for a sweep looks at the owner's token all the while, and ends itself when it is another's.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from physioray.storage import Location, StorageError

OWNER_FILE = "owner.json"
RUNNING_FILE = "running.json"

BEAT_SECONDS = 2.0
LEASE_SECONDS = 20.0
"""A holder whose file has not changed for so long, ten beats, is taken for dead."""

LOOK_SECONDS = 1.0
"""How often a worker looks whether its sweep still belongs to the one that started it."""

PATIENCE_SECONDS = 90.0
FENCED = 17
"""Exit status of a process that found its sweep taken over."""


def describe_process() -> dict[str, Any]:
    """This process, so that others on the same machine can see whether it lives."""
    return {
        "host": platform.node(),
        "boot": _read_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _read_link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "began": _read_start(os.getpid()),
    }


def _read_line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _read_link(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""


def _read_start(process: int) -> str | None:
    """When a process began, as the system counts it; None if there is none, or it is dead and not yet reaped."""
    try:
        parts = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if parts[0] in ("Z", "X") else parts[19]


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a holder's process lives; None if that cannot be seen from here (another machine or container)."""
    here = describe_process()
    if not here["boot"] or any(holder.get(name) != here[name] for name in ("host", "boot", "namespace")):
        return None
    return _read_start(holder["pid"]) == holder["began"]


def is_held(place: Location, *, lease: float = LEASE_SECONDS) -> bool:
    """Whether a lease's holder lives; of one elsewhere it takes up to `lease` seconds of watching to say no."""
    first, until = _read(place), time.monotonic() + lease
    while (current := _read(place)) is not None:
        alive = is_alive(current)
        if alive is not None:
            return alive
        if current != first:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(min(LOOK_SECONDS, lease / 4))
    return False


def _read(place: Location) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        return place.read_json() if place.exists() else None
    return None


def wait_until_free(place: Location, *, patience: float = PATIENCE_SECONDS, lease: float = LEASE_SECONDS) -> None:
    """Wait until a lease's holder is gone.

    Raises:
        StorageError: it still lives after `patience` seconds.
    """
    until = time.monotonic() + patience
    while is_held(place, lease=lease):
        if time.monotonic() > until:
            holder = _read(place) or {}
            raise StorageError(
                f"{place} must have been let go, but process {holder.get('pid')} on {holder.get('host')} still works "
                "on it. End that process and run the same command again."
            )
        time.sleep(0.1)


@contextmanager
def hold(place: Location, token: str, watch: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lease while the body runs; it is given back at the end.

    Args:
        place: the lease's file.
        token: of the sweep's owner.
        watch: called every `LOOK_SECONDS` in a thread of its own.
    """
    done = threading.Event()
    holder = describe_process() | {"token": token}

    def beat() -> None:
        count, beaten = 0, time.monotonic()
        while not done.wait(LOOK_SECONDS):
            if watch is not None:
                watch()
            if time.monotonic() - beaten >= BEAT_SECONDS:
                count, beaten = count + 1, time.monotonic()
                # A disk that is full or away for a moment must not end what works; a lost lease is seen by `watch`.
                with suppress(OSError):
                    place.write_json(holder | {"beat": count})

    place.write_json(holder | {"beat": -1})
    beater = threading.Thread(target=beat, daemon=True, name="lease")
    beater.start()
    try:
        yield
    finally:
        done.set()
        beater.join()
        found = _read(place)
        # Somebody else's lease is not ours to give back.
        if found is not None and found.get("token") == token:
            place.delete()


@contextmanager
def own_sweep(folder: Location, *, lease: float = LEASE_SECONDS) -> Iterator[str]:
    """Be the one process that sweeps a folder while the body runs; yields a token that all its workers carry.

    Raises:
        StorageError: another process sweeps it.
    """
    place = folder / OWNER_FILE
    if is_held(place, lease=lease):
        holder = _read(place) or {}
        raise StorageError(
            f"One process at a time sweeps a folder, but {folder} is held by process {holder.get('pid')} on "
            f"{holder.get('host')}. Wait for it or end it, or name another folder."
        )
    token = uuid.uuid4().hex
    # A process that slept through its lease finds a new owner when it wakes, and must not beat over it.
    with hold(place, token, partial(end_if_lost, folder, token)):
        yield token


def is_owner(folder: Location, token: str) -> bool:
    """Whether a sweep still belongs to the owner with this token."""
    found = _read(folder / OWNER_FILE)
    return found is not None and found.get("token") == token


def end_if_lost(folder: Location, token: str) -> None:
    """End this process at once if the sweep belongs to another owner, so that it cannot write any more."""
    try:
        lost = not is_owner(folder, token)
    except OSError:
        # A bucket that does not answer is no proof; the next look will tell.
        return
    if lost:
        print(f"physioray: {folder} is swept by another process now; this one ends.", file=sys.stderr, flush=True)
        os._exit(FENCED)

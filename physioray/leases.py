"""A lease says who works on something; it expires when its holder is gone or its heartbeat stands still.

Steps, trials and whole sweeps are held by such files. On one machine a holder is gone when its process is; elsewhere
when its file has not changed for the lease's time by the onlooker's own clock, as clocks of machines differ.

On a file system a lease is claimed under a lock, so one claimant gets it. A bucket offers no lock here: the claimant
writes, waits a moment and looks whether its claim still stands; two that claim within the same moment may both go on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from physioray.storage import Location, StorageError

HEARTBEAT_SECONDS = 2.0
LEASE_SECONDS = 20.0
"""A holder elsewhere whose file has not changed for so long, ten beats, is taken for dead."""

LOOK_SECONDS = 1.0
"""How often a holder looks whether it still is one."""

PATIENCE_SECONDS = 90.0
SETTLE_SECONDS = 1.0
"""After claiming in a bucket: how long others that claim at the same moment have to show."""

ORPHAN_SECONDS = 3.0
"""Workers of a process that was killed may write on for so long before they notice."""

FENCED = 17
"""Exit status of a process that found its work taken over."""

_seen: dict[str, tuple[tuple[str, int], float]] = {}
"""By lease: the heartbeat last seen and when, on this machine's own clock."""


class LeaseLost(RuntimeError):
    """This process stood still for so long that another took its work over."""


@dataclass
class Lease:
    """A claim by this process.

    Attributes:
        place: the lease's file.
        heartbeat_seconds: how often `renew` should be called.
        token: of this claim; workers of the claimant carry it too.
        attempt: subfolder that the last claimant worked in, if any.
        beats: heartbeats so far.
    """

    place: Location
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    attempt: str = ""
    beats: int = 0

    def describe(self, *, released: bool = False) -> dict[str, Any]:
        """The lease as it stands in its file."""
        return describe_process() | {
            "token": self.token,
            "attempt": self.attempt,
            "beats": self.beats,
            "released": released,
        }

    def choose_attempt(self, resume: bool) -> str:
        """The subfolder to work in: the last claimant's to go on in, or a new one."""
        if not (resume and self.attempt):
            self.attempt = f"attempt-{self.token}"
        self.write()
        return self.attempt

    def write(self) -> None:
        """Put the claim, or a heartbeat, into the file."""
        self.place.write_json(self.describe())

    def renew(self) -> bool:
        """One heartbeat; False if the lease has gone to another process."""
        if not self.is_mine():
            return False
        self.beats += 1
        self.write()
        return True

    def check(self) -> None:
        """Make sure that this process still holds the lease.

        Raises:
            LeaseLost: it does not.
        """
        if not self.is_mine():
            raise LeaseLost(f"The lease of {self.place.folder} must still be this process's, but another holds it.")

    def release(self) -> None:
        """Let others claim at once; the attempt is remembered, if there is one. Another's lease is left alone."""
        if not self.is_mine():
            return
        if self.attempt:
            self.place.write_json(self.describe(released=True))
        else:
            self.place.delete()

    def is_mine(self) -> bool:
        """True while the file holds this claim."""
        return _read(self.place).get("token") == self.token


@contextmanager
def hold(lease: Lease, watch: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep a lease alive while the body runs, and let it go afterwards whatever happens.

    Args:
        lease: claimed, or written by whoever knows that nobody else holds it.
        watch: called every `LOOK_SECONDS` in the thread that beats.
    """
    stop = threading.Event()
    pause = min(LOOK_SECONDS, lease.heartbeat_seconds)

    def beat() -> None:
        beaten = time.monotonic()
        while not stop.wait(pause):
            if watch is not None:
                watch()
            if time.monotonic() - beaten < lease.heartbeat_seconds:
                continue
            beaten = time.monotonic()
            # A store that is full or away for a moment must not end the work; whoever holds the lease looks again.
            with suppress(OSError):
                if not lease.renew():
                    return

    beater = threading.Thread(target=beat, daemon=True, name="lease")
    beater.start()
    try:
        yield
    finally:
        stop.set()
        beater.join()
        lease.release()


def claim_lease(
    place: Location,
    *,
    lease_seconds: float = LEASE_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    orphan_seconds: float = ORPHAN_SECONDS,
) -> Lease | None:
    """Claim something for this process, or None while another holds it.

    Args:
        place: the lease's file; neither it nor its folder need exist.
        lease_seconds: a heartbeat that stands still for so long has ended.
        heartbeat_seconds: between this process's own heartbeats.
        orphan_seconds: waited after taking over from a holder that did not let go by itself.
    """
    lease = Lease(place, heartbeat_seconds)
    with _lock(place) as locked:
        found = _read(place)
        if not _is_free(found, place, lease_seconds):
            return None
        lease.attempt = str(found.get("attempt", ""))
        lease.write()
    if not locked:
        time.sleep(SETTLE_SECONDS)
        if not lease.is_mine():
            return None
    if found and not found.get("released"):
        # A killed driver's workers may live on for a moment; they must not write beside the new owner's.
        time.sleep(orphan_seconds)
    return lease


@contextmanager
def own(place: Location, *, lease_seconds: float = LEASE_SECONDS) -> Iterator[str]:
    """Be the one process that works on a folder while the body runs; yields a token that all its workers carry.

    A process that slept through its lease finds a new owner when it wakes, and ends at once (`end_if_lost`).

    Args:
        place: the lease's file in the folder.
        lease_seconds: see `claim_lease`.

    Raises:
        StorageError: another process does.
    """
    first = _read(place)
    while (lease := claim_lease(place, lease_seconds=lease_seconds, orphan_seconds=0)) is None:
        holder = _read(place)
        if holder and (is_alive(holder) or holder.get("beats") != first.get("beats")):
            raise StorageError(
                f"One process at a time works on a folder, but {place.folder} is held by {_name(holder)}. "
                "Wait for it or end it, or name another folder."
            )
        time.sleep(min(LOOK_SECONDS, lease_seconds / 4))
    with hold(lease, partial(end_if_lost, place, lease.token)):
        yield lease.token


def end_if_lost(place: Location, token: str) -> None:
    """End this process at once if a lease has gone to another owner, so that it cannot write any more."""
    try:
        lost = _read(place).get("token") != token
    except OSError:
        # A bucket that does not answer is no proof; the next look will tell.
        return
    if lost:
        print(f"physioray: {place.folder} belongs to another process now; this one ends.", file=sys.stderr, flush=True)
        os._exit(FENCED)


def is_held(place: Location, *, lease_seconds: float = LEASE_SECONDS) -> bool:
    """True while some process holds a lease, as far as one look, and those before it, can tell."""
    return not _is_free(_read(place), place, lease_seconds)


def wait_until_free(
    place: Location, *, patience: float = PATIENCE_SECONDS, lease_seconds: float = LEASE_SECONDS
) -> None:
    """Wait until a lease's holder is gone.

    Raises:
        StorageError: it still lives after `patience` seconds.
    """
    until = time.monotonic() + patience
    while is_held(place, lease_seconds=lease_seconds):
        if time.monotonic() > until:
            raise StorageError(
                f"{place} must have been let go, but {_name(_read(place))} still works on it. End that process and "
                "run the same command again."
            )
        time.sleep(0.1)


def describe_process() -> dict[str, Any]:
    """This process, so that others on the same machine can see whether it lives."""
    return {"machine": _name_machine(), "process": os.getpid(), "started": _read_state(os.getpid())[1]}


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a holder's process lives (a reused number does not count); None if that cannot be seen from here."""
    if holder.get("machine") != _name_machine():
        return None
    number = int(holder.get("process", 0))
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, started = _read_state(number)
    # Dead and not yet reaped is dead.
    return state not in ("Z", "X") and (started is None or holder.get("started") in (None, started))


def _is_free(found: dict[str, Any], place: Location, lease_seconds: float) -> bool:
    """True if nobody claims: no lease, a released one, its process gone, or its heartbeat still for too long."""
    if not found or found.get("released") or is_alive(found) is False:
        return True
    mark, now = (str(found.get("token")), int(found.get("beats", 0))), time.monotonic()
    if _seen.get(place.uri, (None, 0.0))[0] != mark:
        _seen[place.uri] = (mark, now)
    return now - _seen[place.uri][1] > lease_seconds


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {str(holder.get('machine')).split(' ')[0]}"


def _name_machine() -> str:
    """Where process numbers mean the same: a machine since it was started, and a container's own count of processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id") as source:
            parts.append(source.read().strip())
    return " ".join(parts)


def _read_state(process: int) -> tuple[str, str | None]:
    """State and start of a process in the kernel's words, or nothing and None where the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as source:
            parts = source.read().rsplit(b")", 1)[1].split()
            return parts[0].decode(), parts[19].decode()
    except (OSError, IndexError):
        return "", None


def _read(place: Location) -> dict[str, Any]:
    try:
        content = place.read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _lock(place: Location) -> Iterator[bool]:
    """Nobody else on this file system is in the body at the same time; yields False where there are no locks."""
    if not place.is_local:
        yield False
        return
    os.makedirs(place.folder.path, exist_ok=True)
    handle = os.open(f"{place.path.removesuffix('.json')}.lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            yield False
            return
        yield True
    finally:
        os.close(handle)

"""A lease says who computes in a folder; it expires when its heartbeat stands still.

On a file system a lease is claimed under a lock, so one claimant gets it. A bucket offers no lock here: the claimant
writes, waits a moment and looks whether its claim still stands; two that claim within the same moment may both go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from physioray.storage import Location

LEASE_FILE = "lease.json"
SETTLE_SECONDS = 1.0
"""After claiming in a bucket: how long others that claim at the same moment have to show."""

ORPHAN_SECONDS = 3.0
"""Workers of a process that was killed may write on for so long before they notice."""

_seen: dict[str, tuple[tuple[str, int], float]] = {}
"""By lease: the heartbeat last seen and when, on this machine's own clock, as clocks of machines differ."""


class LeaseLost(RuntimeError):
    """This process stood still for so long that another took its work over."""


@dataclass
class Lease:
    """A claim on a folder by this process.

    Attributes:
        folder: what is claimed.
        heartbeat_seconds: how often `renew` should be called.
        token: of this claim.
        attempt: subfolder that the last claimant worked in, if any.
        beats: heartbeats so far.
    """

    folder: Location
    heartbeat_seconds: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    attempt: str = ""
    beats: int = 0

    def describe(self, *, released: bool = False) -> dict[str, Any]:
        """The lease as it stands in its file."""
        return {
            "token": self.token,
            "attempt": self.attempt,
            "beats": self.beats,
            "released": released,
            "machine": _name_machine(),
            "process": os.getpid(),
            "started": _read_start(os.getpid()),
        }

    def choose_attempt(self, resume: bool) -> str:
        """The subfolder to work in: the last claimant's to go on in, or a new one."""
        if not (resume and self.attempt):
            self.attempt = f"attempt-{self.token}"
        self._write()
        return self.attempt

    def renew(self) -> bool:
        """One heartbeat; False if the lease has gone to another process."""
        if not self._is_mine():
            return False
        self.beats += 1
        self._write()
        return True

    def check(self) -> None:
        """Make sure that this process still holds the lease.

        Raises:
            LeaseLost: it does not.
        """
        if not self._is_mine():
            raise LeaseLost(f"The lease of {self.folder} must still be this process's, but another holds it.")

    def release(self) -> None:
        """Let others claim at once; what was done so far can be gone on with."""
        if self._is_mine():
            (self.folder / LEASE_FILE).write_json(self.describe(released=True))

    def _write(self) -> None:
        (self.folder / LEASE_FILE).write_json(self.describe())

    def _is_mine(self) -> bool:
        return _read(self.folder).get("token") == self.token

    @staticmethod
    def is_held(folder: Location, lease_seconds: float) -> bool:
        """True while some process holds the folder's lease, as far as one look can tell."""
        return not _is_free(_read(folder), folder, lease_seconds)


def claim_lease(folder: Location, *, lease_seconds: float, heartbeat_seconds: float) -> Lease | None:
    """Claim a folder for this process, or None while another holds it.

    Args:
        folder: what to claim; it need not exist.
        lease_seconds: a heartbeat that stands still for so long has ended.
        heartbeat_seconds: between this process's own heartbeats.
    """
    lease = Lease(folder=folder, heartbeat_seconds=heartbeat_seconds)
    with _lock(folder) as locked:
        found = _read(folder)
        if not _is_free(found, folder, lease_seconds):
            return None
        lease.attempt = str(found.get("attempt", ""))
        lease._write()
    if not locked:
        time.sleep(SETTLE_SECONDS)
        if not lease._is_mine():
            return None
    if found and not found.get("released"):
        # A killed driver's workers may live on for a moment; they must not write beside the new owner's.
        time.sleep(ORPHAN_SECONDS)
    return lease


def _is_free(found: dict[str, Any], folder: Location, lease_seconds: float) -> bool:
    """True if nobody claims: no lease, a released one, its process gone, or its heartbeat still for too long."""
    if not found or found.get("released"):
        return True
    if found.get("machine") == _name_machine() and not _is_alive(found):
        return True
    mark, now = (str(found.get("token")), int(found.get("beats", 0))), time.monotonic()
    if _seen.get(folder.uri, (None, 0.0))[0] != mark:
        _seen[folder.uri] = (mark, now)
    return now - _seen[folder.uri][1] > lease_seconds


def _is_alive(found: dict[str, Any]) -> bool:
    """True if the process that wrote a lease on this machine still runs (a reused number does not count)."""
    number = int(found.get("process", 0))
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = found.get("started")
    return started is None or _read_start(number) in (None, started)


def _name_machine() -> str:
    """Where process numbers mean the same: a machine since it was started, and a container's own count of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id") as source:
            parts.append(source.read().strip())
    return " ".join(parts)


def _read_start(process: int) -> str | None:
    """When a process started, in the kernel's count, or None where the system does not say."""
    try:
        with open(f"/proc/{process}/stat", "rb") as source:
            return source.read().rsplit(b")", 1)[1].split()[19].decode()
    except (OSError, IndexError):
        return None


def _read(folder: Location) -> dict[str, Any]:
    try:
        content = (folder / LEASE_FILE).read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _lock(folder: Location) -> Iterator[bool]:
    """Nobody else on this file system is in the body at the same time; yields False where there are no locks."""
    if not folder.is_local:
        yield False
        return
    os.makedirs(folder.path, exist_ok=True)
    handle = os.open(f"{folder.path}/lease.lock", os.O_CREAT | os.O_RDWR)
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

"""Computes each result once: a step is known by its name, version, settings and inputs, and is kept in a folder.

A step's folder is `ROOT/NAME/IDENTITY/`. Its files lie in a subfolder of the attempt that made them, and it counts
as finished when its `done.json`, written last, lists them with size and hash. Whoever computes holds a lease with a
heartbeat, so two processes that ask at once compute once. A bucket has no lock: there two may compute in rare cases,
each in files of its own, and the result whose `done.json` stands is the one that counts.
"""

from __future__ import annotations

import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from physioray import __version__
from physioray.leases import Lease, LeaseLost, claim_lease
from physioray.stopwatch import Stopwatch
from physioray.storage import DONE, Location, StorageError, commit_folder, hash_bytes, hash_value, open_location

STEP_FILE = "step.json"
SMALL = 1 << 20
"""Files up to this size are compared by hash whenever a step is found; larger ones by size (`verify` hashes all)."""


class StepDamaged(StorageError):
    """A finished step's files are not those it was finished with."""


@runtime_checkable
class Screen(Protocol):
    """Where a step says that it waits."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a result depends on; nothing else may change it.

    Attributes:
        name: what is computed, for example `pretrain`; one folder per name.
        version: of the code that computes it: raised when the same settings would give another result.
        settings: plain values, only those that affect the result.
        inputs: by role, the identities of what is read: of other steps, or fingerprints of cohorts.
    """

    name: str
    version: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The step as plain values, as they stand in its folder."""
        return {
            "name": self.name,
            "version": self.version,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }

    @property
    def identity(self) -> str:
        """Hash of everything the result depends on, the same on every machine."""
        return hash_value(self.describe())[:24]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step as it lies in a store.

    Attributes:
        name, identity: of the step.
        state: `done`, `running` (someone holds its lease), `unfinished` or `damaged`.
        bytes: size of its files.
        created: seconds since 1970 when it was begun.
        seconds: it took to compute, without the steps that were computed on the way; None if unfinished.
        cpu_seconds: of the process meanwhile, all its threads together; None if unfinished, or of an older version.
        device: that computed it, for example `cuda`; empty in an older version.
        commit: version of physioray and commit it was made with, recorded and not part of the identity.
        inputs: by role, identities.
        settings: plain values.
        referred: something that still exists refers to it.
        folder: where it lies.
    """

    name: str
    identity: str
    state: str
    bytes: int
    created: float
    seconds: float | None
    cpu_seconds: float | None
    device: str
    commit: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    referred: bool
    folder: Location


class StepStore:
    """A folder or bucket of finished steps, shared by everything that computes on the same data.

    Args:
        root: the folder; it need not exist yet.
        commit: what code computes, recorded in every step.
        device: where it computes, recorded in every step.
        lease_seconds: a lease whose heartbeat stands still for so long is taken over.
        heartbeat_seconds: between two heartbeats.
    """

    def __init__(
        self,
        root: Location,
        *,
        commit: str = "",
        device: str = "cpu",
        lease_seconds: float = 60,
        heartbeat_seconds: float = 5,
    ) -> None:
        self.root, self.commit, self.device = root, commit, device
        self.lease_seconds, self.heartbeat_seconds = lease_seconds, heartbeat_seconds
        self.used: dict[str, Step] = {}
        self._clock = Stopwatch()

    def locate(self, step: Step) -> Location:
        """The folder that a step has, whether or not it exists."""
        return self.root / step.name / step.identity

    def find(self, step: Step) -> Location | None:
        """The finished step's files, or None.

        Raises:
            StepDamaged: the step was finished, but a file is missing or changed.
        """
        folder = self.locate(step)
        if not (folder / DONE).exists():
            return None
        done = _read_done(folder)
        check_files(folder, done, below=SMALL)
        self.used[step.identity] = step
        return folder / str(done["attempt"])

    def run(
        self,
        step: Step,
        compute: Callable[[Location], object],
        *,
        resumable: bool = False,
        screen: Screen | None = None,
    ) -> Location:
        """The step's files: found, or computed now, or waited for while another process computes them.

        Args:
            step: what to compute.
            compute: writes the result into the folder it is given.
            resumable: `compute` goes on from what an interrupted one has left in the folder (training). Otherwise a
                new attempt starts with an empty folder.
            screen: where it is said that the step waits for another process.

        Returns:
            The folder with the files that `compute` has written.

        Raises:
            StepDamaged: the step was finished, but its files have been changed since.
        """
        told = False
        while (found := self.find(step)) is None:
            lease = claim_lease(
                self.locate(step), lease_seconds=self.lease_seconds, heartbeat_seconds=self.heartbeat_seconds
            )
            if lease is not None:
                try:
                    self._compute(step, compute, lease, resumable)
                except LeaseLost:
                    continue  # another process took over while this one stood still; its result counts
                continue
            if screen is not None and not told:
                screen.say(f"Another process computes {step.name} {step.identity}; waiting for it ...")
                told = True
            time.sleep(min(1.0, self.heartbeat_seconds))
        return found

    def _compute(self, step: Step, compute: Callable[[Location], object], lease: Lease, resumable: bool) -> None:
        folder = self.locate(step)
        with _hold(lease):
            if (folder / DONE).exists():  # finished between looking and claiming
                return
            attempt = lease.choose_attempt(resumable)
            place = folder / attempt
            if not resumable:
                place.delete()
            place.make_folder()
            (folder / STEP_FILE).write_json(step.describe() | {"commit": self.commit, "created": time.time()})
            try:
                with self._clock.measure() as spent:
                    compute(place)
            except Exception:
                lease.check()  # whoever has taken over has deleted this attempt's files, and its result counts
                raise
            lease.check()
            names = [f"{attempt}/{item.path[len(place.path) + 1 :]}" for item in _list_files(place)]
            # An older attempt's leftovers are not part of the result.
            for other in folder.list():
                if other.name.startswith("attempt-") and other.name != attempt:
                    other.delete()
            commit_folder(folder, [STEP_FILE, *names], attempt=attempt, device=self.device, **spent)

    def list_steps(self, within: Location | None = None) -> list[StepRecord]:
        """Every step in the store, newest first within its name; those that results in a folder rest on, if given."""
        raw = [(kind.name, folder) for kind in self._list_kinds() for folder in kind.list()]
        inputs = {folder.name: _read_inputs(folder) for _, folder in raw}
        referred = self._find_referred(inputs, within)
        records = [
            _describe_folder(name, folder, folder.name in referred, self.lease_seconds)
            for name, folder in raw
            if within is None or folder.name in referred
        ]
        return sorted(records, key=lambda record: (record.name, -record.created))

    def refer(self, place: Location, steps: Iterable[Step] | None = None) -> None:
        """Record that the results at `place` rest on some steps (all that this store handed out, if None).

        As long as `place` exists, `list_steps` calls these steps and all that they were made from referred to.
        """
        identities = sorted(step.identity for step in (self.used.values() if steps is None else steps))
        name = f"{hash_value(place.uri)[:16]}.json"
        (self.root / "references" / name).write_json({"place": place.uri, "steps": identities})

    def remove(self, records: Iterable[StepRecord]) -> None:
        """Delete steps; of each its `done.json` first, so that one half deleted does not look finished.

        Raises:
            StorageError: one is being computed right now.
        """
        for record in records:
            if record.state == "running":
                raise StorageError(
                    f"A step that is being computed cannot be removed, but {record.name} {record.identity} is. "
                    "Stop the process that computes it first."
                )
            (record.folder / DONE).delete()
            record.folder.delete()

    def _list_kinds(self) -> list[Location]:
        return [item for item in self.root.list() if item.name != "references" and not item.info().is_file]

    def _find_referred(self, inputs: Mapping[str, Mapping[str, str]], within: Location | None) -> set[str]:
        waiting: list[str] = []
        for item in (self.root / "references").list():
            content = item.read_json()
            inside = within is None or f"{content['place']}/".startswith(f"{within.uri.rstrip('/')}/")
            if inside and open_location(content["place"]).exists():
                waiting += content["steps"]
        found: set[str] = set()
        while waiting:
            identity = waiting.pop()
            if identity not in found:
                found.add(identity)
                waiting += inputs.get(identity, {}).values()
        return found


def check_files(folder: Location, done: Mapping[str, Any], *, below: int | None = None) -> None:
    """Compare a finished folder's files with its `done.json`.

    Args:
        folder: the folder.
        done: content of its `done.json`.
        below: compare hashes of files up to this size; of all files if None.

    Raises:
        StepDamaged: names the first file that is missing or differs.
    """
    for name, entry in done["files"].items():
        place = folder / name
        size = place.info().size
        wrong = ""
        if size is None:
            wrong = "is missing"
        elif size != entry["bytes"]:
            wrong = f"has {size:,} bytes and not {entry['bytes']:,}"
        elif (below is None or size <= below) and hash_bytes(place.read_bytes()) != entry["sha256"]:
            wrong = "has other content"
        if wrong:
            raise StepDamaged(
                f"A finished step must hold the files it was finished with, but {place} {wrong}. Nothing was "
                f"overwritten. Put the file back, or delete the folder {folder} to have the step computed again."
            )


@functools.cache
def find_commit() -> str:
    """Version of physioray and, where it runs from a checkout, the commit; `+` marks changes on top of it."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--exclude", "*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} {done.stdout.strip()}"


@contextmanager
def _hold(lease: Lease) -> Iterator[None]:
    """Keep a lease alive while the body runs, and let it go afterwards whatever happens."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(lease.heartbeat_seconds):
            try:
                if not lease.renew():
                    return
            except OSError:
                continue  # a store that is away for a moment must not end the work; commit checks again

    watcher = threading.Thread(target=beat, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        lease.release()


def _read_done(folder: Location) -> dict[str, Any]:
    try:
        done: dict[str, Any] = (folder / DONE).read_json()
        done["files"], done["attempt"]
    except (ValueError, KeyError, TypeError) as error:
        raise StepDamaged(
            f"{folder / DONE} must be the list of a finished step's files, but cannot be read: {error}. Nothing was "
            "overwritten. Delete the folder to have the step computed again."
        ) from error
    return done


def _read_inputs(folder: Location) -> dict[str, str]:
    try:
        found: dict[str, str] = (folder / STEP_FILE).read_json()["inputs"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def _list_files(folder: Location) -> list[Location]:
    return [item for item in folder.list(recursive=True) if item.info().is_file]


def _describe_folder(name: str, folder: Location, referred: bool, lease_seconds: float) -> StepRecord:
    facts: dict[str, Any] = {}
    state, done = "unfinished", dict[str, Any]()
    try:
        facts = (folder / STEP_FILE).read_json()
        if (folder / DONE).exists():
            done = _read_done(folder)
            check_files(folder, done, below=0)
            state = "done"
        elif Lease.is_held(folder, lease_seconds):
            state = "running"
    except (OSError, ValueError):
        state = "damaged"
    return StepRecord(
        name=name,
        identity=folder.name,
        state=state,
        bytes=sum(item.info().size or 0 for item in _list_files(folder)),
        created=float(facts.get("created", 0.0)),
        seconds=done.get("seconds"),
        cpu_seconds=done.get("cpu_seconds"),
        device=str(done.get("device", "")),
        commit=str(facts.get("commit", "")),
        inputs=facts.get("inputs", {}),
        settings=facts.get("settings", {}),
        referred=referred,
        folder=folder,
    )

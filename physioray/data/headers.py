"""What a recording's header says: its channels, their rates, units and scales, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from physioray.storage import Location

SIMULATED_COMMENT = "simulated by physioray"


class RejectedRecording(ValueError):
    """A recording cannot be used; the message is one line: what must hold, what was got, what to do."""


@dataclass(frozen=True, kw_only=True)
class RecordEntry:
    """One recording of a source: its name, and its path relative to the source without an extension.

    Attributes:
        file: path of an EDF recording with its extension; empty for WFDB, and for EDF to be found by `path`.
        hypnogram: path of the EDF+ hypnogram that belongs to it, empty if there is none.
    """

    name: str
    path: str
    file: str = ""
    hypnogram: str = ""

    @property
    def shown(self) -> str:
        """The path that tells this recording from another of the same name."""
        return self.file or self.path


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One channel of a recording as its header describes it.

    A physical value is (digital value - baseline) / gain, in `unit`.

    Attributes:
        rate: samples per second, in Hz.
        format: WFDB storage format, `16` for plain 16-bit integers; `mat5` for an ATM export, `edf`.
        file: name of the signal file, beside the header.
        offset: bytes before the first sample.
        column: position among the channels of the same file.
        checksum: 16-bit sum of all samples that the header promises, None if it promises none.
        problem: why the header leaves the channel unusable; empty if it does not.
    """

    name: str
    unit: str
    gain: float
    baseline: float
    rate: float
    format: str
    file: str
    offset: int
    column: int
    checksum: int | None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Header:
    """A recording's rate in Hz, samples per channel at that rate (None if not stated) and channels.

    Attributes:
        rate: for EDF, whose channels have rates of their own, that of the fastest.
        start: when the recording began, as its clock said; only used to bring a hypnogram to the same time.
        has_notes: True if the file itself holds EDF+ annotations.
        warnings: what is odd but harmless, and what was repaired.
    """

    rate: float
    samples: int | None
    channels: tuple[Channel, ...]
    comments: tuple[str, ...]
    kind: Literal["wfdb", "atm", "edf"]
    start: datetime | None = None
    has_notes: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def simulated(self) -> bool:
        """True if the header says that physioray made the recording up."""
        return any(SIMULATED_COMMENT in comment.lower() for comment in self.comments)


def check_inside(path: str, what: str) -> None:
    """Refuse a name from a file of somebody else's that leads out of the folder it belongs to.

    Raises:
        RejectedRecording: it is absolute, or has a step such as `..`.
    """
    if "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise RejectedRecording(f"{what} must be named by a path within its own folder, but is {path!r}. Rename it.")


def read_file(place: Location, remedy: str) -> bytes:
    """Read one file of a recording.

    Raises:
        RejectedRecording: it is missing or cannot be read.
    """
    try:
        return place.read_bytes()
    except FileNotFoundError as error:
        raise RejectedRecording(f"{place.name} must stand beside the header, but is missing. {remedy}") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RejectedRecording(f"{place.name} must be readable, but: {reason}. {remedy}") from error

"""Notes inside EDF+ files: when a record began, and what somebody wrote at which time.

Format: Kemp and Olivan 2003, section 2.2 (time-stamped annotations lists). A list is an onset in seconds with its
sign, an optional duration after the byte 21, texts between bytes 20, and ends with the bytes 20 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Note:
    """What was written at which time: onset in seconds after the file's start, duration in seconds if one was given."""

    onset: float
    duration: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Signal without a gap: when it begins by the clock and in the signal, and how long it is; all in seconds."""

    clock: float
    signal: float
    seconds: float


def parse_record(content: bytes, most: int | None = None) -> list[Note]:
    """Read the notes of one data record; what is no note is left out.

    Args:
        content: the bytes of one `EDF Annotations` signal in one data record.
        most: stop after so many.
    """
    notes: list[Note] = []
    for block in content.split(b"\x14\x00"):
        times, _, texts = block.lstrip(b"\x00").partition(b"\x14")
        onset, _, duration = times.partition(b"\x15")
        began, lasted = _read_seconds(onset, signed=True), _read_seconds(duration, signed=False)
        if began is None:
            continue
        for text in texts.split(b"\x14"):
            notes.append(Note(onset=began, duration=lasted, text=text.decode("utf-8", "replace").strip("\x00 ")))
        if most is not None and len(notes) >= most:
            break
    return notes


def _read_seconds(field: bytes, *, signed: bool) -> float | None:
    if not field or (signed and field[:1] not in b"+-") or len(field) > 40:
        return None
    try:
        value = float(field.decode("ascii"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def lay_stretches(onsets: Sequence[float | None], seconds: float, tolerance: float) -> tuple[Stretch, ...]:
    """Join data records that follow each other without a gap.

    Args:
        onsets: when each record began, in seconds after the file's start; None where it does not say.
        seconds: duration of a record.
        tolerance: of clocks, in seconds.

    Raises:
        ValueError: a record has no time, or begins before the one before it has ended.
    """
    stretches: list[Stretch] = []
    first = 0
    expected: float | None = None
    for number, onset in enumerate(onsets):
        if onset is None:
            raise ValueError(f"each data record must say when it began, but record {number + 1} does not")
        if expected is not None and onset < expected - tolerance:
            raise ValueError(
                f"its data records must follow each other, but record {number + 1} begins at {onset:g} s, before "
                f"{expected:g} s"
            )
        if expected is not None and onset > expected + tolerance:
            stretches.append(_make_stretch(onsets, first, number, seconds))
            first = number
        expected = onset + seconds
    return (*stretches, _make_stretch(onsets, first, len(onsets), seconds))


def _make_stretch(onsets: Sequence[float | None], first: int, last: int, seconds: float) -> Stretch:
    return Stretch(clock=float(onsets[first] or 0.0), signal=first * seconds, seconds=(last - first) * seconds)

"""Reads EDF and EDF+ recordings: what their headers say, their channels, and the notes that stand in them.

Format: Kemp et al. 1992 (EDF) and Kemp and Olivan 2003 (EDF+). Fields and samples are read by edfio, which reads
records of any length, channels of any rate and EDF+D. It is only let at a file once sizes agree, because a header may
claim any number. Times of records and notes (`data/edf_notes`) are read here, because edfio keeps them to itself.
The only file that imports edfio.
"""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from physioray.data.edf_layout import AGAIN, FIXED, EdfLayout, read_layout, read_start
from physioray.data.edf_notes import Note, Stretch, lay_stretches, parse_record
from physioray.data.headers import Channel, Header, RejectedRecording
from physioray.storage import Location

_PIECE = 8 * 2**20
_LONGEST_NOTES = 2**28


@dataclass(frozen=True, kw_only=True)
class EdfContent:
    """Some channels of an EDF recording, by their number in the header, as digitised.

    `stretches` says which time of the clock each stretch of signal has; more than one means gaps.
    """

    samples: dict[int, Int16[np.ndarray, "samples"]]
    sha256: str
    stretches: tuple[Stretch, ...]
    warnings: tuple[str, ...]


def is_edf(path: str) -> bool:
    """True if a file's name says that it is EDF."""
    return path.lower().endswith(".edf")


def read_identity(place: Location) -> tuple[str, str] | None:
    """Whose recording a file says it is, and when it began; None if it cannot be read.

    A recording and the EDF+ hypnogram that was scored from it have both in common.
    """
    try:
        with place.filesystem.open_input_file(place.path) as stream:
            head = stream.read(FIXED)
    except OSError:
        return None
    return (head[8:88].decode("latin-1").strip(), head[168:184].decode("latin-1")) if len(head) == FIXED else None


def read_edf_header(place: Location) -> Header:
    """Read the header of an EDF or EDF+ file; of its signals nothing is read.

    A channel whose scale or rate makes no sense is kept with the `problem`; it is never used.

    Raises:
        RejectedRecording: it is missing, no EDF, holds no signal, or promises more than the file holds.
    """
    layout = read_layout(place)
    signals = [number for number in range(len(layout.sizes)) if number not in layout.notes]
    if not signals:
        raise RejectedRecording(
            f"{place.name} must hold a signal, but holds annotations only. A hypnogram is used if its recording "
            "stands in the same folder, under the same name before -Hypnogram or, alone, with the same patient and "
            "start in its header."
        )
    if layout.seconds == 0 or not any(layout.sizes[number] for number in signals):
        raise RejectedRecording(
            f"{place.name} must hold samples in a record that lasts, but its records last {layout.seconds:g} s with at "
            f"most {max(layout.sizes[number] for number in signals)} samples. {AGAIN}"
        )
    edf = _parse_fields(place, layout)
    channels = tuple(
        _describe_channel(edf.signals[column], layout.sizes[number], layout.seconds, column, place.name)
        for column, number in enumerate(signals)
    )
    fastest = max(channels, key=lambda channel: channel.rate)
    start, doubts = read_start(layout.header)
    return Header(
        rate=fastest.rate,
        samples=layout.records * layout.sizes[signals[channels.index(fastest)]],
        channels=channels,
        comments=(layout.header[88:168].decode("latin-1").strip(),),
        kind="edf",
        start=start,
        has_notes=bool(layout.notes),
        warnings=layout.warnings + doubts,
    )


def read_edf_samples(place: Location, header: Header, numbers: Sequence[int]) -> EdfContent:
    """Read some channels of an EDF recording, and when its stretches began.

    The lowest 16-bit code means a missing sample elsewhere (WFDB) and is an ordinary one here: it is read as the next.

    Args:
        place: the file.
        header: what `read_edf_header` made of it.
        numbers: which channels, by their place in `header.channels`.

    Raises:
        RejectedRecording: the file cannot be read, or the times of its records contradict each other.
    """
    layout = read_layout(place)
    with _open_local(place) as path:
        digest = _hash_signals(path, len(layout.header))
        edf = _open_edf(path, layout)
        samples = {}
        for number in numbers:
            signal = edf.signals[header.channels[number].column]
            count = layout.records * signal.samples_per_data_record
            samples[number] = np.maximum(np.asarray(signal.digital[:count], np.int16), np.int16(-32767))
        stretches, doubts = _find_stretches(path, layout, place.name, 1 / header.rate)
    return EdfContent(samples=samples, sha256=digest, stretches=stretches, warnings=doubts)


def read_edf_notes(place: Location) -> tuple[list[Note], datetime | None]:
    """The notes of an EDF+ file in order of time, in seconds after its start, and that start.

    Raises:
        RejectedRecording: the file cannot be read or is no EDF.
    """
    layout = read_layout(place)
    found: list[Note] = []
    with _open_local(place) as path:
        for which, signal in enumerate(layout.notes):
            for record in _cut_notes(path, layout, signal, place.name):
                # The first note of a record only says when the record began.
                found += parse_record(record.tobytes())[0 if which else 1 :]
    ordered = sorted((note for note in found if note.text), key=lambda note: note.onset)
    return ordered, read_start(layout.header)[0]


def _parse_fields(place: Location, layout: EdfLayout) -> Any:
    import edfio

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the header alone holds no samples
            return edfio.read_edf(io.BytesIO(layout.header), lazy_load_data=False, header_encoding=layout.encoding)
    except Exception as error:
        # edfio has no error of its own; whatever it trips over, the header is not what the format asks for.
        raise RejectedRecording(f"{place.name} must have an EDF header, but cannot be parsed ({error!r}).") from error


def _describe_channel(signal: Any, size: int, seconds: float, column: int, file: str) -> Channel:
    gain, baseline, problem = 0.0, 0.0, ""
    try:
        low, high = signal.physical_min, signal.physical_max
        bottom, top = signal.digital_min, signal.digital_max
        if not (math.isfinite(low) and math.isfinite(high)) or low == high:
            problem = f"physical minimum and maximum must be two different numbers, but are {low:g} and {high:g}"
        elif bottom >= top:
            problem = f"digital minimum must lie below the maximum, but they are {bottom} and {top}"
        else:
            gain = (top - bottom) / (high - low)
            baseline = top - high * gain
    except ValueError as error:
        problem = f"physical and digital minimum and maximum must be numbers, but: {error}"
    if size == 0:
        problem = "a data record must hold samples of it, but holds none"
    if not all(math.isfinite(value) for value in (gain, baseline, size / seconds)):
        gain, baseline, problem = 0.0, 0.0, "its scale and rate must be finite, but are not"
    return Channel(
        name=signal.label.strip("\x00 ") or f"channel {column}",
        unit=signal.physical_dimension.strip("\x00 "),
        gain=gain,
        baseline=baseline,
        rate=size / seconds,
        format="edf",
        file=file,
        offset=0,
        column=column,
        checksum=None,
        problem=problem,
    )


@contextmanager
def _open_local(place: Location) -> Iterator[Path]:
    """The file's path on this machine; a bucket's file is copied, piece by piece, for the time."""
    if place.is_local:
        yield Path(place.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "recording.edf")
        try:
            with place.filesystem.open_input_file(place.path) as stream, copy.open("wb") as sink:
                while piece := stream.read(_PIECE):
                    sink.write(piece)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise RejectedRecording(f"{place.name} must be readable, but: {reason}. {AGAIN}") from error
        yield copy


def _hash_signals(path: Path, offset: int) -> str:
    """Hash of the data records only: the same night under another name or anonymised is the same."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(offset)
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _open_edf(path: Path, layout: EdfLayout) -> Any:
    import edfio

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers of records and trailing bytes are told in the header's warnings
            return edfio.read_edf(path, lazy_load_data=True, header_encoding=layout.encoding)
    except Exception as error:
        raise RejectedRecording(f"{path.name} must be readable as EDF, but: {error!r}. {AGAIN}") from error


def _cut_notes(path: Path, layout: EdfLayout, signal: int, name: str) -> UInt8[np.ndarray, "records bytes"]:
    """The bytes of one signal of notes, record by record."""
    width, before = 2 * layout.sizes[signal], 2 * sum(layout.sizes[:signal])
    if width * layout.records > _LONGEST_NOTES:
        raise RejectedRecording(
            f"{name} must hold at most {_LONGEST_NOTES >> 20} MiB of annotations, but holds more. {AGAIN}"
        )
    shape = (layout.records, 2 * sum(layout.sizes))
    data = np.memmap(path, np.uint8, "r", offset=len(layout.header), shape=shape)
    return np.array(data[:, before : before + width])


def _find_stretches(
    path: Path, layout: EdfLayout, name: str, tolerance: float
) -> tuple[tuple[Stretch, ...], tuple[str, ...]]:
    """When each stretch without a gap began, by the times that EDF+ records carry."""
    whole = (Stretch(clock=0.0, signal=0.0, seconds=layout.records * layout.seconds),)
    if not (layout.plus and layout.notes):
        return whole, ()
    onsets = [
        next((note.onset for note in parse_record(record.tobytes(), 1)), None)
        for record in _cut_notes(path, layout, layout.notes[0], name)
    ]
    try:
        return lay_stretches(onsets, layout.seconds, tolerance), ()
    except ValueError as error:
        if layout.plus == "EDF+D":
            raise RejectedRecording(f"{name} is discontinuous (EDF+D), and {error}. {AGAIN}") from error
        return whole, (f"EDF+C, but {error}; it is read as continuous",)

"""Reads the channels that are needed out of a recording's signal files, and hashes the files on the way.

Format 16 stores all channels of a sample side by side, so the file is read once, piece by piece, and the
columns that are wanted are kept; a folder and a bucket are read alike.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16

from physioray.data.edf import read_edf_samples
from physioray.data.edf_notes import Stretch
from physioray.data.headers import Header, RecordEntry, RejectedRecording, read_file
from physioray.storage import Location

_LOCAL_PIECE = 2 * 2**20
_REMOTE_PIECE = 16 * 2**20
"""Bytes read at once: what a cache holds, or what makes a request to a bucket worth its delay."""
_MAT4_INT16 = 30
_AGAIN = "Download the recording again."

Samples = Int16[np.ndarray, "samples"] | Float32[np.ndarray, "samples"]


@dataclass(frozen=True, kw_only=True)
class Waveforms:
    """Channels of one recording, by their number in the header.

    Attributes:
        samples: `(samples,)` per channel: int16 as digitised, or float32 in the channel's unit.
        sha256: hash of the signal files, the same for the same recording under another name.
        warnings: what is odd but harmless.
        stretches: when the signal was recorded (EDF+D); empty if it was without a gap.
    """

    samples: dict[int, Samples]
    sha256: str
    warnings: tuple[str, ...]
    stretches: tuple[Stretch, ...] = ()


def read_waveforms(source: Location, entry: RecordEntry, header: Header, numbers: Sequence[int]) -> Waveforms:
    """Read some channels of a recording.

    Args:
        source, entry, header: the recording.
        numbers: which channels, by their place in `header.channels`.

    Raises:
        RejectedRecording: a signal file is missing, cut short, or disagrees with the header.
    """
    folder = source / entry.path.rsplit("/", 1)[0] if "/" in entry.path else source
    wanted = [header.channels[number] for number in numbers]
    files = {channel.file for channel in wanted}
    if header.kind == "edf":
        content = read_edf_samples(folder / header.channels[0].file, header, numbers)
        return Waveforms(
            samples=dict(content.samples),
            sha256=content.sha256,
            warnings=header.warnings + content.warnings,
            stretches=content.stretches,
        )
    if header.kind == "atm":
        return _read_export(folder, header, numbers)
    inside = [channel for channel in header.channels if channel.file in files]
    if any(channel.format != "16" or channel.rate != header.rate for channel in inside):
        return _read_through_wfdb(folder, header, entry, numbers)
    digest = hashlib.sha256()
    samples: dict[int, Samples] = {}
    for file in sorted(files):
        width = sum(channel.file == file for channel in header.channels)
        chosen = {number: header.channels[number] for number in numbers if header.channels[number].file == file}
        columns = [channel.column for channel in chosen.values()]
        offset = next(iter(chosen.values())).offset
        arrays = _read_columns(folder / file, header, offset, width, columns, digest)
        samples |= dict(zip(chosen, arrays, strict=True))
    lengths = {len(array) for array in samples.values()}
    if len(lengths) > 1:
        raise RejectedRecording(f"The signal files must hold equally many samples, but hold {sorted(lengths)}.")
    return Waveforms(samples=samples, sha256=digest.hexdigest(), warnings=_check_sums(header, samples))


def _read_columns(
    place: Location, header: Header, offset: int, width: int, columns: Sequence[int], digest: Any
) -> list[Int16[np.ndarray, "samples"]]:
    try:
        size = place.info().size
        if size is None:
            raise FileNotFoundError(place.path)
        rows = _check_size(place, header, size, offset, width)
        with _open(place) as stream:
            head = stream.read(offset)
            digest.update(head)
            _check_mat4(place, head, header, rows, width)
            arrays = [np.empty(rows, np.int16) for _ in columns]
            piece = max(1, (_LOCAL_PIECE if place.is_local else _REMOTE_PIECE) // (2 * width))
            for first in range(0, rows, piece):
                count = min(piece, rows - first)
                content = stream.read_buffer(count * 2 * width)
                digest.update(content)
                block = np.frombuffer(content, "<i2").reshape(count, width)
                for array, column in zip(arrays, columns, strict=True):
                    array[first : first + count] = block[:, column]
    except FileNotFoundError as error:
        raise RejectedRecording(f"{place.name} must stand beside the header, but is missing. {_AGAIN}") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RejectedRecording(f"{place.name} must be readable, but: {reason}. {_AGAIN}") from error
    return arrays


def _open(place: Location) -> Any:
    return pa.memory_map(place.path) if place.is_local else place.filesystem.open_input_file(place.path)


def _check_size(place: Location, header: Header, size: int, offset: int, width: int) -> int:
    """Samples per channel in a format 16 file of `size` bytes."""
    if header.samples is None:
        rows, rest = divmod(size - offset, 2 * width)
        if rows <= 0 or rest:
            raise RejectedRecording(
                f"{place.name} must hold whole samples of {width} channels, but has {size} bytes. {_AGAIN}"
            )
        return rows
    expected = offset + 2 * width * header.samples
    if size < expected:
        raise RejectedRecording(f"{place.name} must have {expected} bytes, but is cut short at {size}. {_AGAIN}")
    if size > expected:
        raise RejectedRecording(
            f"{place.name} must have {expected} bytes for {header.samples} samples of {width} channels as its "
            f"header says, but has {size}. {_AGAIN}"
        )
    return header.samples


def _check_mat4(place: Location, head: bytes, header: Header, rows: int, width: int) -> None:
    """Compare the size in a MATLAB 4 file's own head (type, rows, columns, ...) with the header's."""
    if header.samples is None or len(head) < 20:
        return
    kind, signals, columns = (int(value) for value in np.frombuffer(head[:12], "<i4"))
    if kind == _MAT4_INT16 and (signals, columns) != (width, rows):
        raise RejectedRecording(
            f"{place.name} must hold {width} x {rows} samples as its header says, but says {signals} x {columns}. "
            f"{_AGAIN}"
        )


def _check_sums(header: Header, samples: dict[int, Samples]) -> tuple[str, ...]:
    warnings = []
    for number, array in samples.items():
        channel = header.channels[number]
        total = int(array.sum(dtype=np.int64)) & 0xFFFF
        if channel.checksum is not None and total != channel.checksum & 0xFFFF:
            warnings.append(f"{channel.name}: the header's checksum is {channel.checksum & 0xFFFF}, the file's {total}")
    return tuple(warnings)


def _read_export(folder: Location, header: Header, numbers: Sequence[int]) -> Waveforms:
    """Read a PhysioBank ATM export: a MATLAB file with `val`, one row per signal."""
    from scipy import io as matlab

    place = folder / header.channels[0].file
    content = read_file(place, _AGAIN)
    try:
        values = np.asarray(matlab.loadmat(io.BytesIO(content), variable_names=["val"])["val"])
    except Exception as error:
        # scipy.io raises many kinds of errors on a damaged file, and none of its own for all of them.
        raise RejectedRecording(f"{place.name} must be a MATLAB file with `val`, but: {error!r}. {_AGAIN}") from error
    expected = (len(header.channels), header.samples)
    if values.shape != expected:
        raise RejectedRecording(
            f"{place.name} must hold {expected[0]} x {expected[1]} samples as its .info says, but holds "
            f"{' x '.join(map(str, values.shape))}. {_AGAIN}"
        )
    samples: dict[int, Samples] = {}
    for number in numbers:
        channel = header.channels[number]
        row = values[channel.column]
        if row.dtype == np.int16:
            samples[number] = np.ascontiguousarray(row, np.int16)
        else:
            gain = channel.gain or 1.0
            samples[number] = ((row.astype(np.float64) - channel.baseline) / gain).astype(np.float32)
    return Waveforms(samples=samples, sha256=hashlib.sha256(content).hexdigest(), warnings=())


def _read_through_wfdb(folder: Location, header: Header, entry: RecordEntry, numbers: Sequence[int]) -> Waveforms:
    """Read other formats from a local copy, in physical units."""
    import wfdb

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as copy:
        Path(copy, f"{entry.name}.hea").write_bytes(read_file(folder / f"{entry.name}.hea", _AGAIN))
        for file in sorted({channel.file for channel in header.channels}):
            content = read_file(folder / file, _AGAIN)
            digest.update(content)
            Path(copy, file).write_bytes(content)
        try:
            record = wfdb.rdrecord(str(Path(copy, entry.name)), channels=list(numbers), smooth_frames=False)
            signals = record.e_p_signal
        except Exception as error:
            # wfdb has no error of its own; whatever it trips over, the file is not what the header says.
            raise RejectedRecording(
                f"{entry.name} must be readable in the format of its header, but: {error!r}. {_AGAIN}"
            ) from error
    samples = {
        number: np.ascontiguousarray(signal, np.float32) for number, signal in zip(numbers, signals, strict=True)
    }
    return Waveforms(samples=samples, sha256=digest.hexdigest(), warnings=())

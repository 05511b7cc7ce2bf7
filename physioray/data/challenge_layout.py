"""Writes one recording in the files of the PhysioNet/CinC Challenge 2018: header, signals, annotations, arousal labels.

The layout is that of the published files (Ghassemi et al. 2018, DOI 10.13026/6phb-r450): WFDB format 16 after the 24
bytes of a MATLAB v4 header, annotations in MIT format with every content in the note, labels in MATLAB 7.3 (HDF5).
"""

from __future__ import annotations

import os
import struct

import h5py
import numpy as np
from jaxtyping import Float32, Int8, Int16

from physioray.data.night import UNDEFINED, Night
from physioray.signals import WINDOW_SECONDS

RATE = 200
CHANNELS = {
    "F3-M2": ("1/uV", 1.0, 0),
    "F4-M1": ("1/uV", 1.0, 0),
    "C3-M2": ("1/uV", 1.0, 0),
    "C4-M1": ("1/uV", 1.0, 0),
    "O1-M2": ("1/uV", 1.0, 0),
    "O2-M1": ("1/uV", 1.0, 0),
    "E1-M2": ("1/uV", 1.0, 0),
    "Chin1-Chin2": ("1/uV", 1.0, 0),
    "ABD": ("1/uV", 1.0, 0),
    "CHEST": ("1/uV", 1.0, 0),
    "AIRFLOW": ("1/uV", 1.0, 0),
    "SaO2": ("655.35(-32768)/%", 655.35, -32768),
    "ECG": ("1000/mV", 1000.0, 0),
}
"""Channel name to gain and unit as the header says them, steps per unit, and the step that means zero."""

STAGE_NOTES = ("W", "N1", "N2", "N3", "R")
STAGE_FIELDS = ("wake", "nonrem1", "nonrem2", "nonrem3", "rem")
# Codes of annot(5): 22 is a note, whose symbol is the quotation mark.
_NOTE, _SKIP, _TEXT = 22, 59, 63
_CHUNK = 1 << 16


def quantise(channels: dict[str, Float32[np.ndarray, "_"]], samples: int) -> Int16[np.ndarray, "samples channels"]:
    """Signals in physical units to the steps of the files, sample by sample; all channels of `CHANNELS` in order."""
    steps = np.empty((samples, len(CHANNELS)), np.int16)
    for number, (name, (_, gain, zero)) in enumerate(CHANNELS.items()):
        # -32768 stands for a missing sample in WFDB, so the range stops one short of it.
        scaled = channels[name][:samples] * np.float32(gain)
        scaled += np.float32(zero)
        np.rint(scaled, out=scaled)
        steps[:, number] = np.clip(scaled, -32767, 32767, out=scaled)
    return steps


def write_signals(folder: str, record: str, steps: Int16[np.ndarray, "samples channels"], comment: str) -> None:
    """Write `RECORD.mat` and `RECORD.hea`.

    Args:
        folder: existing folder of the record.
        record: its name.
        steps: signals in steps `(samples, channels)`, channels in the order of `CHANNELS`.
        comment: a line for the end of the header.
    """
    samples, count = steps.shape
    with open(os.path.join(folder, f"{record}.mat"), "wb") as sink:
        # Type 30 is little-endian int16; the matrix is stored column by column: one column is one sample.
        sink.write(struct.pack("<5i4s", 30, count, samples, 0, 4, b"val\0"))
        steps.tofile(sink)
    lines = [f"{record} {count} {RATE} {samples}"]
    sums = steps.sum(axis=0, dtype=np.int64)
    for number, (name, (gain, _, _)) in enumerate(CHANNELS.items()):
        checksum = int((sums[number] + 32768) % 65536 - 32768)
        lines.append(f"{record}.mat 16+24 {gain} 16 0 {steps[0, number]} {checksum} 0 {name}")
    lines.append(f"# {comment}")
    with open(os.path.join(folder, f"{record}.hea"), "w", encoding="ascii", newline="\n") as text:
        text.write("\n".join(lines) + "\n")


def list_annotations(night: Night) -> list[tuple[int, str]]:
    """What a scorer leaves: `(sample, note)` in order of time.

    A stage stands only where it changes, and nowhere before the first scored window; an event is a pair of brackets.
    """
    window = RATE * WINDOW_SECONDS
    notes = []
    for number in range(len(night.stages)):
        stage = night.stages[number]
        if stage != UNDEFINED and (number == 0 or night.stages[number - 1] != stage):
            notes.append((number * window, STAGE_NOTES[stage]))
    for event in night.events:
        notes += [(event.start, f"({event.kind}"), (event.end, f"{event.kind})")]
    return sorted(notes, key=lambda note: note[0])


def write_annotations(folder: str, record: str, notes: list[tuple[int, str]]) -> None:
    """Write `RECORD.arousal`: MIT annotations whose symbol is `"` and whose content is the note."""
    parts = [_encode_annotation(0, f"## time resolution: {RATE}")]
    before = 0
    for sample, note in notes:
        parts.append(_encode_annotation(sample - before, note))
        before = sample
    with open(os.path.join(folder, f"{record}.arousal"), "wb") as sink:
        sink.write(b"".join(parts) + b"\0\0")


def _encode_annotation(interval: int, note: str) -> bytes:
    """One annotation: an interval beyond 10 bits goes into a skip, whose high half comes first (WFDB annot(5))."""
    skip = b""
    if interval >= 1024:
        skip = struct.pack("<3H", _SKIP << 10, (interval >> 16) & 0xFFFF, interval & 0xFFFF)
        interval = 0
    text = note.encode("ascii")
    return (
        skip + struct.pack("<2H", (_NOTE << 10) | interval, (_TEXT << 10) | len(text)) + text + b"\0" * (len(text) % 2)
    )


def write_arousal_labels(folder: str, record: str, night: Night, marks: Int8[np.ndarray, "samples"]) -> None:
    """Write `RECORD-arousal.mat`: target arousals and one-hot stages per sample, boundaries one sample early.

    Args:
        folder: existing folder of the record.
        record: its name.
        night: scored stages.
        marks: target arousals, see `physioray.data.night.mark_arousals`.
    """
    samples, window = len(marks), RATE * WINDOW_SECONDS
    numbers = np.append(night.stages, night.stages[-1])
    stages = np.full(samples, UNDEFINED, np.int8)
    # The last stage runs to the end; shifted early by one, the last sample of the file has none.
    stages[:-1] = np.repeat(numbers, window)[1:samples]
    path = os.path.join(folder, f"{record}-arousal.mat")
    # A MATLAB 7.3 file begins with 512 bytes of its own, the version and byte order in the last four.
    with h5py.File(path, "w", userblock_size=512, track_order=False) as file:
        data = file.create_group("data")
        data.attrs["MATLAB_class"] = np.bytes_(b"struct")
        _write_array(data, "arousals", marks.astype(np.float64)[:, None], b"double")
        group = data.create_group("sleep_stages")
        group.attrs["MATLAB_class"] = np.bytes_(b"struct")
        for number, name in [(UNDEFINED, "undefined"), *enumerate(STAGE_FIELDS)]:
            hot = (stages == number).astype(np.uint8)[None, :]
            _write_array(group, name, hot, b"logical").attrs["MATLAB_int_decode"] = np.int32(1)
    title = b"MATLAB 7.3 MAT-file, Platform: physioray, simulated HDF5 schema 1.00 ."
    with open(path, "r+b") as sink:
        sink.write(title.ljust(124) + b"\x00\x02IM")


def _write_array(group: h5py.Group, name: str, values: np.ndarray, kind: bytes) -> h5py.Dataset:
    chunk = tuple(min(size, _CHUNK) for size in values.shape)
    array = group.create_dataset(name, data=values, chunks=chunk, compression="gzip", compression_opts=1)
    array.attrs["MATLAB_class"] = np.bytes_(kind)
    array.attrs["H5PATH"] = np.bytes_(group.name.encode())
    return array

"""Writes EDF and EDF+ files with pyedflib, another library than the one that reads them, and breaks them by hand."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyedflib

START = datetime.datetime(2019, 3, 4, 22, 30, 15)
FIELDS = {"version": (0, 8), "patient": (8, 80), "date": (168, 8), "time": (176, 8), "bytes": (184, 8)} | {
    "plus": (192, 44),
    "records": (236, 8),
    "seconds": (244, 8),
    "signals": (252, 4),
}
SIGNAL_FIELDS = {"label": (0, 16), "unit": (96, 8), "low": (104, 8), "high": (112, 8), "bottom": (120, 8)} | {
    "top": (128, 8),
    "samples": (216, 8),
}
"""Where fields lie (EDF, Kemp et al. 1992): of signal i of n at 256 + n x first + i x width."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A channel to write: label, samples in `unit`, rate in Hz, and the range that the header gives."""

    label: str
    samples: np.ndarray
    rate: float = 200
    unit: str = "uV"
    reach: float = 3000.0
    digital: int = 32767


def make_trace(label: str, seconds: float = 120, *, rate: float = 200, spread: float = 20.0, **options) -> Trace:
    """Noise of a plausible size."""
    seed = sum(label.encode())
    samples = np.random.default_rng(seed).standard_normal(round(seconds * rate)) * spread
    return Trace(label=label, samples=samples, rate=rate, **options)


def _describe(traces: Sequence[Trace]) -> list[dict]:
    return [
        {
            "label": trace.label,
            "dimension": trace.unit,
            "sample_frequency": trace.rate,
            "physical_min": -trace.reach,
            "physical_max": trace.reach,
            "digital_min": -trace.digital,
            "digital_max": trace.digital,
            "transducer": "",
            "prefilter": "",
        }
        for trace in traces
    ]


def write_edf(
    path: Path,
    traces: Sequence[Trace],
    *,
    record_seconds: float = 1.0,
    notes: Sequence[tuple[float, float, str]] = (),
    plus: bool = True,
    start: datetime.datetime = START,
    patient: str = "p01",
) -> Path:
    """Write a recording; without `plus` plain EDF, which has no notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pyedflib.FILETYPE_EDFPLUS if plus else pyedflib.FILETYPE_EDF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = pyedflib.EdfWriter(str(path), len(traces), file_type=kind)
        writer.setStartdatetime(start)
        writer.setPatientCode(patient)
        if traces:
            writer.setSignalHeaders(_describe(traces))
        if traces:
            writer.setDatarecordDuration(record_seconds)
            writer.writeSamples([trace.samples for trace in traces])
        for onset, duration, text in notes:
            writer.writeAnnotation(onset, duration, text)
        writer.close()
    return path


def write_hypnogram(path: Path, notes: Sequence[tuple[float, float, str]], **options) -> Path:
    """An EDF+ file of notes alone."""
    return write_edf(path, [], notes=notes, **options)


def set_field(path: Path, name: str, text: str | bytes, signal: int | None = None) -> None:
    """Overwrite one field of a header."""
    content = bytearray(path.read_bytes())
    if signal is None:
        first, width = FIELDS[name]
    else:
        offset, width = SIGNAL_FIELDS[name]
        first = 256 + int(content[252:256]) * offset + signal * width
    value = text.encode("latin-1") if isinstance(text, str) else text
    content[first : first + width] = value[:width].ljust(width)
    path.write_bytes(bytes(content))


def move_records(path: Path, onsets: Sequence[str]) -> None:
    """Make a file discontinuous: each data record begins when it is told, in seconds after the start."""
    set_field(path, "plus", "EDF+D")
    content = bytearray(path.read_bytes())
    signals = int(content[252:256])
    sizes = [int(content[256 + signals * 216 + 8 * i : 256 + signals * 216 + 8 * (i + 1)]) for i in range(signals)]
    first, width = 256 * (signals + 1), 2 * sum(sizes)
    before = 2 * sum(sizes[:-1])
    for number, onset in enumerate(onsets):
        place = first + number * width + before
        old = bytes(content[place : place + 2 * sizes[-1]])
        rest = old[old.index(b"\x14\x14\x00") :]
        content[place : place + 2 * sizes[-1]] = (
            (f"+{onset}".encode() + rest).rstrip(b"\x00").ljust(2 * sizes[-1], b"\x00")[: 2 * sizes[-1]]
        )
    path.write_bytes(bytes(content))

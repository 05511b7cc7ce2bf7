"""Writes small recordings in the challenge's layout, for tests of ingest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import wfdb

RATE = 200
WINDOW = 30 * RATE
CHANNELS = {"F3-M2": "uV", "E1-M2": "uV", "Chin1-Chin2": "uV", "ECG": "mV"}
_SCALES = {"F3-M2": 20.0, "E1-M2": 30.0, "Chin1-Chin2": 10.0, "ECG": 200.0}
_STAGES = ("W", "N1", "N2", "N3", "R")


def write_recording(
    source: Path,
    name: str,
    *,
    windows: int = 8,
    seed: int = 0,
    stages: Sequence[str] | None = _STAGES,
    folder: str = "training",
) -> Path:
    """One recording `folder/name/name.{hea,mat,arousal}` of noise; a stage note at every window from the second on."""
    place = source / folder / name
    place.mkdir(parents=True, exist_ok=True)
    samples = windows * WINDOW
    generator = np.random.default_rng(seed)
    signal = generator.standard_normal((samples, len(CHANNELS))) * [_SCALES[channel] for channel in CHANNELS]
    counts = np.clip(np.round(signal), -30000, 30000).astype("<i2")
    (place / f"{name}.mat").write_bytes(_matlab_header(counts.shape) + counts.tobytes())
    lines = [f"{name} {len(CHANNELS)} {RATE} {samples}"]
    for number, (channel, unit) in enumerate(CHANNELS.items()):
        gain = "1/uV" if unit == "uV" else "1000/mV"
        checksum = int(counts[:, number].astype(np.int64).sum()) & 0xFFFF
        checksum -= 0x10000 if checksum >= 0x8000 else 0
        lines.append(f"{name}.mat 16+24 {gain} 16 0 {counts[0, number]} {checksum} 0 {channel}")
    (place / f"{name}.hea").write_text("\n".join(lines) + "\n")
    if stages is not None:
        positions = np.arange(1, windows) * WINDOW
        notes = [stages[i % len(stages)] for i in range(windows - 1)]
        wfdb.wrann(name, "arousal", positions, symbol=['"'] * len(notes), aux_note=notes, fs=RATE, write_dir=str(place))
    return place


def _matlab_header(shape: tuple[int, int]) -> bytes:
    """The 24 bytes before the samples of a MATLAB level 4 file of int16, with the name `val`."""
    return np.array([30, shape[1], shape[0], 0, 4], "<i4").tobytes() + b"val\0"


def list_in_records(source: Path) -> None:
    """Write RECORDS for all that has been written."""
    paths = sorted(path.relative_to(source).with_suffix("") for path in source.glob("*/*/*.hea"))
    (source / "RECORDS").write_text("".join(f"{path}\n" for path in paths))


def write_source(source: Path, labelled: int = 6, unlabelled: int = 2, windows: int = 8) -> Path:
    """A small source: labelled recordings, unlabelled ones, ages and RECORDS."""
    rows = ["Record,Sex,Age"]
    for number in range(labelled + unlabelled):
        with_stages = number < labelled
        name = f"{'tr' if with_stages else 'te'}00-{number:04d}"
        write_recording(
            source,
            name,
            windows=windows,
            seed=number,
            stages=_STAGES if with_stages else None,
            folder="training" if with_stages else "test",
        )
        rows.append(f"{name},{'MF'[number % 2]},{40 + 5 * number}")
    (source / "age-sex.csv").write_text("\n".join(rows) + "\n")
    list_in_records(source)
    return source

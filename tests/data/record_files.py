"""Writes single recordings, sound and broken, in the challenge's layout, for tests of reading and converting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import wfdb

CHANNELS = {"F3-M2": "1/uV", "E1-M2": "1/uV", "Chin1-Chin2": "1/uV", "AIRFLOW": "1/uV", "ECG": "1000/mV"}
SPREADS = {"F3-M2": 20.0, "E1-M2": 30.0, "Chin1-Chin2": 8.0, "AIRFLOW": 200.0, "ECG": 200.0}
STAGE_NAMES_IN_FILE = ("wake", "nonrem1", "nonrem2", "nonrem3", "rem")


def make_signal(seconds: float = 120, rate: float = 200, channels: Mapping[str, str] = CHANNELS) -> np.ndarray:
    """Noise of plausible size, `(samples, channels)` int16."""
    samples = round(seconds * rate)
    noise = np.random.default_rng(7).standard_normal((samples, len(channels)))
    return np.round(noise * [SPREADS.get(name, 20.0) for name in channels]).astype("<i2")


def write_record(
    folder: Path,
    name: str,
    signal: np.ndarray,
    *,
    rate: float | str = 200,
    channels: Mapping[str, str] = CHANNELS,
    comment: str = "",
) -> Path:
    """Write `folder/name.{hea,mat}` in format 16+24; returns the path without extension."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, width = signal.shape
    head = np.array([30, width, samples, 0, 4], "<i4").tobytes() + b"val\0"
    (folder / f"{name}.mat").write_bytes(head + signal.astype("<i2").tobytes())
    lines = [f"{name} {width} {rate} {samples}"]
    for number, (channel, gain) in enumerate(channels.items()):
        total = int(signal[:, number].sum(dtype=np.int64)) & 0xFFFF
        total -= 0x10000 if total >= 0x8000 else 0
        lines.append(f"{name}.mat 16+24 {gain} 16 0 {signal[0, number]} {total} 0 {channel}")
    (folder / f"{name}.hea").write_text("\n".join([*lines, *([f"# {comment}"] if comment else [])]) + "\n")
    return folder / name


def write_notes(record: Path, notes: Sequence[tuple[int, str]], rate: int = 200) -> None:
    """Write `record.arousal`."""
    wfdb.wrann(
        record.name,
        "arousal",
        np.array([sample for sample, _ in notes]),
        symbol=['"'] * len(notes),
        aux_note=[note for _, note in notes],
        fs=rate,
        write_dir=str(record.parent),
    )


def write_arousal_mat(record: Path, stages: np.ndarray, arousals: np.ndarray) -> None:
    """Write `record-arousal.mat` as the challenge does; `stages` `(samples,)` with -1 undefined."""
    with h5py.File(f"{record}-arousal.mat", "w") as file:
        file["data/arousals"] = arousals.astype(np.float64)[:, None]
        for number, name in enumerate((*STAGE_NAMES_IN_FILE, "undefined")):
            wanted = -1 if name == "undefined" else number
            file[f"data/sleep_stages/{name}"] = (stages == wanted).astype(np.uint8)[None, :]

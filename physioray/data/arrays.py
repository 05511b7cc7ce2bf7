"""Arrays in physical units to windows, exactly as ingest makes them of a recording's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int16

from physioray.config import IngestConfig
from physioray.data.preprocess import AbsentModality, ProcessedChannel, process_channel
from physioray.signals import WINDOW_SECONDS, LookupMiss, find_modality

_LONGEST_DIFFERENCE = 1.0
"""Signals of one night may differ in length by this many seconds: files end where their blocks end."""


@dataclass(frozen=True, kw_only=True)
class PreparedNight:
    """Signals of one night as windows, ready for an encoder.

    Attributes:
        signals: `(windows, samples)` int16 per modality, in steps of `quantisation_step`; zero where not present.
        present: `(windows,)` per modality.
        scale: of each modality that is there, in its unit: what one is in `signals` x step.
        absent: why the other modalities are absent from the whole night.
    """

    signals: Mapping[str, Int16[np.ndarray, "windows _"]]
    present: Mapping[str, Bool[np.ndarray, "windows"]]
    scale: Mapping[str, float]
    absent: Mapping[str, str]

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def find_usable(self) -> Bool[np.ndarray, "windows"]:
        """`(windows,)` True where at least one modality is present."""
        return np.asarray(np.stack(list(self.present.values())).any(0))


def prepare_signals(
    signals: Mapping[str, tuple[Any, float]], settings: IngestConfig, *, jumps: Sequence[float] = ()
) -> PreparedNight:
    """Filter, resample, scale and cut signals as ingest does (Fang et al. 2024, section 3.1).

    Args:
        signals: by modality, samples `(samples,)` in the unit of `signals.MODALITIES` (uV; mV for the ECG) and
            their rate in Hz. All begin at the same time; any subset of `settings.modalities` will do. NaN marks
            what was not measured.
        settings: see `config.IngestConfig`.
        jumps: seconds at which the recording jumps; filters do not cross them, and windows that hold one are absent.

    Raises:
        LookupMiss: a modality that the settings do not name.
        ValueError: no signal, not one-dimensional, shorter than a window, or of different duration.
    """
    unknown = [name for name in signals if name not in settings.modalities]
    if unknown:
        raise LookupMiss(f"Signals must be of {', '.join(settings.modalities)}, but got {', '.join(unknown)}.")
    arrays = {name: (_check_array(name, values), float(rate)) for name, (values, rate) in signals.items()}
    windows = _count_windows(arrays)
    held = [int(jump / WINDOW_SECONDS) for jump in jumps if jump % WINDOW_SECONDS and jump < windows * WINDOW_SECONDS]
    channels: dict[str, ProcessedChannel] = {}
    absent = {name: "no such signal was given" for name in settings.modalities if name not in arrays}
    for name, (values, rate) in arrays.items():
        modality = find_modality(name)
        try:
            places = [round(jump * rate) for jump in jumps]
            channels[name] = process_channel(values, values, rate, modality, settings, places)
        except AbsentModality as error:
            absent[name] = str(error)
    present, stored = {}, {}
    for name in settings.modalities:
        channel = channels.get(name)
        here = channel.present[:windows].copy() if channel else np.zeros(windows, np.bool_)
        here[held] = False
        samples = find_modality(name).samples
        signal = channel.signal[:windows].copy() if channel else np.zeros((windows, samples), np.int16)
        signal[~here] = 0
        present[name], stored[name] = here, signal
    scale = {name: channel.scale for name, channel in channels.items()}
    return PreparedNight(signals=stored, present=present, scale=scale, absent=absent)


def _check_array(name: str, values: Any) -> Float32[np.ndarray, "samples"]:
    array = np.asarray(values, np.float32)
    if array.ndim != 1:
        raise ValueError(f"A signal must be of one dimension, (samples,), but {name} has the shape {array.shape}.")
    return array


def _count_windows(arrays: Mapping[str, tuple[Float32[np.ndarray, "_"], float]]) -> int:
    if not arrays:
        raise ValueError("At least one signal must be given, but there is none. Give, for example, eeg=(array, 256.0).")
    for name, (_, rate) in arrays.items():
        if not rate > 0:
            raise ValueError(f"A rate must be above 0 Hz, but that of {name} is {rate}.")
    seconds = {name: len(values) / rate for name, (values, rate) in arrays.items()}
    shortest, longest = min(seconds.values()), max(seconds.values())
    if longest - shortest > _LONGEST_DIFFERENCE:
        told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        raise ValueError(
            f"Signals must cover the same time to {_LONGEST_DIFFERENCE:g} s, but last {told}. "
            "Cut them, or fill with NaN what was not recorded."
        )
    windows = int(shortest / WINDOW_SECONDS + 1e-9)
    if windows < 1:
        raise ValueError(f"Signals must last {WINDOW_SECONDS} s or more, but last {shortest:.1f} s.")
    return windows

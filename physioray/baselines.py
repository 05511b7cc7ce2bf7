"""Describes windows by the power in the usual frequency bands: what a sleep researcher would try first.

A pretrained encoder has to leave this behind. Nothing here is learned.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32
from scipy.signal import welch

from physioray.data.batches import Batch
from physioray.data.cohort import StoredModality
from physioray.signals import WINDOW_SECONDS, find_modality

BANDS: Mapping[str, tuple[float, float]] = {
    "delta": (0.5, 4.0),
    "theta": (4.0, 8.0),
    "alpha": (8.0, 12.0),
    "sigma": (12.0, 16.0),
    "beta": (16.0, 30.0),
    "gamma": (30.0, 45.0),
}
"""The sleep laboratory's bands, in Hz (AASM manual; sigma is the band of spindles)."""

SLOW_BANDS: Mapping[str, tuple[float, float]] = {
    "slow": (0.03, 0.1),
    "breath": (0.1, 0.5),
    "fast_breath": (0.5, 1.0),
    "pulse": (1.0, 4.0),
}
"""Bands, in Hz, of breathing (0.1 to 0.5), of what is slower (apneas, desaturations) and of its harmonics."""

SLOW_RATE = 50
"""Modalities sampled below this rate, in Hz, are described by SLOW_BANDS."""

USABLE_SHARE = 0.45
"""Bands must end at or below this share of the rate: above it the anti-alias filter falls off."""

SEGMENT_SECONDS = 4.0
"""Welch segments of fast modalities: 0.25 Hz apart, 14 half-overlapping ones in a window."""


def list_bands(modality: StoredModality) -> dict[str, tuple[float, float]]:
    """The bands, in Hz, by which a modality is described: those its rate and its filter let through."""
    bands = SLOW_BANDS if modality.rate < SLOW_RATE else BANDS
    passed = find_modality(modality.name).band[1]
    return {
        name: (low, high)
        for name, (low, high) in bands.items()
        if high <= USABLE_SHARE * modality.rate and low < passed
    }


def name_features(modalities: Mapping[str, StoredModality]) -> tuple[str, ...]:
    """Names of the columns of `band_powers`, for example `eeg_delta` and `eeg_present`."""
    names = []
    for modality in modalities.values():
        names += [f"{modality.name}_{band}" for band in list_bands(modality)]
        names.append(f"{modality.name}_present")
    return tuple(names)


def band_powers(batch: Batch, modalities: Mapping[str, StoredModality]) -> Float32[np.ndarray, "b features"]:
    """Log band power of every modality of every window, and whether the modality was there.

    Power is Welch's estimate (Hann segments of 4 s; one segment over the whole window for slow modalities), integrated
    over the band, as log10 of its ratio to what white noise of unit variance has in that band. The value 0 is
    therefore an ordinary one, and it stands for a modality that is absent. For a linear classifier this is the same
    as filling in the mean over the windows where it is present, up to the penalty: all features of an absent modality
    change together, and the weight of its flag takes that up.

    Args:
        batch: windows as they lie in the shards.
        modalities: which to describe, with rate and int16 step, as `cohort.modalities`.

    Returns:
        `(B, features)`, columns as `name_features` says, without NaN.
    """
    columns: list[np.ndarray] = []
    for name, modality in modalities.items():
        present = batch.present[name]
        signal = batch.signals[name].astype(np.float32) * np.float32(modality.step)
        for power in _measure_bands(signal, modality).T:
            columns.append(np.where(present, power, 0.0))
        columns.append(present.astype(np.float32))
    return np.stack(columns, 1).astype(np.float32)


def _measure_bands(
    signal: Float32[np.ndarray, "b samples"], modality: StoredModality
) -> Float32[np.ndarray, "b bands"]:
    """Log10 of band power over that of white noise of unit variance."""
    slow = modality.rate < SLOW_RATE
    length = modality.samples if slow else round(SEGMENT_SECONDS * modality.rate)
    frequencies, density = welch(signal, fs=modality.rate, nperseg=length, detrend="constant", axis=1)
    white = 2.0 / modality.rate
    # Rounding to int16 leaves noise of variance step^2 / 12: no power below that means anything, and a signal of
    # zeros gets a finite logarithm.
    floor = modality.step**2 / 12.0
    columns = []
    for low, high in list_bands(modality).values():
        inside = (frequencies >= low - 1e-9) & (frequencies < high - 1e-9)
        if not inside.any():
            raise ValueError(
                f"Band {low}-{high} Hz of {modality.name} must hold a frequency, but {WINDOW_SECONDS} s at "
                f"{modality.rate} Hz gives a spacing of {frequencies[1]:.3f} Hz."
            )
        columns.append(np.log10(density[:, inside].mean(1) / white + floor))
    bands = np.stack(columns, 1) if columns else np.empty((len(signal), 0))
    return bands.astype(np.float32)

"""Building blocks of simulated signals: shaped noise, slow drifts, brief waveforms put in place, upsampling.

Everything is single precision and linear in the number of samples; a night is built from these few operations.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy import signal
from scipy.ndimage import uniform_filter1d

SETTLE_SECONDS = 4
"""Filters start this long before the first sample, so that a recording does not begin with their transient."""


@functools.cache
def _design(low: float, high: float, rate: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Butterworth band-pass (6 dB an octave on either side) and the factor that gives unit variance."""
    numerator, denominator = signal.butter(1, (low, high), btype="band", fs=rate)
    response = signal.lfilter(numerator, denominator, np.eye(1, int(rate * max(8.0, 4.0 / (high - low))))[0])
    return tuple(numerator), tuple(denominator), float(1.0 / np.sqrt(np.sum(response**2)))


def make_noise(
    random: np.random.Generator, samples: int, low: float, high: float, rate: int
) -> Float32[np.ndarray, "samples"]:
    """Noise of a frequency band, unit standard deviation: the carrier of a rhythm.

    Args:
        random: source of chance.
        samples: how many.
        low: lower edge, Hz (half power).
        high: upper edge, Hz.
        rate: samples per second.
    """
    numerator, denominator, scale = _design(low, high, rate)
    settle = SETTLE_SECONDS * rate
    white = random.standard_normal(samples + settle, dtype=np.float32)
    taps = (np.asarray(numerator) * scale).astype(np.float32)
    return np.asarray(signal.lfilter(taps, np.asarray(denominator, np.float32), white)[settle:])


def make_drift(random: np.random.Generator, seconds: int, period: float) -> Float32[np.ndarray, "seconds"]:
    """Slow drift, one value per second, about unit standard deviation: straight lines between random knots.

    Args:
        random: source of chance.
        seconds: how many values.
        period: seconds between two knots.
    """
    knots = random.standard_normal(int(seconds / period) + 3)
    # Averaged over a line between two independent knots the variance is 2/3.
    line = np.interp(np.arange(seconds) / period, np.arange(len(knots)), knots)
    return np.asarray(line * np.sqrt(1.5), np.float32)


def smooth(values: Float[np.ndarray, "seconds"], width: int) -> Float[np.ndarray, "seconds"]:
    """Moving average over `width` values; the ends are continued."""
    return np.asarray(uniform_filter1d(values, width, mode="nearest"))


def upsample(values: Float[np.ndarray, "steps"], factor: int) -> Float32[np.ndarray, "samples"]:
    """Straight lines between values: `factor` samples for each of them, the last one is held."""
    start = values.astype(np.float32)
    step = np.diff(start, append=start[-1:]) / np.float32(factor)
    ramp = np.arange(factor, dtype=np.float32)
    return (start[:, None] + step[:, None] * ramp).reshape(-1)


def add_waveforms(
    target: Float[np.ndarray, "samples"],
    starts: Int[np.ndarray, "events"],
    waveforms: Float[np.ndarray, "events length"],
) -> None:
    """Add brief waveforms in place where they start; what hangs over either end is cut off."""
    if len(starts) == 0:
        return
    places = starts[:, None] + np.arange(waveforms.shape[1])
    inside = (places >= 0) & (places < len(target))
    if inside.all():
        np.add.at(target, places.ravel(), waveforms.astype(np.float32).ravel())
    else:
        np.add.at(target, places[inside], waveforms.astype(np.float32)[inside])


def draw_onsets(
    random: np.random.Generator, hourly: Float[np.ndarray, "seconds"], rate: int
) -> Int[np.ndarray, "events"]:
    """Times of a Poisson process, as sample numbers in ascending order.

    Args:
        random: source of chance.
        hourly: expected events per hour, second by second.
        rate: samples per second of the numbers returned.
    """
    counts = random.poisson(hourly / 3600.0)
    seconds = np.repeat(np.arange(len(hourly)), counts)
    return np.sort(((seconds + random.random(len(seconds))) * rate).astype(np.int64))


def bump(
    seconds: int,
    starts: Float[np.ndarray, "events"],
    heights: Float[np.ndarray, "events"],
    kernel: Float[np.ndarray, "length"],
) -> Float32[np.ndarray, "seconds"]:
    """Sum of one response of fixed shape per event, second by second.

    Args:
        seconds: length of the result.
        starts: when each response begins, in seconds.
        heights: its height.
        kernel: its shape, one value per second.
    """
    result = np.zeros(seconds, np.float32)
    add_waveforms(result, np.floor(starts).astype(np.int64), heights[:, None] * kernel)
    return result

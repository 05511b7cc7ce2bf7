"""Judges every window of a channel by its samples as they were recorded: invalid, flat or clipped.

A window with a fault is absent in that modality; the modality's other windows and the window's other
modalities are unharmed. The limits were set on the real excerpts of the CinC Challenge 2018, where they find
the channels that went dead and leave low chin tone alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int16, Real, Shaped

from physioray.signals import WINDOW_SECONDS

INVALID_SAMPLE = -32768
"""The 16-bit code that WFDB keeps for a sample that was not measured."""

_FLAT_STEPS = 0.75
"""A window whose standard deviation stays below this many digital steps shows its converter, not the body."""
_FLAT_SECONDS = 0.5
"""A window is flat if this share of its seconds is constant."""
_FEWER = (8, 2, 1)
"""Of a window every eighth sample is looked at, every second if these leave it in doubt, then all."""
_WINDOWS_AT_ONCE = 32
_RAIL_SHARE = 0.01
"""A window is clipped if more than this share of its samples lies on the converter's ends, +-32767."""
_STUCK_SHARE = 0.2
"""A window is clipped if more than this share lies on the recording's own smallest or largest value."""
_STUCK_RANGE = 50


@dataclass(frozen=True, kw_only=True)
class WindowFaults:
    """Which windows of a channel cannot be used and why; a window has at most one fault."""

    invalid: Bool[np.ndarray, "windows"]
    flat: Bool[np.ndarray, "windows"]
    clipped: Bool[np.ndarray, "windows"]

    @property
    def any(self) -> Bool[np.ndarray, "windows"]:
        """True where a window has a fault."""
        return self.invalid | self.flat | self.clipped


def find_invalid(raw: Real[np.ndarray, "samples"]) -> Bool[np.ndarray, "samples"]:
    """True where a sample was not measured: not a finite number, or the 16-bit code -32768."""
    if np.issubdtype(raw.dtype, np.floating):
        return ~np.isfinite(raw)
    return raw == INVALID_SAMPLE if raw.dtype == np.int16 else np.zeros(len(raw), np.bool_)


def _cut(values: Shaped[np.ndarray, "samples"], rate: float, windows: int) -> list[Shaped[np.ndarray, "window"]]:
    edges = np.rint(np.arange(windows + 1) * WINDOW_SECONDS * rate).astype(np.int64)
    return [values[first:last] for first, last in itertools.pairwise(edges)]


def find_faults(raw: Real[np.ndarray, "samples"], rate: float, windows: int, *, slow: bool = False) -> WindowFaults:
    """Judge each window of a channel by its samples as they were recorded, before any filter.

    Invalid: a sample was not measured. Flat: half of the seconds are constant, or the window moves less
    than 0.75 of a digital step. Clipped: more than 1 % of the samples on the converter's ends, or more
    than a fifth on the recording's own extremes.

    Args:
        raw: `(samples,)` digital values (int16), or physical ones (floating point).
        rate: samples per second, in Hz.
        windows: number of whole windows.
        slow: the signal may rest for 30 s in health (oxygen saturation), also on the converter's end, which the
            challenge's headers give to 100 %: never flat nor clipped.
    """
    digital = raw.dtype == np.int16
    # The lowest code is that of a sample that was not measured, so the smallest sample tells whether there is one.
    some_invalid = bool(raw.min(initial=0) == INVALID_SAMPLE) if digital else bool(find_invalid(raw).any())
    invalid_samples = find_invalid(raw) if some_invalid else None
    valid = raw[~invalid_samples] if invalid_samples is not None else raw
    low, high = (valid.min(), valid.max()) if len(valid) else (0, 0)
    flat_below = _FLAT_STEPS if digital else 1e-3 * float(valid.std(dtype=np.float64)) if len(valid) else 0.0
    second = max(1, int(rate))
    stuck_at = not slow and float(high) - float(low) >= _STUCK_RANGE if digital else not slow and high > low
    rails = digital and not slow and (low <= -32767 or high == 32767)
    flags = np.zeros((3, windows), np.bool_)
    cuts = _cut(raw, rate, windows)
    shortest = min((len(window) for window in cuts), default=0)
    # What is rare in the whole recording cannot be frequent in a window.
    rails = rails and np.count_nonzero((raw <= -32767) | (raw == 32767)) > _RAIL_SHARE * shortest
    stuck_at = stuck_at and np.count_nonzero(raw == low) + np.count_nonzero(raw == high) > _STUCK_SHARE * shortest
    invalid_cuts = _cut(invalid_samples, rate, windows) if invalid_samples is not None else None
    moving = _find_moving(raw, rate, windows, flat_below) if not slow and invalid_cuts is None else None
    for number in range(windows) if moving is None else np.flatnonzero(~moving | rails | stuck_at).tolist():
        window = cuts[number]
        if invalid_cuts is not None and invalid_cuts[number].any():
            flags[0, number] = True
        elif not slow and (moving is None or not moving[number]) and _is_flat(window, second, flat_below):
            flags[1, number] = True
        else:
            flags[2, number] = (rails and _is_on_rails(window)) or (
                stuck_at and _is_stuck(window, float(low), float(high))
            )
    return WindowFaults(invalid=flags[0], flat=flags[1], clipped=flags[2])


def _find_moving(
    raw: Real[np.ndarray, "samples"], rate: float, windows: int, flat_below: float
) -> Bool[np.ndarray, "windows"] | None:
    """True where a few samples of a window show at once that it is not flat; None if a second is no whole number.

    The squares of all deviations add up to no less than those of some samples from their own mean. So a window moves
    enough if every eighth sample says so by itself, or every second one where these do not, as in a quiet muscle; and
    less than half of its seconds are constant if three samples that differ say so of more than half.
    """
    second = int(rate)
    if second != rate or second < 1 or windows == 0:
        return None
    seconds = raw[: windows * WINDOW_SECONDS * second].reshape(windows, WINDOW_SECONDS, second)
    first = seconds[:, :, 0]
    doubtful = ((first == seconds[:, :, second // 2]) & (first == seconds[:, :, -1])).sum(axis=1)
    whole, enough = seconds.reshape(windows, -1), np.zeros(windows, np.bool_)
    for fewer in _FEWER:
        doubtful_rows = np.flatnonzero(~enough)
        for start in range(0, len(doubtful_rows), _WINDOWS_AT_ONCE):
            rows = doubtful_rows[start : start + _WINDOWS_AT_ONCE]
            some = whole[:, ::fewer][rows].astype(np.float64)
            # With a tenth to spare, far more than single precision rounds off.
            enough[rows] = some.var(axis=1) * some.shape[1] > 1.1 * flat_below**2 * WINDOW_SECONDS * second
    return np.asarray((doubtful < _FLAT_SECONDS * WINDOW_SECONDS) & enough)


def _is_flat(window: Real[np.ndarray, "window"], second: int, flat_below: float) -> bool:
    seconds = window[: len(window) // second * second].reshape(-1, second)
    # Three samples that differ show at once that a second is not constant; only the rest is looked at whole.
    doubtful = seconds[(seconds[:, 0] == seconds[:, second // 2]) & (seconds[:, 0] == seconds[:, -1])]
    constant = int((doubtful == doubtful[:, :1]).all(axis=1).sum()) if len(doubtful) else 0
    if constant >= _FLAT_SECONDS * len(seconds):
        return True
    return float(np.std(window, dtype=np.float32)) <= flat_below


def _is_on_rails(window: Int16[np.ndarray, "window"]) -> bool:
    return float(np.mean((window <= -32767) | (window == 32767))) > _RAIL_SHARE


def _is_stuck(window: Real[np.ndarray, "window"], low: float, high: float) -> bool:
    return float(np.mean((window == low) | (window == high))) > _STUCK_SHARE

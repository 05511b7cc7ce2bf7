"""A modality's signal in physical units: a channel as it is, or the difference of two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float32, Real
from scipy.signal import resample_poly

from physioray.data.channels import ChosenChannel
from physioray.data.faults import find_faults, find_invalid
from physioray.data.preprocess import fill_invalid
from physioray.data.waveforms import Samples
from physioray.signals import WINDOW_SECONDS

_LARGEST_FACTOR = 2000


@dataclass(frozen=True, kw_only=True)
class DerivedSignal:
    """A signal in its modality's unit, the same as recorded (for judging windows), and its rate in Hz."""

    physical: Float32[np.ndarray, "samples"]
    raw: Real[np.ndarray, "samples"]
    rate: float


def derive_signal(
    samples: Mapping[int, Samples], chosen: ChosenChannel, *, seconds: float, jumps: Sequence[float]
) -> DerivedSignal:
    """Bring a chosen channel to its modality's unit; of a derivation, subtract the second channel.

    Both are brought to the same unit, and the faster to the rate of the slower (zero-phase polyphase filter, never
    across a jump). A window in which either is invalid, flat or clipped holds no number, so that it is absent.

    Args:
        samples: channels by their number in the header.
        chosen: which.
        seconds: duration of the recording.
        jumps: times at which the signal jumps, in seconds of signal.
    """
    raw = samples[chosen.number]
    if chosen.minus is None:
        return DerivedSignal(physical=to_physical(raw, chosen), raw=raw, rate=chosen.channel.rate)
    rate = chosen.rate
    length = round(seconds * rate)
    first = _bring(raw, chosen, rate, length, jumps)
    first -= _bring(samples[chosen.minus.number], chosen.minus, rate, length, jumps)
    return DerivedSignal(physical=first, raw=first, rate=rate)


def _bring(
    raw: Samples, chosen: ChosenChannel, rate: float, length: int, jumps: Sequence[float]
) -> Float32[np.ndarray, "length"]:
    own = chosen.channel.rate
    physical = fill_invalid(to_physical(raw, chosen), find_invalid(raw))
    if own != rate:
        ratio = (Fraction(rate).limit_denominator(10**6) / Fraction(own).limit_denominator(10**6)).limit_denominator(
            _LARGEST_FACTOR
        )
        edges = [0, *sorted({round(jump * own) for jump in jumps}), len(physical)]
        result = np.zeros(length, np.float32)
        for begin, end in itertools.pairwise(edges):
            start = round(begin / own * rate)
            piece = resample_poly(physical[begin:end], ratio.numerator, ratio.denominator, padtype="line")
            result[start : start + len(piece)] = piece[: max(0, length - start)]
        physical = result
    physical = np.pad(physical, (0, max(0, length - len(physical))), mode="edge")[:length]
    windows = int(length / rate / WINDOW_SECONDS + 1e-9)
    faults = find_faults(raw, own, windows).any
    borders = np.rint(np.arange(windows + 1) * WINDOW_SECONDS * rate).astype(np.int64)
    for window in np.flatnonzero(faults):
        physical[borders[window] : borders[window + 1]] = np.nan
    return physical


def to_physical(raw: Real[np.ndarray, "samples"], chosen: ChosenChannel) -> Float32[np.ndarray, "samples"]:
    """A channel's samples in its modality's unit."""
    physical = raw.astype(np.float32)
    if raw.dtype != np.int16:
        physical *= np.float32(chosen.factor)
        return physical
    if chosen.channel.baseline:
        physical -= np.float32(chosen.channel.baseline)
    factor = chosen.factor / chosen.channel.gain
    if factor != 1:
        physical *= np.float32(factor)
    return physical

"""Arrays in, arrays out: filter, resample, judge, scale and quantise one channel of one recording.

The band-pass and the anti-alias low-pass are one zero-phase kernel, applied by overlap-save in the frequency
domain, and only the samples that are kept are computed: the spectrum of a block is repeated for the zeros
that interpolation inserts, multiplied, and folded for the samples that decimation leaves out. The result is
that of filtering at the common rate followed by taking every `down`-th sample.

Sources: Fang et al. 2024 (arXiv 2410.16424), section 3.1, for bands and rate; filter length and phase are not
stated there and are settings of `config.IngestConfig`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Complex64, Float32, Float64, Int16, Int64, Real
from scipy import fft
from scipy.signal import oaconvolve

from physioray.config import IngestConfig
from physioray.data.faults import WindowFaults, find_faults, find_invalid
from physioray.data.quartiles import find_quartiles, measure_spread
from physioray.signals import WINDOW_SECONDS, Modality

_SAFE_SHARE = 0.45
"""No pass-band ends above this share of a sampling rate."""
_ROBUST_DEVIATIONS = 8.0
_IQR_OF_NORMAL = 1.3489795003921634
_LONGEST_RESPONSE = 2**23
_LARGEST_FACTOR = 2000
_LARGEST_DRIFT = 1e-6
"""How far the ratio of two rates may be from the exact one: 0.03 s in a night."""
_BLOCKS_AT_ONCE = 8
"""Blocks transformed together: the library works on as many at a time as fit a vector register."""
_WINDOWS_AT_ONCE = 32
_CLIP_SHARE = 0.5
"""A window is clipped if more than this share of its scaled samples lies beyond `IngestConfig.clip`."""


class AbsentModality(ValueError):
    """A channel holds nothing to keep; the message is the reason, and other modalities are unharmed."""


@dataclass(frozen=True, kw_only=True)
class FilterPlan:
    """One zero-phase kernel and the change of rate that goes with it.

    Attributes:
        up, down: target rate over source rate in lowest terms.
        kernel: `(taps,)` symmetric, odd, at `up` times the source rate.
        band: lower and upper edge (half amplitude) of the band-pass, in Hz; lower edge 0 means low-pass.
        antialias: half-amplitude edge of the low-pass against aliasing, in Hz; None if there is none.
    """

    up: int
    down: int
    kernel: Float64[np.ndarray, "taps"]
    band: tuple[float, float]
    antialias: float | None


@dataclass(frozen=True, kw_only=True)
class ProcessedChannel:
    """A channel as it goes into a shard, with what is needed for the way back to physical units.

    Attributes:
        signal: `(windows, samples)` int16 in steps of `quantisation_step`; zero where not present.
        present: `(windows,)`.
        faults: why the other windows are absent.
        scale, offset: a sample is `signal x step x scale + offset` in the channel's unit.
        robust_std: interquartile range over 1.349 of the filtered signal in good windows, in that unit.
        plan: how it was filtered.
    """

    signal: Int16[np.ndarray, "windows samples"]
    present: Bool[np.ndarray, "windows"]
    faults: WindowFaults
    scale: float
    offset: float
    robust_std: float
    plan: FilterPlan


def quantisation_step(settings: IngestConfig) -> float:
    """Size of one int16 step in scales: the clip is the largest number, `clip / 32767`."""
    return settings.clip / 32767


def design_filter(source_rate: float, rate: int, band: tuple[float, float], settings: IngestConfig) -> FilterPlan:
    """Design the band-pass, the anti-alias low-pass and the change of rate as one kernel.

    Windowed sincs with a Hamming window, whose transition is 3.3 / duration (Oppenheim and Schafer,
    Discrete-Time Signal Processing, section on FIR design by windowing). The transition is
    `settings.transition` Hz where the band has a lower edge, else a fifth of the upper edge.

    Args:
        source_rate: samples per second of the recording, in Hz, not below `rate`.
        rate: samples per second that are kept, in Hz.
        band: lower and upper edge in Hz; the upper is lowered to 0.45 x `source_rate` if need be.
        settings: `transition` and `decimate_antialias`.

    Raises:
        AbsentModality: the source is slower than `rate`, or the two rates have no simple ratio.
        ValueError: no band is left.
    """
    if source_rate < rate:
        raise AbsentModality(f"its rate must be at least {rate} Hz, but is {source_rate:g} Hz")
    low, high = band[0], min(band[1], _SAFE_SHARE * source_rate)
    if not low < high:
        raise ValueError(f"A band's lower edge must lie below its upper, but got {low:g} to {high:g} Hz.")
    exact = Fraction(rate) / Fraction(source_rate).limit_denominator(10**6)
    ratio = exact.limit_denominator(_LARGEST_FACTOR)
    if abs(ratio / exact - 1) > _LARGEST_DRIFT:
        raise AbsentModality(
            f"its rate must be to {rate} Hz as whole numbers up to {_LARGEST_FACTOR}, but is {source_rate:g} Hz; "
            "resample the recording first"
        )
    common = source_rate * ratio.numerator
    taps = _count_taps(common, settings.transition if low > 0 else 0.2 * high)
    kernel = _make_lowpass(common, high, taps)
    if low > 0:
        kernel = kernel - _make_lowpass(common, low, taps)
    cutoff = _SAFE_SHARE * rate if settings.decimate_antialias and rate < source_rate else None
    if cutoff is not None:
        kernel = oaconvolve(kernel, _make_lowpass(common, cutoff, _count_taps(common, 0.1 * rate)))
    return FilterPlan(up=ratio.numerator, down=ratio.denominator, kernel=kernel, band=(low, high), antialias=cutoff)


def _count_taps(rate: float, transition: float) -> int:
    return math.ceil(3.3 * rate / transition) | 1


def _make_lowpass(rate: float, cutoff: float, taps: int) -> Float64[np.ndarray, "taps"]:
    time = np.arange(taps) - taps // 2
    kernel = np.sinc(2 * cutoff / rate * time) * np.hamming(taps)
    # Unit gain at 0 Hz: the difference of two such kernels then removes a constant exactly.
    return kernel / kernel.sum()


@dataclass(frozen=True)
class _Fold:
    """One repetition of the spectrum that lands on the output's: which bins, with which gains."""

    bins: Int64[np.ndarray, "out_bins"] | slice
    conjugate: Bool[np.ndarray, "out_bins"]
    gain: Float32[np.ndarray, "out_bins"]


def _plan_folds(plan: FilterPlan, length: int) -> list[_Fold]:
    """Gains for blocks of `length` input samples, a multiple of `plan.down`."""
    total = length * plan.up
    centred = np.zeros(total)
    half = len(plan.kernel) // 2
    centred[: half + 1] = plan.kernel[half:]
    centred[total - half :] = plan.kernel[:half]
    response = fft.rfft(centred).real * (plan.up / plan.down)
    out_length = total // plan.down
    folds = []
    for repetition in range(plan.down):
        place = np.arange(out_length // 2 + 1) + repetition * out_length
        gain = response[np.minimum(place, total - place)]
        # Below -120 dB a repetition is under the rounding of float32.
        if np.abs(gain).max() < 1e-6:
            continue
        inside = place % length
        conjugate = inside > length // 2
        bins = np.where(conjugate, length - inside, inside)
        folds.append(_Fold(_find_slice(bins), conjugate, gain.astype(np.float32)))
    return folds


def _find_slice(bins: Int64[np.ndarray, "out_bins"]) -> Int64[np.ndarray, "out_bins"] | slice:
    """The same bins as a slice, which costs no copy, where they follow each other up or down."""
    steps = np.diff(bins)
    if len(steps) == 0 or abs(steps[0]) != 1 or (steps != steps[0]).any():
        return bins
    stop = int(bins[-1] + steps[0])
    return slice(int(bins[0]), stop if stop >= 0 else None, int(steps[0]))


def _fold_spectrum(
    spectrum: Complex64[np.ndarray, "blocks bins"], folds: list[_Fold]
) -> Complex64[np.ndarray, "blocks out_bins"]:
    total: np.ndarray | None = None
    for fold in folds:
        term = spectrum[:, fold.bins] * fold.gain
        if fold.conjugate.any():
            np.conjugate(term, out=term, where=fold.conjugate)
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None, "a filter passes something"
    return total


def filter_signal(
    samples: Float32[np.ndarray, "samples"], plan: FilterPlan, jumps: Sequence[int] = ()
) -> Float32[np.ndarray, "resampled"]:
    """Filter a whole recording's channel with zero phase and resample it.

    Stretches between jumps are filtered separately, each continued by its own mirror image, so nothing
    leaks across. Output sample k stands at time k / target rate of the recording, whatever the jumps.

    Args:
        samples: `(samples,)` at the source rate, finite.
        plan: made by `design_filter`.
        jumps: sample numbers at which a new stretch begins.

    Returns:
        `(ceil(samples x up / down),)` float32 in the input's unit.
    """
    edges = [0, *sorted({jump for jump in jumps if 0 < jump < len(samples)}), len(samples)]
    result = np.empty(-(-len(samples) * plan.up // plan.down), np.float32)
    folds: dict[int, list[_Fold]] = {}
    for first, last in itertools.pairwise(edges):
        start, stop = (-(-edge * plan.up // plan.down) for edge in (first, last))
        if stop > start:
            _filter_stretch(samples[first:last], plan, first, result[start:stop], folds)
    return result


def _filter_stretch(
    samples: Float32[np.ndarray, "samples"],
    plan: FilterPlan,
    first: int,
    result: Float32[np.ndarray, "resampled"],
    folds: dict[int, list[_Fold]],
) -> None:
    """Filter one stretch that begins at sample `first` of the recording into `result`."""
    reach = -(-(len(plan.kernel) // 2) // plan.up)
    pad = -(-reach // plan.down) * plan.down
    # Blocks begin where an input sample coincides with an output sample.
    lead = pad + first % plan.down
    # Blocks of ten kernels waste a tenth; with a large factor `up` the response itself would be too long.
    wanted = 4 * pad if 20 * pad * plan.up > _LONGEST_RESPONSE else 20 * pad
    length = max(min(wanted, lead + len(samples) + 2 * pad), 4 * pad)
    length = plan.down * fft.next_fast_len(-(-length // plan.down), real=True)
    hop = length - 2 * pad
    blocks = -(-(lead - pad + len(samples)) // hop)
    tail = blocks * hop + 2 * pad - lead - len(samples)
    mean = samples.mean(dtype=np.float64)
    padded = _pad(samples, np.float32(mean), lead, max(tail, 0))
    views = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop][:blocks]
    if length not in folds:
        folds[length] = _plan_folds(plan, length)
    skip, keep, out_length = (value * plan.up // plan.down for value in (pad, hop, length))
    begin = -(-first * plan.up // plan.down) - (first - first % plan.down) * plan.up // plan.down
    filtered = np.empty((blocks, keep), np.float32)
    for number in range(0, blocks, _BLOCKS_AT_ONCE):
        spectrum = fft.rfft(views[number : number + _BLOCKS_AT_ONCE], axis=1)
        block = fft.irfft(_fold_spectrum(spectrum, folds[length]), n=out_length, axis=1)
        filtered[number : number + _BLOCKS_AT_ONCE] = block[:, skip : skip + keep]
    result[:] = filtered.reshape(-1)[begin : begin + len(result)]
    if plan.band[0] == 0:
        result += np.float32(mean)


def _pad(
    samples: Float32[np.ndarray, "samples"], mean: np.float32, before: int, after: int
) -> Float32[np.ndarray, "padded"]:
    """The samples without their mean, continued by their mirror image."""
    padded = np.empty(before + len(samples) + after, np.float32)
    np.subtract(samples, mean, out=padded[before : before + len(samples)])
    if max(before, after) < len(samples):
        inside = padded[before : before + len(samples)]
        padded[:before] = inside[before:0:-1]
        padded[before + len(samples) :] = inside[-2 : -2 - after : -1]
        return padded
    centred = padded[before : before + len(samples)].copy()
    return np.pad(centred, (before, after), mode="reflect" if len(samples) > 1 else "edge")


def fill_invalid(
    samples: Float32[np.ndarray, "samples"], invalid: Bool[np.ndarray, "samples"]
) -> Float32[np.ndarray, "samples"]:
    """Bridge samples that were not measured by straight lines, so that a filter can run over them."""
    if not invalid.any() or invalid.all():
        return np.where(invalid, np.float32(0), samples)
    good = np.flatnonzero(~invalid)
    filled = samples.copy()
    bad = np.flatnonzero(invalid)
    filled[bad] = np.interp(bad, good, samples[good])
    return filled


def measure_scale(samples: Float32[np.ndarray, "samples"], settings: IngestConfig) -> tuple[float, float, float]:
    """Centre, scale and robust standard deviation of a recording's channel.

    `recording_std`: the standard deviation of the samples within 8 robust deviations of the median;
    `recording_iqr`: the interquartile range. A scale per recording keeps the difference between stages,
    a scale per window would remove it.

    Returns:
        Median, scale and robust standard deviation (interquartile range / 1.349), in the samples' unit.

    Raises:
        AbsentModality: the samples do not vary.
    """
    lower, centre, upper = (float(value) for value in find_quartiles(samples))
    robust = (upper - lower) / _IQR_OF_NORMAL
    if settings.input_norm == "recording_iqr":
        scale = upper - lower
    else:
        scale = measure_spread(samples, centre, _ROBUST_DEVIATIONS * robust)
    if not (math.isfinite(scale) and scale > 1e-12):
        raise AbsentModality(f"its samples must vary, but their scale is {scale:g}; look at the electrode")
    return centre, scale, robust


def _quantise(
    filtered: Float32[np.ndarray, "windows samples"], centre: float, factor: float
) -> tuple[Int16[np.ndarray, "windows samples"], Int64[np.ndarray, "windows"]]:
    """Centred and scaled windows as int16, and how many samples of each lie beyond its range.

    A few windows at a time, which stay in the processor's cache from one operation to the next.
    """
    signal = np.empty(filtered.shape, np.int16)
    beyond = np.zeros(len(filtered), np.int64)
    for first in range(0, len(filtered), _WINDOWS_AT_ONCE):
        some = slice(first, first + _WINDOWS_AT_ONCE)
        block = filtered[some]
        block -= np.float32(centre)
        block *= np.float32(factor)
        if max(block.max(), -block.min()) > 32767:
            beyond[some] = np.count_nonzero(np.abs(block) > 32767, axis=1)
            np.clip(block, -32767, 32767, out=block)
        signal[some] = np.rint(block, out=block)
    return signal, beyond


def process_channel(
    samples: Float32[np.ndarray, "samples"],
    raw: Real[np.ndarray, "samples"],
    rate: float,
    modality: Modality,
    settings: IngestConfig,
    jumps: Sequence[int] = (),
) -> ProcessedChannel:
    """Turn one channel of one recording into quantised windows.

    Args:
        samples: `(samples,)` in physical units.
        raw: `(samples,)` the same as recorded, for judging windows.
        rate: samples per second, in Hz.
        modality: what it is kept as.
        settings: see `config.IngestConfig`.
        jumps: samples at which the signal jumps; filters do not cross them.

    Raises:
        AbsentModality: no window is left, or the signal does not vary.
    """
    windows = int(len(samples) / rate / WINDOW_SECONDS + 1e-9)
    plan = design_filter(rate, modality.rate, modality.band, settings)
    faults = find_faults(raw, rate, windows, slow=modality.band[1] <= 1.0)
    if faults.any.all():
        counts = ", ".join(f"{name} {getattr(faults, name).sum()}" for name in ("flat", "invalid", "clipped"))
        raise AbsentModality(f"at least one window must be usable, but none of {windows} is ({counts})")
    filled = samples
    if faults.invalid.any():
        filled = fill_invalid(samples, find_invalid(raw))
    elif np.issubdtype(raw.dtype, np.floating):  # what comes after the last window may be no number
        filled = np.nan_to_num(samples)
    filtered = filter_signal(filled, plan, jumps)
    missing = windows * modality.samples - len(filtered)
    if missing > 0:  # only where an odd rate was met nearly
        filtered = np.pad(filtered, (0, missing), mode="edge")
    filtered = filtered[: windows * modality.samples].reshape(windows, -1)
    good = ~faults.any
    usable = filtered if good.all() else filtered[good]
    centre, scale, robust = measure_scale(usable.reshape(-1), settings)
    signal, beyond = _quantise(filtered, centre, 1 / (scale * quantisation_step(settings)))
    clipped = beyond > _CLIP_SHARE * modality.samples
    faults = WindowFaults(invalid=faults.invalid, flat=faults.flat, clipped=faults.clipped | (clipped & good))
    present = ~faults.any
    signal[~present] = 0
    return ProcessedChannel(
        signal=signal,
        present=present,
        faults=faults,
        scale=scale,
        offset=centre,
        robust_std=robust,
        plan=plan,
    )

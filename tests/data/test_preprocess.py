"""Filters, scale and judgement of windows, against known signals and scipy's direct computation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import signal as scipy_signal

from physioray.config import IngestConfig
from physioray.data.faults import find_faults
from physioray.data.preprocess import (
    AbsentModality,
    design_filter,
    fill_invalid,
    filter_signal,
    measure_scale,
    process_channel,
    quantisation_step,
)
from physioray.data.quartiles import find_quartiles, measure_spread
from physioray.signals import find_modality

SETTINGS = IngestConfig()
LITERAL = dataclasses.replace(SETTINGS, decimate_antialias=False)
RATES = (100.0, 128.0, 200.0, 250.0, 256.0, 512.0)


def _sine(frequency: float, rate: float, seconds: float = 240, phase: float = 0.3) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate + phase).astype(np.float32)


def _gain(frequency: float, rate: float, band: tuple[float, float], settings: IngestConfig = SETTINGS) -> float:
    plan = design_filter(rate, 100, band, settings)
    result = filter_signal(_sine(frequency, rate), plan)
    return float(np.sqrt(2) * result[5000:-5000].std())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frequency", [0.3, 1.0, 10.0, 29.0])
def test_the_pass_band_is_kept_whatever_the_source_rate(rate: float, frequency: float) -> None:
    assert _gain(frequency, rate, (0.1, 30.0)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frequency", [0.01, 31.0, 40.0, 49.0])
def test_the_stop_band_lies_below_40_decibels_whatever_the_source_rate(rate: float, frequency: float) -> None:
    assert _gain(frequency, rate, (0.1, 30.0)) < 0.01


@pytest.mark.parametrize("rate", RATES)
def test_a_sine_keeps_its_phase_and_time_whatever_the_source_rate(rate: float) -> None:
    result = filter_signal(_sine(10.0, rate), design_filter(rate, 100, (0.1, 30.0), SETTINGS))
    assert len(result) == 24000
    assert np.abs(result - _sine(10.0, 100.0))[4000:-4000].max() < 0.01


def test_mains_hum_does_not_fold_to_40_hz_with_the_antialias_filter_and_does_without() -> None:
    assert _gain(60.0, 200.0, (0.1, 70.0)) < 0.01
    assert _gain(60.0, 200.0, (0.1, 70.0), LITERAL) == pytest.approx(1.0, abs=0.01)
    folded = filter_signal(_sine(60.0, 200.0), design_filter(200.0, 100, (0.1, 70.0), LITERAL))[4000:20000]
    assert np.argmax(np.abs(np.fft.rfft(folded))) / 160 == pytest.approx(40.0, abs=0.1)


def test_the_plan_records_the_band_that_was_used() -> None:
    assert design_filter(200.0, 100, (0.1, 70.0), SETTINGS).band == (0.1, 70.0)
    narrow = design_filter(128.0, 100, (0.1, 70.0), SETTINGS)
    assert narrow.band == (0.1, pytest.approx(57.6))
    assert narrow.antialias == 45.0
    assert design_filter(100.0, 100, (0.1, 30.0), SETTINGS).antialias is None
    assert design_filter(200.0, 100, (0.1, 30.0), LITERAL).antialias is None


@pytest.mark.parametrize("rate", [100.0, 128.0, 200.0, 250.0])
@pytest.mark.parametrize("settings", [SETTINGS, LITERAL], ids=["antialias", "literal"])
def test_the_result_is_that_of_filtering_in_full_and_then_leaving_samples_out(
    rate: float, settings: IngestConfig
) -> None:
    samples = np.random.default_rng(1).standard_normal(round(rate * 300)).astype(np.float32)
    plan = design_filter(rate, 100, (0.1, 70.0), settings)
    half = len(plan.kernel) // 2
    pad = (half // plan.up // plan.down + 2) * plan.down
    padded = np.pad(samples - samples.mean(), pad, mode="reflect").astype(np.float64)
    full = np.zeros(len(padded) * plan.up)
    full[:: plan.up] = padded
    full = plan.up * scipy_signal.oaconvolve(full, plan.kernel, mode="same")
    expected = full[pad * plan.up :: plan.down][: len(samples) * plan.up // plan.down]
    result = filter_signal(samples, plan)
    # Repetitions of the spectrum below -120 dB are left out, up to 25 of them.
    assert np.abs(result - expected).max() < 5e-5


def test_an_odd_source_rate_is_met_exactly() -> None:
    plan = design_filter(199.5, 100, (0.1, 30.0), SETTINGS)
    result = filter_signal(_sine(10.0, 199.5), plan)
    assert (plan.up, plan.down) == (200, 399)
    assert np.abs(result - _sine(10.0, 100.0)[: len(result)])[4000:-4000].max() < 0.02


def test_a_source_rate_that_only_nearly_fits_is_refused_instead_of_drifting() -> None:
    with pytest.raises(AbsentModality, match=r"199\.993 Hz; resample"):
        design_filter(199.993, 100, (0.1, 30.0), SETTINGS)


@pytest.mark.parametrize("jump", [12000, 12001, 12345])
def test_nothing_leaks_across_a_jump(jump: int) -> None:
    generator = np.random.default_rng(3)
    first, other = (generator.standard_normal(24000).astype(np.float32) for _ in range(2))
    changed = first.copy()
    changed[jump:] = 1000 + 50 * other[jump:]
    plan = design_filter(200.0, 100, (0.1, 30.0), SETTINGS)
    edge = -(-jump // 2)
    one, two = filter_signal(first, plan, [jump]), filter_signal(changed, plan, [jump])
    assert np.array_equal(one[:edge], two[:edge])
    assert np.abs(two[edge:]).max() < 400
    assert not np.array_equal(filter_signal(first, plan)[:edge], filter_signal(changed, plan)[:edge])


@pytest.mark.parametrize("rate", [200.0, 250.0])
def test_time_goes_on_evenly_after_a_jump_that_is_off_the_new_grid(rate: float) -> None:
    result = filter_signal(_sine(10.0, rate), design_filter(rate, 100, (0.1, 30.0), SETTINGS), [round(100 * rate) + 1])
    assert np.abs(result - _sine(10.0, 100.0))[11000:20000].max() < 0.02


@pytest.mark.parametrize("samples", [1, 2, 50, 3000])
def test_a_stretch_shorter_than_the_filter_is_filtered_without_nonsense(samples: int) -> None:
    stretch = (500 + np.random.default_rng(4).standard_normal(samples)).astype(np.float32)
    result = filter_signal(stretch, design_filter(200.0, 100, (0.1, 30.0), SETTINGS))
    assert len(result) == -(-samples // 2)
    assert np.isfinite(result).all() and np.abs(result).max() < 5


def test_a_minute_between_jumps_keeps_its_amplitude_up_to_its_edges() -> None:
    minutes = _sine(5.0, 200.0, seconds=120)
    result = filter_signal(minutes, design_filter(200.0, 100, (0.1, 30.0), SETTINGS), [12000])
    assert np.abs(result - _sine(5.0, 100.0, seconds=120))[100:5900].max() < 0.15


def test_a_constant_is_removed_by_a_band_pass_and_kept_by_a_low_pass() -> None:
    constant = np.full(20000, 97.0, np.float32)
    assert np.abs(filter_signal(constant, design_filter(200.0, 100, (0.1, 30.0), SETTINGS))).max() < 1e-3
    kept = filter_signal(constant, design_filter(200.0, 4, (0.0, 1.0), SETTINGS))
    assert len(kept) == 400 and np.allclose(kept, 97.0, atol=1e-3)


def test_a_source_slower_than_the_modality_is_refused() -> None:
    with pytest.raises(AbsentModality, match="at least 100 Hz, but is 50 Hz"):
        design_filter(50.0, 100, (0.1, 30.0), SETTINGS)


def test_samples_that_were_not_measured_are_bridged_by_lines() -> None:
    filled = fill_invalid(np.array([1, 9, 9, 4], np.float32), np.array([False, True, True, False]))
    assert filled.tolist() == [1, 2, 3, 4]


def _raw(windows: int = 6) -> np.ndarray:
    return np.round(np.random.default_rng(5).standard_normal(windows * 6000) * 20).astype(np.int16)


def test_each_fault_is_found_in_its_own_window_only() -> None:
    raw = _raw()
    raw[6000:12000] = 5
    raw[12100] = -32768
    raw[18000:18200] = 32767
    raw[24000:27500] = -7
    faults = find_faults(raw, 200.0, 6)
    assert faults.flat.tolist() == [False, True, False, False, True, False]
    assert faults.invalid.tolist() == [False, False, True, False, False, False]
    assert faults.clipped.tolist() == [False, False, False, True, False, False]


def test_a_channel_that_sticks_at_its_own_extreme_is_clipped_there() -> None:
    raw = np.clip(_raw() * 5, -400, 400).astype(np.int16)
    raw[6000:12000] = np.clip(np.random.default_rng(1).normal(0, 2000, 6000), -400, 400)
    assert find_faults(raw, 200.0, 6).clipped.tolist() == [False, True, False, False, False, False]


def test_low_tone_of_a_coarse_channel_is_not_flat_but_less_than_its_step_is() -> None:
    noise = np.random.default_rng(6).standard_normal(12000)
    raw = np.concatenate([np.round(noise[:6000]), np.round(noise[6000:] * 0.45)]).astype(np.int16)
    assert find_faults(raw, 200.0, 2).flat.tolist() == [False, True]


@pytest.mark.parametrize("level", [30000, 32767])
def test_a_slow_signal_may_rest_even_on_the_top_of_its_range(level: int) -> None:
    saturation = np.full(12000, level, np.int16)
    assert find_faults(saturation, 200.0, 2).flat.all()
    saturation[::50] -= 100
    assert not find_faults(saturation, 200.0, 2, slow=True).any.any()
    assert find_faults(saturation, 200.0, 2).clipped.all()


def test_numbers_that_are_not_finite_are_invalid() -> None:
    raw = _raw(2).astype(np.float32)
    raw[6500] = np.nan
    assert find_faults(raw, 200.0, 2).invalid.tolist() == [False, True]


def test_the_scale_ignores_samples_beyond_eight_robust_deviations() -> None:
    samples = np.random.default_rng(8).normal(3, 10, 100_000).astype(np.float32)
    samples[:500] = 1e5
    centre, scale, robust = measure_scale(samples, SETTINGS)
    assert (centre, scale, robust) == pytest.approx((3, 10, 10), rel=0.03)
    _, wide, _ = measure_scale(samples, dataclasses.replace(SETTINGS, input_norm="recording_iqr"))
    assert wide == pytest.approx(13.49, rel=0.02)


def test_a_signal_that_never_varies_has_no_scale() -> None:
    with pytest.raises(AbsentModality, match="must vary"):
        measure_scale(np.zeros(1000, np.float32), SETTINGS)


def test_stored_steps_give_the_filtered_signal_back() -> None:
    eeg, raw = find_modality("eeg"), _raw()
    samples = raw.astype(np.float32)
    item = process_channel(samples, raw, 200.0, eeg, SETTINGS)
    back = item.signal.reshape(-1) * quantisation_step(SETTINGS) * item.scale + item.offset
    expected = filter_signal(samples, item.plan)
    assert item.present.all()
    assert np.abs(back - expected).max() < 0.6 * quantisation_step(SETTINGS) * item.scale
    assert quantisation_step(SETTINGS) * 32767 == SETTINGS.clip


def test_windows_with_a_fault_hold_zeros_and_do_not_set_the_scale() -> None:
    raw = _raw()
    clean = process_channel(raw.astype(np.float32), raw, 200.0, find_modality("eeg"), SETTINGS)
    raw[6000:12000] = 3
    item = process_channel(raw.astype(np.float32), raw, 200.0, find_modality("eeg"), SETTINGS)
    assert item.present.tolist() == [True, False, True, True, True, True]
    assert not item.signal[1].any() and item.signal[0].any()
    assert item.scale == pytest.approx(clean.scale, rel=0.02)


def test_a_window_mostly_beyond_the_clip_is_absent() -> None:
    raw = _raw(8)
    raw[6000:12000] = np.random.default_rng(2).normal(0, 4000, 6000)
    item = process_channel(raw.astype(np.float32), raw, 200.0, find_modality("eeg"), SETTINGS)
    assert item.faults.clipped.tolist() == [False, True, *[False] * 6]


def test_a_channel_without_a_usable_window_is_absent_with_the_counts() -> None:
    raw = np.full(12000, 4, np.int16)
    with pytest.raises(AbsentModality, match="none of 2 is \\(flat 2"):
        process_channel(raw.astype(np.float32), raw, 200.0, find_modality("eeg"), SETTINGS)


@pytest.mark.parametrize("count", [100, 65_537, 65_538, 65_539, 70_000])
@pytest.mark.parametrize("rounded", [False, True])
def test_quartiles_by_histogram_are_those_of_numpy_to_the_last_bit(count: int, rounded: bool) -> None:
    # Heavy tails, as artefacts make them, put nearly all samples into few bins.
    samples = (np.random.default_rng(count).standard_t(2, count) * 30).astype(np.float32)
    samples = np.round(samples) if rounded else samples
    assert np.array_equal(find_quartiles(samples), np.percentile(samples, (25, 50, 75)))
    assert np.array_equal(find_quartiles(np.full(count, 3, np.float32)), [3, 3, 3])


@pytest.mark.parametrize("reach", [0.0, 60.0, 1e9])
@pytest.mark.parametrize("count", [1, 1000, 65_537, 131_083, 1_000_003])
def test_the_spread_of_what_lies_near_is_that_of_numpy_to_the_last_bit(count: int, reach: float) -> None:
    samples = (np.random.default_rng(count).standard_t(3, count) * 20).astype(np.float32)
    deviation = samples - np.float32(0.37)
    near = deviation[np.abs(deviation) <= reach] if reach else deviation
    assert measure_spread(samples, 0.37, reach) == near.std(dtype=np.float64)
    assert math.isnan(measure_spread(samples, 1e6, 1.0))

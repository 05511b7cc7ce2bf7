"""Whether the effects that the simulation promises are in the signals, measured on fixed seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import signal

from physioray.data.artefacts import spoil_signals
from physioray.data.body_signals import RATE, _draw_breathing, simulate_body, simulate_heart_rate, simulate_saturation
from physioray.data.brain_signals import RATE as HEAD_RATE
from physioray.data.brain_signals import cover_arousals, simulate_head
from physioray.data.challenge_layout import CHANNELS
from physioray.data.hypnogram import STAGE_PRIORS, simulate_hypnogram
from physioray.data.night import Event, Night, mark_arousals, simulate_night

W, N1, N2, N3, REM = range(5)
PEOPLE = 6


def make_night(stage: int, *, age: float = 55.0, minutes: int = 10, arousals: np.ndarray | None = None) -> Night:
    """A night of one stage without events: effects of a stage stand alone in it."""
    stages = np.full(minutes * 2, stage, np.int8)
    calm = np.empty((0, 3)) if arousals is None else arousals
    return Night(seconds=minutes * 60, stages=stages, looks=stages, events=(), arousals=calm, age=age)


def band_amplitude(values: np.ndarray, low: float, high: float, rate: int) -> float:
    # Slow rhythms of the heart need longer pieces than those of the head.
    seconds = 4 if low >= 0.5 else 60
    frequency, power = signal.welch(values, rate, nperseg=seconds * rate)
    inside = (frequency >= low) & (frequency < high)
    assert inside.any()
    return float(np.sqrt(power[inside].sum() / seconds))


@pytest.fixture(scope="module")
def heads() -> dict[int, list[dict[str, np.ndarray]]]:
    """Heads of the same people (same seeds) in each stage."""
    return {
        stage: [simulate_head(np.random.default_rng([7, person]), make_night(stage)) for person in range(PEOPLE)]
        for stage in range(5)
    }


def compare(heads: dict[int, list[dict[str, np.ndarray]]], channel: str, low: float, high: float) -> list[float]:
    """Median amplitude of a band in each stage."""
    return [
        float(np.median([band_amplitude(head[channel], low, high, HEAD_RATE) for head in heads[stage]]))
        for stage in range(5)
    ]


def test_slow_waves_are_largest_in_deep_sleep(heads: dict[int, list[dict[str, np.ndarray]]]) -> None:
    delta = compare(heads, "F3-M2", 0.5, 2.0)
    assert delta[N3] > 1.5 * max(delta[W], delta[N1], delta[N2], delta[REM])
    assert delta[N2] > delta[N1]


def test_alpha_is_largest_awake_and_over_the_back_of_the_head(heads: dict[int, list[dict[str, np.ndarray]]]) -> None:
    back = np.array(compare(heads, "O2-M1", 8.0, 12.0)) / compare(heads, "O2-M1", 0.5, 30.0)
    front = np.array(compare(heads, "F3-M2", 8.0, 12.0)) / compare(heads, "F3-M2", 0.5, 30.0)
    assert back[W] > back[N2] > back[N3]
    assert back[W] > front[W]


def test_spindles_make_sigma_stand_out_in_stage_two(heads: dict[int, list[dict[str, np.ndarray]]]) -> None:
    sigma = compare(heads, "C3-M2", 12.0, 15.0)
    assert sigma[N2] > max(sigma[N1], sigma[REM])


def test_the_eyes_roll_slowly_when_drowsy_and_move_in_rem(heads: dict[int, list[dict[str, np.ndarray]]]) -> None:
    rolling = compare(heads, "E1-M2", 0.2, 0.5)
    moving = compare(heads, "E1-M2", 0.5, 2.0)
    leaked = compare(heads, "F3-M2", 0.5, 2.0)
    assert rolling[N1] > 1.5 * rolling[N2]
    assert moving[REM] / leaked[REM] > 1.3 * moving[N2] / leaked[N2]


def test_derivations_share_most_of_their_signal_but_not_all(heads: dict[int, list[dict[str, np.ndarray]]]) -> None:
    for head in heads[N2]:
        near = np.corrcoef(head["F3-M2"], head["F4-M1"])[0, 1]
        far = np.corrcoef(head["F3-M2"], head["O2-M1"])[0, 1]
        assert 0.6 < near < 0.98 and far < near


def test_chin_tone_falls_from_wake_to_sleep_and_is_lowest_in_rem() -> None:
    tone = []
    for stage in range(5):
        chins = [
            simulate_body(np.random.default_rng([8, person]), make_night(stage, minutes=5))["Chin1-Chin2"]
            for person in range(PEOPLE)
        ]
        tone.append(np.median([band_amplitude(chin, 15, 55, RATE) for chin in chins]))
    assert tone[W] > tone[N2] > tone[N3] > tone[REM]
    assert tone[W] > 1.8 * tone[REM]


def draw_heart(stage: int, person: int, age: float = 55.0, arousals: np.ndarray | None = None) -> np.ndarray:
    random = np.random.default_rng([9, person])
    night = make_night(stage, age=age, arousals=arousals)
    phase, _ = _draw_breathing(random, night.spread_stages())
    return simulate_heart_rate(random, night, phase)


def test_the_heart_is_fastest_awake_and_most_steady_in_deep_sleep() -> None:
    rates = [np.mean([draw_heart(stage, person).mean() for person in range(PEOPLE)]) for stage in range(5)]
    assert rates[W] > rates[REM] > rates[N3]
    slow = [
        np.mean([band_amplitude(draw_heart(stage, person), 0.03, 0.12, 4) for person in range(PEOPLE)])
        for stage in range(5)
    ]
    assert slow[REM] > slow[N2] > slow[N3]


def test_older_people_have_less_breathing_in_their_heart_rate_and_smaller_slow_waves() -> None:
    def amplitude(age: float) -> float:
        return float(np.mean([band_amplitude(draw_heart(N2, n, age), 0.15, 0.4, 4) for n in range(PEOPLE)]))

    def delta(age: float) -> float:
        night = make_night(N3, age=age, minutes=4)
        heads = [simulate_head(np.random.default_rng([7, n]), night)["F3-M2"] for n in range(2)]
        return float(np.mean([band_amplitude(head, 0.5, 2.0, HEAD_RATE) for head in heads]))

    assert amplitude(30.0) > 1.5 * amplitude(80.0)
    assert delta(30.0) > 1.3 * delta(80.0)


def test_age_alone_does_not_decide_what_a_heart_looks_like() -> None:
    """People of one age differ by so much that the effect of 25 years is often covered."""
    younger = [band_amplitude(draw_heart(N2, person, 45.0), 0.15, 0.4, 4) for person in range(20)]
    older = [band_amplitude(draw_heart(N2, person + 50, 65.0), 0.15, 0.4, 4) for person in range(20)]
    assert min(younger) < np.median(older) and max(older) > np.median(younger)


def test_beats_follow_the_heart_rate() -> None:
    night = make_night(N2, minutes=5)
    ecg = simulate_body(np.random.default_rng(3), night)["ECG"]
    peaks, _ = signal.find_peaks(ecg, height=0.6 * np.percentile(ecg, 99.9), distance=60)
    per_minute = len(peaks) / 5
    assert 45 < per_minute < 95
    assert np.std(np.diff(peaks) / RATE) > 0.01


def test_arousals_show_in_eeg_chin_and_heart_rate_together() -> None:
    arousals = np.array([[60.0 * minute + 30.0, 8.0, 1.5] for minute in range(10)])
    night = make_night(N2, arousals=arousals)
    inside = cover_arousals(night) > 0
    assert inside.sum() == 80
    head = simulate_head(np.random.default_rng(1), night)["C3-M2"].reshape(-1, HEAD_RATE)
    chin = simulate_body(np.random.default_rng(1), night)["Chin1-Chin2"].reshape(-1, RATE)
    fast = np.diff(head, axis=1).std(axis=1)
    assert np.median(fast[inside]) > 1.2 * np.median(fast[~inside])
    assert np.median(chin.std(axis=1)[inside]) > 1.3 * np.median(chin.std(axis=1)[~inside])
    heart = np.mean([draw_heart(N2, person, arousals=arousals) for person in range(PEOPLE)], axis=0).reshape(-1, 4)
    around = heart.mean(axis=1).reshape(10, 60).mean(axis=0)
    assert around[33:38].mean() > around[10:28].mean() + 3


def make_apneas(kind: str) -> Night:
    events = tuple(Event(kind=kind, start=t * RATE, end=(t + 25) * RATE) for t in range(60, 540, 120))
    return replace(make_night(N2), events=events)


def test_saturation_falls_twenty_to_thirty_seconds_after_apneas() -> None:
    night = make_apneas("resp_obstructiveapnea")
    values = simulate_saturation(np.random.default_rng(2), night)[::RATE]
    lowest = []
    for event in night.events:
        end = event.end // RATE
        after = values[end : end + 60]
        assert after[15:35].min() < values[end - 25 : end].mean() - 1.0
        lowest.append(int(np.argmin(after)))
    assert 20 <= np.mean(lowest) <= 32


@pytest.mark.parametrize(("kind", "effort_goes_on"), [("resp_obstructiveapnea", True), ("resp_centralapnea", False)])
def test_flow_stops_in_apneas_while_effort_depends_on_their_kind(kind: str, effort_goes_on: bool) -> None:
    night = make_apneas(kind)
    body = simulate_body(np.random.default_rng(4), night)
    shares = {}
    for name in ("AIRFLOW", "CHEST"):
        inside = np.mean([body[name][e.start + 3 * RATE : e.end - 2 * RATE].std() for e in night.events])
        outside = np.mean([body[name][e.start - 40 * RATE : e.start - 5 * RATE].std() for e in night.events])
        shares[name] = inside / outside
    assert shares["AIRFLOW"] < 0.25
    assert (shares["CHEST"] > 0.5) == effort_goes_on


def test_hypnograms_have_the_priors_and_run_lengths_of_the_real_labels() -> None:
    random = np.random.default_rng(0)
    ages = np.clip(random.normal(55, 14.3, 300), 18, 93)
    nights = [simulate_hypnogram(random, 900, float(age)) for age in ages]
    shares = np.array([np.bincount(night, minlength=5) / 900 for night in nights])
    assert np.abs(shares.mean(axis=0) - STAGE_PRIORS).max() < 0.025
    # Run lengths of the real labels, as events of the 994 records give them: windows over runs.
    real = {W: 6.7, N1: 3.2, N2: 9.8, N3: 8.6, REM: 17.4}
    runs: dict[int, list[int]] = {stage: [] for stage in range(5)}
    for night in nights:
        for run in np.split(night, np.flatnonzero(np.diff(night)) + 1):
            runs[int(run[0])].append(len(run))
    for stage, mean in real.items():
        assert np.mean(runs[stage]) == pytest.approx(mean, rel=0.25)
    correlation = [np.corrcoef(ages, shares[:, stage])[0, 1] for stage in range(5)]
    assert correlation[W] > 0.1 and correlation[N1] > 0.1 and correlation[N3] < -0.1


def test_short_nights_hold_all_stages_over_a_cohort_of_forty() -> None:
    random = np.random.default_rng(1)
    nights = [simulate_hypnogram(random, 60, 55.0) for _ in range(40)]
    holding = [sum(stage in night for night in nights) for stage in range(5)]
    assert min(holding) >= 8


def test_target_arousals_are_about_as_frequent_as_in_the_real_labels() -> None:
    """Real: 2.74 % of the scored windows are covered for 75 % or more, 8.3 % touched."""
    random = np.random.default_rng(2)
    covered = touched = windows = 0
    for age in np.clip(random.normal(55, 14.3, 100), 18, 93):
        night = simulate_night(random, 5_520_000, float(age))
        marks = mark_arousals(night, 5_520_000)
        share = (np.append(marks[:1], marks[:-1]).reshape(-1, 6000) == 1).mean(axis=1)[night.stages >= 0]
        covered, touched, windows = covered + (share >= 0.75).sum(), touched + (share > 0).sum(), windows + len(share)
    assert 0.02 < covered / windows < 0.036
    assert 0.06 < touched / windows < 0.12


def test_some_channels_fall_flat_for_a_while_or_for_the_whole_record() -> None:
    night = make_night(N2, minutes=2)
    whole = partly = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        values = random.standard_normal((13, night.seconds * RATE), dtype=np.float32)
        channels = dict(zip(CHANNELS, values, strict=True))
        spoil_signals(random, night, channels)
        still = np.array([(np.diff(channel) == 0).mean() for channel in channels.values()])
        whole += int((still == 1).sum())
        partly += int(((still > 0.015) & (still < 1)).sum())
    channels_seen = 150 * 13
    assert 0.002 < whole / channels_seen < 0.012
    assert 0.02 < partly / channels_seen < 0.045


def test_one_person_differs_from_another() -> None:
    night = make_night(N2, minutes=2)
    sizes = [simulate_head(np.random.default_rng(seed), night)["F3-M2"].std() for seed in range(12)]
    assert 0.15 < np.std(np.log(sizes)) < 0.6

"""Simulates what electrodes on the head see: six EEG derivations and the left eye's EOG.

A derivation is a sum of frequency bands whose amplitudes follow the stage, plus the waveforms that a scorer looks
for. Signals are made at 100 Hz in microvolts. The effect sizes below were fixed before any model was compared on
them; where they are measured, it was on 21 records of 60 s excerpts of the CinC Challenge 2018 (median over records
of the median window, O2-M1 and E1-M2).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int

from physioray.data.hypnogram import standardise_age
from physioray.data.night import REM, WAKE, Night
from physioray.data.signal_shapes import add_waveforms, draw_onsets, make_drift, make_noise, smooth, upsample

RATE = 100
"""Samples per second at which the head's signals are made; they hold nothing above 45 Hz but mains hum."""

EEG_CHANNELS = ("F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1")
FRONTAL_SHARE = (0.95, 0.95, 0.70, 0.70, 0.25, 0.25)
"""How much of a derivation is the frontal generator; the rest (in power) is the occipital one."""
OWN_SHARE = 0.45
"""Amplitude of what no other derivation shares, relative to the common part (coherence about 0.8)."""

BANDS = ((0.5, 2.0), (2.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, 15.0), (15.0, 30.0), (30.0, 45.0))
DELTA, SLOW, THETA, ALPHA, SIGMA, BETA, GAMMA = range(len(BANDS))
BAND_AMPLITUDES = (
    (6.9, 4.5, 7.1, 16.5, 4.8),
    (3.7, 2.8, 4.3, 6.4, 2.8),
    (4.1, 3.2, 4.2, 5.6, 3.2),
    (3.1, 2.9, 2.9, 2.9, 2.5),
    (1.9, 1.75, 1.9, 1.9, 1.45),
    (2.1, 2.2, 1.85, 1.65, 1.75),
    (0.72, 0.92, 0.62, 0.54, 0.54),
)
"""Root mean square in uV of each band (row) in W, N1, N2, N3, REM (column), measured."""
FRONTAL_GAINS = (1.5, 1.4, 1.2, 0.8, 1.2, 1.1, 1.1)
"""Frontal over occipital amplitude of each band. Reason: slow waves and slow spindles are largest over the frontal
lobes, alpha over the occipital ones (AASM manual)."""

ALPHA_IN_WAKE = 1.6
"""Alpha of waking with closed eyes against the measured average of waking, for half of the waking time."""
PERSON_SPREAD = 0.30
"""Standard deviation over people of the log amplitude of the EEG as a whole (skull, age and montage)."""
PERSON_BAND_SPREAD = 0.16
"""The same band by band (measured over groups of people in one stage: 0.09 to 0.24)."""
MOMENT_SPREAD = 0.22
"""Standard deviation within a night of the log amplitude of all bands together, changing over half a minute."""
MOMENT_BAND_SPREAD = 0.22
"""The same for each band alone."""

AGE_SLOW_WAVES = -0.16
"""Change of log delta amplitude in sleep per standard deviation of age: slow-wave amplitude about halves from
20 to 70 years (Carrier et al. 2011; Mander et al. 2017), less here because the mixed sample of a sleep clinic
overlaps more."""
AGE_SPINDLES = -0.18
"""Change of log spindle density and amplitude per standard deviation of age (Martin et al. 2013)."""
AGE_ALPHA_HERTZ = -0.2
"""Change of the alpha peak in Hz per standard deviation of age, from 9.8 Hz (people differ by 0.8)."""
ALPHA_HERTZ = (9.8, 0.8)

SPINDLES_PER_HOUR = (0.0, 10.0, 150.0, 70.0, 5.0)
"""Spindles per hour by stage: two to three a minute in N2, fewer seen in N3 (Purcell et al. 2017)."""
SPINDLE_HERTZ = (13.2, 0.6)
SPINDLE_MICROVOLTS = 9.0
K_COMPLEXES_PER_HOUR = (0.0, 2.0, 70.0, 25.0, 0.0)
"""K-complexes per hour: about one a minute in N2 (Halasz 2005)."""
K_COMPLEX_MICROVOLTS = 55.0
VERTEX_WAVES_PER_HOUR = (0.0, 40.0, 12.0, 0.0, 0.0)
VERTEX_MICROVOLTS = 28.0
SAWTOOTH_PER_HOUR = (0.0, 1.0, 0.0, 0.0, 45.0)
"""Sawtooth trains (2 to 6 Hz, a few seconds) per hour, the sign of REM (AASM manual); 45 because many REM windows
hold none."""
SAWTOOTH_MICROVOLTS = 9.0

AROUSAL_GAINS = (0.0, 0.0, 0.1, 0.45, 0.2, 0.5, 0.7)
"""Rise of the log amplitude of each band during an arousal of strength 1. Reason: an arousal is a shift to alpha,
theta or faster above 16 Hz (AASM manual); half of the log unit leaves weak ones inside the ordinary variation."""
STRONGEST_AROUSAL = 3.0
"""Overlapping or very strong arousals are held at this strength, so that amplitudes stay those of a body."""

EYE_LEAK = 0.62
"""Share of the frontal EEG that the eye channel sees (ratio of the measured 4-8 Hz amplitudes is 0.8)."""
EYE_NOISE = 2.2
"""Root mean square in uV of the eye channel's own slow noise."""
RAPID_EYE_MOVEMENTS_PER_HOUR = (260.0, 10.0, 3.0, 1.0, 330.0)
"""Rapid eye movements per hour: looking around in wake, 5 to 6 a minute in REM, in bursts."""
RAPID_EYE_MICROVOLTS = 36.0
AGE_RAPID_EYE = -0.22
"""Change of the log density and size of rapid eye movements in REM per standard deviation of age
(Darchia et al. 2003: density falls with age)."""
SLOW_EYE_MICROVOLTS = (3.5, 11.0, 1.5, 0.5, 2.0)
"""Slow rolling movements (0.2 to 0.5 Hz), root mean square in uV by stage: the sign of drowsiness."""
BLINKS_PER_HOUR = (420.0, 15.0, 0.0, 0.0, 0.0)
"""Blinks per hour with eyes open; half of waking in bed is with eyes closed."""
BLINK_MICROVOLTS = 45.0


def simulate_head(random: np.random.Generator, night: Night) -> dict[str, Float32[np.ndarray, "samples"]]:
    """EEG and left EOG of a night, in microvolts at 100 Hz.

    Args:
        random: source of chance.
        night: stages and arousals.

    Returns:
        Channel name to signal `(seconds * 100,)`: six EEG derivations and `E1-M2`.
    """
    stages = night.spread_stages()
    eyes_closed = smooth((make_drift(random, night.seconds, 120.0) > 0).astype(np.float64), 5)
    gains = _draw_gains(random, night, eyes_closed)
    frontal, occipital = _make_generators(random, night, gains)
    mixed: dict[str, np.ndarray] = {}
    own_level = np.sqrt(np.sum(np.square(gains[THETA:]), axis=0))
    for name, share in zip(EEG_CHANNELS, FRONTAL_SHARE, strict=True):
        own = make_noise(random, len(frontal), 0.5, 12.0, RATE)
        own *= upsample(own_level * OWN_SHARE, RATE)
        own += np.float32(np.sqrt(share)) * frontal
        own += np.float32(np.sqrt(1 - share)) * occipital
        mixed[name] = own
    _add_sleep_waves(random, night, stages, mixed)
    eye = np.float32(EYE_LEAK) * mixed["F3-M2"]
    _add_eye_movements(random, night, stages, eyes_closed, eye, mixed)
    return {**mixed, "E1-M2": eye}


def pick_by_stage(table: tuple[float, ...], stages: Int[np.ndarray, "seconds"]) -> Float[np.ndarray, "seconds"]:
    """Value of a table of W, N1, N2, N3, REM at each second, passing over 11 s from one stage to the next."""
    return smooth(np.asarray(table, np.float64)[stages], 11)


def cover_arousals(night: Night) -> Float32[np.ndarray, "seconds"]:
    """Strength of the cortical arousal at each second; 0 outside arousals."""
    level = np.zeros(night.seconds, np.float32)
    for start, duration, strength in night.arousals:
        first = max(0, int(start))
        level[first : max(first + 1, round(start + duration))] += strength
    return np.minimum(level, np.float32(STRONGEST_AROUSAL))


def _draw_gains(
    random: np.random.Generator, night: Night, eyes_closed: Float[np.ndarray, "seconds"]
) -> Float[np.ndarray, "bands seconds"]:
    """Amplitude of each band in uV at each second, for this person on this night."""
    stages = night.spread_stages()
    older = standardise_age(night.age)
    arousal = cover_arousals(night)
    common = PERSON_SPREAD * random.standard_normal() + MOMENT_SPREAD * make_drift(random, night.seconds, 20.0)
    asleep = smooth((stages != WAKE).astype(np.float64), 11)
    gains = np.empty((len(BANDS), night.seconds))
    for band, table in enumerate(BAND_AMPLITUDES):
        log = pick_by_stage(tuple(np.log(table)), stages) + common + AROUSAL_GAINS[band] * arousal
        log += PERSON_BAND_SPREAD * random.standard_normal()
        log += MOMENT_BAND_SPREAD * make_drift(random, night.seconds, 20.0)
        if band in (DELTA, SLOW):
            log += AGE_SLOW_WAVES * older * asleep
        if band == ALPHA:
            log += np.log(ALPHA_IN_WAKE) * (2 * eyes_closed - 1) * (1 - asleep)
        gains[band] = np.exp(log)
    return gains


def _make_generators(
    random: np.random.Generator, night: Night, gains: Float[np.ndarray, "bands seconds"]
) -> tuple[Float32[np.ndarray, "samples"], Float32[np.ndarray, "samples"]]:
    """The frontal and the occipital generator `(samples,)` in uV: bands of noise at the given amplitudes."""
    samples = night.seconds * RATE
    peak = ALPHA_HERTZ[0] + ALPHA_HERTZ[1] * random.standard_normal() + AGE_ALPHA_HERTZ * standardise_age(night.age)
    peak = float(np.clip(peak, 7.5, 12.5))
    frontal, occipital = np.zeros(samples, np.float32), np.zeros(samples, np.float32)
    for band, (low, high) in enumerate(BANDS):
        edges = (peak - 1.5, peak + 1.5) if band == ALPHA else (low, high)
        for target, gain in ((frontal, FRONTAL_GAINS[band]), (occipital, 1.0)):
            rhythm = make_noise(random, samples, *edges, RATE)
            rhythm *= upsample(gains[band] * gain, RATE)
            target += rhythm
    return frontal, occipital


def _add_sleep_waves(
    random: np.random.Generator, night: Night, stages: np.ndarray, mixed: dict[str, np.ndarray]
) -> None:
    """Spindles, K-complexes, vertex waves and sawtooth trains, each with its own place on the head."""
    older = standardise_age(night.age)
    fewer = np.exp(AGE_SPINDLES * older + 0.35 * random.standard_normal())
    hertz = SPINDLE_HERTZ[0] + SPINDLE_HERTZ[1] * random.standard_normal()
    time = np.arange(-0.6, 0.6, 1 / RATE)
    spindle = np.exp(-0.5 * (time / 0.25) ** 2) * np.cos(2 * np.pi * hertz * time) * np.exp(AGE_SPINDLES * older)
    k_time = np.arange(0.0, 1.2, 1 / RATE)
    complex_wave = -np.exp(-0.5 * ((k_time - 0.35) / 0.09) ** 2) + 0.7 * np.exp(-0.5 * ((k_time - 0.7) / 0.16) ** 2)
    vertex = -np.exp(-0.5 * ((k_time - 0.35) / 0.045) ** 2) + 0.4 * np.exp(-0.5 * ((k_time - 0.5) / 0.07) ** 2)
    saw_time = np.arange(0.0, 4.0, 1 / RATE)
    saw_hertz = float(random.uniform(2.5, 4.5))
    sawtooth = (2 * ((saw_time * saw_hertz) % 1) - 1) * np.sin(np.pi * saw_time / 4.0)
    kinds = (
        (spindle * SPINDLE_MICROVOLTS, np.asarray(SPINDLES_PER_HOUR) * fewer, (0.9, 1.0, 0.5)),
        (
            complex_wave * K_COMPLEX_MICROVOLTS * np.exp(AGE_SLOW_WAVES * older),
            np.asarray(K_COMPLEXES_PER_HOUR),
            (1.0, 0.8, 0.35),
        ),
        (vertex * VERTEX_MICROVOLTS, np.asarray(VERTEX_WAVES_PER_HOUR), (0.6, 1.0, 0.3)),
        (sawtooth * SAWTOOTH_MICROVOLTS, np.asarray(SAWTOOTH_PER_HOUR), (0.9, 1.0, 0.4)),
    )
    for shape, hourly, places in kinds:
        starts = draw_onsets(random, hourly[stages], RATE)
        sizes = random.lognormal(0.0, 0.4, len(starts))
        for number, name in enumerate(EEG_CHANNELS):
            add_waveforms(mixed[name], starts, sizes[:, None] * shape * places[number // 2])


def _add_eye_movements(
    random: np.random.Generator,
    night: Night,
    stages: np.ndarray,
    eyes_closed: np.ndarray,
    eye: Float32[np.ndarray, "samples"],
    mixed: dict[str, np.ndarray],
) -> None:
    """Slow and rapid eye movements and blinks, into the eye channel and weakly into the frontal EEG."""
    size = float(np.exp(0.3 * random.standard_normal()))
    older = standardise_age(night.age)
    moved = make_noise(random, len(eye), 0.2, 0.5, RATE)
    moved *= upsample(pick_by_stage(SLOW_EYE_MICROVOLTS, stages) * size, RATE)
    # Rapid movements come in bursts: the density varies over ten seconds by a factor of e either way.
    density = pick_by_stage(RAPID_EYE_MOVEMENTS_PER_HOUR, stages) * np.exp(
        make_drift(random, night.seconds, 10.0) - 0.5
    )
    in_rem = np.exp(AGE_RAPID_EYE * older)
    starts = draw_onsets(random, density * np.where(stages == REM, in_rem, 1.0), RATE)
    time = np.arange(0.0, 1.5, 1 / RATE)
    step = (1 / (1 + np.exp(-(time - 0.15) / 0.025))) * np.exp(-np.maximum(0, time - 0.2) / 0.45)
    heights = (
        RAPID_EYE_MICROVOLTS * size * random.lognormal(0.0, 0.5, len(starts)) * random.choice((-1, 1), len(starts))
    )
    heights *= np.where(stages[starts // RATE] == REM, in_rem, 1.0)
    add_waveforms(moved, starts, heights[:, None] * step)
    blink = np.exp(-0.5 * ((time[:60] - 0.25) / 0.08) ** 2)
    starts = draw_onsets(random, pick_by_stage(BLINKS_PER_HOUR, stages) * (1 - eyes_closed) * 2, RATE)
    add_waveforms(moved, starts, BLINK_MICROVOLTS * size * random.lognormal(0.0, 0.3, (len(starts), 1)) * blink)
    eye += moved
    eye += np.float32(EYE_NOISE) * make_noise(random, len(eye), 0.3, 6.0, RATE)
    # Both frontal derivations see a fraction of the eye, the right one with the other sign for sideways movements.
    mixed["F3-M2"] += np.float32(0.15) * moved
    mixed["F4-M1"] -= np.float32(0.08) * moved

"""Simulates what electrodes and belts on the body see: chin EMG, ECG, airflow, breathing belts and oxygen saturation.

One breathing rhythm and one heart drive all of it: breathing moves the heart rate, arousals raise it, apneas stop
the flow and let the saturation fall. Effect sizes were fixed before any model was compared on them; chin amplitudes
are measured on 21 records of excerpts of the CinC Challenge 2018 (median over records of the median window).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int

from physioray.data.brain_signals import cover_arousals, pick_by_stage
from physioray.data.hypnogram import standardise_age
from physioray.data.night import REM, Night
from physioray.data.signal_shapes import add_waveforms, bump, draw_onsets, make_drift, make_noise, smooth, upsample

RATE = 200
BREATH_RATE = 25
"""Samples per second at which breathing is made; it holds nothing above 3 Hz."""

CHIN_MICROVOLTS = (4.2, 4.7, 2.6, 2.0, 1.35)
"""Root mean square of chin EMG (15-90 Hz) in W, N1, N2, N3, REM, measured."""
CHIN_PERSON_SPREAD = 0.45
"""Standard deviation over people of its log; groups of people in one stage differ by 0.35."""
CHIN_MOMENT_SPREAD = 0.35
"""The same within a night: tone drifts with posture and electrode over minutes."""
CHIN_AROUSAL = 0.45
"""Rise of log chin tone in an arousal of strength 1: required of an arousal in REM (AASM manual)."""
ATONIA_AGE_SLOPE = 0.12
"""Change of log chin tone in REM per standard deviation of age: atonia weakens with age (Ferri et al. 2008)."""
TWITCHES_PER_HOUR = (30.0, 8.0, 3.0, 1.0, 70.0)
TWITCH_MICROVOLTS = 9.0

HEART_RATE = (64.0, 8.0)
"""Mean and standard deviation over people of the heart rate in N2, per minute."""
HEART_RATE_BY_STAGE = (5.0, 1.5, 0.0, -0.5, 2.5)
"""Heart rate against N2, per minute: highest in wake, up again in REM (Trinder et al. 2001)."""
SINUS_ARRHYTHMIA = 3.2
"""Respiratory modulation of the heart rate in N2, half of peak to peak, per minute, of an average person."""
SINUS_ARRHYTHMIA_BY_STAGE = (0.6, 0.85, 1.0, 1.1, 0.65)
SINUS_ARRHYTHMIA_AGE = -0.42
"""Change of its log per standard deviation of age: vagal modulation falls by about a quarter a decade
(Antelmi et al. 2004; Brandenberger et al. 2003 for sleep)."""
SINUS_ARRHYTHMIA_SPREAD = 0.45
SLOW_VARIABILITY = (3.5, 2.5, 1.7, 1.0, 3.0)
"""Standard deviation of the heart rate's slow (0.03-0.12 Hz) variation by stage, per minute: lowest in N3, high in
REM (Busek et al. 2005)."""
SLOW_VARIABILITY_AGE = -0.25
AROUSAL_HEART_RATE = 6.0
"""Peak rise of the heart rate after an arousal of strength 1, per minute, some 5 s after its start (Sforza 2000)."""
T_WAVE_AGE = -0.12
"""Change of the log T-wave amplitude per standard deviation of age."""
ECG_MILLIVOLTS = (0.55, 0.35)
"""Median R amplitude in mV and standard deviation of its log."""

BREATHS_PER_MINUTE = (15.0, 2.0)
BREATH_VARIABILITY = (0.25, 0.16, 0.08, 0.05, 0.20)
"""Standard deviation of log breath rate and depth by stage: most regular in N3, irregular in REM and wake."""
EFFORT = {
    # flow, belts, belts out of phase with each other, saturation drop in percent for 20 s
    "resp_hypopnea": (0.45, 0.65, 0.3, 3.0),
    "resp_obstructiveapnea": (0.06, 0.75, 1.0, 4.5),
    "resp_centralapnea": (0.06, 0.10, 0.0, 3.5),
    "resp_mixedapnea": (0.06, 0.40, 0.6, 5.0),
    "arousal_rera": (0.75, 1.15, 0.2, 0.7),
}
"""What an event does: definitions of the AASM manual (apnea: flow falls by 90 %; hypopnea: by 30 % with a fall of
3 % in saturation; obstructive: effort goes on, paradoxical; central: effort stops; RERA: flow flattens)."""
SATURATION = (96.0, 1.2)
"""Mean and spread over people of the saturation awake, percent; older people have `SATURATION_AGE` less."""
SATURATION_AGE = -0.4
SATURATION_DELAY = 8
"""Seconds from the end of an event to the beginning of the fall: circulation and averaging time; the lowest value
comes 20 to 30 s after the event."""


def simulate_body(random: np.random.Generator, night: Night) -> dict[str, Float32[np.ndarray, "samples"]]:
    """Chin EMG, ECG, airflow, belts and saturation of a night, at 200 Hz.

    Args:
        random: source of chance.
        night: stages, events and arousals.

    Returns:
        Channel name to signal `(seconds * 200,)`: `Chin1-Chin2` (uV), `ABD`, `CHEST`, `AIRFLOW` (uV, uncalibrated),
        `SaO2` (%), `ECG` (mV).
    """
    stages = night.spread_stages()
    phase, depth = _draw_breathing(random, stages)
    channels = _simulate_breathing(random, night, phase, depth)
    channels["SaO2"] = simulate_saturation(random, night)
    heart = simulate_heart_rate(random, night, phase)
    channels["ECG"] = _simulate_ecg(random, heart, phase, night.age)
    channels["Chin1-Chin2"] = _simulate_chin(random, night, stages, channels["ECG"])
    return channels


def simulate_heart_rate(
    random: np.random.Generator, night: Night, phase: Float[np.ndarray, "breath_samples"]
) -> Float[np.ndarray, "quarters"]:
    """Heart rate in beats per minute, four values a second.

    Args:
        random: source of chance.
        night: stages, events and arousals.
        phase: breathing phase in breaths `(seconds * 25,)`.
    """
    stages, older = night.spread_stages(), standardise_age(night.age)
    vagal = np.exp(SINUS_ARRHYTHMIA_AGE * older + SINUS_ARRHYTHMIA_SPREAD * random.standard_normal())
    free = np.exp(SLOW_VARIABILITY_AGE * older + 0.3 * random.standard_normal())
    base = HEART_RATE[0] + HEART_RATE[1] * random.standard_normal() + pick_by_stage(HEART_RATE_BY_STAGE, stages)
    base = base + 1.5 * make_drift(random, night.seconds, 300.0)
    kernel = np.concatenate([np.linspace(0.2, 1.0, 5), np.exp(-np.arange(20) / 5.0)])
    base = base + AROUSAL_HEART_RATE * bump(night.seconds, night.arousals[:, 0], night.arousals[:, 2], kernel)
    slow = make_noise(random, night.seconds * 4, 0.03, 0.12, 4) * upsample(
        pick_by_stage(SLOW_VARIABILITY, stages) * free, 4
    )
    at = np.interp(np.arange(night.seconds * 4) / 4, np.arange(len(phase)) / BREATH_RATE, phase)
    swing = SINUS_ARRHYTHMIA * vagal * upsample(pick_by_stage(SINUS_ARRHYTHMIA_BY_STAGE, stages), 4)
    return np.clip(upsample(base, 4) + slow + swing * np.cos(2 * np.pi * at), 36.0, 150.0)


def simulate_saturation(random: np.random.Generator, night: Night) -> Float32[np.ndarray, "samples"]:
    """Oxygen saturation in percent at 200 Hz, falling after breathing events by their kind and duration."""
    drop = np.zeros(night.seconds, np.float32)
    time = np.arange(60.0)
    fall = np.clip((time - SATURATION_DELAY) / 16.0, 0, 1) * np.exp(-np.maximum(0, time - 26.0) / 10.0)
    for event in night.events:
        if event.kind in EFFORT:
            seconds = (event.end - event.start) / RATE
            depth = EFFORT[event.kind][3] * min(2.5, seconds / 20.0) * random.lognormal(0.0, 0.4)
            add_waveforms(drop, np.array([event.end // RATE]), (depth * fall)[None, :])
    level = SATURATION[0] + SATURATION[1] * random.standard_normal() + SATURATION_AGE * standardise_age(night.age)
    level = min(float(level), 98.5)
    value = level + 0.4 * make_drift(random, night.seconds, 60.0) - drop
    # Oximeters hold a value for a second and show whole percents or tenths; tenths here.
    return np.repeat(np.clip(value, 50.0, 100.0).round(1), RATE).astype(np.float32)


def _draw_breathing(
    random: np.random.Generator, stages: Int[np.ndarray, "seconds"]
) -> tuple[Float[np.ndarray, "breath_samples"], Float[np.ndarray, "seconds"]]:
    """Breathing phase in breaths at 25 Hz, and depth (1 on average) second by second."""
    irregular = pick_by_stage(BREATH_VARIABILITY, stages)
    usual = BREATHS_PER_MINUTE[0] + BREATHS_PER_MINUTE[1] * random.standard_normal()
    rate = max(9.0, usual) * np.exp(irregular * make_drift(random, len(stages), 6.0))
    phase = np.cumsum(upsample(rate / 60 / BREATH_RATE, BREATH_RATE), dtype=np.float64)
    return phase, np.exp(irregular * make_drift(random, len(stages), 5.0))


def _simulate_breathing(
    random: np.random.Generator,
    night: Night,
    phase: Float[np.ndarray, "breath_samples"],
    depth: Float[np.ndarray, "seconds"],
) -> dict[str, Float32[np.ndarray, "samples"]]:
    """Airflow and the two belts, with what events take away and the deep breaths after them."""
    flow, belts, paradox = depth.copy(), depth.copy(), np.zeros(night.seconds)
    for event in night.events:
        if event.kind in EFFORT:
            start, end = event.start // RATE, max(event.start // RATE + 1, event.end // RATE)
            flow[start:end] *= EFFORT[event.kind][0]
            belts[start:end] *= EFFORT[event.kind][1]
            paradox[start:end] = EFFORT[event.kind][2]
            flow[end : end + 10] *= 1.4
            belts[end : end + 10] *= 1.4
    angle = 2 * np.pi * phase
    # Inspiration is shorter than expiration: a second harmonic skews the sine.
    wave = np.sin(angle) + 0.25 * np.sin(2 * angle)
    effort = np.sin(angle - 1.2)
    opposed = np.sin(angle - 1.2 + np.pi * upsample(smooth(paradox, 3), BREATH_RATE))
    result = {}
    for name, shape, amount, median in (
        ("AIRFLOW", wave, flow, 25.0),
        ("CHEST", effort, belts, 180.0),
        ("ABD", opposed, belts, 200.0),
    ):
        level = median * random.lognormal(0.0, 0.6)
        posture = np.exp(0.3 * make_drift(random, night.seconds, 900.0))
        channel = (shape * upsample(smooth(amount, 3) * posture * level, BREATH_RATE)).astype(np.float32)
        channel += np.float32(0.05 * level) * make_noise(random, len(channel), 0.05, 3.0, BREATH_RATE)
        result[name] = upsample(channel, RATE // BREATH_RATE)
    return result


def _shape_beats(classes: Float[np.ndarray, "classes"], t_wave: float) -> Float[np.ndarray, "classes length"]:
    """P, QRS and T of one beat per class of beat interval (s), in units of the R wave, from 0.3 s before R on."""
    time = np.arange(-0.3, 0.5, 1 / RATE)[None, :]
    # The QT interval follows the square root of the beat interval (Bazett).
    late = 0.27 * np.sqrt(classes)[:, None]
    parts = ((0.12, -0.16, 0.025), (-0.12, -0.028, 0.009), (1.0, 0.0, 0.011), (-0.22, 0.03, 0.011))
    beat = sum(height * np.exp(-0.5 * ((time - centre) / width) ** 2) for height, centre, width in parts)
    return np.asarray(beat + t_wave * np.exp(-0.5 * ((time - late) / 0.045) ** 2))


def _simulate_ecg(
    random: np.random.Generator,
    heart: Float[np.ndarray, "quarters"],
    phase: Float[np.ndarray, "breath_samples"],
    age: float,
) -> Float32[np.ndarray, "samples"]:
    """ECG in mV: one template per beat, its T wave by the interval, its height moved by breathing."""
    samples = len(heart) * RATE // 4
    turns = np.concatenate([[0.0], np.cumsum(heart / 60 / 4)]) + random.random()
    beats = np.interp(np.arange(np.ceil(turns[0]), turns[-1]), turns, np.arange(len(turns)) / 4)
    intervals = np.clip(np.diff(beats, append=beats[-1] + 0.9), 0.4, 1.6)
    classes = np.arange(0.4, 1.65, 0.05)
    t_wave = 0.28 * np.exp(T_WAVE_AGE * standardise_age(age) + 0.3 * random.standard_normal())
    shapes = _shape_beats(classes, float(t_wave))
    breathing = np.sin(2 * np.pi * np.interp(beats, np.arange(len(phase)) / BREATH_RATE, phase))
    heights = ECG_MILLIVOLTS[0] * random.lognormal(0.0, ECG_MILLIVOLTS[1]) * (1 + 0.08 * breathing)
    nearest = np.clip(np.round((intervals - 0.4) / 0.05).astype(np.int64), 0, len(classes) - 1)
    ecg = make_noise(random, samples, 0.05, 0.4, RATE) * np.float32(0.03)
    starts = np.round(beats * RATE).astype(np.int64) - int(0.3 * RATE)
    add_waveforms(ecg, starts, (shapes.astype(np.float32)[nearest]) * heights[:, None].astype(np.float32))
    ecg += np.float32(0.006) * random.standard_normal(samples, dtype=np.float32)
    return ecg


def _simulate_chin(
    random: np.random.Generator,
    night: Night,
    stages: Int[np.ndarray, "seconds"],
    ecg: Float32[np.ndarray, "samples"],
) -> Float32[np.ndarray, "samples"]:
    """Chin EMG in uV: tone by stage, atonia with twitches in REM, bursts in arousals, a trace of the ECG."""
    log = pick_by_stage(tuple(np.log(CHIN_MICROVOLTS)), stages)
    log = log + CHIN_PERSON_SPREAD * random.standard_normal() + CHIN_AROUSAL * cover_arousals(night)
    log += CHIN_MOMENT_SPREAD * (
        0.7 * make_drift(random, night.seconds, 40.0) + 0.7 * make_drift(random, night.seconds, 600.0)
    )
    log += ATONIA_AGE_SLOPE * standardise_age(night.age) * (stages == REM)
    tone = np.exp(log)
    starts = draw_onsets(random, np.asarray(TWITCHES_PER_HOUR)[stages], RATE)
    np.add.at(tone, starts // RATE, TWITCH_MICROVOLTS * random.lognormal(-0.5, 0.5, len(starts)))
    chin = make_noise(random, night.seconds * RATE, 18.0, 60.0, RATE)
    chin *= upsample(tone, RATE)
    chin += np.float32(random.lognormal(0.5, 0.6)) * ecg
    return chin

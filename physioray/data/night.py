"""Simulates what happens in a night beside its stages: breathing events, arousals, and what the scorer wrote down.

Rates and durations are aggregates of the events of the 994 labelled records of the CinC Challenge 2018 (Ghassemi et
al. 2018); where a number is not theirs, its comment gives the source or the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int8

from physioray.data.hypnogram import simulate_hypnogram, standardise_age
from physioray.signals import STAGES, WINDOW_SECONDS

WAKE, N1, N2, N3, REM = range(len(STAGES))
UNDEFINED = -1

LEAD_IN_SHARE = 0.0188
"""Median share of a record before its first stage note (quartiles 0.015 and 0.028)."""
LEAD_IN_SPREAD = 0.66
"""Standard deviation of the log of that share."""

EVENT_RATES = {
    "resp_hypopnea": (0.97, 12.4, 9.6, 3.3, 8.7),
    "resp_obstructiveapnea": (0.38, 8.7, 5.1, 0.92, 5.2),
    "resp_centralapnea": (1.2, 9.5, 2.6, 0.60, 1.7),
    "resp_mixedapnea": (0.05, 0.92, 0.42, 0.03, 0.18),
    "arousal_rera": (0.75, 10.3, 7.7, 2.2, 4.9),
    # Real: 70 in 994 records (0.01 an hour), which a small cohort would never show. Raised to 0.3 an hour.
    "arousal_spontaneous": (0.0, 0.4, 0.4, 0.1, 0.3),
}
"""Events per hour of W, N1, N2, N3 and REM."""
EVENT_SECONDS = {
    "resp_hypopnea": (20.8, 0.33, 10.0),
    "resp_obstructiveapnea": (18.0, 0.40, 10.0),
    "resp_centralapnea": (15.0, 0.31, 10.0),
    "resp_mixedapnea": (26.3, 0.32, 10.0),
    "arousal_rera": (18.5, 0.32, 10.0),
    "arousal_spontaneous": (4.5, 0.4, 3.0),
}
"""Median duration in seconds, standard deviation of its log, and the shortest one that is scored."""
EVENT_CLUSTERING = 0.8
"""Standard deviation of the log rate within a night. Gaps between breathing events are 15, 26 and 63 s at the
quartiles, where a constant rate of 15 an hour would give 70, 166 and 333 s: events come in trains."""
BREATHING_SPREAD = 0.85
"""Standard deviation over people of the log rate of breathing events (1.06 measured, counting noise included)."""
EFFORT_SPREAD = 0.95
"""The same for RERAs (1.15 measured); the two rates do not correlate over people (0.02)."""
BREATHING_AGE_SLOPE = 0.21
"""Change of the log rate of breathing events per standard deviation of age (0.21 measured)."""
AROUSAL_AGE_SLOPE = 0.08
"""The same for RERAs (0.076 measured)."""
OVERLAP_CORRECTION = 1.75
"""Events that would overlap are dropped; this factor on the rates restores the totals."""

EVENT_AROUSAL_CHANCE = 0.6
"""Share of apneas and hypopneas that end in a cortical arousal: about two in three do, and it is what the challenge
excludes from scoring (-1). Reason: arousals after events look like the targets, so the label is not the signal."""
UNSCORED_AROUSALS_PER_HOUR = (4.0, 7.0, 5.0, 2.0, 5.0)
"""Brief activations that no scorer marks (under 3 s, or not agreed on). Reason: scorers agree on arousals only
moderately (kappa about 0.5 to 0.6), so the signal must hold unmarked ones; older people have more of them."""
UNSCORED_AGE_SLOPE = 0.25
"""Change of their log rate per standard deviation of age; arousal index about doubles from 20 to 60 years
(Bonnet and Arand 2007)."""

SCORER_AGREEMENT = (0.84, 0.63, 0.85, 0.67, 0.905)
"""Agreement of scorers with the majority by stage (Rosenberg and Van Hout 2013: W 84.1, N1 63.0, N2 85.2, N3 67.4,
REM 90.5 %). One scorer is wrong about as often as two disagree, shared among both: the square root is used."""
SCORER_CONFUSION = (
    (0.0, 0.75, 0.15, 0.0, 0.1),
    (0.35, 0.0, 0.50, 0.0, 0.15),
    (0.08, 0.42, 0.0, 0.40, 0.10),
    (0.02, 0.02, 0.96, 0.0, 0.0),
    (0.15, 0.50, 0.35, 0.0, 0.0),
)
"""What a window of each scored stage looks like when it does not look like that stage. Reason: adjacent stages."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something scored in the night: its name in the annotations, and start and end in whole samples of 200 Hz."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Night:
    """One simulated night: what the scorer wrote and what the body did.

    Attributes:
        seconds: duration, rounded up to whole seconds.
        stages: scored stage of each window `(windows,)`, -1 before scoring starts.
        looks: stage that the body is in, window by window `(windows,)`; scorers do not always agree with it.
        events: scored events in order of their start, none overlapping.
        arousals: every cortical arousal, scored or not: start (s), duration (s) and strength `(arousals, 3)`.
        age: years.
    """

    seconds: int
    stages: Int8[np.ndarray, "windows"]
    looks: Int8[np.ndarray, "windows"]
    events: tuple[Event, ...]
    arousals: Float[np.ndarray, "arousals 3"]
    age: float

    def spread_stages(self) -> Int8[np.ndarray, "seconds"]:
        """Stage that the body is in at each second; the last partial window continues the one before."""
        every = np.repeat(self.looks, WINDOW_SECONDS)
        return np.pad(every, (0, max(0, self.seconds - len(every))), mode="edge")[: self.seconds]


def simulate_night(random: np.random.Generator, samples: int, age: float, rate: int = 200) -> Night:
    """Draw a night: stages, breathing events and arousals of one person.

    Args:
        random: source of chance.
        samples: length of the recording in samples at `rate`; at least two windows.
        age: years.
        rate: samples per second.

    Returns:
        The night; its first windows are not scored, as in real recordings.
    """
    windows = samples // (rate * WINDOW_SECONDS)
    share = LEAD_IN_SHARE * np.exp(LEAD_IN_SPREAD * random.standard_normal())
    lead = int(np.clip(round(share * windows), 1, max(1, windows // 5)))
    stages = np.full(windows, UNDEFINED, np.int8)
    stages[lead:] = simulate_hypnogram(random, windows - lead, age)
    looks = _disagree(random, stages)
    events = _draw_events(random, stages, age, samples / rate, rate)
    arousals = _draw_arousals(random, stages, events, age, rate)
    return Night(
        seconds=-(-samples // rate), stages=stages, looks=looks, events=events, arousals=arousals, age=float(age)
    )


def mark_arousals(night: Night, samples: int, rate: int = 200) -> Int8[np.ndarray, "samples"]:
    """What the challenge scores as target arousal: 1 target, 0 none, -1 not scored.

    A RERA counts from 2 s before its start to 10 s after its end, another arousal from 2 s before to 2 s after.
    Within 10 s of wake, apnea or hypopnea nothing is scored, which takes precedence. Boundaries stand one sample
    early, as in the challenge's files.

    Returns:
        One value per sample `(samples,)`.
    """
    marks = np.zeros(samples, np.int8)
    for event in night.events:
        if event.kind.startswith("arousal"):
            after = 10 if event.kind == "arousal_rera" else 2
            marks[max(0, event.start - 2 * rate - 1) : event.end + after * rate] = 1
    for event in night.events:
        if event.kind.startswith("resp"):
            marks[max(0, event.start - 10 * rate - 1) : event.end + 10 * rate] = -1
    window = rate * WINDOW_SECONDS
    awake = np.flatnonzero(np.diff(np.pad((night.stages == WAKE).astype(np.int8), 1)))
    for start, end in awake.reshape(-1, 2):
        last = samples if end == len(night.stages) else end * window
        marks[max(0, start * window - 10 * rate - 2) : last - 1 + 10 * rate] = -1
    return marks


def _disagree(random: np.random.Generator, stages: Int8[np.ndarray, "windows"]) -> Int8[np.ndarray, "windows"]:
    """Stage that each window looks like: mostly the scored one; wake before scoring starts."""
    scored = np.where(stages == UNDEFINED, WAKE, stages)
    agree = random.random(len(stages)) < np.sqrt(np.asarray(SCORER_AGREEMENT))[scored]
    limits = np.cumsum(np.asarray(SCORER_CONFUSION), axis=1)[scored]
    other = (random.random(len(stages))[:, None] > limits).sum(axis=1).clip(0, len(STAGES) - 1)
    return np.where(agree | (stages == UNDEFINED), scored, other).astype(np.int8)


def _draw_events(
    random: np.random.Generator, stages: Int8[np.ndarray, "windows"], age: float, seconds: float, rate: int
) -> tuple[Event, ...]:
    """Scored events of a night, without overlap, none in the unscored lead-in or past the end."""
    older = standardise_age(age)
    breathing = np.exp(
        BREATHING_SPREAD * random.standard_normal() - BREATHING_SPREAD**2 / 2 + BREATHING_AGE_SLOPE * older
    )
    effort = np.exp(EFFORT_SPREAD * random.standard_normal() - EFFORT_SPREAD**2 / 2 + AROUSAL_AGE_SLOPE * older)
    # Trains last some ten minutes: knots every 20 windows.
    knots = random.standard_normal(len(stages) // 20 + 2)
    wave = np.interp(np.arange(len(stages)) / 20, np.arange(len(knots)), knots)
    train = np.exp(EVENT_CLUSTERING * wave - EVENT_CLUSTERING**2 / 2)
    drawn: list[tuple[float, float, str]] = []
    for kind, rates in EVENT_RATES.items():
        person = breathing if kind.startswith("resp") else effort
        hourly = np.where(stages == UNDEFINED, 0.0, np.asarray(rates)[stages]) * person * train * OVERLAP_CORRECTION
        counts = random.poisson(hourly * WINDOW_SECONDS / 3600)
        onsets = (np.repeat(np.arange(len(stages)), counts) + random.random(counts.sum())) * WINDOW_SECONDS
        median, spread, shortest = EVENT_SECONDS[kind]
        lasting = np.maximum(shortest, median * np.exp(spread * random.standard_normal(len(onsets))))
        drawn += [(float(onset), float(length), kind) for onset, length in zip(onsets, lasting, strict=True)]
    kept: list[Event] = []
    free = 0.0
    for onset, length, kind in sorted(drawn):
        if onset >= free and onset + length + 1.0 <= seconds:
            kept.append(Event(kind=kind, start=round(onset * rate), end=round((onset + length) * rate)))
            free = onset + length + 3.0
    return tuple(kept)


def _draw_arousals(
    random: np.random.Generator,
    stages: Int8[np.ndarray, "windows"],
    events: tuple[Event, ...],
    age: float,
    rate: int,
) -> Float[np.ndarray, "arousals 3"]:
    """Cortical arousals: at the end of scored events, and unscored ones anywhere."""
    rows: list[tuple[float, float, float]] = []
    for event in events:
        start, end, chance = event.start / rate, event.end / rate, random.random()
        onset, tail, strength = random.uniform(2.0, 10.0), random.uniform(0.0, 8.0), random.lognormal(0.0, 0.5)
        if event.kind == "arousal_rera":
            rows.append((end - onset, onset + tail, strength))
        elif event.kind.startswith("arousal"):
            rows.append((start, end - start, strength))
        elif chance < EVENT_AROUSAL_CHANCE:
            rows.append((end - onset / 5, onset / 5 + tail, strength))
    hourly = np.asarray(UNSCORED_AROUSALS_PER_HOUR)[np.where(stages == UNDEFINED, WAKE, stages)]
    counts = random.poisson(hourly * np.exp(UNSCORED_AGE_SLOPE * standardise_age(age)) * WINDOW_SECONDS / 3600)
    for onset in (np.repeat(np.arange(len(stages)), counts) + random.random(counts.sum())) * WINDOW_SECONDS:
        rows.append((float(onset), random.uniform(2.0, 6.0), random.lognormal(-0.5, 0.5)))
    return np.asarray(sorted(rows), np.float64).reshape(-1, 3)

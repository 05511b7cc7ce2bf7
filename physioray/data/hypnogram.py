"""Simulates hypnograms: a Markov chain over sleep stages at 30 s, with the frequencies and run lengths of real nights.

Every number below is an aggregate of the 994 labelled records of the PhysioNet/CinC Challenge 2018 (Ghassemi et al.
2018, DOI 10.13026/6phb-r450), counted on the 892,200 windows that their annotations score; the last run of a
record was extended to the record's end.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int8

from physioray.signals import STAGES

AGE_MEAN = 55.0
"""Mean age in years of the 1,983 people of the challenge (54.99)."""
AGE_DEVIATION = 14.3
"""Standard deviation of their ages in years (14.32); ages run from 18 to 93."""

STAGE_PRIORS = (0.177, 0.154, 0.423, 0.115, 0.131)
"""Share of the scored windows in W, N1, N2, N3 and REM."""

FIRST_STAGE = (0.92, 0.07, 0.01, 0.0, 0.0)
"""Share of the records that begin scoring in each stage (0.9215, 0.0694, 0.007, 0, 0.002)."""

NIGHT_WINDOWS = 900
"""Scored windows of a full night (mean 898). Shorter recordings are cut from a random place of one this long."""

STAGE_TRANSITIONS = (
    (
        (0.8419, 0.1525, 0.0049, 0.0001, 0.0006),
        (0.1013, 0.6948, 0.1933, 0.0002, 0.0103),
        (0.0176, 0.0542, 0.8851, 0.0382, 0.0049),
        (0.0052, 0.0040, 0.0975, 0.8929, 0.0004),
        (0.0124, 0.0486, 0.0142, 0.0001, 0.9248),
    ),
    (
        (0.8718, 0.1227, 0.0047, 0.0001, 0.0008),
        (0.1046, 0.6852, 0.1872, 0.0001, 0.0227),
        (0.0165, 0.0383, 0.9027, 0.0322, 0.0102),
        (0.0061, 0.0044, 0.1089, 0.8793, 0.0013),
        (0.0118, 0.0309, 0.0098, 0.0002, 0.9474),
    ),
    (
        (0.8458, 0.1476, 0.0048, 0.0000, 0.0018),
        (0.1038, 0.6747, 0.1874, 0.0001, 0.0341),
        (0.0169, 0.0383, 0.9081, 0.0236, 0.0130),
        (0.0061, 0.0048, 0.1128, 0.8747, 0.0016),
        (0.0143, 0.0327, 0.0076, 0.0002, 0.9452),
    ),
)
"""Probability of the next window's stage (column) after each stage (row), in the first, middle and last third of
the night. Thirds keep what one matrix would lose: slow-wave sleep comes early, REM late."""

AGE_SLOPES = (
    (0.01, -0.05, -0.11, 0.00, -0.32),
    (0.10, 0.00, -0.03, 0.00, -0.27),
    (0.18, 0.21, -0.01, 0.06, -0.03),
    (0.15, 0.36, 0.12, -0.02, 0.00),
    (0.18, -0.01, -0.09, 0.00, 0.00),
)
"""Change of the log of each transition per standard deviation of age: oldest against youngest third of the people
(split at 48 and 62 years). Entries that rest on a few hundred transitions or fewer are set to 0."""

PERSONAL_TILT = (0.35, 0.30, 0.10, 0.35, 0.12)
"""Standard deviation over people of a log preference for each stage, chosen so that the shares of a night spread as
in the real records (W 0.134, N1 0.099, N2 0.133, N3 0.084, REM 0.081, age included)."""

TILT_CENTRE = (-0.09, -0.02, 0.04, -0.03, 0.02)
"""Mean of that preference: undoes the bias that averaging over unequal people brings, so that the priors are met."""


def standardise_age(age: float) -> float:
    """Age in standard deviations from the mean of the challenge's people; `age` in years."""
    return (age - AGE_MEAN) / AGE_DEVIATION


def tilt_transitions(age: float, tilt: Float[np.ndarray, "stages"]) -> Float[np.ndarray, "thirds stages stages"]:
    """One person's transition matrices: those of the average night, shifted by age and personal preference.

    Args:
        age: years.
        tilt: log preference `(5,)` for each stage; zeros for an average person.

    Returns:
        Probabilities `(3, 5, 5)`: third of the night, stage now, stage 30 s later; rows sum to 1.
    """
    logits = np.log(np.asarray(STAGE_TRANSITIONS) + 1e-6) + standardise_age(age) * np.asarray(AGE_SLOPES) + tilt
    odds = np.exp(logits)
    return np.asarray(odds / odds.sum(axis=2, keepdims=True))


def simulate_hypnogram(random: np.random.Generator, windows: int, age: float) -> Int8[np.ndarray, "windows"]:
    """Draw a hypnogram: one sleep stage for each 30 s window.

    Fewer windows than a full night are cut from a random place of a full one: a half-hour recording may lie
    anywhere between falling asleep and the last REM period, so that a cohort of short nights holds all stages.

    Args:
        random: source of chance.
        windows: number of windows, at least 1.
        age: years; age brings more wake and N1 and less slow-wave sleep.

    Returns:
        Stage numbers `(windows,)` in the order of `physioray.signals.STAGES`.
    """
    night = max(windows, NIGHT_WINDOWS)
    tilt = np.asarray(TILT_CENTRE) + random.standard_normal(len(STAGES)) * np.asarray(PERSONAL_TILT)
    limits = np.cumsum(tilt_transitions(age, tilt), axis=2)
    draws = random.random(night)
    stage = int(np.searchsorted(np.cumsum(FIRST_STAGE), draws[0] * sum(FIRST_STAGE), side="right"))
    stages = np.empty(night, np.int8)
    stages[0] = stage
    for window in range(1, night):
        row = limits[3 * window // night, stage]
        stage = min(int(np.searchsorted(row, draws[window], side="right")), len(STAGES) - 1)
        stages[window] = stage
    start = int(random.integers(0, night - windows + 1))
    return stages[start : start + windows]

"""Spoils simulated signals the way real ones are: movement, electrode pops, mains hum, and channels that fall flat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from physioray.data.brain_signals import EEG_CHANNELS
from physioray.data.night import Night
from physioray.data.signal_shapes import add_waveforms, draw_onsets

RATE = 200

MOVEMENTS_PER_HOUR = (14.0, 5.0, 2.0, 1.0, 3.0)
"""Body movements per hour of W, N1, N2, N3, REM. Reason: a few an hour asleep, many more awake."""
MOVEMENT_SIZE = {name: 45.0 for name in (*EEG_CHANNELS, "E1-M2")} | {
    "Chin1-Chin2": 25.0,
    "ABD": 150.0,
    "CHEST": 150.0,
    "AIRFLOW": 15.0,
    "ECG": 0.25,
}
"""Size of a movement in each channel, in its own unit. Reason: slow swings of a few times the usual amplitude."""
POPS_PER_HOUR = 1.0
"""Sudden jumps of one electrode that decay over a second, per hour and channel."""
POP_MICROVOLTS = 120.0
HUM_MICROVOLTS = (0.3, 1.0)
"""Median amplitude of 60 Hz hum and standard deviation of its log over channels; most real channels show next to
none above the quantisation (0.15 uV between 65 and 90 Hz), a few show several microvolts."""
ALWAYS_FLAT_CHANCE = 0.006
"""Chance of a channel to be flat in a whole record."""
SOMETIMES_FLAT_CHANCE = 0.03
"""Chance of a channel to be flat for a while. Reason: 2 of 21 excerpt records keep flat stretches of chin or flow."""
FLAT_SHARE = (0.02, 0.25)
"""Shortest and longest such stretch, as a share of the recording."""


def spoil_signals(
    random: np.random.Generator, night: Night, channels: dict[str, Float32[np.ndarray, "samples"]]
) -> None:
    """Add artefacts to all channels of a night, in place.

    Args:
        random: source of chance.
        night: stages, which movements follow.
        channels: name to signal `(seconds * 200,)` in the channel's unit.
    """
    _add_movements(random, night, channels)
    second = np.sin(2 * np.pi * 60 * np.arange(RATE) / RATE).astype(np.float32)
    for name in sorted(channels):
        electrode = name in EEG_CHANNELS or name in ("E1-M2", "Chin1-Chin2")
        if electrode:
            _add_pops(random, night, channels[name])
        if electrode or name == "ECG":
            unit = 0.001 if name == "ECG" else 1.0
            level = HUM_MICROVOLTS[0] * random.lognormal(0.0, HUM_MICROVOLTS[1]) * unit
            channels[name].reshape(-1, RATE)[:] += np.float32(level) * second
    for name in sorted(channels):
        _flatten(random, channels[name])


def _add_movements(
    random: np.random.Generator, night: Night, channels: dict[str, Float32[np.ndarray, "samples"]]
) -> None:
    starts = draw_onsets(random, np.asarray(MOVEMENTS_PER_HOUR)[night.spread_stages()], RATE)
    if len(starts) == 0:
        return
    length = 6 * RATE
    strength = random.lognormal(0.0, 0.5, len(starts))
    ends = random.uniform(0.3, 1.0, len(starts))
    time = np.arange(length) / length
    hull = np.sin(np.pi * np.minimum(time / ends[:, None], 1.0)) * strength[:, None]
    for name, size in MOVEMENT_SIZE.items():
        # Slow swings: a random walk through knots 0.25 s apart, plus muscle on the electrodes.
        knots = random.standard_normal((len(starts), 26))
        place = time * 24
        left = np.floor(place).astype(np.int64)
        swing = knots[:, left] * (1 - place + left) + knots[:, left + 1] * (place - left)
        swing += 0.3 * random.standard_normal(swing.shape)
        add_waveforms(channels[name], starts, hull * swing * size)


def _add_pops(random: np.random.Generator, night: Night, channel: Float32[np.ndarray, "samples"]) -> None:
    starts = draw_onsets(random, np.full(night.seconds, POPS_PER_HOUR), RATE)
    heights = POP_MICROVOLTS * random.lognormal(0.0, 0.5, (len(starts), 1)) * random.choice((-1, 1), (len(starts), 1))
    add_waveforms(channel, starts, heights * np.exp(-np.arange(2 * RATE) / (0.3 * RATE)))


def _flatten(random: np.random.Generator, channel: Float32[np.ndarray, "samples"]) -> None:
    whole, while_chance, share, place = random.random(4)
    if whole < ALWAYS_FLAT_CHANCE:
        channel[:] = channel[0]
    elif while_chance < SOMETIMES_FLAT_CHANCE:
        length = int((FLAT_SHARE[0] + (FLAT_SHARE[1] - FLAT_SHARE[0]) * share) * len(channel))
        start = int(place * (len(channel) - length))
        channel[start : start + length] = channel[start]

"""Chooses which channel of a recording serves a modality, and how its unit is converted.

Names are compared exactly, after one stated normalisation (`normalise_name`); nothing is guessed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from physioray.config import Montage
from physioray.data.headers import Channel, Header
from physioray.data.preprocess import AbsentModality
from physioray.signals import Modality

_MICROVOLTS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "nv": 1e-3}
_SECONDS = {"s": 1.0, "sec": 1.0, "ms": 1e-3}
_PERCENT = {"%": 1.0, "percent": 1.0, "pct": 1.0}
_ANY_UNIT = ("airflow", "abdomen", "chest")
"""Breathing is recorded in whatever a belt or a cannula gives, so its own unit is kept where it is no voltage."""


_TYPES = {"eeg": ("eeg",), "eog": ("eog",), "emg": ("emg",), "ecg": ("ecg", "ekg")}
"""What EDF+ writes before the electrodes: `EEG F3-M2` (Kemp and Olivan 2003, standard texts)."""
_HYPHENS = str.maketrans({":": "-", "/": "-", "_": "-", "\N{EN DASH}": "-", "\N{MINUS SIGN}": "-"})


@dataclass(frozen=True, kw_only=True)
class ChosenChannel:
    """A modality's channel: its number in the header, and what a value is multiplied by to be in `unit`.

    `minus` is the channel to subtract, in the same unit; None if the channel is taken as it is.
    """

    number: int
    channel: Channel
    factor: float
    unit: str
    minus: ChosenChannel | None = None

    @property
    def name(self) -> str:
        """What was taken: a channel's name, or `C4 minus M1`."""
        return f"{self.channel.name} minus {self.minus.name}" if self.minus else self.channel.name

    @property
    def rate(self) -> float:
        """Samples per second, in Hz; of a derivation those of the slower channel."""
        return min(self.channel.rate, self.minus.rate) if self.minus else self.channel.rate

    @property
    def numbers(self) -> tuple[int, ...]:
        """Channels of the header that must be read."""
        return (self.number, *(self.minus.numbers if self.minus else ()))


def normalise_name(name: str, modality: str = "") -> str:
    """The form in which names of channels are compared.

    Without case and spaces; `:`, `/` and `_` count as `-`; and without the modality's own word in front: `EEG F3:M2`
    is `F3-M2` for the EEG. `EEG` alone stays.
    """
    words = name.translate(_HYPHENS).lower().split()
    if len(words) > 1 and words[0].rstrip("-") in _TYPES.get(modality, ()):
        words = words[1:]
    return "".join(words)


def choose_channel(header: Header, modality: Modality, montage: Montage = Montage()) -> ChosenChannel:  # noqa: B008
    """Find the first of a modality's candidates that a recording has in a usable unit and rate.

    The candidates are the montage's, if it names the modality, else the modality's own. A name that two channels have
    means the first of them; one that is written exactly so comes before one that is alike after normalisation.

    Raises:
        AbsentModality: there is none; the message says what stood in the way.
    """
    candidates = [(channel, minus) for name, channel, minus in montage.choices if name == modality.name]
    candidates = candidates or [(name, "") for name in modality.candidates]
    reasons = []
    for name, minus in candidates:
        numbers = [_find(header, part, modality) for part in (name, minus) if part]
        found = [number for number in numbers if number is not None]
        try:
            if len(found) == len(numbers):
                first, *second = (_judge(number, header.channels[number], modality) for number in found)
                return dataclasses.replace(first, minus=second[0] if second else None)
            if found:
                missing = (name, minus)[numbers.index(None)]
                raise AbsentModality(f"{name} minus {minus} needs both, but {missing} is missing")
        except AbsentModality as error:
            reasons.append(str(error))
    if reasons:
        raise AbsentModality("; ".join(dict.fromkeys(reasons)))
    wanted = ", ".join(f"{name} minus {minus}" if minus else name for name, minus in candidates)
    raise AbsentModality(
        f"a channel must be named one of {wanted}, but the recording has "
        f"{', '.join(channel.name for channel in header.channels)}"
    )


def _find(header: Header, name: str, modality: Modality) -> int | None:
    exact = [number for number, channel in enumerate(header.channels) if channel.name == name]
    wanted = normalise_name(name, modality.name)
    alike = (
        number
        for number, channel in enumerate(header.channels)
        if normalise_name(channel.name, modality.name) == wanted
    )
    return exact[0] if exact else next(alike, None)


def _judge(number: int, channel: Channel, modality: Modality) -> ChosenChannel:
    if channel.problem:
        raise AbsentModality(f"{channel.name}: {channel.problem}")
    if channel.rate < modality.rate:
        raise AbsentModality(
            f"{channel.name} must be sampled at {modality.rate} Hz or more, but is at {channel.rate:g} Hz"
        )
    factor, unit = convert_unit(channel, modality)
    return ChosenChannel(number=number, channel=channel, factor=factor, unit=unit)


def convert_unit(channel: Channel, modality: Modality) -> tuple[float, str]:
    """Factor and unit that bring a channel into its modality's unit.

    Raises:
        AbsentModality: the header gives no unit, or one that cannot be converted.
    """
    own = channel.unit.replace("\N{MICRO SIGN}", "u").replace("\N{GREEK SMALL LETTER MU}", "u").strip()
    if not own or channel.gain == 0:
        raise AbsentModality(f"{channel.name} must have a gain and a unit, but its header gives none")
    for table in (_MICROVOLTS, _SECONDS, _PERCENT):
        if own.lower() in table and modality.unit.lower() in table:
            return table[own.lower()] / table[modality.unit.lower()], modality.unit
    if modality.name in _ANY_UNIT:
        return 1.0, own
    raise AbsentModality(f"{channel.name} must be in a unit convertible to {modality.unit}, but is in {own!r}")

"""Chooses which channel of a recording serves a modality, and how its unit is converted."""

from __future__ import annotations

from dataclasses import dataclass

from physioray.data.preprocess import AbsentModality
from physioray.data.records import Channel, Header
from physioray.signals import Modality

_MICROVOLTS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "nv": 1e-3}
_SECONDS = {"s": 1.0, "sec": 1.0, "ms": 1e-3}
_PERCENT = {"%": 1.0, "percent": 1.0, "pct": 1.0}
_ANY_UNIT = ("airflow", "abdomen", "chest")
"""Breathing is recorded in whatever a belt or a cannula gives, so its own unit is kept where it is no voltage."""


@dataclass(frozen=True, kw_only=True)
class ChosenChannel:
    """A modality's channel: its number in the header, and what a value is multiplied by to be in `unit`."""

    number: int
    channel: Channel
    factor: float
    unit: str


def normalise_name(name: str) -> str:
    """A channel's name without case and spaces, the form in which names are compared."""
    return "".join(name.split()).lower()


def choose_channel(header: Header, modality: Modality) -> ChosenChannel:
    """Find the first of a modality's candidates that a recording has in a usable unit and rate.

    Raises:
        AbsentModality: there is none; the message says what stood in the way.
    """
    names: dict[str, int] = {}
    for number, channel in enumerate(header.channels):
        names.setdefault(normalise_name(channel.name), number)
    reasons = []
    for candidate in modality.candidates:
        number = names.get(normalise_name(candidate), -1)
        if number < 0:
            continue
        channel = header.channels[number]
        try:
            if channel.rate < modality.rate:
                raise AbsentModality(
                    f"{channel.name} must be sampled at {modality.rate} Hz or more, but is at {channel.rate:g} Hz"
                )
            factor, unit = convert_unit(channel, modality)
        except AbsentModality as error:
            reasons.append(str(error))
            continue
        return ChosenChannel(number=number, channel=channel, factor=factor, unit=unit)
    if reasons:
        raise AbsentModality("; ".join(reasons))
    raise AbsentModality(
        f"a channel must be named one of {', '.join(modality.candidates)}, but the recording has "
        f"{', '.join(channel.name for channel in header.channels)}"
    )


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

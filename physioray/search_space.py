"""Says which settings a sweep varies and between which values, and builds the settings of one trial.

A space maps dotted names to distributions: `{"objective.mask.hidden_ratio": uniform(0.3, 0.9)}`. The first part of a
name is a key of the base settings, the rest a field in that config dataclass, however deep.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from physioray.config import to_dict
from physioray.signals import LookupMiss

MOST_CORNERS = 4096
"""Corners of a space that are all built before the first trial; of a larger space every value is built once."""

Scalar = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers between two bounds, both included.

    Attributes:
        low, high: the bounds.
        step: distance of the values, counted from `low`; any value if None.
        log: equal ratios are equally likely, not equal differences.
        whole: values are integers.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"A range must have low < high, but got {self.low!r} and {self.high!r}.")
        if self.log and self.low <= 0:
            raise ValueError(f"A logarithmic range must begin above 0, but got {self.low!r}.")
        if self.log and self.step is not None and not self.whole:
            raise ValueError("A logarithmic range has no step: take choice([...]) for a grid over it.")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"A step must be positive, but got {self.step!r}.")

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """Smallest and largest value."""
        return (self.low, self.high)

    def list_values(self) -> tuple[Scalar, ...]:
        """Every value of a stepped range, for a grid.

        Raises:
            ValueError: the range has no step, so it has no finite list of values.
        """
        if self.step is None:
            raise ValueError("A grid needs choice([...]) or a range with a step.")
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        if self.whole:
            return tuple(int(self.low + number * self.step) for number in range(count))
        return tuple(round(self.low + number * self.step, 12) for number in range(count))

    def describe(self) -> dict[str, Any]:
        """The range as plain JSON values."""
        return {"kind": "numbers"} | dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of a list of values: numbers, words, truth values, None, or tuples of them."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("A choice must have at least one value, but got none.")
        for value in self.values:
            for part in value if isinstance(value, tuple) else (value,):
                if not isinstance(part, bool | int | float | str | None):
                    raise ValueError(f"A choice must be of numbers, words or tuples of them, but got {value!r}.")
        if any(one == other for one, other in itertools.combinations(self.values, 2)):
            raise ValueError(f"A choice must not repeat a value, but got {self.values!r}.")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Every value: any may be the one that does not fit."""
        return self.values

    def list_values(self) -> tuple[Any, ...]:
        """Every value, for a grid."""
        return self.values

    def describe(self) -> dict[str, Any]:
        """The choice as plain JSON values."""
        return {"kind": "choice", "values": [list(v) if isinstance(v, tuple) else v for v in self.values]}


Distribution = Numbers | Choice
Space = Mapping[str, Distribution]
Settings = Mapping[str, Any]
"""Named config dataclasses and plain values, for example `{"train": TrainConfig(...), "training_subjects": 50}`."""


def uniform(low: float, high: float, *, step: float | None = None) -> Numbers:
    """Any number between two bounds, or every `step` from the lower one."""
    return Numbers(low=float(low), high=float(high), step=step)


def loguniform(low: float, high: float) -> Numbers:
    """Any number between two bounds, every factor of ten equally likely."""
    return Numbers(low=float(low), high=float(high), log=True)


def integers(low: int, high: int, *, step: int = 1, log: bool = False) -> Numbers:
    """Whole numbers between two bounds, both included."""
    return Numbers(low=low, high=high, step=step, log=log, whole=True)


def choice(values: list[Any] | tuple[Any, ...]) -> Choice:
    """One of the listed values."""
    return Choice(values=tuple(tuple(value) if isinstance(value, list) else value for value in values))


def change_setting(settings: Settings, name: str, value: Any) -> dict[str, Any]:
    """Settings with one of them changed, validated by the config dataclass it belongs to.

    Args:
        settings: named configs and plain values.
        name: dotted name, for example `objective.mask.hidden_ratio`.
        value: what to put there.

    Raises:
        LookupMiss: there is no such setting; the message lists the nearest ones.
        ValueError: the config refuses the value.
    """
    head, *rest = name.split(".")
    if head not in settings:
        raise _miss(name, settings)
    changed = _replace(settings[head], rest, value, name, settings) if rest else value
    return {**settings, head: changed}


def _replace(config: Any, parts: list[str], value: Any, name: str, settings: Settings) -> Any:
    known = {item.name for item in fields(config)} if is_dataclass(config) and not isinstance(config, type) else set()
    if parts[0] not in known:
        raise _miss(name, settings)
    inner = getattr(config, parts[0])
    if len(parts) > 1:
        value = _replace(inner, parts[1:], value, name, settings)
    elif is_dataclass(inner) and not is_dataclass(value):
        raise LookupMiss(f"{name} must be a single field, but it is a whole {type(inner).__name__}: name one in it.")
    elif isinstance(inner, bool) != isinstance(value, bool) and inner is not None:
        raise ValueError(f"{name} is {inner!r}, so it must be varied over the same kind of value, but got {value!r}.")
    elif isinstance(inner, int) and isinstance(value, float):
        raise ValueError(f"{name} must be a whole number as {inner!r} is, but got {value!r}. Use integers(...).")
    return dataclasses.replace(config, **{parts[0]: value})


def _miss(name: str, settings: Settings) -> LookupMiss:
    known = list(flatten_settings(settings))
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    # A field named without its config is the most frequent slip, and too short for a likeness to be seen.
    near += [item for item in known if item.split(".")[-1] == name.split(".")[-1] and item not in near]
    listed = f"Near ones: {', '.join(near)}." if near else f"There are: {', '.join(known)}."
    return LookupMiss(f"A sweep must name settings that exist, but got {name!r}. {listed}")


def apply_parameters(base: Settings, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one trial: the base with every varied setting in its place.

    Raises:
        LookupMiss: a name does not exist.
        ValueError: a config refuses a value; the message names the parameters.
    """
    settings = dict(base)
    for name, value in parameters.items():
        settings = change_setting(settings, name, value)
    return settings


def check_space(base: Settings, space: Space) -> None:
    """Build every corner of a space once, so that no trial fails hours later for its settings.

    Of spaces with more than `MOST_CORNERS` corners every value is built at least once, with the others at either end.

    Raises:
        ValueError: the space is empty, or a corner is refused; the message says which.
        LookupMiss: a name does not exist.
    """
    if not space:
        raise ValueError("A sweep must vary at least one setting, but its space is empty.")
    for corner in _list_corners(space):
        try:
            apply_parameters(base, corner)
        except ValueError as error:
            raise ValueError(f"Every corner of a space must be valid, but {corner} is not: {error}") from error


def _list_corners(space: Space) -> Iterator[dict[str, Any]]:
    ends = {name: distribution.ends for name, distribution in space.items()}
    if math.prod(len(values) for values in ends.values()) <= MOST_CORNERS:
        yield from (dict(zip(ends, corner, strict=True)) for corner in itertools.product(*ends.values()))
        return
    for side in (0, -1):
        rest = {name: values[side] for name, values in ends.items()}
        yield from ({**rest, name: value} for name, values in ends.items() for value in values)


def list_grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of a space's values; the last name varies fastest.

    Raises:
        ValueError: a range has no step.
    """
    values = {}
    for name, distribution in space.items():
        try:
            values[name] = distribution.list_values()
        except ValueError as error:
            raise ValueError(f"{error} {name} has neither.") from error
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def flatten_settings(settings: Settings) -> dict[str, Any]:
    """Settings as dotted names and plain values, in the order of the fields."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                add(f"{prefix}.{key}", item)
        else:
            flat[prefix] = value

    for name, value in settings.items():
        add(name, to_dict(value) if is_dataclass(value) else value)
    return flat

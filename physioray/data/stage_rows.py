"""Scored periods of any length to one stage per window, by a stated rule.

Stages of Rechtschaffen and Kales (1968) become those of the AASM: 1 N1, 2 N2, 3 and 4 N3, movement time undefined.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8

from physioray.data.edf_notes import Note, Stretch
from physioray.data.labels import find_stage
from physioray.signals import STAGES, UNKNOWN, WINDOW_SECONDS, LookupMiss

UNDEFINED = "undefined"
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """A stage from `onset` for `seconds`, by the recording's clock; -1 where undefined."""

    onset: float
    seconds: float
    stage: int


@dataclass(frozen=True, kw_only=True)
class NamedRuns:
    """Stages that were recognised.

    Attributes:
        runs: in order of time, none reaching into the next.
        names: what each name of the file was taken for, a stage or `undefined`.
        unknown: how often each other name stands there.
    """

    runs: tuple[StageRun, ...]
    names: dict[str, str]
    unknown: dict[str, int]


def name_runs(notes: Sequence[Note], own: Mapping[str, str]) -> NamedRuns:
    """Recognise stages by their names.

    A period without a duration lasts to the next one, the last 30 s; one that reaches into the next ends there.

    Args:
        notes: onset, duration and name.
        own: names that the user has given, to a stage or `undefined`; they come before the known ones.
    """
    given = {_fold(name): stage for name, stage in own.items()}
    names: dict[str, str] = {}
    unknown: Counter[str] = Counter()
    found: list[tuple[Note, int]] = []
    for note in sorted(notes, key=lambda item: item.onset):
        try:
            stage = find_stage(given.get(_fold(note.text), note.text))
        except LookupMiss:
            unknown[note.text] += 1
            continue
        names[note.text] = UNDEFINED if stage == UNKNOWN else STAGES[stage]
        found.append((note, stage))
    runs = []
    for number, (note, stage) in enumerate(found):
        following = found[number + 1][0].onset if number + 1 < len(found) else None
        seconds = note.duration or (following - note.onset if following is not None else float(WINDOW_SECONDS))
        if following is not None:
            seconds = min(seconds, following - note.onset)
        runs.append(StageRun(onset=note.onset, seconds=seconds, stage=stage))
    return NamedRuns(runs=tuple(runs), names=dict(sorted(names.items())), unknown=dict(unknown.most_common()))


def _fold(name: str) -> str:
    return " ".join(name.split()).lower()


def label_by_majority(
    runs: Sequence[StageRun], stretches: Sequence[Stretch], windows: int
) -> Int8[np.ndarray, "windows"]:
    """Stage of each window: that of most of its 30 seconds; -1 if there is a tie, or most are not scored.

    So hypnograms of 20 s or of any other period, and those that begin between two windows, come to the 30 s grid.

    Args:
        runs: scored periods by the recording's clock, none reaching into the next.
        stretches: when the signal was recorded; between two of them the recorder stood still.
        windows: number of windows of signal.
    """
    seconds = np.zeros((len(STAGES) + 1, windows))
    begins = [stretch.clock for stretch in stretches]
    for run in runs:
        if run.stage == UNKNOWN:
            continue
        number = max(0, bisect_right(begins, run.onset) - 1)
        while number < len(stretches) and begins[number] < run.onset + run.seconds:
            stretch = stretches[number]
            first = max(run.onset, stretch.clock) - stretch.clock
            last = min(run.onset + run.seconds - stretch.clock, stretch.seconds)
            _add(seconds[run.stage], stretch.signal + first, stretch.signal + last)
            number += 1
    seconds[-1] = WINDOW_SECONDS - seconds[:-1].sum(axis=0)
    order = np.sort(seconds, axis=0)
    stage = seconds.argmax(axis=0)
    clear = (order[-1] - order[-2] > _TOLERANCE) & (stage < len(STAGES))
    return np.where(clear, stage, UNKNOWN).astype(np.int8)


def _add(row: np.ndarray, first: float, last: float) -> None:
    """Add the time from `first` to `last` to the windows that it falls into."""
    first, last = max(first, 0.0), min(last, len(row) * float(WINDOW_SECONDS))
    if last <= first:
        return
    begin, end = int(first // WINDOW_SECONDS), min(int(last // WINDOW_SECONDS), len(row) - 1)
    row[begin : end + 1] += WINDOW_SECONDS
    row[begin] -= first - begin * WINDOW_SECONDS
    row[end] -= (end + 1) * WINDOW_SECONDS - last

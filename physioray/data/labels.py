"""Annotations to one label per window and task: sleep stage, age group, arousal.

Two forms of the same scoring are read: the challenge's per-sample `-arousal.mat`, whose boundaries stand one
sample early, and notes (`.arousal`, or rows of events) from which the same per-sample marks are derived.

Sources: the CinC Challenge 2018 (Ghassemi et al. 2018, DOI 10.22489/CinC.2018.049) for target arousals;
Fang et al. 2024 (arXiv 2410.16424), section 3.1, for the three tasks. The derivation below gives the marks of
the challenge's own files sample for sample, on all eight label files it was compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8, Int64

from physioray.config import ArousalRule
from physioray.data.records import ArousalFile, RejectedRecording
from physioray.signals import STAGES, UNKNOWN, WINDOW_SECONDS, LookupMiss

_WAKE = STAGES.index("W")

_NAMES_OF_STAGES: Mapping[str, tuple[str, ...]] = {
    "W": ("W", "Wake", "Sleep stage W"),
    "N1": ("N1", "S1", "Sleep stage 1", "Sleep stage N1"),
    "N2": ("N2", "S2", "Sleep stage 2", "Sleep stage N2"),
    # Rechtschaffen and Kales' stages 3 and 4 are one stage in the AASM's rules.
    "N3": ("N3", "N4", "S3", "S4", "Sleep stage 3", "Sleep stage 4", "Sleep stage N3"),
    "REM": ("R", "REM", "Sleep stage R", "Sleep stage REM"),
}

STAGE_NAMES: Mapping[str, int] = {
    **{name.lower(): STAGES.index(stage) for stage, names in _NAMES_OF_STAGES.items() for name in names},
    **{name: UNKNOWN for name in ("undefined", "?", "u", "sleep stage ?", "movement time")},
}
"""Lower-case names of stages, as files write them, to the index in `signals.STAGES`, -1 for not scored."""

_BEFORE_SECONDS = 2
_AFTER_SECONDS = {"arousal_rera": 10}
_AFTER_OTHER_SECONDS = 2
_UNSCORED_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened from sample `start` to sample `stop`, for example `resp_hypopnea`."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A night's scoring as notes: where a stage begins (it lasts to the next one), and events.

    Attributes:
        starts: `(runs,)` first sample of each run, ascending.
        stages: `(runs,)` index into `signals.STAGES`, -1 unknown.
        events: arousals and respiratory events.
        warnings: what is odd but harmless.
    """

    starts: Int64[np.ndarray, "runs"]
    stages: Int8[np.ndarray, "runs"]
    events: tuple[Event, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WindowLabels:
    """One label per window and task, -1 where unknown.

    Attributes:
        sleep: `(windows,)` index into `signals.STAGES`.
        arousal: `(windows,)` 1 arousal, 0 none.
        arousal_sample_share: share of target arousal among the samples of windows with a stage; None if
            arousals were not annotated.
        unscored_sample_share: the same for samples that the challenge does not score.
    """

    sleep: Int8[np.ndarray, "windows"]
    arousal: Int8[np.ndarray, "windows"]
    arousal_sample_share: float | None
    unscored_sample_share: float | None


def find_stage(name: str) -> int:
    """Look a stage up by any of its names, for example `R`, `REM` or `Sleep stage R`; -1 if not scored.

    Raises:
        LookupMiss: no stage has that name; the message lists those that exist.
    """
    key = " ".join(name.split()).lower()
    if key not in STAGE_NAMES:
        known = ", ".join(other for names in _NAMES_OF_STAGES.values() for other in names)
        raise LookupMiss(f"A stage must be one of {known}, undefined or ?, but got {name!r}.")
    return STAGE_NAMES[key]


def parse_notes(notes: Sequence[tuple[int, str]], samples: int) -> Scoring:
    """Read the notes of an `.arousal` file: stages where they change, and events as bracket pairs.

    Args:
        notes: sample and text, for example `(72000, "W")` or `(74000, "(resp_hypopnea")`, in order of time.
        samples: length of the recording.

    Raises:
        RejectedRecording: a stage is unknown or a note stands past the recording's end.
    """
    runs: list[tuple[int, int]] = []
    events: list[Event] = []
    pending: dict[str, list[int]] = {}
    warnings: list[str] = []
    for sample, note in notes:
        if sample < 0 or sample > samples:
            raise RejectedRecording(
                f"An annotation must lie within the recording's {samples} samples, but {note!r} stands at {sample}. "
                "Check that the annotations belong to this recording."
            )
        if note.startswith("("):
            pending.setdefault(note[1:], []).append(sample)
        elif note.endswith(")"):
            kind = note[:-1]
            if pending.get(kind):
                events.append(Event(kind=kind, start=pending[kind].pop(0), stop=sample))
            else:
                warnings.append(f"an event {kind} ends at sample {sample} but never begins")
        elif note:
            try:
                runs.append((sample, find_stage(note)))
            except LookupMiss as error:
                raise RejectedRecording(f"{error} It stands at sample {sample}; correct the annotations.") from error
    warnings += [
        f"an event {kind} begins at sample {at} but never ends" for kind, left in pending.items() for at in left
    ]
    return _make_scoring(runs, events, warnings)


def parse_event_rows(rows: Iterable[tuple[float, float, str]], rate: float) -> Scoring:
    """Read rows of events: onset in seconds, duration in seconds, and a stage or an event's name.

    A stage lasts to the next one or to the end of the recording: the durations of stages are not used,
    because published tables give the last run of a night a wrong one.

    Raises:
        LookupMiss: a name is neither a stage nor begins with `arousal_` or `resp_`.
    """
    runs: list[tuple[int, int]] = []
    events: list[Event] = []
    for onset, duration, kind in rows:
        start = round(onset * rate)
        if kind.startswith(("arousal_", "resp_")):
            events.append(Event(kind=kind, start=start, stop=round((onset + duration) * rate)))
        else:
            runs.append((start, find_stage(kind)))
    return _make_scoring(runs, events, [])


def _make_scoring(runs: list[tuple[int, int]], events: list[Event], warnings: list[str]) -> Scoring:
    ordered = sorted(runs, key=lambda run: run[0])
    return Scoring(
        starts=np.array([start for start, _ in ordered], np.int64),
        stages=np.array([stage for _, stage in ordered], np.int8),
        events=tuple(events),
        warnings=tuple(warnings),
    )


def mark_arousals(scoring: Scoring, samples: int, rate: float) -> Int8[np.ndarray, "samples"]:
    """Mark every sample as the challenge does: 1 target arousal, 0 none, -1 not scored.

    1 from 2 s before a RERA to 10 s after it, and from 2 s before any other arousal to 2 s after it; -1
    within 10 s of being awake and of an apnea, hypopnea or other respiratory event, which overrules 1.

    Args:
        scoring: stages and events.
        samples: length of the recording.
        rate: samples per second, in Hz.

    Returns:
        `(samples,)` with boundaries one sample early, as in `-arousal.mat`.
    """
    marks = np.zeros(samples, np.int8)
    around = round(_UNSCORED_SECONDS * rate)
    for event in scoring.events:
        if event.kind.startswith("arousal_"):
            after = round(_AFTER_SECONDS.get(event.kind, _AFTER_OTHER_SECONDS) * rate)
            _fill(marks, event.start - round(_BEFORE_SECONDS * rate) - 1, event.stop + after, 1)
    for event in scoring.events:
        if event.kind.startswith("resp_"):
            _fill(marks, event.start - around - 1, event.stop + around, -1)
    ends = [*scoring.starts[1:].tolist(), samples + 1]
    for start, end, stage in zip(scoring.starts.tolist(), ends, scoring.stages.tolist(), strict=True):
        if stage == _WAKE:
            _fill(marks, start - around - 2, end - 1 + around, -1)
    return marks


def _fill(marks: Int8[np.ndarray, "samples"], start: int, stop: int, value: int) -> None:
    marks[max(0, start) : max(0, stop)] = value


def label_stages(scoring: Scoring, rate: float, windows: int) -> Int8[np.ndarray, "windows"]:
    """Stage of each window, at its centre, from notes; -1 before the first note."""
    if len(scoring.starts) == 0:
        return np.full(windows, UNKNOWN, np.int8)
    run = np.searchsorted(scoring.starts, _find_centres(rate, windows), side="right") - 1
    return np.where(run >= 0, scoring.stages[np.maximum(run, 0)], np.int8(UNKNOWN)).astype(np.int8)


def _find_centres(rate: float, windows: int) -> Int64[np.ndarray, "windows"]:
    return np.floor((np.arange(windows) + 0.5) * WINDOW_SECONDS * rate).astype(np.int64)


def label_from_scoring(scoring: Scoring, samples: int, rate: float, windows: int, rule: ArousalRule) -> WindowLabels:
    """Label windows from notes or rows of events.

    Where no event stands at all, arousals were not annotated, and the task's labels are unknown.
    """
    known = any(event.kind.startswith(("arousal", "resp")) for event in scoring.events)
    marks = mark_arousals(scoring, samples, rate) if known else None
    return _label(label_stages(scoring, rate, windows), marks, rate, rule)


def label_from_file(file: ArousalFile, samples: int, rate: float, windows: int, rule: ArousalRule) -> WindowLabels:
    """Label windows from a challenge `-arousal.mat`.

    Raises:
        RejectedRecording: the file has another length than the recording.
    """
    if len(file.arousals) != samples:
        raise RejectedRecording(
            f"The -arousal.mat must have the recording's {samples} samples, but has {len(file.arousals)}. "
            "Check that it belongs to this recording, or remove it to use .arousal."
        )
    # Boundaries stand one sample early: sample i of the file belongs to sample i + 1 of the grid.
    centres = np.maximum(_find_centres(rate, windows) - 1, 0)
    return _label(file.stages[centres], file.arousals, rate, rule)


def _label(
    sleep: Int8[np.ndarray, "windows"],
    marks: Int8[np.ndarray, "samples"] | None,
    rate: float,
    rule: ArousalRule,
) -> WindowLabels:
    unknown = np.full(len(sleep), UNKNOWN, np.int8)
    if marks is None or len(sleep) == 0:
        return WindowLabels(sleep=sleep, arousal=unknown, arousal_sample_share=None, unscored_sample_share=None)
    length = WINDOW_SECONDS * rate
    starts = np.maximum(np.rint(np.arange(len(sleep) + 1) * length).astype(np.int64) - 1, 0)
    target, unscored = (np.add.reduceat(marks == value, starts[:], dtype=np.int64)[:-1] for value in (1, -1))
    needed = 1 if rule.kind == "any" else rule.min_fraction * length - 1e-6
    known = sleep != UNKNOWN
    if rule.unscored == "drop":
        known &= unscored == 0
    scored = sleep != UNKNOWN
    total = float(scored.sum() * length)
    return WindowLabels(
        sleep=sleep,
        arousal=np.where(known, (target >= needed).astype(np.int8), unknown),
        arousal_sample_share=float(target[scored].sum() / total) if total else None,
        unscored_sample_share=float(unscored[scored].sum() / total) if total else None,
    )


def label_age(age: float | None, threshold: float, windows: int) -> Int8[np.ndarray, "windows"]:
    """Age group of each window: 1 from `threshold` years on, 0 below, -1 if the age is not known."""
    return np.full(windows, UNKNOWN if age is None else int(age >= threshold), np.int8)


def make_unlabelled(windows: int) -> WindowLabels:
    """Labels of a recording that nobody scored: all unknown."""
    unknown = np.full(windows, UNKNOWN, np.int8)
    return WindowLabels(sleep=unknown, arousal=unknown, arousal_sample_share=None, unscored_sample_share=None)

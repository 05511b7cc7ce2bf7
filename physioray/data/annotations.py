"""Finds whatever scoring lies with a recording, and turns it into one label per window and task.

In order: the challenge's `-arousal.mat`, its `.arousal`, a table of stages, an EDF+ hypnogram, MIT-BIH's `.st`, and
annotations inside an EDF+ recording. The first that is there counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from physioray.config import IngestConfig
from physioray.data.edf import read_edf_notes
from physioray.data.edf_notes import Stretch
from physioray.data.hypnogram_files import HypnogramFile, find_hypnogram, read_hypnogram, read_st_notes
from physioray.data.labels import WindowLabels, label_from_file, label_from_scoring, make_unlabelled, parse_notes
from physioray.data.records import Header, RecordEntry, read_annotations, read_arousal_file
from physioray.data.stage_rows import NamedRuns, label_by_majority, name_runs
from physioray.signals import UNKNOWN
from physioray.storage import Location

_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class LabelledWindows:
    """Labels of a recording's windows and where they come from.

    Attributes:
        labels: per window and task.
        source: kind of the scoring, `none` if there is none.
        stage_names: what each name in the scoring was taken for; empty for the challenge's files.
    """

    labels: WindowLabels
    source: str
    stage_names: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_labels(
    source: Location,
    entry: RecordEntry,
    header: Header,
    *,
    samples: int,
    windows: int,
    stretches: Sequence[Stretch],
    settings: IngestConfig,
) -> LabelledWindows:
    """Label the windows of a recording by the scoring that lies with it.

    Args:
        source, entry, header: the recording.
        samples: its length, at the header's rate.
        windows: number of whole windows.
        stretches: when its signal was recorded.
        settings: the arousal rule, and the user's names of stages.

    Raises:
        RejectedRecording: a scoring is there and cannot be read.
    """
    rate, rule = header.rate, settings.arousal_rule
    file = read_arousal_file(source, entry)
    if file is not None:
        return LabelledWindows(labels=label_from_file(file, samples, rate, windows, rule), source="arousal.mat")
    notes = read_annotations(source, entry, rate)
    if notes is not None:
        scoring = parse_notes(notes, samples)
        labels = label_from_scoring(scoring, samples, rate, windows, rule)
        return LabelledWindows(labels=labels, source="arousal", warnings=scoring.warnings)
    hypnogram = read_stage_notes(source, entry, header)
    if hypnogram is None:
        return LabelledWindows(labels=make_unlabelled(windows), source="none")
    named = name_runs(hypnogram.notes, dict(settings.montage.stages))
    warnings = list(hypnogram.warnings) + doubt_names(named, hypnogram)
    if not named.runs:
        return LabelledWindows(labels=make_unlabelled(windows), source="none", warnings=tuple(warnings))
    warnings += _compare_lengths(named, stretches)
    sleep = label_by_majority(named.runs, stretches, windows)
    labels = WindowLabels(
        sleep=sleep,
        arousal=np.full(windows, UNKNOWN, np.int8),
        arousal_sample_share=None,
        unscored_sample_share=None,
    )
    return LabelledWindows(labels=labels, source=hypnogram.kind, stage_names=named.names, warnings=tuple(warnings))


def read_stage_notes(
    source: Location, entry: RecordEntry, header: Header, *, embedded: bool = True
) -> HypnogramFile | None:
    """The hypnogram that lies beside a recording or stands in it; None if there is none.

    Args:
        source, entry, header: the recording.
        embedded: look into the recording itself, which means reading through it.

    Raises:
        RejectedRecording: it is there and cannot be read.
    """
    path = find_hypnogram(source, entry)
    if path:
        return read_hypnogram(source, path, header)
    notes = read_annotations(source, entry, header.rate, "st")
    if notes is not None:
        return read_st_notes(notes, header.rate)
    if embedded and header.has_notes:
        folder = source / entry.path.rsplit("/", 1)[0] if "/" in entry.path else source
        inside, _ = read_edf_notes(folder / header.channels[0].file)
        return HypnogramFile(kind="edf annotations", notes=inside, only_stages=False)
    return None


def doubt_names(named: NamedRuns, hypnogram: HypnogramFile) -> list[str]:
    """What to say about names that are no stage: all in a table; elsewhere, where events stand too, if they look so."""
    strange = {
        name: count
        for name, count in named.unknown.items()
        if hypnogram.only_stages or not named.runs or name.lower().startswith(("sleep stage", "stage"))
    }
    if not strange:
        return []
    told = ", ".join(f"{name!r} ({count})" for name, count in list(strange.items())[:_NAMED])
    more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
    return [f"names of no known stage are undefined: {told}{more}; say what they mean under [stages] (--channels)"]


def _compare_lengths(named: NamedRuns, stretches: Sequence[Stretch]) -> list[str]:
    end = stretches[-1].clock + stretches[-1].seconds
    scored = named.runs[-1].onset + named.runs[-1].seconds
    if scored <= end + 1e-6:
        return []
    return [f"the hypnogram reaches to {scored:g} s and the recording to {end:g} s; what is beyond is not used"]

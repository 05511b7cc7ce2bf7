"""One recording to windows: reads it, filters and judges its channels, labels it, and says what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int8

from physioray.config import IngestConfig
from physioray.data.annotations import LabelledWindows, read_labels
from physioray.data.channels import ChosenChannel, choose_channel
from physioray.data.derivations import derive_signal
from physioray.data.edf_notes import Stretch
from physioray.data.labels import label_age
from physioray.data.preprocess import AbsentModality, ProcessedChannel, process_channel
from physioray.data.records import (
    Header,
    RecordEntry,
    RejectedRecording,
    SubjectFacts,
    is_simulated,
    read_header,
)
from physioray.data.waveforms import Samples, Waveforms, read_waveforms
from physioray.signals import (
    TASKS,
    WINDOW_SECONDS,
    Modality,
    find_modality,
    label_column,
    present_column,
    shard_schema,
)
from physioray.storage import Location


@dataclass(frozen=True)
class ConvertedRecording:
    """A recording as it goes into a cohort.

    Attributes:
        table: one row per window, columns as in `signals.shard_schema`.
        facts: what was found, for the ledger: JSON without NaN.
    """

    table: pa.Table
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Night:
    """What all channels of a recording share; `kept` `(windows,)` is False where a window holds a jump.

    `stretches` says when the signal was recorded, by the clock that annotations follow.
    """

    samples: int
    rate: float
    windows: int
    jumps: tuple[int, ...]
    kept: Bool[np.ndarray, "windows"]
    stretches: tuple[Stretch, ...]

    @property
    def partial_samples(self) -> int:
        return self.samples - round(self.windows * WINDOW_SECONDS * self.rate)


def convert_recording(
    source: Location,
    entry: RecordEntry,
    settings: IngestConfig,
    *,
    subject: SubjectFacts | None,
    discontinuities: Sequence[int] = (),
) -> ConvertedRecording:
    """Turn one recording into windows of 30 s with labels.

    Every full window is kept, scored or not, except those that a jump falls into; what is left at the end
    is dropped. Where a modality is absent its column holds zeros.

    Args:
        source: folder or bucket of the recordings.
        entry: which one.
        settings: modalities, filters, scale, rules; see `config.IngestConfig`.
        subject: whose it is; None if nothing is known.
        discontinuities: samples, at the source's rate, that are the first after a jump.

    Raises:
        RejectedRecording: it cannot be used; one line says why and what to do.
    """
    header = read_header(source, entry)
    chosen, absent = choose_channels(header, settings)
    if not chosen:
        raise RejectedRecording(_say_nothing_left(absent))
    numbers = {number for channel in chosen.values() for number in channel.numbers}
    waveforms = read_waveforms(source, entry, header, sorted(numbers))
    warnings = list(waveforms.warnings)
    night = _lay_grid(header, waveforms, discontinuities, warnings)
    labelled = _label(source, entry, header, night, settings)
    processed = _process_channels(waveforms, chosen, absent, night, settings)
    if not processed:
        raise RejectedRecording(_say_nothing_left(absent))
    age = subject.age if subject else None
    tasks = {
        "sleep": labelled.labels.sleep[night.kept],
        "age": label_age(age, settings.age_threshold, int(night.kept.sum())),
        "arousal": labelled.labels.arousal[night.kept],
    }
    channels = {name: _describe(chosen[name], item, night.kept, name) for name, item in processed.items()}
    warnings += [*labelled.warnings, *_doubt_amplitudes(channels)]
    warnings += [subject.note] if subject and subject.note else []
    facts = {
        "recording": entry.name,
        "subject": subject.subject if subject else entry.name,
        "age": age,
        "sex": subject.sex if subject else None,
        "simulated": header.simulated or is_simulated(source, []),
        "channels": channels,
        "absent_modalities": absent,
        "class_counts": {task: _count(values, len(TASKS[task].classes)) for task, values in tasks.items()},
        "signal_sha256": waveforms.sha256,
        "warnings": warnings,
        **_describe_labels(labelled),
        **_describe_night(night),
    }
    return ConvertedRecording(_build_table(settings.modalities, night, processed, tasks), facts)


def _label(
    source: Location, entry: RecordEntry, header: Header, night: _Night, settings: IngestConfig
) -> LabelledWindows:
    return read_labels(
        source,
        entry,
        header,
        samples=night.samples,
        windows=night.windows,
        stretches=night.stretches,
        settings=settings,
    )


def _describe_labels(labelled: LabelledWindows) -> dict[str, Any]:
    return {
        "label_source": labelled.source,
        "stage_names": labelled.stage_names,
        "arousal_sample_share": labelled.labels.arousal_sample_share,
        "unscored_sample_share": labelled.labels.unscored_sample_share,
    }


def choose_channels(header: Header, settings: IngestConfig) -> tuple[dict[str, ChosenChannel], dict[str, str]]:
    """The channel of each modality that is asked for, and the reason why a modality has none."""
    chosen: dict[str, ChosenChannel] = {}
    absent: dict[str, str] = {}
    for name in settings.modalities:
        try:
            chosen[name] = choose_channel(header, find_modality(name), settings.montage)
        except AbsentModality as error:
            absent[name] = str(error)
    return chosen, absent


def _process_channels(
    waveforms: Waveforms,
    chosen: dict[str, ChosenChannel],
    absent: dict[str, str],
    night: _Night,
    settings: IngestConfig,
) -> dict[str, ProcessedChannel]:
    """What each chosen channel becomes; one that holds nothing is added to `absent`."""
    processed: dict[str, ProcessedChannel] = {}
    for name, channel in chosen.items():
        try:
            processed[name] = _process(waveforms.samples, channel, night, find_modality(name), settings)
        except AbsentModality as error:
            absent[name] = f"{channel.name}: {error}"
    return processed


def _doubt_amplitudes(channels: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}: robust standard deviation {facts['robust_std']:.4g} {facts['unit']} is not plausible for "
        f"{facts['channel']} ({find_modality(name).plausible[0]:g} to {find_modality(name).plausible[1]:g})"
        for name, facts in channels.items()
        if not facts["plausible"]
    ]


def _say_nothing_left(absent: dict[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
    return f"At least one modality must be present, but none is ({reasons}). Check the header or ask for others."


def _lay_grid(header: Header, waveforms: Waveforms, discontinuities: Sequence[int], warnings: list[str]) -> _Night:
    number, samples = next(iter(waveforms.samples.items()))
    count = round(len(samples) * header.rate / header.channels[number].rate)
    if header.samples is not None and count != header.samples:
        raise RejectedRecording(
            f"The signal files must hold the header's {header.samples} samples, but hold {count}. "
            "Download the recording again."
        )
    length = WINDOW_SECONDS * header.rate
    windows = int(count / length + 1e-9)
    if windows < 1:
        raise RejectedRecording(
            f"A recording must last {WINDOW_SECONDS} s or more, but lasts {count / header.rate:.1f} s. Leave it out."
        )
    stretches = waveforms.stretches or (Stretch(clock=0.0, signal=0.0, seconds=count / header.rate),)
    gaps = {round(stretch.signal * header.rate) for stretch in stretches[1:]}
    jumps = tuple(sorted(gaps | {jump for jump in discontinuities if 0 < jump < count}))
    outside = [jump for jump in discontinuities if not 0 < jump < count]
    if outside:
        warnings.append(f"discontinuities outside the recording's {count} samples are ignored: {outside[:5]}")
    place = np.array(jumps, np.float64) / length
    # A jump at the border of two windows lies in neither.
    inside = place[np.abs(place - np.rint(place)) * length > 1e-6].astype(np.int64)
    kept = np.ones(windows, np.bool_)
    kept[inside[inside < windows]] = False
    if not kept.any():
        raise RejectedRecording(
            f"A window must lie between two jumps, but every one of {windows} holds a jump. "
            "Check discontinuities.csv, or the gaps of EDF+D."
        )
    return _Night(samples=count, rate=header.rate, windows=windows, jumps=jumps, kept=kept, stretches=tuple(stretches))


def _process(
    samples: dict[int, Samples], chosen: ChosenChannel, night: _Night, modality: Modality, settings: IngestConfig
) -> ProcessedChannel:
    times = [jump / night.rate for jump in night.jumps]
    signal = derive_signal(samples, chosen, seconds=night.samples / night.rate, jumps=times)
    jumps = [round(jump * (signal.rate / night.rate)) for jump in night.jumps]
    processed = process_channel(signal.physical, signal.raw, signal.rate, modality, settings, jumps)
    if not processed.present[night.kept].any():
        raise AbsentModality("at least one window between jumps must be usable, but none is")
    return processed


def _describe(
    chosen: ChosenChannel, item: ProcessedChannel, kept: Bool[np.ndarray, "windows"], name: str
) -> dict[str, Any]:
    modality = find_modality(name)
    low, high = modality.plausible
    return {
        "channel": chosen.name,
        "source_rate": chosen.rate,
        "unit": chosen.unit,
        "scale": item.scale,
        "offset": item.offset,
        "band": list(item.plan.band),
        "antialias": item.plan.antialias,
        "robust_std": item.robust_std,
        # The range is stated in the modality's unit; in another unit there is nothing to compare with.
        "plausible": chosen.unit != modality.unit or bool(low <= item.robust_std <= high),
        "present_windows": int(item.present[kept].sum()),
        "absent_windows": {
            "flat": int(item.faults.flat[kept].sum()),
            "invalid": int(item.faults.invalid[kept].sum()),
            "clipped": int(item.faults.clipped[kept].sum()),
        },
    }


def _describe_night(night: _Night) -> dict[str, Any]:
    return {
        "source_rate": night.rate,
        "hours": night.samples / night.rate / 3600,
        "windows": int(night.kept.sum()),
        "partial_samples": night.partial_samples,
        "windows_dropped_at_jumps": int((~night.kept).sum()),
        "discontinuities": [jump / night.rate for jump in night.jumps],
    }


def _count(values: Int8[np.ndarray, "windows"], classes: int) -> list[int]:
    return [int(count) for count in np.bincount(values[values >= 0], minlength=classes)]


def _build_table(
    modalities: tuple[str, ...],
    night: _Night,
    processed: dict[str, ProcessedChannel],
    tasks: dict[str, Int8[np.ndarray, "windows"]],
) -> pa.Table:
    schema = shard_schema(modalities)
    numbers = np.flatnonzero(night.kept)
    columns: dict[str, Any] = {
        "window": numbers.astype(np.int32),
        "start": numbers * float(WINDOW_SECONDS),
        **{label_column(task): values for task, values in tasks.items()},
    }
    for name in modalities:
        samples = find_modality(name).samples
        item = processed.get(name)
        present = item.present if item else np.zeros(night.windows, np.bool_)
        signal = item.signal if item else np.zeros((night.windows, samples), np.int16)
        if not night.kept.all():
            present, signal = present[night.kept], signal[night.kept]
        columns[present_column(name)] = present
        kind = schema.field(name).type
        flat = pa.array(np.ascontiguousarray(signal).reshape(math.prod(signal.shape)))
        columns[name] = pa.ExtensionArray.from_storage(
            kind, pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type)
        )
    return pa.table(
        {
            field.name: pa.array(columns[field.name])
            if isinstance(columns[field.name], np.ndarray)
            else columns[field.name]
            for field in schema
        },
        schema=schema,
    )

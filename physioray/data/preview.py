"""Says what ingest would make of a source, by headers only: what serves each modality, what is missing and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from physioray.config import IngestConfig
from physioray.data.annotations import doubt_names, read_stage_notes
from physioray.data.channels import ChosenChannel
from physioray.data.convert import choose_channels
from physioray.data.hypnogram_files import find_hypnogram
from physioray.data.ledger import key_entries, reject_same_name
from physioray.data.records import Header, RecordEntry, RejectedRecording, is_simulated, list_records, read_header
from physioray.data.stage_rows import name_runs
from physioray.data.subjects import read_subject_facts
from physioray.signals import WINDOW_SECONDS
from physioray.storage import Location

_NAMED = 8
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class RecordingPreview:
    """What would be used of one recording.

    Attributes:
        path: in the source.
        reason: why it would be rejected; empty if its header is sound.
        seconds: duration that the header states, None if it states none.
        chosen: the channel of each modality.
        absent: why a modality has none.
        age_known: True if a table beside the recordings gives an age.
        labels: where stages and arousals come from, or `none`.
        stage_names: what each name in a hypnogram would be taken for.
        warnings: what was repaired or is odd.
    """

    path: str
    reason: str = ""
    seconds: float | None = None
    chosen: Mapping[str, ChosenChannel] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    age_known: bool = False
    labels: str = "none"
    stage_names: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def preview_source(
    source: Location, settings: IngestConfig, progress: Callable[[int, int, str], None] | None = None
) -> tuple[list[RecordingPreview], bool]:
    """Read the headers and hypnograms of a source; signals are neither read nor judged, and nothing is written.

    Args:
        source: folder or bucket of the recordings.
        settings: modalities and montage.
        progress: called with the number done, the number of all, and a note.

    Returns:
        One preview per recording, and whether the source is simulated.

    Raises:
        StorageError: the source is missing, empty or unreadable.
    """
    entries = list_records(source)
    keyed = key_entries(entries)
    twice = {row.key: row.reason for row in reject_same_name(source, keyed)}
    ages = {name for name, facts in read_subject_facts(source).items() if facts.age is not None}

    def look(item: tuple[str, RecordEntry]) -> RecordingPreview:
        key, entry = item
        if key in twice:
            return RecordingPreview(path=entry.shown, reason=twice[key])
        return replace(_preview(source, entry, settings), age_known=entry.name in ages)

    previews = []
    # Requests to a bucket take their time, one after the other; a folder is as fast without threads.
    with ThreadPoolExecutor(1 if source.is_local else _READERS) as pool:
        for preview in pool.map(look, keyed.items()):
            previews.append(preview)
            if progress is not None:
                progress(len(previews), len(keyed), "headers")
    return previews, is_simulated(source, entries)


def _preview(source: Location, entry: RecordEntry, settings: IngestConfig) -> RecordingPreview:
    chosen: dict[str, ChosenChannel] = {}
    absent: dict[str, str] = {}
    try:
        header = read_header(source, entry)
        chosen, absent = choose_channels(header, settings)
        seconds = header.samples / header.rate if header.samples is not None else None
        if not chosen:
            raise RejectedRecording("At least one modality must be present, but none is.")
        if seconds is not None and seconds < WINDOW_SECONDS:
            raise RejectedRecording(f"A recording must last {WINDOW_SECONDS} s or more, but lasts {seconds:.1f} s.")
        labels, names, warnings = _preview_labels(source, entry, header, settings)
    except RejectedRecording as error:
        return RecordingPreview(path=entry.shown, reason=" ".join(str(error).split()), chosen=chosen, absent=absent)
    return RecordingPreview(
        path=entry.shown,
        seconds=seconds,
        chosen=chosen,
        absent=absent,
        labels=labels,
        stage_names=names,
        warnings=header.warnings + tuple(warnings),
    )


def _preview_labels(
    source: Location, entry: RecordEntry, header: Header, settings: IngestConfig
) -> tuple[str, dict[str, str], list[str]]:
    """Where labels come from, what names of stages mean, and doubts."""
    for ending in ("-arousal.mat", ".arousal"):
        if (source / f"{entry.path}{ending}").exists():
            return ending, {}, []
    hypnogram = read_stage_notes(source, entry, header, embedded=False)
    if hypnogram is None:
        return ("annotations inside, if they name stages" if header.has_notes else "none"), {}, []
    named = name_runs(hypnogram.notes, dict(settings.montage.stages))
    warnings = list(hypnogram.warnings) + doubt_names(named, hypnogram)
    file = find_hypnogram(source, entry).rsplit("/", 1)[-1] or ".st"
    hours = sum(run.seconds for run in named.runs if run.stage >= 0) / 3600
    return f"{file}, {hours:.2f} h scored", named.names, warnings


def describe_preview(
    previews: Sequence[RecordingPreview], settings: IngestConfig, *, simulated: bool, width: int = 120
) -> str:
    """The preview as text: a table with a row per recording, then every reason with the recordings it concerns."""
    out = StringIO()
    console = Console(file=out, width=max(width, 80), no_color=True, highlight=False)
    if simulated:
        console.print("SIMULATED NIGHTS: nothing here was measured on a person.")
    usable = [item for item in previews if not item.reason]
    table = Table(
        title="What would be used (dry run: headers only, nothing is written)",
        box=box.SIMPLE,
        title_justify="left",
        pad_edge=False,
    )
    for column in ("recording", "hours", *settings.modalities, "labels"):
        table.add_column(column, justify="right" if column == "hours" else "left", overflow="fold")
    for item in usable:
        hours = "?" if item.seconds is None else f"{item.seconds / 3600:.2f}"
        cells = [_show_channel(item.chosen.get(name)) for name in settings.modalities]
        # Names may hold brackets, which rich would take for its own markup.
        table.add_row(*(cell.replace("[", r"\[") for cell in (item.path, hours, *cells, item.labels)))
    if usable:
        console.print(table)
    for name in settings.modalities:
        _print_reasons(console, f"No {name} in", {item.path: item.absent.get(name, "") for item in usable})
    names: dict[str, str] = {}
    for item in usable:
        names |= item.stage_names
    if names:
        told = ", ".join(f"{name} = {stage}" for name, stage in sorted(names.items()))
        console.print(f"Names of stages: {told}", markup=False)
    for item in usable:
        for warning in item.warnings:
            console.print(f"{item.path}: {warning}", markup=False)
    rejected = [item for item in previews if item.reason]
    for item in rejected:
        console.print(f"Would be rejected: {item.path}: {item.reason}", markup=False)
    ages = sum(item.age_known for item in usable)
    lacking = sum(item.labels == "none" for item in usable)
    console.print(
        f"{len(usable)} of {len(previews)} recordings would be used, {lacking} of them without stages or arousals, "
        f"{len(usable) - ages} without an age; signals have not been looked at.",
        markup=False,
    )
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _show_channel(chosen: ChosenChannel | None) -> str:
    if chosen is None:
        return "absent"
    units = f"{chosen.channel.unit}" if not chosen.minus else f"{chosen.channel.unit}, {chosen.minus.channel.unit}"
    return f"{chosen.name} ({chosen.rate:g} Hz, {units})"


def _print_reasons(console: Console, opening: str, reasons: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        if reason:
            by_reason.setdefault(reason, []).append(path)
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        console.print(f"{opening} {', '.join(paths[:_NAMED])}{more}: {reason}", markup=False)

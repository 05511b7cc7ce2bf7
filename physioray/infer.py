"""Reads a recording with a trained model: embeddings, hypnogram with probabilities, a picture and a page."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from edfio import Edf, EdfAnnotation
from edfio import Recording as EdfRecording
from jaxtyping import Bool, Float, Float32, Int

from physioray import __version__
from physioray.config import IngestConfig, hash_config
from physioray.data.convert import ConvertedRecording, convert_recording
from physioray.data.gather import view_tensor
from physioray.data.ledger import stamp_files
from physioray.data.records import RecordEntry
from physioray.figures import find_runs, render_svg
from physioray.metrics import score_predictions
from physioray.night_figures import draw_night, render_png
from physioray.night_page import render_page
from physioray.pretrained import PretrainedModel
from physioray.signals import (
    STAGES,
    TASKS,
    UNKNOWN,
    WINDOW_SECONDS,
    find_modality,
    find_task,
    label_column,
    present_column,
)
from physioray.storage import Location, StorageError, commit_folder, is_committed

EMBEDDINGS_FILE = "embeddings.parquet"
HYPNOGRAM_CSV = "hypnogram.csv"
HYPNOGRAM_EDF = "hypnogram.edf"
PICTURE_FILE = "night.png"
PAGE_FILE = "night.html"
SUMMARY_FILE = "summary.json"

EDF_STAGES = {"W": "Sleep stage W", "N1": "Sleep stage N1", "N2": "Sleep stage N2", "N3": "Sleep stage N3"} | {
    "REM": "Sleep stage R"
}
"""Standard texts of EDF+ (https://www.edfplus.info/specs/edftexts.html)."""

PERSONAL_TASKS = ("age",)
"""Tasks whose answer is the same all night: told as a mean probability, not in minutes."""

_UNKNOWN_TEXT = "Sleep stage ?"


@dataclass(frozen=True, kw_only=True)
class ReadNight:
    """What a model says of one recording.

    Attributes:
        start: `(n,)` seconds of the windows from the start of the recording.
        window: `(n,)` their numbers; those that hold a jump are left out.
        present: `(n,)` per modality.
        vectors: `(n, features)` embeddings, NaN where nothing is present.
        probabilities: `(n, classes)` by task, NaN where nothing is present.
        true: `(n,)` labels by task, of those tasks that the recording itself has been scored for.
        facts: of the recording, see `data.convert`.
    """

    start: Float[np.ndarray, "n"]
    window: Int[np.ndarray, "n"]
    present: Mapping[str, Bool[np.ndarray, "n"]]
    vectors: Float32[np.ndarray, "n features"]
    probabilities: Mapping[str, Float[np.ndarray, "n _"]]
    true: Mapping[str, Int[np.ndarray, "n"]]
    facts: Mapping[str, Any]

    def predict(self, task: str) -> Int[np.ndarray, "n"]:
        """Most probable class `(n,)` of a task, -1 where nothing is present."""
        values = self.probabilities[task]
        known = np.isfinite(values).all(1)
        return np.where(known, np.nan_to_num(values).argmax(1), UNKNOWN)


def read_night(
    source: Location,
    entry: RecordEntry,
    model: PretrainedModel,
    *,
    discontinuities: Sequence[int] = (),
    settings: IngestConfig | None = None,
) -> ReadNight:
    """Bring one recording to windows as the model's cohort was, and embed and classify them.

    Arguments as for `infer_recording`.

    Raises:
        RejectedRecording: it cannot be read, or has none of the model's modalities.
    """
    converted = convert_recording(
        source, entry, settings or model.preprocessing, subject=None, discontinuities=tuple(discontinuities)
    )
    signals, present = _take_windows(converted, model.modalities)
    vectors = model.embed_windows(signals, present)
    table = converted.table
    labels = {task: table.column(label_column(task)).to_numpy().astype(np.int64) for task in TASKS}
    return ReadNight(
        start=table.column("start").to_numpy(),
        window=table.column("window").to_numpy().astype(np.int64),
        present=present,
        vectors=vectors,
        probabilities=model.predict(vectors),
        true={task: values for task, values in labels.items() if (values != UNKNOWN).any()},
        facts=converted.facts,
    )


def _take_windows(
    converted: ConvertedRecording, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    table = converted.table.combine_chunks()
    signals, present = {}, {}
    for name in names:
        column = table.column(name).chunk(0)
        signals[name] = view_tensor(column, find_modality(name).samples)
        present[name] = table.column(present_column(name)).to_numpy().astype(np.bool_)
    return signals, present


def infer_recording(
    source: Location,
    entry: RecordEntry,
    model: PretrainedModel,
    out: Location,
    *,
    discontinuities: Sequence[int] = (),
    settings: IngestConfig | None = None,
) -> dict[str, Any]:
    """Write what a model says of one recording into a folder; a finished one is not made again.

    Args:
        source, entry: the recording, see `data.selection.find_recordings`.
        model: see `origins.open_model`.
        out: folder for embeddings.parquet, hypnogram.csv, hypnogram.edf, night.png, night.html and summary.json.
        discontinuities: samples, at the source's rate, that are the first after a jump.
        settings: the model's preprocessing with what is particular to this source; the model's own if None.

    Returns:
        The content of summary.json.

    Raises:
        RejectedRecording: the recording cannot be used.
        StorageError: the folder holds something else.
    """
    used = settings or model.preprocessing
    identity = {**_identify(source, entry, model, discontinuities), "settings": hash_config(used)}
    known = _read_summary(out)
    if known is not None:
        for part in ("recording", "weights_sha256"):
            if known["identity"].get(part) != identity[part]:
                raise StorageError(
                    f"{out} must be empty or hold this model's reading of {entry.name}, but its {part} is "
                    f"{known['identity'].get(part)}. Choose another folder."
                )
        if known["identity"] == identity and is_committed(out):
            return known
    night = read_night(source, entry, model, discontinuities=discontinuities, settings=used)
    summary = summarise_night(entry.name, night, model) | {"identity": identity}
    figure = _draw(entry.name, night, model)
    picture = render_png(figure)
    files = {EMBEDDINGS_FILE: _tabulate_embeddings(night, model), PICTURE_FILE: picture}
    if "sleep" in night.probabilities:
        files |= {HYPNOGRAM_CSV: write_csv(night, model), HYPNOGRAM_EDF: write_edf(night, model)}
    page = render_page(summary, model.description, render_svg(figure, "night"), sorted(files))
    files[PAGE_FILE] = page.encode()
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / SUMMARY_FILE).write_json(summary)
    commit_folder(out, [*files, SUMMARY_FILE])
    return summary


def _identify(
    source: Location, entry: RecordEntry, model: PretrainedModel, discontinuities: Sequence[int]
) -> dict[str, Any]:
    return {
        "recording": entry.name,
        "files": stamp_files(source, entry),
        "jumps": list(discontinuities),
        "weights_sha256": model.description["weights_sha256"],
        "physioray": __version__,
    }


def _read_summary(out: Location) -> dict[str, Any] | None:
    place = out / SUMMARY_FILE
    return place.read_json() if place.exists() else None


def summarise_night(name: str, night: ReadNight, model: PretrainedModel) -> dict[str, Any]:
    """A night in plain values: what was present, minutes per class, agreement with a scoring, amplitudes."""
    facts = night.facts
    usable = np.stack(list(night.present.values())).any(0)
    tasks: dict[str, Any] = {}
    for task in night.probabilities:
        classes, predicted = find_task(task).classes, night.predict(task)
        counts = np.bincount(predicted[predicted != UNKNOWN], minlength=len(classes))
        entry: dict[str, Any] = {
            "minutes": None
            if task in PERSONAL_TASKS
            else {label: float(n) * WINDOW_SECONDS / 60 for label, n in zip(classes, counts, strict=True)},
            "mean_probability": {
                label: float(value) for label, value in zip(classes, _mean(night.probabilities[task]), strict=True)
            },
        }
        entry["agreement"] = None if task in PERSONAL_TASKS else _compare(task, night, predicted)
        tasks[task] = entry
    return {
        "recording": name,
        "simulated_recording": bool(facts["simulated"]),
        "simulated_training": model.simulated,
        "hours": facts["hours"],
        "windows": len(night.start),
        "usable_windows": int(usable.sum()),
        "windows_dropped_at_jumps": facts["windows_dropped_at_jumps"],
        "jumps": len(facts["discontinuities"]),
        "modalities": {
            item: {"present_windows": int(here.sum()), "share": float(here.mean())}
            for item, here in night.present.items()
        },
        "channels": facts["channels"],
        "absent": facts["absent_modalities"],
        "warnings": facts["warnings"],
        "tasks": tasks,
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """A night in a few lines for the terminal; says SIMULATED where that is so."""
    told = [
        name
        for name, true in (
            ("the model was trained on SIMULATED signals", summary["simulated_training"]),
            ("the recording is SIMULATED", summary["simulated_recording"]),
        )
        if true
    ]
    lines = [f"{summary['recording']}: {summary['usable_windows']:,} of {summary['windows']:,} windows read"]
    lines[0] += f" ({'; '.join(told)})." if told else "."
    shares = [f"{name} {entry['share']:.0%}" for name, entry in summary["modalities"].items()]
    lines.append(f"Present: {', '.join(shares)}.")
    for task, found in summary["tasks"].items():
        if found["minutes"] is None:
            means = ", ".join(f"{label} {value:.2f}" for label, value in found["mean_probability"].items())
            lines.append(f"{find_task(task).title}, mean probability over the night: {means}.")
            continue
        minutes = ", ".join(f"{label} {value:.1f}" for label, value in found["minutes"].items())
        agreement = found["agreement"]
        compared = ""
        if agreement and agreement["balanced_accuracy"] is not None:
            compared = f"; balanced accuracy against its scoring {agreement['balanced_accuracy']:.3f}"
        lines.append(f"{find_task(task).title}, minutes: {minutes}{compared}.")
    return "\n".join(lines)


def _mean(values: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "classes"]:
    known = values[np.isfinite(values).all(1)]
    return known.mean(0) if len(known) else np.zeros(values.shape[1])


def _compare(task: str, night: ReadNight, predicted: Int[np.ndarray, "n"]) -> dict[str, Any] | None:
    """Balanced accuracy and kappa against the recording's own scoring; None if there is none."""
    if task not in night.true:
        return None
    rows = np.flatnonzero((night.true[task] != UNKNOWN) & (predicted != UNKNOWN))
    if not len(rows):
        return None
    true = night.true[task][rows]
    scores = score_predictions(find_task(task), true, predicted[rows], night.probabilities[task][rows])
    return {
        "balanced_accuracy": scores["balanced_accuracy"],
        "kappa": scores["kappa"],
        "windows": len(rows),
        "classes": int(len(np.unique(true))),
    }


def _draw(name: str, night: ReadNight, model: PretrainedModel) -> Any:
    words = [f"{name}"]
    if model.simulated:
        words.append("model trained on SIMULATED signals")
    if night.facts["simulated"]:
        words.append("SIMULATED recording")
    sleep = "sleep" in night.probabilities
    arousal = night.probabilities.get("arousal")
    return draw_night(
        night.start,
        find_runs(night.start, night.facts["discontinuities"]),
        night.present,
        title=", ".join(words),
        predicted=night.predict("sleep") if sleep else None,
        probabilities=night.probabilities["sleep"] if sleep else None,
        true=night.true.get("sleep"),
        arousal=arousal[:, 1] if arousal is not None else None,
    )


def _tabulate_embeddings(night: ReadNight, model: PretrainedModel) -> pa.Buffer:
    """One row per window as Parquet: number, start in seconds, presence, embedding (null where nothing is present)."""
    usable = np.isfinite(night.vectors).all(1)
    columns: dict[str, Any] = {
        "window": pa.array(night.window, pa.int32()),
        "start": pa.array(night.start),
        **{present_column(name): pa.array(here) for name, here in night.present.items()},
        "embedding": pa.array(
            [row if good else None for row, good in zip(night.vectors, usable, strict=True)], pa.list_(pa.float32())
        ),
    }
    table = pa.table(columns).replace_schema_metadata(
        {"weights_sha256": model.description["weights_sha256"], "trained_on": _say_training(model)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _say_training(model: PretrainedModel) -> str:
    return "SIMULATED signals" if model.simulated else "recorded signals"


def write_csv(night: ReadNight, model: PretrainedModel) -> bytes:
    """The hypnogram as a table: onset and duration in seconds, stage, probabilities, modalities present."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    arousal = night.probabilities.get("arousal")
    names = ["onset", "duration", "stage", *(f"p_{stage}" for stage in STAGES)]
    writer.writerow([*names, *(["p_arousal"] if arousal is not None else []), "present", "trained_on"])
    stages = night.predict("sleep")
    for row, onset in enumerate(night.start):
        present = "+".join(name for name, here in night.present.items() if here[row])
        known = stages[row] != UNKNOWN
        values = [f"{value:.4f}" if known else "" for value in night.probabilities["sleep"][row]]
        more = [] if arousal is None else [f"{arousal[row, 1]:.4f}" if known else ""]
        stage = STAGES[stages[row]] if known else "?"
        writer.writerow([f"{onset:g}", WINDOW_SECONDS, stage, *values, *more, present, _say_training(model)])
    return sink.getvalue().encode()


def write_edf(night: ReadNight, model: PretrainedModel) -> bytes:
    """The hypnogram as an EDF+ file of annotations alone, one per stretch of a stage; `Sleep stage ?` if unknown."""
    stages = night.predict("sleep")
    edges = np.flatnonzero((np.diff(stages) != 0) | (np.abs(np.diff(night.start) - WINDOW_SECONDS) > 0.5)) + 1
    bounds = [0, *edges.tolist(), len(stages)]
    notes = [
        EdfAnnotation(
            float(night.start[first]),
            float(night.start[last - 1] + WINDOW_SECONDS - night.start[first]),
            EDF_STAGES[STAGES[stages[first]]] if stages[first] != UNKNOWN else _UNKNOWN_TEXT,
        )
        for first, last in itertools.pairwise(bounds)
    ]
    # The header's field holds 80 characters.
    told = ("predicted", "trained_on_SIMULATED" if model.simulated else "trained_on_recorded")
    recording = EdfRecording(equipment_code=f"physioray_{__version__}", additional=told)
    return Edf([], annotations=notes, recording=recording).to_bytes()

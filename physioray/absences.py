"""Measures how far a model's scores fall when a modality is missing: its embeddings are computed without it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.metrics import balance_confusions, bound_draws, draw_subjects, weigh_confusions
from physioray.readouts import Readout
from physioray.signals import TASKS, UNKNOWN, find_task, present_column
from physioray.strategies import Encoder
from physioray.train import to_tensors

MISSING_FILE = "missing_modalities.json"
MOST_WINDOWS = 2000
"""Validation windows are thinned evenly to this number: every subset of the modalities costs an embedding of each."""

FEW_MODALITIES = 4
"""Up to this number every subset is measured: 15 of four. Above, only all but one and each alone."""

_BATCH = 64
_DRAWS = 500
_LEAST_PEOPLE = 3
"""For an interval: two people can only be drawn in three ways."""


def list_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All modalities, all but one, every pair if there are few, and each alone; no subset twice."""
    whole = tuple(modalities)
    sizes = range(len(whole), 0, -1) if len(whole) <= FEW_MODALITIES else (len(whole), len(whole) - 1, 1)
    return [subset for size in sizes for subset in itertools.combinations(whole, size)]


def measure_absences(
    encoder: Encoder,
    readouts: Mapping[str, Readout],
    cohort: Cohort,
    *,
    device: torch.device | str = "cpu",
    most_windows: int = MOST_WINDOWS,
    chosen: str = "the heads' penalty was chosen",
) -> dict[str, Any]:
    """Score a model on its validation subjects with some of the modalities taken away.

    A subset is scored on the windows that have any of it, and beside it stands the score with all modalities on the
    same windows, so that the change is paired. Intervals (95 %) are by bootstrap over subjects. Heads are not fitted
    again: it is what happens to somebody whose recording lacks a channel.

    Args:
        encoder: frozen.
        readouts: its heads by task.
        cohort: whose validation split is used.
        device: where to embed.
        most_windows: more windows than that are thinned evenly.
        chosen: what was decided on these subjects, as the sentence says it.

    Returns:
        JSON: `sentence` (whom it was measured on), `subjects`, `windows`, `simulated`, and `rows` with task, present
        and absent modalities, value, low, high, whole, change, change_low, change_high, windows, subjects.
    """
    names = tuple(encoder.tokens)
    windows = _choose_windows(cohort, readouts, names)
    facts: dict[str, Any] = {"modalities": list(names), "simulated": cohort.simulated, "split": "validation"}
    if not len(windows):
        sentence = "Not measured: the validation split has no labelled window with a head to score."
        return {**facts, "subjects": 0, "windows": 0, "sentence": sentence, "rows": []}
    kept = windows[np.unique(np.linspace(0, len(windows) - 1, min(len(windows), most_windows)).astype(int))]
    subsets = list_subsets(names)
    vectors, usable, labels, subject = _embed_subsets(encoder, cohort, kept, subsets, device)
    rows = [
        _score_subset(readouts[task], subset, names, vectors, usable, labels[task], subject)
        for task in TASKS
        if task in readouts
        for subset in subsets
    ]
    people = len(np.unique(subject))
    thinned = f", thinned evenly from {len(windows):,}" if len(kept) < len(windows) else ""
    sentence = (
        f"Measured on the {people} labelled validation subjects of {'SIMULATED ' if cohort.simulated else ''}cohort "
        f"{cohort.location.name} ({len(kept):,} windows{thinned}), whom neither pretraining nor the fit of the heads "
        f"has seen; {chosen} on them, which flatters all rows alike."
    )
    found = [row for row in rows if row is not None]
    return {**facts, "subjects": people, "windows": len(kept), "sentence": sentence, "rows": found}


def _choose_windows(cohort: Cohort, readouts: Mapping[str, Readout], names: Sequence[str]) -> Int64[np.ndarray, "n"]:
    windows = cohort.find_windows(splits=["validation"])
    if not len(windows) or not readouts:
        return windows[:0]
    known = np.stack([cohort.read_labels(task)[windows] != UNKNOWN for task in readouts]).any(0)
    here = np.stack([cohort.read_column(present_column(name)).astype(bool)[windows] for name in names]).any(0)
    return windows[known & here]


@torch.inference_mode()
def _embed_subsets(
    encoder: Encoder,
    cohort: Cohort,
    windows: Int64[np.ndarray, "n"],
    subsets: Sequence[tuple[str, ...]],
    device: torch.device | str,
) -> tuple[
    dict[tuple[str, ...], Float32[np.ndarray, "n features"]],
    dict[tuple[str, ...], Bool[np.ndarray, "n"]],
    dict[str, np.ndarray],
    Int64[np.ndarray, "n"],
]:
    """Embeddings under every subset (zeros where none of it is present), where it is usable, labels, subjects."""
    encoder = encoder.to(device).eval()
    names = tuple(encoder.tokens)
    vectors = {subset: np.zeros((len(windows), encoder.features), np.float32) for subset in subsets}
    usable = {subset: np.zeros(len(windows), np.bool_) for subset in subsets}
    source = GatherSource(cohort, windows, batch_size=_BATCH, modalities=names)
    batches, first = [], 0
    for batch in source.iterate_all():
        tensors = to_tensors(batch, source.modalities, device)
        place = np.arange(first, first + len(batch))
        first += len(batch)
        for subset in subsets:
            present = {
                name: here if name in subset else torch.zeros_like(here) for name, here in tensors.present.items()
            }
            rows = torch.stack(list(present.values())).any(0)
            usable[subset][place] = rows.numpy()
            if bool(rows.any()):
                signals = {name: signal[rows.to(signal.device)] for name, signal in tensors.signals.items()}
                found = encoder.embed(signals, {name: here[rows] for name, here in present.items()})
                vectors[subset][place[rows.numpy()]] = found.float().cpu().numpy()
        batches.append((batch.labels, batch.subject))
    labels = {task: np.concatenate([entry[0][task] for entry in batches]) for task in batches[0][0]}
    return vectors, usable, labels, np.concatenate([entry[1] for entry in batches])


def _score_subset(
    readout: Readout,
    subset: tuple[str, ...],
    names: Sequence[str],
    vectors: Mapping[tuple[str, ...], Float32[np.ndarray, "n features"]],
    usable: Mapping[tuple[str, ...], Bool[np.ndarray, "n"]],
    labels: np.ndarray,
    subject: Int64[np.ndarray, "n"],
) -> dict[str, Any] | None:
    """One row; None if the labelled windows that have any of the subset are of less than two classes."""
    rows = np.flatnonzero(usable[subset] & (labels != UNKNOWN))
    classes = len(np.unique(labels[rows]))
    if classes < 2:
        return None
    task, true = find_task(readout.task), labels[rows].astype(np.int64)
    people, owner = np.unique(subject[rows], return_inverse=True)
    once, draws = np.ones((1, len(people))), draw_subjects(len(people), _DRAWS, 0)

    def balance(vector: Float32[np.ndarray, "n features"], weights: np.ndarray) -> np.ndarray:
        predicted = readout.predict(vector[rows]).argmax(1)
        return balance_confusions(weigh_confusions(len(task.classes), true, predicted, owner, weights))

    mine, whole = vectors[subset], vectors[tuple(names)]
    value, reference = float(balance(mine, once)[0]), float(balance(whole, once)[0])
    drawn, other = balance(mine, draws), balance(whole, draws)
    enough = len(people) >= _LEAST_PEOPLE
    bounds, change = (bound_draws(drawn), bound_draws(drawn - other)) if enough else (None, None)
    return {
        "task": readout.task,
        "present": list(subset),
        "absent": [name for name in names if name not in subset],
        "value": value,
        "low": bounds[0] if bounds else None,
        "high": bounds[1] if bounds else None,
        "whole": reference,
        "change": value - reference,
        "change_low": change[0] if change else None,
        "change_high": change[1] if change else None,
        # Balanced accuracy is the mean over the classes that occur, so guessing is right more often where few do.
        "chance": task.chance if classes == len(task.classes) else 1 / classes,
        "windows": len(rows),
        "subjects": len(people),
    }

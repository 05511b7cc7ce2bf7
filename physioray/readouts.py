"""Keeps fitted heads beside their encoder, so that a model can classify recordings that nobody has scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.embeddings import Embeddings
from physioray.probe import LinearHead, ProbeError, choose_head, fit_path
from physioray.signals import TASKS, UNKNOWN, Split, Task, find_task
from physioray.storage import Location, StorageError, dump_json

HEADS_FILE = "heads.safetensors"
HEADS_NOTE = "heads.json"
_PARTS = ("mean", "scale", "weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A fitted head of one task, and whom it was fitted on.

    Attributes:
        head: the linear classifier with its standardisation.
        task: a name of `signals.TASKS`.
        training_subjects, training_windows: what it was fitted on.
        validation_subjects: whom the penalty was chosen on; 0 if nobody, the middle penalty then holds.
        note: what a reader must know of it.
    """

    head: LinearHead
    task: str
    training_subjects: int = 0
    training_windows: int = 0
    validation_subjects: int = 0
    note: str = ""

    def predict(self, vectors: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the classes `(n, classes)` for embeddings `(n, features)`."""
        return self.head.predict(vectors.astype(np.float64))


def choose_training_splits(cross_validated: bool) -> tuple[Split, ...]:
    """Whose labels a kept head may see: never validation's, and the test split's only if no test was held out."""
    return ("train", "test") if cross_validated else ("train",)


def fit_readouts(
    embeddings: Embeddings, cohort: Cohort, config: ProbeConfig, *, cross_validated: bool
) -> tuple[dict[str, Readout], dict[str, str]]:
    """Fit one head per task on all labelled training subjects, its penalty chosen on the validation subjects.

    The solver is that of the headline probe (see `probe.fit_path`). With held-out test subjects these heads are the
    ones that were scored; in cross-validation every fold had its own, and these see all folds' subjects.

    Args:
        embeddings: of the labelled windows.
        cohort: where they come from.
        config: tasks and penalties.
        cross_validated: whether scores were cross-validated, so that there is no held-out test split.

    Returns:
        Heads by task, and the reason by task where there is none.
    """
    splits = np.array([item.split for item in cohort.recordings])[embeddings.recording]
    training = np.isin(splits, choose_training_splits(cross_validated))
    readouts: dict[str, Readout] = {}
    missing: dict[str, str] = {}
    for name in config.tasks:
        if name not in embeddings.labels:
            missing[name] = "the embeddings carry no labels of it"
            continue
        known = embeddings.find_labels(name) != UNKNOWN
        train, validation = np.flatnonzero(known & training), np.flatnonzero(known & (splits == "validation"))
        try:
            readouts[name] = _fit(embeddings, find_task(name), train, validation, config)
        except ProbeError as error:
            missing[name] = str(error).rstrip(".")
    return readouts, missing


def _fit(
    embeddings: Embeddings,
    task: Task,
    train: Int64[np.ndarray, " train"],
    validation: Int64[np.ndarray, " validation"],
    config: ProbeConfig,
) -> Readout:
    vectors, labels = embeddings.vectors, embeddings.find_labels(task.name)
    heads = fit_path(
        vectors[train], labels[train], len(task.classes), config.penalties, class_weights=config.class_weights
    )
    note = ""
    if len(validation):
        head = choose_head(heads, vectors[validation], labels[validation])
    else:
        head = sorted(heads, key=lambda item: item.penalty or 0.0)[len(heads) // 2]
        note = f"No validation window has a label, so the middle penalty C = {head.penalty} holds."
    absent = [name for name, bias in zip(task.classes, head.bias, strict=True) if np.isneginf(bias)]
    if absent:
        note = f"{note} No training window is {', '.join(absent)}, which is never predicted.".strip()
    return Readout(
        head=head,
        task=task.name,
        training_subjects=len(np.unique(embeddings.subject[train])),
        training_windows=len(train),
        validation_subjects=len(np.unique(embeddings.subject[validation])),
        note=note,
    )


def pack_readouts(readouts: Mapping[str, Readout], facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Heads as the content of two files: numbers in safetensors, all else in JSON.

    Args:
        readouts: by task.
        facts: plain values to keep beside them, for example which weights they belong to.
    """
    tensors = {
        f"{name}.{part}": np.ascontiguousarray(getattr(item.head, part), np.float64)
        for name, item in readouts.items()
        for part in _PARTS
    }
    notes = {
        name: {
            "classes": list(find_task(name).classes),
            "penalty": item.head.penalty,
            "training_subjects": item.training_subjects,
            "training_windows": item.training_windows,
            "validation_subjects": item.validation_subjects,
            "note": item.note,
        }
        for name, item in readouts.items()
    }
    return {HEADS_FILE: save_tensors(tensors), HEADS_NOTE: dump_json({**facts, "heads": notes}).encode()}


def unpack_readouts(files: Mapping[str, bytes], where: object) -> tuple[dict[str, Readout], dict[str, Any]]:
    """What `pack_readouts` has packed: heads by task, and the facts beside them.

    Raises:
        StorageError: the files are damaged, or name other classes than this version knows.
    """
    try:
        facts = json.loads(files[HEADS_NOTE])
        tensors = load_tensors(files[HEADS_FILE])
        readouts, notes = {}, facts.pop("heads")
        for name in sorted(notes, key=list(TASKS).index):
            task, note = find_task(name), notes[name]
            if list(task.classes) != note.pop("classes"):
                raise ValueError(f"the classes of {name} must be {', '.join(task.classes)}")
            parts = {part: tensors[f"{name}.{part}"] for part in _PARTS}
            head = LinearHead(**parts, penalty=note.pop("penalty"))
            readouts[name] = Readout(head=head, task=name, **note)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StorageError(f"{where} must hold whole heads, but: {error}. Export the run again.") from error
    return readouts, facts


def save_readouts(folder: Location, readouts: Mapping[str, Readout], facts: Mapping[str, Any]) -> None:
    """Write heads into a folder; the JSON, which says that they are there, last."""
    files = pack_readouts(readouts, facts)
    for name in (HEADS_FILE, HEADS_NOTE):
        (folder / name).write_bytes(files[name])


def load_readouts(folder: Location) -> tuple[dict[str, Readout], dict[str, Any]]:
    """Read what `save_readouts` has written.

    Raises:
        StorageError: there are no heads, or they are damaged.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in (HEADS_FILE, HEADS_NOTE)}
    except FileNotFoundError as error:
        raise StorageError(f"{folder} must hold {HEADS_FILE} and {HEADS_NOTE}, but does not.") from error
    return unpack_readouts(files, folder)

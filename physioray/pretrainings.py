"""Finished pretrainings: found or run once as a step, or opened from a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from physioray.checkpoint import load_checkpoint
from physioray.config import TrainConfig, from_dict, hash_config, to_dict
from physioray.data.cohort import Cohort
from physioray.journal import Screen
from physioray.pretrain import PretrainJob, choose_checkpoint, pretrain
from physioray.signals import LookupMiss
from physioray.steps import Step, StepStore
from physioray.storage import Location, StorageError, hash_bytes, open_location
from physioray.strategies import ModelSettings, describe_settings, name_strategy, restore_settings

PRETRAIN_VERSION = 1
"""Raised when the same settings would give other weights."""

PRETRAINING_FILE = "pretraining.json"
"""In a folder that rests on a pretraining kept elsewhere: where that is."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished pretraining.

    Attributes:
        step: what it depends on.
        folder: its files; checkpoints in `checkpoints/`.
        checkpoint: the one it is judged by.
        name: of the strategy, as in result files.
        model: settings of the encoder.
        config_hash: of model, objective and training.
    """

    step: Step
    folder: Location
    checkpoint: Location
    name: str
    model: ModelSettings
    config_hash: str


def pretrain_once(
    store: StepStore,
    job: PretrainJob,
    *,
    run: Callable[[PretrainJob], object] = pretrain,
    screen: Screen | None = None,
) -> Pretraining:
    """A pretraining, run now or found; one that was interrupted goes on from its checkpoint.

    Args:
        store: where it is kept.
        job: what is pretrained; its `out` is replaced by the step's folder.
        run: trains, in this process or on a cluster.
        screen: where waiting is said.
    """
    step = describe_pretraining(job, Cohort.open(job.cohort).fingerprint)
    folder = store.run(step, lambda place: run(replace(job, out=place.uri)), resumable=True, screen=screen)
    return Pretraining(
        step=step,
        folder=folder,
        checkpoint=choose_checkpoint(folder / "checkpoints", job.train),
        name=job.name,
        model=job.model,
        config_hash=hash_config(job.model, job.objective, job.train),
    )


def open_pretraining(place: str | Location) -> tuple[Pretraining, dict[str, Any]]:
    """A pretraining that was run outside of a store: a run's folder, or one of its checkpoints.

    Returns:
        The pretraining, known by its weights, and the identity in the checkpoint: settings, cohort, splits.

    Raises:
        StorageError: no checkpoint of a pretraining stands there.
    """
    place = open_location(place) if isinstance(place, str) else place
    if (place / PRETRAINING_FILE).exists():
        place = open_location((place / PRETRAINING_FILE).read_json()["folder"])
    if (place / "checkpoints" / "last.pt").exists():
        known = load_checkpoint(place / "checkpoints" / "last.pt")["identity"]
        place = choose_checkpoint(place / "checkpoints", from_dict(TrainConfig, known["train"]))
    elif place.exists() and not place.info().is_file:
        raise StorageError(
            f"A run's folder must hold checkpoints/last.pt, but {place} does not. Name the folder that a pretraining "
            "was given as --out, or one of its checkpoints (.pt)."
        )
    content = load_checkpoint(place)
    identity = content["identity"]
    try:
        model, objective = (restore_settings(identity.get(part, {})) for part in ("model", "objective"))
    except LookupMiss as error:
        raise StorageError(f"{place} must be the checkpoint of a pretraining, but: {error}") from error
    step = Step(name="checkpoint", version=1, settings={"sha256": hash_bytes(place.read_bytes())})
    pretraining = Pretraining(
        step=step,
        folder=place.folder.folder,
        checkpoint=place,
        name=name_strategy(model, objective),  # type: ignore[arg-type]
        model=model,  # type: ignore[arg-type]
        config_hash=hash_config(model, objective, from_dict(TrainConfig, identity["train"])),
    )
    return pretraining, identity


def describe_pretraining(job: PretrainJob, fingerprint: str) -> Step:
    """The step of a pretraining on the cohort with a fingerprint."""
    settings = {
        "model": describe_settings(job.model),
        "objective": describe_settings(job.objective),
        "train": to_dict(job.train),
        "splits": list(job.splits),
        "keep_passes": list(job.keep_passes),
    }
    return Step(name="pretrain", version=PRETRAIN_VERSION, settings=settings, inputs={"cohort": fingerprint})

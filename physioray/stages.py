"""The stages of a study as steps: ingest, pretrain, embed, probe, train on a task. Each is computed once per store."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physioray.baselines import band_powers
from physioray.config import IngestConfig, ProbeConfig, to_dict
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.splits import Fold
from physioray.embeddings import Embeddings, embed_windows
from physioray.evaluate import Evaluation, evaluate_probe
from physioray.finetune import FinetuneJob, FinetuneResult, finetune
from physioray.journal import Screen
from physioray.pretrain import choose_checkpoint, load_encoder, make_encode
from physioray.pretrainings import Pretraining
from physioray.results import (
    PREDICTIONS_FILE,
    PROBES,
    RESULTS_FILE,
    SUBJECT_SCORES_FILE,
    read_predictions,
    read_results,
    read_subject_scores,
    write_predictions,
    write_results,
    write_subject_scores,
)
from physioray.steps import Step, StepStore
from physioray.storage import Location, hash_value, open_location
from physioray.strategies import ModelSettings, build_model, describe_settings

VERSIONS: Mapping[str, int] = {"ingest": 1, "embed": 1, "probe": 2, "finetune": 1, "score": 2}
"""Raised when the code of a stage would give another result for the same settings."""

EMBED_BATCH = 64
EMBEDDINGS_FILE = "embeddings.arrow"
OUTCOME_FILE = "outcome.npz"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Some windows described by vectors: the step, and its embeddings read when somebody needs them."""

    step: Step
    features: str
    pretraining: str
    config_hash: str
    read: Callable[[], Embeddings]


def ingest_once(
    store: StepStore,
    source: str,
    settings: IngestConfig,
    run: Callable[[str, str, IngestConfig], object],
    *,
    screen: Screen | None = None,
) -> Location:
    """The cohort of a source, ingested now or found; another file, size or time of change makes another step.

    Args:
        store: where it is kept.
        source: folder or URI of the recordings.
        settings: of ingest.
        run: called with source, folder and settings (`data.shards.ingest_cohort`, which needs a cluster).
        screen: where waiting is said.
    """
    place = open_location(source)
    files = [
        [item.path[len(place.path) + 1 :], info.size, info.mtime_ns]
        for item in place.list(recursive=True)
        if (info := item.info()).is_file
    ]
    step = Step(
        name="ingest",
        version=VERSIONS["ingest"],
        settings=to_dict(settings),
        inputs={"source": hash_value([place.uri, files])[:24]},
    )
    return store.run(step, lambda folder: run(source, folder.uri, settings), resumable=True, screen=screen)


def embed_pretrained(
    store: StepStore,
    cohort: Cohort,
    windows: NDArray[np.int64],
    pretraining: Pretraining,
    *,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> Description:
    """Embeddings of windows `(n,)` by a pretrained encoder."""

    def encode() -> Embeddings:
        return _embed(cohort, windows, load_encoder(pretraining.checkpoint, device), pretraining.model, device)

    settings = {"features": "pretrained", "checkpoint": pretraining.checkpoint.name}
    inputs = {"pretraining": pretraining.step.identity}
    found = _embed_once(store, cohort, windows, settings, inputs, encode, screen)
    return replace(found, pretraining=pretraining.name, config_hash=pretraining.config_hash)


def embed_untrained(
    store: StepStore,
    cohort: Cohort,
    windows: NDArray[np.int64],
    model: ModelSettings,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> Description:
    """Embeddings of windows `(n,)` by the encoder that a pretraining with this seed starts from: a floor."""
    settings = {"features": "untrained", "model": describe_settings(model), "seed": seed}
    return _embed_once(
        store,
        cohort,
        windows,
        settings,
        {},
        lambda: _embed(cohort, windows, build_model(model, seed).encoder.eval(), model, device),
        screen,
    )


def describe_bands(
    store: StepStore,
    cohort: Cohort,
    windows: NDArray[np.int64],
    modalities: Sequence[str],
    *,
    screen: Screen | None = None,
) -> Description:
    """Band powers of windows `(n,)`: the floor that a sleep researcher would try first."""

    def describe() -> Embeddings:
        source = GatherSource(cohort, windows, batch_size=EMBED_BATCH, modalities=tuple(modalities))
        return embed_windows(lambda batch: band_powers(batch, source.modalities), source.iterate_all())

    settings = {"features": "band_powers", "modalities": list(modalities)}
    return _embed_once(store, cohort, windows, settings, {}, describe, screen)


def _embed_once(
    store: StepStore,
    cohort: Cohort,
    windows: NDArray[np.int64],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    describe: Callable[[], Embeddings],
    screen: Screen | None,
) -> Description:
    step = Step(
        name="embed",
        version=VERSIONS["embed"],
        settings={**settings, "windows": hash_value(windows.tolist())[:24]},
        inputs={"cohort": cohort.fingerprint, **inputs},
    )

    def read() -> Embeddings:
        folder = store.run(step, lambda place: describe().save(place / EMBEDDINGS_FILE), screen=screen)
        return Embeddings.load(folder / EMBEDDINGS_FILE)

    return Description(step=step, features=str(settings["features"]), pretraining="none", config_hash="", read=read)


def probe_once(
    store: StepStore,
    description: Description,
    cohort: Cohort,
    config: ProbeConfig,
    *,
    folds: Mapping[int, Sequence[Fold]] | None = None,
    subsets: Mapping[int, Sequence[str]] | None = None,
    evaluations: Sequence[str] = PROBES,
    screen: Screen | None = None,
    **options: Any,
) -> Evaluation:
    """Probe scores of some embeddings, fitted now or found; arguments as for `evaluate.evaluate_probe`."""
    step = describe_probe(description, cohort, config, folds, subsets, evaluations, **options)

    def compute(folder: Location) -> None:
        found = evaluate_probe(
            description.read(),
            cohort,
            config,
            features=description.features,
            pretraining=description.pretraining,
            config_hash=description.config_hash,
            folds=folds,
            subsets=subsets,
            evaluations=evaluations,
            **options,
        )
        save_evaluation(folder, found)

    return load_evaluation(store.run(step, compute, screen=screen))


def describe_probe(
    description: Description,
    cohort: Cohort,
    config: ProbeConfig,
    folds: Mapping[int, Sequence[Fold]] | None,
    subsets: Mapping[int, Sequence[str]] | None,
    evaluations: Sequence[str],
    **options: Any,
) -> Step:
    """The step of some probes."""
    people = {
        "folds": None
        if folds is None
        else {str(seed): [to_dict(fold) for fold in parts] for seed, parts in folds.items()},
        "subsets": None if subsets is None else {str(size): list(names) for size, names in subsets.items()},
    }
    return Step(
        name="probe",
        version=VERSIONS["probe"],
        settings={
            "probe": to_dict(config),
            "evaluations": list(evaluations),
            "people": hash_value(people)[:24],
            "features": description.features,
            "pretraining": description.pretraining,
            **options,
        },
        inputs={"cohort": cohort.fingerprint, "embeddings": description.step.identity},
    )


def finetune_once(
    store: StepStore,
    job: FinetuneJob,
    pretraining: Pretraining | None = None,
    *,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> FinetuneResult:
    """A training on a task, run now or found; of its checkpoints only the chosen weights are kept.

    Args:
        store: where it is kept.
        job: what is trained; `out` (and `checkpoint`, if there is a pretraining) are filled in here.
        pretraining: where the trunk comes from; None if from scratch.
        device, screen: as for `finetune`.
    """
    if pretraining is not None:
        job = replace(job, checkpoint=pretraining.checkpoint.uri, model=None)
    step = describe_training(job, Cohort.open(job.cohort).fingerprint, pretraining)

    def compute(folder: Location) -> None:
        result = finetune(replace(job, out=folder.uri), device=device, screen=screen)
        _save_outcome(folder / OUTCOME_FILE, result)
        chosen = choose_checkpoint(folder / "checkpoints", job.train).name
        for place in (folder / "checkpoints").list():
            if place.name != chosen:
                place.delete()

    return _load_outcome(store.run(step, compute, resumable=True, screen=screen) / OUTCOME_FILE)


def describe_training(job: FinetuneJob, fingerprint: str, pretraining: Pretraining | None) -> Step:
    """The step of a training on a task."""
    settings = {
        "task": job.task,
        "train": to_dict(job.train),
        "frozen": job.frozen,
        "class_weights": job.class_weights,
        "people": None if job.fold is None else hash_value(to_dict(job.fold))[:24],
        "model": None if job.model is None else describe_settings(job.model),
    }
    inputs = {"cohort": fingerprint}
    if pretraining is not None:
        inputs |= {"pretraining": pretraining.step.identity}
        settings |= {"checkpoint": pretraining.checkpoint.name}
    return Step(name="finetune", version=VERSIONS["finetune"], settings=settings, inputs=inputs)


def save_evaluation(folder: Location, evaluation: Evaluation) -> None:
    """Write scores, predictions and notes into a folder."""
    write_results(folder / RESULTS_FILE, evaluation.scores)
    write_predictions(folder / PREDICTIONS_FILE, [evaluation.predictions])
    write_subject_scores(folder / SUBJECT_SCORES_FILE, [evaluation.subject_scores])
    (folder / "notes.json").write_json(evaluation.notes)


def load_evaluation(folder: Location) -> Evaluation:
    """Read what `save_evaluation` has written."""
    return Evaluation(
        scores=read_results(folder / RESULTS_FILE),
        predictions=read_predictions(folder / PREDICTIONS_FILE),
        subject_scores=read_subject_scores(folder / SUBJECT_SCORES_FILE),
        notes=(folder / "notes.json").read_json(),
    )


def _embed(
    cohort: Cohort, windows: NDArray[np.int64], encoder: Any, model: ModelSettings, device: torch.device | str
) -> Embeddings:
    source = GatherSource(cohort, windows, batch_size=EMBED_BATCH, modalities=tuple(model.modalities))
    return embed_windows(make_encode(encoder, source.modalities, device), source.iterate_all())


def _save_outcome(place: Location, result: FinetuneResult) -> None:
    facts = dataclasses.asdict(replace(result, window_id=np.empty(0, np.int64), probabilities=np.empty((0, 0))))
    plain = {name: facts[name] for name in ("history", "step_losses", "training_subjects", "pretraining")}
    (place.folder / "outcome.json").write_json(plain)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, window_id=result.window_id, probabilities=result.probabilities)
    place.write_bytes(buffer.getvalue())


def _load_outcome(place: Location) -> FinetuneResult:
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as arrays:
        return FinetuneResult(
            window_id=arrays["window_id"],
            probabilities=arrays["probabilities"],
            **(place.folder / "outcome.json").read_json(),
        )

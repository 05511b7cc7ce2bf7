"""Trains an encoder on a task with its labels: finetuned from a checkpoint, or from scratch; scored like a probe.

The loop is that of pretraining (`train`), with another objective and a classifier around the trunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from physioray.checkpoint import load_checkpoint
from physioray.config import ProbeConfig, TrainConfig, hash_config, to_dict
from physioray.data.batches import BatchSource
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.splits import Fold
from physioray.divisions import check_scored, plan_folds, plan_holdout
from physioray.journal import Journal, Screen
from physioray.models.heads import Classifier
from physioray.objectives.classification import WeightedCrossEntropy
from physioray.pretrain import (
    MakeSource,
    check_modalities,
    choose_checkpoint,
    find_pretraining_windows,
    load_encoder,
)
from physioray.probe import ProbeError, check_training, weigh_classes
from physioray.results import FINETUNE, FROZEN, SCRATCH, TEST, VALIDATION
from physioray.scoring import Answers, Evaluation, ScoreBoard
from physioray.signals import UNKNOWN, Task, find_task
from physioray.storage import StorageError, hash_value, open_location
from physioray.strategies import (
    Encoder,
    ModelSettings,
    build_model,
    describe_settings,
    name_strategy,
    restore_settings,
)
from physioray.train import WorkerGroup, to_tensors, train

PREDICT_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """One training on a task.

    Attributes:
        cohort: path or URI of the cohort.
        out: path or URI of the folder; checkpoints go to `checkpoints/` in it.
        task: a name of `signals.TASKS`.
        checkpoint: path or URI of a pretraining's checkpoint; None trains from scratch.
        model: settings of the untrained encoder, for training from scratch; else those of the checkpoint hold.
        train: settings of the loop; its seed draws head and order (and the trunk, from scratch).
        frozen: keep the trunk as it is and train the head alone.
        class_weights: rare classes count as much as frequent ones.
        fold: who trains, who chooses the weights, who is tested; the cohort's own splits if None.
        threads: CPU threads; PyTorch's own choice if None.
    """

    cohort: str
    out: str
    task: str
    checkpoint: str | None = None
    model: ModelSettings | None = None
    train: TrainConfig
    frozen: bool = False
    class_weights: bool = True
    fold: Fold | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.model is None):
            raise ValueError(
                "FinetuneJob must have either a checkpoint (finetuning) or a model (from scratch), "
                f"but got checkpoint={self.checkpoint!r} and model={self.model!r}."
            )
        if self.frozen and self.checkpoint is None:
            raise ValueError("FinetuneJob.frozen must come with a checkpoint, but there is none to freeze.")
        find_task(self.task)

    @property
    def evaluation(self) -> str:
        """A name of `results.EVALUATIONS`."""
        if self.checkpoint is None:
            return SCRATCH
        return FROZEN if self.frozen else FINETUNE


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a training on a task leaves.

    Attributes:
        window_id: `(n,)` windows of the test subjects with a known label.
        probabilities: `(n, classes)` of their classes.
        history: one record per pass, see `train`.
        step_losses: of the passes that this call has run.
        training_subjects: people with a labelled training window.
        pretraining: name of the strategy.
    """

    window_id: Int64[np.ndarray, "n"]
    probabilities: Float[np.ndarray, "n classes"]
    history: list[dict[str, Any]]
    step_losses: list[float]
    training_subjects: int
    pretraining: str


def finetune(
    job: FinetuneJob,
    *,
    make_source: MakeSource = GatherSource,
    group: WorkerGroup | None = None,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
) -> FinetuneResult:
    """Train on a task in this process, or take it up where it stopped, and classify the test subjects' windows.

    The weights of the lowest validation loss are used, or the last (`train.select`).

    Raises:
        ProbeError: the training subjects have no labelled window, or all are of one class.
        StorageError: there is no such checkpoint, or it needs modalities that the cohort lacks.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    group = group or WorkerGroup()
    cohort, out, task = _open_cohort(job), open_location(job.out), find_task(job.task)
    encoder, pretrained = _open_trunk(job)
    names = tuple(encoder.tokens)
    check_modalities(names, cohort, job.checkpoint or "the model to be trained from scratch")
    windows = _divide_windows(cohort, job, names)
    labels = cohort.read_labels(task.name)[windows["train"]]
    check_training(labels, len(task.classes))
    weights = weigh_classes(labels, len(task.classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.train.seed)
        model = Classifier(encoder, len(task.classes), frozen=job.frozen)
    shared = {
        "batch_size": job.train.batch_size,
        "seed": job.train.seed,
        "modalities": names,
        "rank": group.rank,
        "world_size": group.world_size,
    }
    result = train(
        model=model,
        objective=WeightedCrossEntropy(task.name, (weights if job.class_weights else (weights > 0)).tolist()),
        source=make_source(cohort, windows["train"], **shared),
        validation=_make_validation(cohort, windows["validation"], make_source, shared),
        config=job.train,
        folder=out / "checkpoints",
        identity=_identify(job, windows, pretrained),
        reporter=Journal(out, job.train.passes, None, screen),
        group=group,
        device=device,
    )
    group.add_up(torch.zeros(1, device=device))  # the first worker's last checkpoint stands before anyone reads it
    best = load_checkpoint(choose_checkpoint(out / "checkpoints", job.train), device)
    model.load_state_dict(best["model"])
    return FinetuneResult(
        window_id=windows["test"],
        probabilities=classify_windows(model, cohort, windows["test"], device),
        history=result.history,
        step_losses=result.step_losses,
        training_subjects=len(_list_owners(cohort, windows["train"])),
        pretraining=pretrained["strategy"],
    )


def _make_validation(
    cohort: Cohort, window_ids: NDArray[np.int64], make_source: MakeSource, shared: dict[str, Any]
) -> BatchSource | None:
    """The validation subjects' batches; None with fewer windows than workers."""
    return make_source(cohort, window_ids, **shared) if len(window_ids) >= shared["world_size"] else None


@torch.inference_mode()
def classify_windows(
    model: Classifier, cohort: Cohort, window_ids: NDArray[np.int64], device: torch.device | str = "cpu"
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of the classes `(n, classes)` of some windows, the model in evaluation mode."""
    model.to(device).eval()
    parts = [np.empty((0, model.head.out_features), np.float64)]
    if len(window_ids):
        source = GatherSource(cohort, window_ids, batch_size=PREDICT_BATCH, modalities=tuple(model.tokens))
        for batch in source.iterate_all():
            windows = to_tensors(batch, source.modalities, device)
            parts.append(model(windows.signals, windows.present).double().softmax(1).cpu().numpy())
    return np.concatenate(parts)


def evaluate_finetuning(
    job: FinetuneJob,
    config: ProbeConfig,
    *,
    folds: Mapping[int, Sequence[Fold]] | None = None,
    subsets: Mapping[int, Sequence[str]] | None = None,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
    train_one: Callable[[FinetuneJob], FinetuneResult] | None = None,
    scored: str = TEST,
) -> Evaluation:
    """Train on every task, seed and fold, and score the test subjects; what is finished is not trained again.

    Plans, scopes, tables and notes are those of `evaluate_probe`: the rows of both stand in one table. Of the
    training subjects of a plan those train, the plan's validation subjects choose the weights.

    Args:
        job: what to train; task, fold, seed and folder are filled in here.
        config: tasks, seeds and bootstrap draws.
        folds, subsets, scored: as for `evaluate_probe`.
        device, screen: as for `finetune`.
        train_one: runs one training, or finds it done; `finetune` if None.

    Raises:
        StorageError: there is no such checkpoint, or it needs modalities that the cohort lacks.
        LockedSplitError: a fold holds a test subject while settings are chosen.
    """
    run = train_one or partial(finetune, device=device, screen=screen)
    check_scored(cohort := Cohort.open(job.cohort, test_locked=scored == VALIDATION), scored)
    pretraining, features = _name_trunk(job)
    config_hash = hash_config(replace(job.train, seed=0))
    board = ScoreBoard(cohort, config, features=features, pretraining=pretraining, config_hash=config_hash)
    if folds is not None:
        plans = plan_folds(folds, cohort=cohort, scored=scored)
    else:
        plans = plan_holdout(cohort, subsets, config.seeds, board.note, scored=scored)
    # What is trained while settings are chosen stands apart: its training subjects are others.
    out = f"{job.out}/selection" if scored == VALIDATION else job.out
    for name in config.tasks:
        task = find_task(name)
        for plan in plans:
            found, reasons = [], []
            for number, fold in enumerate(plan.folds):
                place = f"{out}/{name}/subjects-{len(fold.train)}-seed-{plan.seed}-fold-{number}"
                settings = replace(job.train, seed=plan.seed)
                one = replace(job, task=name, fold=fold, train=settings, out=place)
                try:
                    found.append(run(one))
                except ProbeError as error:
                    reasons.append(f"{task.title}, seed {plan.seed}, fold {number + 1}: left out. {error}")
                    board.note(reasons[-1])
            if sum(len(item.window_id) for item in found):
                board.add(task, job.evaluation, plan, _join(cohort, task, found))
            else:
                why = reasons[0].rstrip(".") if reasons else "no window of those to be tested has a label"
                board.note(f"{task.title}, seed {plan.seed}: no window could be trained on and tested.")
                board.skip(task, job.evaluation, plan, why)
    return board.finish()


def _join(cohort: Cohort, task: Task, found: Sequence[FinetuneResult]) -> Answers:
    """The answers of one plan: the folds' test windows together."""
    ids = np.concatenate([item.window_id for item in found])
    subject = np.array([item.subject_index for item in cohort.recordings], np.int64)
    return Answers(
        window_id=ids,
        true=cohort.read_labels(task.name)[ids],
        probabilities=np.concatenate([item.probabilities for item in found]),
        subject=subject[cohort.locate(ids)[0]],
        training_subjects=round(float(np.mean([item.training_subjects for item in found]))),
    )


def _name_trunk(job: FinetuneJob) -> tuple[str, str]:
    """Names of the strategy and of the features in result files."""
    if job.checkpoint is None:
        assert job.model is not None
        return name_strategy(job.model, None), "untrained"
    return _open_trunk(job)[1]["strategy"], "pretrained"


def _open_cohort(job: FinetuneJob) -> Cohort:
    """The job's cohort, its test split locked if the fold needs nobody of it."""
    cohort = Cohort.open(job.cohort)
    people = set() if job.fold is None else {*job.fold.train, *job.fold.validation, *job.fold.test}
    needed = job.fold is None or people & set(cohort.list_subjects("test"))
    return cohort if needed else cohort.lock_test()


def _open_trunk(job: FinetuneJob) -> tuple[Encoder, dict[str, Any]]:
    """The encoder to start from, and what it is: part of the identity of the run."""
    if job.checkpoint is None:
        assert job.model is not None
        encoder = build_model(job.model, job.train.seed).encoder
        return encoder.train(), {"strategy": name_strategy(job.model, None), "model": describe_settings(job.model)}
    place = open_location(job.checkpoint)
    encoder = load_encoder(place)
    content = load_checkpoint(place)
    settings = [restore_settings(content["identity"][part]) for part in ("model", "objective")]
    known = {"strategy": name_strategy(settings[0], settings[1]), "model": content["identity"]["model"]}  # type: ignore[arg-type]
    return encoder, known | {"checkpoint": hashlib.sha256(place.read_bytes()).hexdigest()[:16]}


def _identify(
    job: FinetuneJob, windows: Mapping[str, NDArray[np.int64]], pretrained: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = {part: hash_value(windows[part].tolist()) for part in ("train", "validation")}
    return {
        "task": job.task,
        "evaluation": job.evaluation,
        "class_weights": job.class_weights,
        "trunk": dict(pretrained),
        "windows": chosen,
    }


def _divide_windows(cohort: Cohort, job: FinetuneJob, modalities: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Windows of training, validation and test subjects: those with a known label and one of the modalities."""
    labels = cohort.read_labels(job.task)
    usable = find_pretraining_windows(cohort, cohort.readable_splits, modalities)
    usable = usable[labels[usable] != UNKNOWN]
    if job.fold is None:
        theirs = {part: cohort.find_windows(splits=[part]) for part in ("train", "validation", "test")}
    else:
        fold = job.fold
        theirs = {part: cohort.find_windows(subjects=getattr(fold, part)) for part in ("train", "validation", "test")}
        shared = (set(fold.train) & set(fold.validation)) | (set(fold.test) & {*fold.train, *fold.validation})
        if shared:
            raise StorageError(f"A subject must stand in one part of a fold, but {sorted(shared)[:5]} stand in two.")
    return {part: np.intersect1d(ids, usable) for part, ids in theirs.items()}


def _list_owners(cohort: Cohort, window_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Subject numbers that some windows belong to."""
    subject = np.array([item.subject_index for item in cohort.recordings], np.int64)
    return np.unique(subject[cohort.locate(window_ids)[0]])


def describe_finetuning(job: FinetuneJob) -> dict[str, Any]:
    """The job as plain JSON values."""
    model = None if job.model is None else describe_settings(job.model)
    return to_dict(job) | {"model": model, "evaluation": job.evaluation}

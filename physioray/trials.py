"""What one trial of a sweep does: pretrain, or find it done, and score on validation subjects, test locked away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from physioray.config import ProbeConfig, TrainConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.splits import Fold
from physioray.embeddings import embed_windows
from physioray.evaluate import Evaluation, evaluate_probe
from physioray.finetune import FinetuneJob, evaluate_finetuning
from physioray.journal import AfterPass
from physioray.metrics import AGGREGATE, METRICS
from physioray.pretrain import PretrainJob, find_pretraining_windows, load_encoder, make_encode, pretrain
from physioray.pretrainings import PRETRAINING_FILE, Pretraining, pretrain_once
from physioray.results import CONVERGED, VALIDATION, ScoreRow
from physioray.selection import SELECTION_SPLITS, fold_selection
from physioray.stages import EMBED_BATCH, embed_pretrained, finetune_once, probe_once
from physioray.steps import Step, StepStore
from physioray.storage import Location, open_location
from physioray.strategies import ModelSettings, ObjectiveSettings

StepsByIdentity = dict[str, Step]
"""Steps by identity."""


@runtime_checkable
class ReportingTrial(Protocol):
    """A trial as a sweep hands it out."""

    settings: Mapping[str, Any]
    folder: Location

    def report(self, *, epoch: float, **metrics: float) -> None:
        """Tell the scores after so many passes; raises if the trial is to stop."""
        ...


@runtime_checkable
class Workplace(Protocol):
    """Where a trial does its work: in this process, or on workers of a cluster."""

    @property
    def device(self) -> str:
        """What is computed on: `cpu` or `cuda`."""
        ...

    def pretrain(self, job: PretrainJob, after_pass: AfterPass | None) -> object:
        """Run a pretraining, and tell after every pass."""
        ...

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function, called where the device is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """This process."""

    device: str = "cpu"

    def pretrain(self, job: PretrainJob, after_pass: AfterPass | None) -> object:
        """Pretrain in this process."""
        return pretrain(job, device=self.device, after_pass=after_pass)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function in this process."""
        return function()


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What the trials of a sweep have in common. Plain values only: it travels to other processes.

    Attributes:
        cohort, store: paths or URIs.
        evaluation: `probe` (the converged linear probe) or `finetune` (the whole network trained on each task).
        rungs: after which passes of pretraining a probe is fitted and reported; the end is reported in any case.
        threads: CPU threads of a worker.
        place: where the work is done.
        commit: what code computes.
    """

    cohort: str
    store: str
    evaluation: Literal["probe", "finetune"] = "probe"
    rungs: tuple[int, ...] = ()
    threads: int | None = 1
    place: Workplace = Here()
    commit: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The settings that a sweep may vary, by name, see `make_base`.

    Attributes:
        model, objective, train: of the pretraining.
        probe: tasks, seeds, folds of the score.
        finetune: how the network is trained on a task.
        training_subjects: people whose labels are used; all if None.
    """

    model: ModelSettings
    objective: ObjectiveSettings
    train: TrainConfig
    probe: ProbeConfig
    finetune: TrainConfig
    training_subjects: int | None = None


def make_base(settings: TrialSettings) -> dict[str, Any]:
    """Settings as the named configs that a sweep's dotted fields reach into: `objective.mask.ratio`."""
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def run_trial(trial: ReportingTrial, plan: TrialPlan) -> None:
    """Pretrain as the trial's settings say; report the score on validation subjects after every rung and at the end.

    Reported are balanced accuracy by task with its interval (`sleep`, `sleep_low`, `sleep_high`) and their `aggregate`.
    The pretraining is a step: trials that differ in anything else share it, and an interrupted one goes on.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    settings = TrialSettings(**trial.settings)
    # Who cannot be scored is not pretrained either.
    _Scorer.open(plan, settings)
    job = PretrainJob(
        cohort=plan.cohort,
        out="",
        model=settings.model,
        objective=settings.objective,
        train=settings.train,
        splits=SELECTION_SPLITS,
        threads=plan.threads,
    )
    store = StepStore(open_location(plan.store), commit=plan.commit, device=plan.place.device)
    watch = _Watch(trial=trial, plan=plan, settings=settings) if plan.evaluation == "probe" and plan.rungs else None
    pretraining = pretrain_once(store, job, run=partial(_pretrain, plan.place, watch))
    (trial.folder / PRETRAINING_FILE).write_json({"folder": pretraining.folder.uri})
    scores, used = plan.place.call(partial(_score, plan, settings, pretraining))
    trial.report(epoch=settings.train.passes, **scores)
    store.refer(trial.folder, {**store.used, **used}.values())


def _pretrain(place: Workplace, watch: AfterPass | None, job: PretrainJob) -> object:
    return place.pretrain(job, watch)


def _score(
    plan: TrialPlan, settings: TrialSettings, pretraining: Pretraining
) -> tuple[dict[str, float], StepsByIdentity]:
    """Scores of validation subjects after the whole pretraining, and the steps that they rest on."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    store = StepStore(open_location(plan.store), commit=plan.commit, device=plan.place.device)
    scorer = _Scorer.open(plan, settings)
    score = scorer.probe_step if plan.evaluation == "probe" else scorer.finetune
    return summarise(score(store, pretraining)), store.used


@dataclass(frozen=True, kw_only=True)
class _Watch:
    """Probes the encoder at the rungs while it is pretrained; travels to whichever process trains."""

    trial: ReportingTrial
    plan: TrialPlan
    settings: TrialSettings

    def __call__(self, passes: int, folder: Location) -> None:
        if passes in self.plan.rungs and passes < self.settings.train.passes:
            scorer = _Scorer.open(self.plan, self.settings)
            found = scorer.probe_checkpoint(folder / "checkpoints" / "last.pt")
            self.trial.report(epoch=passes, **summarise(found))


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """Scores on validation subjects."""

    plan: TrialPlan
    settings: TrialSettings
    cohort: Cohort
    folds: Mapping[int, Sequence[Fold]]
    split: str
    windows: NDArray[np.int64]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, plan: TrialPlan, settings: TrialSettings) -> _Scorer:
        cohort = Cohort.open(plan.cohort).lock_test()
        folds, split = fold_selection(cohort, settings.probe, settings.training_subjects)
        people = {
            name for parts in folds.values() for fold in parts for name in (*fold.train, *fold.validation, *fold.test)
        }
        usable = find_pretraining_windows(cohort, cohort.readable_splits, tuple(settings.model.modalities))
        windows = np.intersect1d(cohort.find_windows(subjects=people), usable)
        return cls(plan=plan, settings=settings, cohort=cohort, folds=folds, split=split, windows=windows)

    def probe_checkpoint(self, checkpoint: Location) -> Evaluation:
        encoder = load_encoder(checkpoint, self.plan.place.device)
        source = GatherSource(
            self.cohort, self.windows, batch_size=EMBED_BATCH, modalities=tuple(self.settings.model.modalities)
        )
        embeddings = embed_windows(
            make_encode(encoder, source.modalities, self.plan.place.device), source.iterate_all()
        )
        return evaluate_probe(
            embeddings,
            self.cohort,
            self.settings.probe,
            features="pretrained",
            folds=self.folds,
            evaluations=(CONVERGED,),
            scored=VALIDATION,
        )

    def probe_step(self, store: StepStore, pretraining: Pretraining) -> Evaluation:
        described = embed_pretrained(store, self.cohort, self.windows, pretraining, device=self.plan.place.device)
        return probe_once(
            store,
            described,
            self.cohort,
            self.settings.probe,
            folds=self.folds,
            evaluations=(CONVERGED,),
            scored=VALIDATION,
        )

    def finetune(self, store: StepStore, pretraining: Pretraining) -> Evaluation:
        tasks = tuple(task for task in self.settings.probe.tasks if self.cohort.has_task(task))
        job = FinetuneJob(
            cohort=self.plan.cohort,
            out="",
            task=tasks[0],
            checkpoint=pretraining.checkpoint.uri,
            train=self.settings.finetune,
            threads=self.plan.threads,
        )
        return evaluate_finetuning(
            job,
            replace(self.settings.probe, tasks=tasks),
            folds=self.folds,
            scored=VALIDATION,
            train_one=lambda one: finetune_once(store, one, pretraining, device=self.plan.place.device),
        )


def summarise(evaluation: Evaluation) -> dict[str, float]:
    """Balanced accuracy by task, mean over seeds, with its interval by subject, and the aggregate over tasks."""
    found: dict[str, float] = {}
    groups: dict[str, list[ScoreRow]] = {}
    for row in evaluation.scores:
        if row.metric in (METRICS[0], AGGREGATE) and row.value is not None:
            groups.setdefault(row.task, []).append(row)
    for task, rows in groups.items():
        found[task] = float(np.mean([row.value for row in rows]))
        for name in ("low", "high"):
            bounds = [getattr(row, name) for row in rows if getattr(row, name) is not None]
            if bounds:
                found[f"{task}_{name}"] = float(np.mean(bounds))
    if not found:
        raise ValueError(f"A trial must have a score on validation subjects, but: {' '.join(evaluation.notes)}")
    return found

"""The grid of trainings behind the paper's tables: what must be computed, each piece as a step, and the scores.

Tables 1 to 7 of Fang et al. 2024 need pretrained encoders, probes on them at several training-set sizes, and
trainings on the tasks, from a pretrained trunk and from scratch. A grid lists these as pieces of work that know
nothing of each other but their steps, so that they run one after the other, many at once, or another day.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from physioray.config import TrainConfig, to_dict
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold
from physioray.evaluate import Evaluation
from physioray.finetune import FinetuneJob, FinetuneResult, evaluate_finetuning
from physioray.grid_plan import FLOORS, GridConfig, GridPlan, plan_grid
from physioray.journal import Screen
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, choose_checkpoint, fit_modalities, pretrain
from physioray.pretrainings import Pretraining, describe_pretraining, pretrain_once
from physioray.protocol import find_labelled_windows
from physioray.results import PROBES
from physioray.stages import (
    VERSIONS,
    Description,
    describe_bands,
    describe_probe,
    describe_training,
    embed_pretrained,
    embed_untrained,
    finetune_once,
    load_evaluation,
    probe_once,
    save_evaluation,
)
from physioray.steps import Step, StepDamaged, StepStore
from physioray.storage import Location, open_location
from physioray.strategies import ModelSettings, find_strategy
from physioray.work import Work


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid on a cohort, with its steps in a store. Plain values only, so that it travels to any process.

    Attributes:
        cohort, store: paths or URIs.
        config: what is computed.
        device: where trainings run.
        threads: CPU threads of a piece of work; PyTorch's own choice if None.
        commit: what code computes.
    """

    cohort: str
    store: str
    config: GridConfig
    device: str = "cpu"
    threads: int | None = 1
    commit: str = ""

    def open_store(self) -> StepStore:
        """The store of the grid's steps."""
        return StepStore(open_location(self.store), commit=self.commit, device=self.device)

    def list_work(self) -> list[Work]:
        """Every piece of work: pretrainings first, then what rests on them; seeds outermost, so that a grid that is
        stopped half-way has whole repetitions."""
        plan = self.plan
        work = [
            Work(kind="pretrain", strategy=name, passes=self._find_train(name).passes, windows=plan.pretraining_windows)
            for name in plan.pretrained
        ]
        work += [
            Work(kind="probe", strategy=name, size=size) for name in (*plan.pretrained, *FLOORS) for size in plan.sizes
        ]
        tasks = [task for task in (self.config.finetune_tasks or self.config.probe.tasks) if plan.cohort.has_task(task)]
        sizes = plan.sizes if self.config.whole else plan.sizes[-1:]
        passes = self._finetuning().passes
        for seed in range(self.config.finetune_seeds):
            for size in reversed(sizes):
                folds = plan.fold(size, seed)
                for name in (*plan.finetuned, *plan.scratch):
                    for task in tasks:
                        work += [
                            Work(
                                kind="train",
                                strategy=name,
                                task=task,
                                seed=seed,
                                fold=number,
                                size=size,
                                passes=passes,
                                windows=len(plan.cohort.find_windows(subjects=fold.train)),
                            )
                            for number, fold in enumerate(folds)
                        ]
        return work

    def do(self, work: Work, screen: Screen | None = None) -> None:
        """Compute a piece of work, or find it done."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        store = self.open_store()
        if work.kind == "pretrain":
            self.pretrain(store, work.strategy, screen)
        elif work.kind == "probe":
            self.probe(store, work.strategy, work.size, screen)
        else:
            self._train(store, work, screen)

    def list_missing(self) -> list[Work]:
        """The work that is not done yet; a damaged step counts as missing, and will say so when it is asked for."""
        store = self.open_store()
        missing: list[Work] = []
        for work in self.list_work():
            if any(other.kind == "pretrain" and other.strategy == work.strategy for other in missing):
                missing.append(work)
                continue
            try:
                done = self.is_done(work, store)
            except StepDamaged:
                done = False
            if not done:
                missing.append(work)
        return missing

    def is_done(self, work: Work, store: StepStore) -> bool:
        """True if a piece of work stands in the store; what it rests on must stand there."""
        if work.kind == "pretrain":
            return self.is_pretrained(work.strategy, store)
        if work.kind == "probe":
            described = self.describe_windows(store, work.strategy)
            step = describe_probe(
                described, self.plan.cohort, self.config.probe, *self._find_people(work.size), evaluations=PROBES
            )
            return store.find(step) is not None
        job, pretraining = self._make_training(store, work)
        return store.find(describe_training(job, self.plan.cohort.fingerprint, pretraining)) is not None

    @functools.cached_property
    def plan(self) -> GridPlan:
        """Who is trained on and tested, on this cohort."""
        return plan_grid(Cohort.open(self.cohort), self.config)

    def make_job(self, name: str) -> PretrainJob:
        """The pretraining of a strategy."""
        plan, preset = self.plan, find_preset(self.config.sizes)
        job = PretrainJob.from_strategy(find_strategy(name), preset, cohort=self.cohort, out="")
        return replace(job, train=self._find_train(name), splits=plan.protocol.splits, threads=self.threads)

    def pretrain(self, store: StepStore, name: str, screen: Screen | None = None) -> Pretraining:
        """A strategy's pretraining, run now or found."""
        run = functools.partial(pretrain, device=self.device, screen=screen)
        return pretrain_once(store, self.make_job(name), run=run, screen=screen)

    def describe_windows(self, store: StepStore, name: str, screen: Screen | None = None) -> Description:
        """Vectors of all labelled windows by a pretrained strategy or a floor."""
        plan = self.plan
        if name == "band_powers":
            return describe_bands(store, plan.cohort, plan.windows, tuple(plan.cohort.modalities), screen=screen)
        if name == "untrained":
            model = fit_modalities(find_preset(self.config.sizes).model, plan.cohort)
            seed = find_preset(self.config.sizes).train.seed
            return embed_untrained(store, plan.cohort, plan.windows, model, seed, device=self.device, screen=screen)
        pretraining = self.pretrain(store, name, screen)
        windows = find_labelled_windows(plan.cohort, plan.protocol, pretraining.model.modalities)
        return embed_pretrained(store, plan.cohort, windows, pretraining, device=self.device, screen=screen)

    def probe(self, store: StepStore, name: str, size: int, screen: Screen | None = None) -> Evaluation:
        """Probe scores of a strategy or floor at a training-set size, fitted now or found."""
        plan = self.plan
        folds, subsets = self._find_people(size)
        return probe_once(
            store,
            self.describe_windows(store, name, screen),
            plan.cohort,
            self.config.probe,
            folds=folds,
            subsets=subsets,
            evaluations=PROBES,
            screen=screen,
        )

    def _find_people(self, size: int) -> tuple[dict[int, list[Fold]] | None, dict[int, tuple[str, ...]] | None]:
        """Folds, or training subjects of a held-out evaluation."""
        plan = self.plan
        return plan.folds_of(size), None if plan.protocol.folds is not None else {size: plan.subsets[size]}

    def _train(self, store: StepStore, work: Work, screen: Screen | None) -> FinetuneResult:
        job, pretraining = self._make_training(store, work)
        return finetune_once(store, job, pretraining, device=self.device, screen=screen)

    def _make_training(self, store: StepStore, work: Work) -> tuple[FinetuneJob, Pretraining | None]:
        fold = self.plan.fold(work.size, work.seed)[work.fold]
        job = self.make_training(work.strategy, task=work.task, seed=work.seed, fold=fold)
        strategy = find_strategy(work.strategy)
        return job, None if strategy.objective is None else self.pretrain(store, work.strategy)

    def fit_model(self, name: str) -> ModelSettings:
        """The model of a strategy in the grid's size, for the modalities of the cohort."""
        return find_strategy(name).fit_model(fit_modalities(find_preset(self.config.sizes).model, self.plan.cohort))

    def make_training(self, name: str, *, task: str, seed: int = 0, fold: Fold | None = None) -> FinetuneJob:
        """A training on a task, from a strategy's trunk (the checkpoint is filled in by `finetune_once`)."""
        strategy, model = find_strategy(name), self.fit_model(name)
        return FinetuneJob(
            cohort=self.cohort,
            out="",
            task=task,
            model=model if strategy.objective is None else None,
            checkpoint=None if strategy.objective is None else "pretrained",
            train=replace(self._finetuning(), seed=seed),
            fold=fold,
            threads=self.threads,
        )

    def is_pretrained(self, name: str, store: StepStore) -> bool:
        """True if a strategy's pretraining stands in the store."""
        return store.find(describe_pretraining(self.make_job(name), self.plan.cohort.fingerprint)) is not None

    def find_checkpoint(self, store: StepStore, name: str, task: str = "sleep") -> tuple[Step, Location] | None:
        """The weights of a strategy: its pretraining's, or from scratch those trained on a task (first seed and fold).

        Returns:
            What they depend on, and the checkpoint; None if they are not there yet.
        """
        if find_strategy(name).objective is not None:
            found = self.pretrain(store, name) if self.is_pretrained(name, store) else None
            return None if found is None else (found.step, found.checkpoint)
        work = Work(kind="train", strategy=name, task=task, size=self.plan.sizes[-1])
        job, _ = self._make_training(store, work)
        step = describe_training(job, self.plan.cohort.fingerprint, None)
        folder = store.find(step)
        return None if folder is None else (step, choose_checkpoint(folder / "checkpoints", job.train))

    def score_training(self, store: StepStore, name: str, *, task: str, seed: int, size: int) -> Evaluation:
        """Scores of one strategy's trainings on a task under one seed, all folds together."""
        plan, inputs = self.plan, {"cohort": self.plan.cohort.fingerprint}
        trained: dict[Fold | None, FinetuneResult] = {}
        for number, fold in enumerate(plan.fold(size, seed)):
            work = Work(kind="train", strategy=name, task=task, seed=seed, fold=number, size=size)
            job, pretraining = self._make_training(store, work)
            inputs[f"fold {number}"] = describe_training(job, plan.cohort.fingerprint, pretraining).identity
            trained[fold] = finetune_once(store, job, pretraining, device=self.device)
        config = replace(self.config.probe, tasks=(task,), seeds=(seed,))
        folds = None if plan.protocol.folds is None else {seed: plan.fold(size, seed)}
        step = Step(name="score", version=VERSIONS["score"], settings={"probe": to_dict(config)}, inputs=inputs)

        def compute(folder: Location) -> None:
            job = self.make_training(name, task=task, seed=seed)
            if find_strategy(name).objective is not None:
                job = replace(job, checkpoint=self.pretrain(store, name).checkpoint.uri)
            found = evaluate_finetuning(
                job,
                config,
                folds=folds,
                subsets=None if folds is not None else {size: plan.subsets[size]},
                train_one=lambda job: trained[job.fold],
            )
            save_evaluation(folder, found)

        return load_evaluation(store.run(step, compute))

    def _find_train(self, name: str) -> TrainConfig:
        train = find_strategy(name).fit_train(find_preset(self.config.sizes).train)
        return train if self.config.passes is None else shorten(train, self.config.passes)

    def _finetuning(self) -> TrainConfig:
        train = find_preset(self.config.sizes).finetune
        return train if self.config.finetune_passes is None else shorten(train, self.config.finetune_passes)


def shorten(train: TrainConfig, passes: int) -> TrainConfig:
    """The same training over fewer passes, with no longer a warm-up than half of them."""
    return replace(train, passes=passes, warmup_passes=min(train.warmup_passes, passes / 2))

"""The grid of trainings behind the paper's tables: what must be computed, each piece as a step, and the scores.

Tables 1 to 7 of Fang et al. 2024 need pretrained encoders, probes on them at several training-set sizes, and
trainings on the tasks, from a pretrained trunk and from scratch. A grid lists these as pieces of work that know
nothing of each other but their steps, so that they run one after the other, many at once, or another day.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch

from physioray.config import TrainConfig, to_dict
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold
from physioray.evaluate import Evaluation, aggregate_rows
from physioray.finetune import FinetuneJob, FinetuneResult, evaluate_finetuning
from physioray.grid_plan import FLOORS, GridConfig, GridPlan, plan_grid
from physioray.journal import Screen
from physioray.metrics import AGGREGATE
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, fit_modalities, pretrain
from physioray.pretrainings import Pretraining, describe_pretraining, pretrain_once
from physioray.results import PROBES, ScoreRow, prediction_schema
from physioray.stages import (
    VERSIONS,
    Description,
    describe_bands,
    describe_training,
    embed_pretrained,
    embed_untrained,
    finetune_once,
    load_evaluation,
    probe_once,
    save_evaluation,
)
from physioray.steps import Step, StepStore
from physioray.storage import Location, open_location
from physioray.strategies import ModelSettings, find_strategy
from physioray.study import find_labelled_windows

Kind = Literal["pretrain", "probe", "train"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of the grid.

    Attributes:
        kind: what is done.
        strategy: a name of `strategies.STRATEGIES`, or of a floor.
        task, seed, fold, size: where they matter; `size` is the number of training subjects asked for.
        passes: over how many windows in all, for judging time.
        windows: see `passes`.
    """

    kind: Kind
    strategy: str
    task: str = ""
    seed: int = 0
    fold: int = 0
    size: int = 0
    passes: int = 0
    windows: int = 0

    @property
    def title(self) -> str:
        """The piece in words, for a line of progress."""
        parts = [self.kind, self.strategy, self.task]
        parts += [f"seed {self.seed}"] if self.kind == "train" else []
        parts += [f"{self.size} subjects"] if self.size else []
        return " ".join(part for part in parts if part)


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
        return StepStore(open_location(self.store), commit=self.commit)

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

    def is_done(self, work: Work, store: StepStore) -> bool:
        """True if a training on a task stands in the store."""
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
        return probe_once(
            store,
            self.describe_windows(store, name, screen),
            plan.cohort,
            self.config.probe,
            folds=plan.folds_of(size),
            subsets=None if plan.protocol.folds is not None else {size: plan.subsets[size]},
            evaluations=PROBES,
            screen=screen,
        )

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
            found = evaluate_finetuning(
                self.make_training(name, task=task, seed=seed),
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


def run_work(
    do: Callable[[Work], object],
    work: Sequence[Work],
    *,
    begin: Callable[[Work], None] = lambda _: None,
    end: Callable[[Work], None] = lambda _: None,
    deadline: float | None = None,
) -> dict[Work, str]:
    """Do pieces of work one after the other; one that fails stops none that does not rest on it.

    Args:
        do: does one piece.
        work: in an order in which what others rest on comes first, see `Grid.list_work`.
        begin, end: are told.
        deadline: in `time.monotonic`; no piece is begun after it.

    Returns:
        What failed, and why. What was not begun is in neither.
    """
    failures: dict[Work, str] = {}
    for item in work:
        if deadline is not None and time.monotonic() > deadline:
            break
        begin(item)
        reason = explain_block(item, failures)
        if not reason:
            try:
                do(item)
            except (OSError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason:
            failures[item] = reason
        end(item)
    return failures


def explain_block(item: Work, failures: Mapping[Work, str]) -> str:
    """Why a piece cannot be done after what failed; empty if it can."""
    for failed in failures:
        if failed.kind == "pretrain" and failed.strategy == item.strategy:
            return f"its pretraining failed: {failures[failed]}"
    return ""


def shorten(train: TrainConfig, passes: int) -> TrainConfig:
    """The same training over fewer passes, with no longer a warm-up than half of them."""
    return replace(train, passes=passes, warmup_passes=min(train.warmup_passes, passes / 2))


@dataclass(frozen=True, kw_only=True)
class GridScores:
    """Everything a grid has computed so far.

    Attributes:
        rows: every score.
        predictions: by (pretraining or floor, evaluation), the test predictions at the largest training-set size.
        notes: sentences for the reader, for example what has not been run.
    """

    rows: list[ScoreRow]
    predictions: dict[tuple[str, str], pa.Table] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def collect_scores(grid: Grid, failures: Mapping[Work, str] | None = None, screen: Screen | None = None) -> GridScores:
    """Gather the scores of all work that is done; nothing is trained here.

    Args:
        grid: whose scores.
        failures: work that failed, and why.
        screen: where waiting is said.
    """
    store, plan = grid.open_store(), grid.plan
    found = GridScores(rows=[], notes=list(plan.notes))
    found.notes.extend(f"{work.title}: failed. {reason}" for work, reason in (failures or {}).items())
    broken = {work.strategy for work in failures or {} if work.kind == "pretrain"}
    for name in (*plan.pretrained, *FLOORS):
        if name in broken:
            continue
        if name not in FLOORS and not grid.is_pretrained(name, store):
            found.notes.append(f"{name}: not pretrained yet, so nothing that rests on it was run.")
            continue
        for size in plan.sizes:
            if any(work.kind == "probe" and (work.strategy, work.size) == (name, size) for work in failures or {}):
                continue
            _take(found, grid.probe(store, name, size, screen), name, size == plan.sizes[-1])
    for name in (*plan.finetuned, *plan.scratch):
        pretrained = name not in broken and name in plan.pretrained and grid.is_pretrained(name, store)
        if find_strategy(name).objective is None or pretrained:
            for size in plan.sizes if grid.config.whole else plan.sizes[-1:]:
                _take(
                    found,
                    _score_trainings(grid, store, name, size, failures or {}, found.notes),
                    name,
                    size == plan.sizes[-1],
                )
    return found


def _take(found: GridScores, evaluation: Evaluation, name: str, largest: bool) -> None:
    found.rows.extend(evaluation.scores)
    found.notes.extend(note for note in evaluation.notes if note not in found.notes)
    if largest and len(evaluation.predictions):
        for chosen in evaluation.predictions.column("evaluation").unique().to_pylist():
            table = evaluation.predictions.filter(pc.field("evaluation") == chosen)
            found.predictions[name, chosen] = table


def _score_trainings(
    grid: Grid, store: StepStore, name: str, size: int, failures: Mapping[Work, str], notes: list[str]
) -> Evaluation:
    """Scores of the trainings of one strategy and size, over the seeds and tasks whose every fold is done."""
    evaluations = []
    missing: dict[str, int] = {}
    work = [item for item in grid.list_work() if (item.kind, item.strategy, item.size) == ("train", name, size)]
    groups: dict[tuple[int, str], list[Work]] = {}
    for item in work:
        groups.setdefault((item.seed, item.task), []).append(item)
    for (seed, task), items in groups.items():
        if not any(item in failures for item in items) and all(grid.is_done(item, store) for item in items):
            evaluations.append(grid.score_training(store, name, task=task, seed=seed, size=size))
        else:
            missing[task] = missing.get(task, 0) + 1
    for task, count in missing.items():
        notes.append(f"{name}, {task}, {size} subjects: {count} of {grid.config.finetune_seeds} repetitions not run.")
    rows = [row for item in evaluations for row in item.scores if row.task != AGGREGATE]
    tables = [item.predictions for item in evaluations] or [prediction_schema().empty_table()]
    tasks = tuple(dict.fromkeys(item.task for item in work))
    return Evaluation(
        scores=rows + aggregate_rows(rows, tasks),
        predictions=pa.concat_tables(tables),
        notes=list(dict.fromkeys(note for item in evaluations for note in item.notes)),
    )

"""The parts of a reproduction: each says what is missing and what that costs, computes it, and names what failed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from physioray.analysis import VERSION as ANALYSIS_VERSION
from physioray.analysis import AnalysisJob, AnalysisSums, summarise
from physioray.analysis_results import Analysis, load_analysis, save_analysis
from physioray.config import to_dict
from physioray.costs import PROBE_SECONDS, estimate_cost, measure_rate
from physioray.grid import Grid
from physioray.journal import Screen
from physioray.reproduction.plan import FIGURES, ReproductionConfig, SweepRecipe
from physioray.steps import Step, StepStore
from physioray.storage import Location
from physioray.sweep_journal import SWEEP_FILE, SweepResult, read_sweep
from physioray.sweep_setup import Evaluation, SweepSetup
from physioray.work import Kind, Work

Look = Callable[[AnalysisJob, Screen], AnalysisSums]


@runtime_checkable
class DoWork(Protocol):
    """Does a grid's pieces of work: `work.run_work` or `spread.spread_work`, with what they need bound."""

    def __call__(
        self,
        work: Sequence[Work],
        *,
        begin: Callable[[Work], None],
        end: Callable[[Work], None],
        deadline: float | None,
    ) -> dict[Work, str]:
        """What failed, and why."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runners:
    """How parts are computed, in this process or on a cluster.

    Attributes:
        work: does pieces of a grid.
        sweep: runs a sweep to its end, or goes on with one.
        look: looks into a checkpoint.
    """

    work: DoWork
    sweep: Callable[[SweepSetup, Screen], SweepResult]
    look: Look


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What of a part is still to be done.

    Attributes:
        missing: number of pieces.
        words: what they are.
        seconds: of one process, judged from rates measured on this machine.
        failures: what has failed for good.
    """

    missing: int
    words: str
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part went: what failed, and what was left because time was up."""

    failures: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@runtime_checkable
class Part(Protocol):
    """One part of the paper."""

    @property
    def name(self) -> str:
        """Short, for files."""
        ...

    @property
    def title(self) -> str:
        """As the page calls it."""
        ...

    def stand(self) -> Standing:
        """What is missing; nothing is computed."""
        ...

    def run(self, screen: Screen, deadline: float | None) -> Outcome:
        """Compute what is missing."""
        ...


@dataclass(frozen=True, kw_only=True)
class GridPart:
    """Pieces of the grid behind the tables: the pretrainings, or all that rests on them."""

    name: str
    title: str
    kinds: tuple[Kind, ...]
    grid: Grid
    runners: Runners

    def _list_missing(self) -> tuple[list[Work], list[Work]]:
        """Pieces of this part, and pretrainings, that are not done."""
        missing = self.grid.list_missing()
        return [w for w in missing if w.kind in self.kinds], [w for w in missing if w.kind == "pretrain"]

    def stand(self) -> Standing:
        """What is missing."""
        work, _ = self._list_missing()
        cost = estimate_cost(self.grid, work)
        counts = {"pretrain": "pretrainings", "probe": "probes", "train": "trainings on tasks"}
        numbers = [(sum(w.kind == kind for w in work), words) for kind, words in counts.items()]
        words = ", ".join(f"{count} {words}" for count, words in numbers if count)
        return Standing(missing=len(work), words=words, seconds=cost.seconds)

    def run(self, screen: Screen, deadline: float | None) -> Outcome:
        """Compute what is missing; what rests on a pretraining that is not there is left out."""
        work, pretrainings = self._list_missing()
        absent = {w.strategy for w in pretrainings} if "pretrain" not in self.kinds else set()
        cost = estimate_cost(self.grid, work)
        done = 0.0

        def show(item: Work, share: float = 0.0) -> None:
            nonlocal done
            done += share
            screen.update(round(1000 * done), max(1, round(1000 * cost.seconds)), item.title)

        able = [w for w in work if w.strategy not in absent]
        failures = self.runners.work(able, begin=show, end=lambda w: show(w, cost.by_work[w]), deadline=deadline)
        blocked = [f"{w.title}: its pretraining is not there." for w in work if w.strategy in absent]
        left = [w.title for w in self._list_missing()[0] if w not in failures and w in able]
        return Outcome(
            failures=(*(f"{w.title}: {reason}" for w, reason in failures.items()), *blocked), left=tuple(left)
        )


@dataclass(frozen=True, kw_only=True)
class SweepPart:
    """One sweep by one evaluation."""

    name: str
    title: str
    recipe: SweepRecipe
    evaluation: Evaluation
    options: argparse.Namespace
    folder: Location
    grid: Grid
    runners: Runners

    def read(self) -> SweepResult | None:
        """What stands in the folder; None if the sweep was never begun."""
        return read_sweep(self.folder) if (self.folder / SWEEP_FILE).exists() else None

    def stand(self) -> Standing:
        """How many trials have no outcome yet."""
        plan = self.recipe.set_up(self.options, self.evaluation).plan
        found = self.read()
        ended = () if found is None else tuple(trial for trial in found.trials if trial.state != "planned")
        missing = plan.count_trials() - len(ended)
        failures = tuple(f"trial {t.number}: {t.reason}" for t in ended if t.state == "failed")
        seconds = self._judge_seconds(missing, plan.base["train"].passes) if missing > 0 else 0.0
        return Standing(missing=max(0, missing), words=f"{missing} trials", seconds=seconds, failures=failures)

    def _judge_seconds(self, trials: int, passes: int) -> float:
        """Trials that differ in the number of training subjects alone share a pretraining."""
        grid, plan = self.grid, self.grid.plan
        work = Work(kind="pretrain", strategy=self.recipe.strategy, passes=passes, windows=plan.pretraining_windows)
        pretrainings = math.ceil(trials / max(1, len(self.recipe.sizes))) if self.recipe.space else 1
        seconds = pretrainings * work.passes * work.windows / measure_rate(grid, work) + trials * PROBE_SECONDS
        if self.evaluation == "finetune":
            train = [w for w in grid.list_work() if (w.kind, w.strategy) == ("train", "multimae_drop")]
            rates = {w.task: measure_rate(grid, w) for w in {w.task: w for w in train}.values()}
            seconds += trials * sum(w.passes * w.windows / rates[w.task] for w in train)
        return seconds

    def run(self, screen: Screen, deadline: float | None) -> Outcome:  # noqa: ARG002 (a sweep that has begun is ended)
        """Run the sweep to its end."""
        self.runners.sweep(self.recipe.set_up(self.options, self.evaluation), screen)
        return Outcome(failures=self.stand().failures)


@dataclass(frozen=True, kw_only=True)
class FigurePart:
    """A look inside one strategy's weights, for the paper's Figures 2, 4 and 6."""

    name: str
    title: str
    strategy: str
    config: ReproductionConfig
    grid: Grid
    runners: Runners

    def _describe(self, store: StepStore) -> tuple[Step, AnalysisJob] | None:
        found = self.grid.find_checkpoint(store, self.strategy)
        if found is None:
            return None
        trained, checkpoint = found
        name, config = FIGURES[self.strategy], self.config.analysis
        step = Step(
            name="analysis",
            version=ANALYSIS_VERSION,
            settings={"name": name, "config": to_dict(config), "checkpoint": checkpoint.name},
            inputs={"cohort": self.grid.plan.cohort.fingerprint, "training": trained.identity},
        )
        return step, AnalysisJob(name=name, checkpoint=checkpoint.uri, cohort=self.grid.cohort, config=config)

    def read(self, store: StepStore) -> Analysis | None:
        """What was found, or None if nobody has looked yet."""
        described = self._describe(store)
        folder = None if described is None else store.find(described[0])
        return None if folder is None else load_analysis(folder)

    def stand(self) -> Standing:
        """Whether it is still to be looked into; about as many windows a second as training are judged."""
        if self.read(self.grid.open_store()) is not None:
            return Standing(missing=0, words="")
        config, work = self.config.analysis, Work(kind="pretrain", strategy="multimae")
        modalities = len(self.grid.plan.cohort.modalities)
        windows = config.windows * (3 + modalities) + config.contexts * config.draws * modalities
        seconds = windows / measure_rate(self.grid, work)
        return Standing(missing=1, words="1 look inside", seconds=seconds)

    def run(self, screen: Screen, deadline: float | None) -> Outcome:  # noqa: ARG002 (one piece)
        """Measure attention, source variance and reconstructions, and keep them as a step."""
        store = self.grid.open_store()
        described = self._describe(store)
        if described is None:
            what = "training on sleep stages" if self.strategy == "scratch" else "pretraining"
            return Outcome(failures=(f"{FIGURES[self.strategy]}: its {what} is not there.",))
        step, job = described
        store.run(
            step,
            lambda folder: save_analysis(summarise(job, self.runners.look(job, screen)), folder),
            screen=screen,
        )
        return Outcome()


def list_parts(
    config: ReproductionConfig, grid: Grid, out: Location, options: argparse.Namespace, runners: Runners
) -> list[Part]:
    """All parts in the paper's order: strategies, tables, sweeps, figures.

    Args:
        config: what is computed.
        grid: of its strategies and tables.
        out: the reproduction's folder.
        options: of all sweeps, see `make_options`.
        runners: how parts are computed.
    """
    parts: list[Part] = [
        GridPart(name="strategies", title="Strategies", kinds=("pretrain",), grid=grid, runners=runners),
        GridPart(name="tables", title="Tables 1 to 7", kinds=("probe", "train"), grid=grid, runners=runners),
    ]
    for recipe in config.sweeps:
        for evaluation in recipe.evaluations:
            name = f"{recipe.name}-{evaluation}"
            folder = out / "sweeps" / name
            own = argparse.Namespace(**(vars(options) | {"out": folder.uri, "evaluation": evaluation}))
            way = "linear probe" if evaluation == "probe" else "full finetuning"
            parts.append(
                SweepPart(
                    name=name,
                    title=f"{recipe.title}, by {way}",
                    recipe=recipe,
                    evaluation=evaluation,
                    options=own,
                    folder=folder,
                    grid=grid,
                    runners=runners,
                )
            )
    for strategy, title in FIGURES.items():
        name = f"figures-{strategy}"
        parts.append(
            FigurePart(
                name=name,
                title=f"Figures 2, 4 and 6: {title}",
                strategy=strategy,
                config=config,
                grid=grid,
                runners=runners,
            )
        )
    return parts


def make_options(config: ReproductionConfig, grid: Grid, address: str | None = None) -> argparse.Namespace:
    """The options that all sweeps of a reproduction share (see `sweep_setup.parse_options`)."""
    return argparse.Namespace(
        cohort=grid.cohort,
        steps=grid.store,
        preset=config.grid.sizes,
        passes=config.grid.passes,
        evaluation="probe",
        task="sleep",
        seeds=None,
        trials=None,
        concurrent=None,
        address=address,
        device=grid.device,
        smoke=config.name == "smoke",
        out="",
    )

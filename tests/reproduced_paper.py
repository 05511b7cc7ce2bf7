"""A reproduction small enough for tests, in one process; run as a program by the test that kills it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from physioray.analysis import measure
from physioray.analysis_config import AnalysisConfig
from physioray.config import ProbeConfig
from physioray.grid import Grid
from physioray.grid_plan import GridConfig
from physioray.journal import Screen
from physioray.reproduction.course import Course
from physioray.reproduction.page import write_reproduction
from physioray.reproduction.parts import Part, Runners, list_parts, make_options
from physioray.reproduction.plan import ReproductionConfig, SweepRecipe
from physioray.search_space import choice
from physioray.storage import Location, open_location
from physioray.work import run_work
from tests.sweep_trials import sweep_by_hand

CONFIG = ReproductionConfig(
    name="smoke",
    grid=GridConfig(
        name="smoke",
        sizes="tiny",
        pretrained=("multimae", "multimae_drop"),
        scratch=("scratch",),
        passes=1,
        finetune_passes=1,
        probe=ProbeConfig(
            tasks=("sleep",), seeds=(0,), folds=2, bootstrap_draws=20, recipe_passes=2, recipe_min_steps=20
        ),
        finetune_seeds=1,
        finetune_tasks=("sleep",),
        sizes_asked=1,
    ),
    sweeps=(
        SweepRecipe(
            name="mask_ratio",
            title="Figure 3: how much to hide",
            question="How much?",
            space={"objective.mask.drop": choice([True]), "objective.mask.hidden_ratio": choice([0.6, 0.7])},
            sizes=(25, 500),
        ),
    ),
    analysis=AnalysisConfig(windows=24, contexts=2, draws=4, examples=1, bootstrap_draws=20),
    left_out={"The temperature": "not part of this test"},
)


class Told:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[tuple[int, int, str]] = []

    def update(self, done: int, total: int, note: str = "") -> None:
        self.updates.append((done, total, note))

    def say(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class Reproduction:
    """The small reproduction on a cohort, in a folder."""

    out: Location
    grid: Grid
    parts: list[Part]
    course: Course
    screen: Told

    def write(self) -> Location:
        """Write the page."""
        return write_reproduction(
            self.out, CONFIG, self.grid, self.parts, self.course.records, command="python this.py"
        )

    def run(self, deadline: float | None = None) -> Location:
        """Compute what is missing."""
        self.course.run(self.course.look(), deadline=deadline)
        return self.write()


def make_reproduction(cohort: str, folder: Path) -> Reproduction:
    out = open_location(str(folder))
    grid = Grid(cohort=cohort, store=(out / "steps").uri, config=CONFIG.grid, threads=1, commit="test")

    def look(job, screen: Screen):  # type: ignore[no-untyped-def]
        return measure(job, progress=screen.update)

    runners = Runners(
        work=partial(run_work, grid.do),
        sweep=lambda setup, screen: sweep_by_hand(setup.plan, setup.run_trial, setup.out),  # noqa: ARG005
        look=look,
    )
    parts, screen = list_parts(CONFIG, grid, out, make_options(CONFIG, grid), runners), Told()
    return Reproduction(out, grid, parts, Course(out, parts, screen), screen)


if __name__ == "__main__":
    make_reproduction(sys.argv[1], Path(sys.argv[2])).run()

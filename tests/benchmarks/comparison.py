"""The project's figure beside a peer's and the limit's, measured side by side in one run, as ratios with their spread.

These machines are shared: a figure alone says little, and two figures of different minutes say less. Contenders
therefore take turns, and what counts is the ratio within a turn, over at least five turns.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from physioray.steps import find_commit

OURS = "physioray"
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A ratio to reach against one contender.

    Attributes:
        against: name of the contender.
        ratio: how many times as good as it the project's figure must be: rates ours / theirs, seconds theirs / ours.
    """

    against: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table.

    Attributes:
        title: what was measured.
        unit: of the figures.
        better: whether more or less of the unit is better.
        figures: by contender, one figure a turn; `physioray` is among them.
        goals: ratios to reach; any one of them suffices if `one_goal_suffices`.
        note: what a reader must know, such as SIMULATED signals or what was left out.
    """

    title: str
    unit: str
    better: Literal["more", "less"]
    figures: Mapping[str, Sequence[float]]
    goals: Sequence[Goal] = ()
    one_goal_suffices: bool = False
    note: str = ""
    context: Mapping[str, str] = field(default_factory=dict)

    def list_ratios(self, against: str) -> list[float]:
        """How many times as good the project is as a contender, turn by turn; above one it is better."""
        pairs = zip(self.figures[OURS], self.figures[against], strict=True)
        return [ours / theirs if self.better == "more" else theirs / ours for ours, theirs in pairs]

    def find_missed(self) -> list[Goal]:
        """The goals that the median ratio does not reach."""
        missed = [goal for goal in self.goals if statistics.median(self.list_ratios(goal.against)) < goal.ratio]
        return [] if self.one_goal_suffices and len(missed) < len(self.goals) else missed


def take_turns(contenders: Mapping[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Let every contender measure itself `repeats` times, one after the other, each turn beginning with another.

    Args:
        contenders: by name, a function that does the work once and gives its figure.
        repeats: turns.
    """
    names = list(contenders)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            figures[name].append(float(contenders[name]()))
    return figures


class Notebook:
    """Keeps every comparison of a run: as JSON at once, as a table at the end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"benchmarks-{time.strftime('%Y%m%d-%H%M%S')}.json"
        self.rows: list[Comparison] = []
        self.not_run: list[str] = []

    def leave_out(self, title: str, reason: str) -> None:
        """Say in the table that a row was not run, and why."""
        self.not_run.append(f"{title}: not run yet, {reason}")

    def keep(self, row: Comparison) -> None:
        """Add a row, write the file anew, and print the row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "commit": find_commit(),
            "machine": f"{platform.machine()}, {platform.processor() or platform.system()}, torch {torch.__version__}, "
            f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
            "comparisons": [asdict(row) for row in self.rows],
        }
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(content, indent=1))
        unfinished.replace(self.path)
        print("\n" + "\n".join(describe_comparison(row)))


def describe_comparison(row: Comparison) -> list[str]:
    """A row in words: each contender's median figure, and the ratios with their spread and their goal."""
    goals = {goal.against: goal.ratio for goal in row.goals}
    lines = [f"{row.title} ({row.unit}){': ' + row.note if row.note else ''}"]
    for name, figures in row.figures.items():
        line = f"  {name:<44} {statistics.median(figures):>12,.4g}"
        if name != OURS:
            ratios = row.list_ratios(name)
            line += f"   ours {statistics.median(ratios):>8.3g} times [{min(ratios):.3g} to {max(ratios):.3g}]"
            line += f"   to reach {goals[name]:g}" if name in goals else ""
        lines.append(line)
    missed = row.find_missed()
    if row.goals:
        lines.append("  reached" if not missed else f"  NOT reached: {', '.join(goal.against for goal in missed)}")
    return lines

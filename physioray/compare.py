"""Compares two evaluations on the same windows: the difference, its interval by subject, and a plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from physioray.metrics import balance_confusions, bound_draws, draw_subjects, weigh_confusions
from physioray.results import CONVERGED
from physioray.signals import Task, find_task

FEATURE_PHRASES = {
    "pretrained": "the pretrained encoder",
    "untrained": "the untrained encoder",
    "band_powers": "band powers",
}

SMALLEST_SHOWN = 0.0005
"""A difference nearer to 0 is written as 0.000."""


class ComparisonError(ValueError):
    """Two evaluations that cannot be compared; the message says what they do not share."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How far one kind of features lies above another in balanced accuracy, on the same windows and folds.

    Attributes:
        task, evaluation: what was compared.
        first, second: names of the features; the difference is first minus second.
        first_value, second_value: balanced accuracy, mean over the seeds.
        value, low, high: difference and its 95 % interval by subject; None without an interval.
        seeds, windows, subjects: what it rests on.
    """

    task: str
    evaluation: str
    first: str
    second: str
    first_value: float
    second_value: float
    value: float
    low: float | None
    high: float | None
    seeds: int
    windows: int
    subjects: int

    @property
    def is_above(self) -> bool:
        """True if the whole interval lies above 0, also as it is written, with three digits."""
        return self.low is not None and self.low >= SMALLEST_SHOWN

    @property
    def is_below(self) -> bool:
        """True if the whole interval lies below 0, also as it is written, with three digits."""
        return self.high is not None and self.high <= -SMALLEST_SHOWN


def compare_paired(
    first: pa.Table,
    second: pa.Table,
    task: str,
    *,
    evaluation: str = CONVERGED,
    draws: int = 500,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference of balanced accuracy of two evaluations, by a bootstrap that draws the same subjects for both.

    Args:
        first, second: predictions (`Evaluation.predictions`), one kind of features each.
        task: name of the task.
        evaluation: which probe.
        draws, seed, confidence: of the bootstrap.

    Raises:
        ComparisonError: one of them has no predictions, or they are not of the same windows under the same seeds.
    """
    classes = find_task(task)
    one, other = (_take(table, task, evaluation) for table in (first, second))
    for column in ("seed", "window_id", "true"):
        if not one.column(column).equals(other.column(column)):
            raise ComparisonError(
                f"Two evaluations compare only on the same windows, seeds and labels, but they differ in {column}. "
                "Evaluate both with the same folds."
            )
    names, owner = np.unique(one.column("subject").to_numpy(zero_copy_only=False), return_inverse=True)
    weights = draw_subjects(len(names), draws, seed)
    everyone = np.ones((1, len(names)))
    values = [_average_seeds(classes, table, owner, everyone) for table in (one, other)]
    bounds = None
    if len(names) > 1:
        drawn = [_average_seeds(classes, table, owner, weights) for table in (one, other)]
        bounds = bound_draws(drawn[0] - drawn[1], confidence)
    return PairedDifference(
        task=task,
        evaluation=evaluation,
        first=one.column("features")[0].as_py(),
        second=other.column("features")[0].as_py(),
        first_value=float(values[0][0]),
        second_value=float(values[1][0]),
        value=float(values[0][0] - values[1][0]),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        seeds=len(pc.unique(one.column("seed"))),
        windows=len(pc.unique(one.column("window_id"))),
        subjects=len(names),
    )


def _take(table: pa.Table, task: str, evaluation: str) -> pa.Table:
    chosen = table.filter((pc.field("task") == task) & (pc.field("evaluation") == evaluation))
    if not len(chosen):
        raise ComparisonError(f"A comparison needs predictions of {task} by {evaluation}, but there are none.")
    kinds = pc.unique(chosen.column("features")).to_pylist()
    if len(kinds) > 1:
        raise ComparisonError(f"Each side of a comparison must hold one kind of features, but got {', '.join(kinds)}.")
    return chosen.combine_chunks().sort_by([("seed", "ascending"), ("window_id", "ascending")])


def _average_seeds(
    task: Task, table: pa.Table, owner: Int[np.ndarray, " n"], weights: Float[np.ndarray, "draws subjects"]
) -> Float[np.ndarray, " draws"]:
    """Balanced accuracy of every draw, mean over seeds; the same people are drawn under every seed."""
    seeds = table.column("seed").to_numpy()
    true = table.column("true").to_numpy().astype(np.int64)
    predicted = table.column("predicted").to_numpy().astype(np.int64)
    parts = []
    for number in np.unique(seeds):
        rows = seeds == number
        confusions = weigh_confusions(len(task.classes), true[rows], predicted[rows], owner[rows], weights)
        parts.append(balance_confusions(confusions))
    return np.mean(parts, axis=0)


def state_difference(difference: PairedDifference) -> str:
    """One sentence in plain words: whether the first kind of features has overtaken the second, by how much."""
    first, second = (FEATURE_PHRASES.get(name, name) for name in (difference.first, difference.second))
    verdict = "has overtaken" if difference.is_above else "has not overtaken"
    subject = "pretraining" if difference.first == "pretrained" else first
    reason = ""
    if difference.is_below:
        reason = " and lies below it" if difference.second != "band_powers" else " and lies below them"
    elif not difference.is_above and difference.low is not None:
        reason = ": the difference cannot be told from 0"
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f" [95 % interval by subject {difference.low:+.3f}, {difference.high:+.3f}]"
    title = find_task(difference.task).title
    return (
        f"{title}: {subject} {verdict} {second}{reason}; balanced accuracy {difference.first_value:.3f} against "
        f"{difference.second_value:.3f}, difference {difference.value:+.3f}{interval}."
    )


def state_chance(task: str, value: float, low: float | None, classes: int | None = None) -> str:
    """One sentence: whether a balanced accuracy clears guessing by its interval.

    Args:
        classes: how many classes occur among the scored windows, if fewer than the task has: guessing is then
            right more often, because balanced accuracy is the mean over the classes that occur.
    """
    found = find_task(task)
    if classes is not None and 0 < classes < len(found.classes):
        return (
            f"{found.title}: only {classes} of {len(found.classes)} classes occur, so guessing scores "
            f"{1 / classes:.2f}; balanced accuracy {value:.3f} is not to be compared with other cohorts'."
        )
    verdict = "clears" if low is not None and low > found.chance else "does not clear"
    bound = "no interval" if low is None else f"interval from {low:.3f}"
    return f"{found.title}: balanced accuracy {value:.3f} ({bound}) {verdict} chance, {found.chance:.2f}."


def list_comparisons(
    evaluations: Sequence[tuple[str, pa.Table]], tasks: Sequence[str], *, draws: int = 500, seed: int = 0
) -> list[PairedDifference]:
    """Compare the first evaluation with each of the others on every task that both were scored on.

    Args:
        evaluations: name and predictions; the first is the one in question, usually the pretrained encoder.
        tasks: names of the tasks; those without predictions are left out.
        draws, seed: of the bootstrap.
    """
    found = []
    for task in tasks:
        for _, table in evaluations[1:]:
            try:
                found.append(compare_paired(evaluations[0][1], table, task, draws=draws, seed=seed))
            except ComparisonError:
                continue
    return found

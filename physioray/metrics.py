"""Scores of predictions, their intervals by subject, and the one list of metric names.

Every metric is a function of windows whose label is known. A metric that has no value for the windows given
(for example an AUROC where the truth holds one class only) is None, never NaN, and `explain_undefined` says
why; it is never averaged away.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
)

from physioray.signals import UNKNOWN, LookupMiss, Task, find_task

METRIC_TITLES: Mapping[str, str] = {
    "balanced_accuracy": "Balanced accuracy",
    "kappa": "Cohen's kappa",
    "auroc": "AUROC",
    "f1_macro": "F1 (macro)",
    "f1_weighted": "F1 (weighted)",
    "accuracy": "Accuracy",
}
METRICS: tuple[str, ...] = tuple(METRIC_TITLES)
"""Names of all metrics, as written in result files, TensorBoard and reports; the first is the headline."""

AGGREGATE = "aggregate"
"""Name of the score over all tasks (Fang et al. 2024, section 4): task and metric of its result rows."""

FEW_WINDOWS = 20
"""With fewer scored windows of a class, one window moves the class's share of right answers by a twentieth and more."""

SCORE_BINS = 2048
"""Largest number of score levels in the bootstrap of the AUROC; finer scores are grouped by rank."""


def find_metric(name: str) -> str:
    """Title of a metric for tables and axes.

    Raises:
        LookupMiss: no such metric; the message lists those that exist.
    """
    if name not in METRIC_TITLES:
        raise LookupMiss(f"A metric must be one of {', '.join(METRICS)}, but got {name!r}.")
    return METRIC_TITLES[name]


def score_predictions(
    task: Task,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> dict[str, float | None]:
    """Score predictions of windows against their labels; windows without a label are left out.

    Balanced accuracy is the mean recall over the classes that occur in the truth, F1 (macro) the mean over the
    classes that occur in the truth or the predictions, both as scikit-learn defines them. AUROC is that of the
    second class for a task of two classes, and the mean of one-versus-rest over all classes otherwise.

    Args:
        task: whose classes the numbers are.
        true, predicted: `(n,)` class numbers; `true` is -1 where unknown.
        probabilities: `(n, classes)` per class.

    Returns:
        A value per name of `METRICS`; None where `explain_undefined` gives a reason.
    """
    known = true != UNKNOWN
    true, predicted, probabilities = true[known], predicted[known], probabilities[known]
    undefined = explain_undefined(task, true, predicted)
    scores: dict[str, float | None] = {}
    for metric in METRICS:
        scores[metric] = None if metric in undefined else _score_one(metric, task, true, predicted, probabilities)
    return scores


def _score_one(
    metric: str,
    task: Task,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
) -> float:
    if metric == "balanced_accuracy":
        # The same value as balanced_accuracy_score, which warns when a class missing from the truth is predicted.
        return float(recall_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0))
    if metric == "kappa":
        return float(cohen_kappa_score(true, predicted, labels=np.arange(len(task.classes))))
    if metric == "f1_macro":
        return float(f1_score(true, predicted, average="macro", zero_division=0))
    if metric == "f1_weighted":
        return float(f1_score(true, predicted, average="weighted", zero_division=0))
    if metric == "auroc":
        columns = [1] if len(task.classes) == 2 else range(len(task.classes))
        return float(np.mean([roc_auc_score(true == column, probabilities[:, column]) for column in columns]))
    return float(accuracy_score(true, predicted))


def explain_rarity(task: Task, true: Int[np.ndarray, "n"], subject: Int[np.ndarray, "n"]) -> str:
    """A sentence for the reader where scores rest on a class of few windows; empty where they do not."""
    if not len(true):
        return ""
    counts = np.bincount(true, minlength=len(task.classes))
    rarest = min((count, number) for number, count in enumerate(counts.tolist()) if count)[1]
    if counts[rarest] >= FEW_WINDOWS:
        return ""
    people = len(np.unique(subject[true == rarest]))
    return (
        f"{task.title}: only {counts[rarest]} scored windows, of {people} of {len(np.unique(subject))} people, are of "
        f"the class {task.classes[rarest]}; scores and intervals look surer than they are."
    )


def explain_undefined(task: Task, true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> dict[str, str]:
    """Say which metrics have no value for these windows, and why.

    No metric has one without a known label; the AUROC needs every class in the truth (for two classes: both);
    kappa needs chance agreement below 1, which fails when truth and predictions hold one and the same class.

    Args:
        task: whose classes the numbers are.
        true, predicted: `(n,)` class numbers; `true` is -1 where unknown.
    """
    known = true != UNKNOWN
    true, predicted = true[known], predicted[known]
    if not len(true):
        return dict.fromkeys(METRICS, "no window has a known label")
    found = np.unique(true)
    missing = [name for number, name in enumerate(task.classes) if number not in found]
    reasons = {}
    if missing:
        reasons["auroc"] = f"needs every class in the truth, but has no window of {', '.join(missing)}"
    if len(found) == 1 and np.all(predicted == found[0]):
        reasons["kappa"] = f"needs two classes, but truth and predictions hold only {task.classes[int(found[0])]}"
    return reasons


def bootstrap_by_subject(
    task: Task,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
    subject: Int[np.ndarray, "n"],
    draws: int,
    seed: int,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Interval of every metric when people, not windows, are drawn anew: percentile bootstrap by subject.

    Subjects are drawn with replacement, as many as there are, and bring all their windows. Draws in which a
    metric has no value are left out; the interval is None when these are more than half, or when there are
    fewer than two subjects.

    Args:
        task, true, predicted, probabilities: as in `score_predictions`.
        subject: `(n,)` number of each window's subject.
        draws: number of draws.
        seed: the same seed gives the same draws.
        confidence: share of the draws inside the interval.

    Returns:
        Lower and upper bound per name of `METRICS`.
    """
    known = true != UNKNOWN
    true, predicted, probabilities, subject = true[known], predicted[known], probabilities[known], subject[known]
    names, owner = np.unique(subject, return_inverse=True)
    if len(names) < 2:
        return dict.fromkeys(METRICS, None)
    weights = draw_subjects(len(names), draws, seed)
    values = _score_confusions(weigh_confusions(len(task.classes), true, predicted, owner, weights))
    values["auroc"] = _weigh_auroc(task, true, probabilities, owner, weights)
    return {metric: bound_draws(values[metric], confidence) for metric in METRICS}


def draw_subjects(subjects: int, draws: int, seed: int) -> Float[np.ndarray, "draws subjects"]:
    """How often each of `subjects` people is drawn in each of `draws` samples with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(subjects, np.full(subjects, 1.0 / subjects), size=draws).astype(np.float64)


def bound_draws(values: Float[np.ndarray, "draws"], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval that holds the middle `confidence` of the draws that have a value; None if half have none."""
    defined = values[np.isfinite(values)]
    if 2 * len(defined) <= len(values):
        return None
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(defined, [tail, 100.0 - tail])
    return float(low), float(high)


def weigh_confusions(
    classes: int,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    owner: Int[np.ndarray, "n"],
    weights: Float[np.ndarray, "draws subjects"],
) -> Float[np.ndarray, "draws true predicted"]:
    """Confusion matrix of every draw, from one matrix per subject.

    Label metrics depend on the windows through the confusion matrix alone, so a draw costs `subjects` x
    `classes` squared operations instead of a pass over all windows.
    """
    per_subject = count_by_subject(classes, true, predicted, owner, weights.shape[1])
    summed = weights @ per_subject.reshape(weights.shape[1], -1).astype(np.float64)
    return summed.reshape(len(weights), classes, classes)


def balance_confusions(confusions: Float[np.ndarray, "draws true predicted"]) -> Float[np.ndarray, "draws"]:
    """Balanced accuracy of every confusion matrix: mean recall over the classes that its truth holds."""
    rows = confusions.sum(2)
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rows > 0, hits / rows, 0.0).sum(1) / (rows > 0).sum(1)


def _score_confusions(confusions: Float[np.ndarray, "draws true predicted"]) -> dict[str, np.ndarray]:
    """Label metrics of every confusion matrix, NaN where undefined; definitions as in `score_predictions`."""
    total = confusions.sum((1, 2))
    rows, columns = confusions.sum(2), confusions.sum(1)
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    occurs = rows + columns > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(occurs, 2.0 * hits / (rows + columns), 0.0)
        accuracy = hits.sum(1) / total
        chance = (rows * columns).sum(1) / total**2
        kappa = np.where(chance < 1.0, (accuracy - chance) / (1.0 - chance), np.nan)
        return {
            "balanced_accuracy": balance_confusions(confusions),
            "kappa": kappa,
            "f1_macro": f1.sum(1) / occurs.sum(1),
            "f1_weighted": (f1 * rows).sum(1) / total,
            "accuracy": accuracy,
        }


def _weigh_auroc(
    task: Task,
    true: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
    owner: Int[np.ndarray, "n"],
    weights: Float[np.ndarray, "draws subjects"],
) -> Float[np.ndarray, "draws"]:
    """AUROC of every draw, from one histogram of scores per subject and class.

    With more than `SCORE_BINS` distinct scores, windows whose scores are neighbours in rank share a bin and
    count as tied; that moves an AUROC by less than 1 / SCORE_BINS and a bound of an interval by far less.
    """
    columns = [1] if len(task.classes) == 2 else range(len(task.classes))
    subjects = weights.shape[1]
    parts = []
    for column in columns:
        _, level = np.unique(probabilities[:, column], return_inverse=True)
        if level.max() >= SCORE_BINS:
            rank = np.cumsum(np.bincount(level)) - 1
            level = rank[level] * SCORE_BINS // len(level)
        bins = int(level.max()) + 1
        sides = []
        for side in (true == column, true != column):
            counts = np.bincount(owner[side] * bins + level[side], minlength=subjects * bins)
            sides.append(weights @ counts.reshape(subjects, bins).astype(np.float64))
        positive, negative = sides
        below = np.cumsum(negative, 1) - 0.5 * negative
        pairs = positive.sum(1) * negative.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.where(pairs > 0, (positive * below).sum(1) / pairs, np.nan))
    # A draw that lacks one class has no mean over all of them: NaN stays NaN.
    return np.mean(parts, axis=0)


def count_confusion(
    task: Task, true: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "true predicted"]:
    """Windows by true class (rows) and predicted class (columns), known labels only."""
    known = true != UNKNOWN
    return confusion_matrix(true[known], predicted[known], labels=np.arange(len(task.classes)))


def count_by_subject(
    classes: int,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    owner: Int[np.ndarray, "n"],
    subjects: int,
) -> Int[np.ndarray, "subjects true predicted"]:
    """Confusion matrix of every subject, `owner` `(n,)` from 0 to `subjects` - 1; labels must be known."""
    cells = (owner.astype(np.int64) * classes + true) * classes + predicted
    return np.bincount(cells, minlength=subjects * classes * classes).reshape(subjects, classes, classes)


def score_subjects(
    task: Task,
    true: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n classes"],
    owner: Int[np.ndarray, "n"],
    subjects: int,
) -> dict[str, Float[np.ndarray, "subjects"]]:
    """Every metric of every subject on their own windows; definitions as in `score_predictions`, NaN where undefined.

    Args:
        task, true, predicted, probabilities: as in `score_predictions`, labels known.
        owner: `(n,)` whose window it is, from 0 to `subjects` - 1.
        subjects: how many people.
    """
    values = _score_confusions(count_by_subject(len(task.classes), true, predicted, owner, subjects).astype(float))
    values["auroc"] = np.full(subjects, np.nan)
    columns = [1] if len(task.classes) == 2 else range(len(task.classes))
    for number in range(subjects):
        mine = owner == number
        if len(np.unique(true[mine])) == len(task.classes):
            parts = [_rank_auroc(true[mine] == column, probabilities[mine, column]) for column in columns]
            values["auroc"][number] = np.mean(parts)
    return {metric: values[metric] for metric in METRICS}


def _rank_auroc(positive: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"]) -> float:
    """AUROC by ranks (Mann and Whitney), ties counting half; scikit-learn's takes thirty times longer on a night."""
    hits, misses = int(positive.sum()), int((~positive).sum())
    return float((rankdata(score)[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def aggregate_score(scores_by_task: Mapping[str, float], classes: Mapping[str, int] | None = None) -> float:
    """Mean over tasks of how far balanced accuracy lies above guessing, (s - r) / r with r the chance level.

    Fang et al. 2024, section 4. It is computed per seed; aggregates over different tasks do not compare. Where a
    cohort lacks classes, r is one over the number of those that occur, as balanced accuracy is their mean.

    Args:
        scores_by_task: balanced accuracy by name of the task.
        classes: by task how many classes occur; all of them if None, left out or 0.

    Raises:
        ValueError: no task was given.
        LookupMiss: a task does not exist.
    """
    if not scores_by_task:
        raise ValueError("An aggregate needs the balanced accuracy of at least one task, but got none.")
    gains = []
    for name, score in scores_by_task.items():
        chance = 1.0 / ((classes or {}).get(name, 0) or len(find_task(name).classes))
        gains.append((score - chance) / chance)
    return float(np.mean(gains))

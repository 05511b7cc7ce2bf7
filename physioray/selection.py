"""Scores to choose by: validation subjects are scored, test subjects are locked away.

Sweeps and early stopping choose between models. What they see must not contain the test subjects, or the scores that
the report shows are too good. So everything here works on a cohort whose test subjects are locked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold, fold_subjects, shrink_fold
from physioray.results import ScoreRow
from physioray.signals import TASKS, UNKNOWN, Split

VALIDATION: Final = "validation"
VALIDATION_FOLDS: Final = "validation_cross_validation"

SELECTION_SPLITS: Final[tuple[Split, ...]] = ("pretrain", "train")
"""Whose signals a model that is chosen by `fold_selection` is pretrained on."""


def fold_selection(
    cohort: Cohort, config: ProbeConfig, training_subjects: int | None = None
) -> tuple[dict[int, list[Fold]], str]:
    """By seed, the folds that a choice between models is scored on: no test subject is in any of them.

    With enough labelled people the cohort's validation subjects are scored, after training on its training subjects,
    of whom some (15 %, drawn by seed) choose the penalty. Fewer than `config.cross_validate_below` people besides the
    test subjects are cross-validated by subject, because a handful of validation subjects would choose at random.

    Args:
        cohort: its test subjects may be locked or not; they are not used.
        config: seeds, folds, and from how many people on held-out subjects are used.
        training_subjects: train on no more than so many; smaller sets begin larger ones. All if None.

    Returns:
        The folds, and what `ScoreRow.split` of their scores is.

    Raises:
        SplitError: there are fewer than two labelled people besides the test subjects.
    """
    cohort = cohort.lock_test()
    known = _list_labelled(cohort)
    age = cohort.read_labels("age")
    strata = {
        item.subject: str(age[item.first : item.first + item.rows].max(initial=UNKNOWN)) for item in cohort.recordings
    }
    folds: dict[int, list[Fold]] = {}
    held_out = len(known) >= config.cross_validate_below
    for seed in config.seeds:
        if held_out:
            split = {item.subject: item.split for item in cohort.recordings}
            train = [name for name in known if split[name] == "train"]
            # One fold of a division of the training subjects gives those that choose the penalty.
            inner = fold_subjects(train, 7, seed, 0.15, strata)[0]
            scored = tuple(name for name in known if split[name] == "validation")
            parts = [Fold(train=(*inner.train, *inner.validation), validation=inner.test, test=scored)]
        else:
            parts = fold_subjects(known, config.folds, seed, 0.15, strata)
        if training_subjects is not None:
            parts = [shrink_fold(part, training_subjects, [seed, number], strata) for number, part in enumerate(parts)]
        folds[seed] = parts
    return folds, VALIDATION if held_out else VALIDATION_FOLDS


def name_split(rows: Sequence[ScoreRow], split: str) -> list[ScoreRow]:
    """The same scores, called what they are: scores of validation subjects."""
    return [dataclasses.replace(row, split=split) for row in rows]


def average_scores(rows: Sequence[ScoreRow], metric: str, evaluation: str) -> Mapping[str, float]:
    """A metric by task, mean over seeds; tasks without a score are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row.metric, row.evaluation) == (metric, evaluation) and row.value is not None:
            found.setdefault(row.task, []).append(row.value)
    return {task: float(np.mean(values)) for task, values in found.items()}


def _list_labelled(cohort: Cohort) -> tuple[str, ...]:
    """People of training and validation with a labelled window, in the cohort's order."""
    labels = np.stack([cohort.read_labels(task) for task in TASKS])
    known = (labels != UNKNOWN).any(0)
    theirs = {
        item.subject
        for item in cohort.recordings
        if item.split in ("train", "validation") and known[item.first : item.first + item.rows].any()
    }
    return tuple(name for name in cohort.subjects if name in theirs)

"""Which windows train, choose and test a probe: held-out splits with nested subsets, or folds over subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from physioray.data.cohort import Cohort
from physioray.data.splits import Fold
from physioray.embeddings import Embeddings
from physioray.probe import ProbeError, check_training
from physioray.results import CROSS_VALIDATION, TEST
from physioray.signals import UNKNOWN, Task

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of the embeddings for one fit of one task."""

    train: Int64[np.ndarray, " train"]
    validation: Int64[np.ndarray, " validation"]
    test: Int64[np.ndarray, " test"]
    training_subjects: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One score to come: its parts are fitted one by one, and their predictions scored together."""

    split: str
    seed: int
    folds: tuple[Fold, ...]
    largest: bool = True


def map_owners(embeddings: Embeddings, cohort: Cohort) -> dict[str, Int64[np.ndarray, " rows"]]:
    """Rows of the embeddings that belong to each subject of the cohort."""
    order = np.argsort(embeddings.subject, kind="stable")
    bounds = np.searchsorted(embeddings.subject[order], np.arange(len(cohort.subjects) + 1))
    return {name: order[bounds[i] : bounds[i + 1]].astype(np.int64) for i, name in enumerate(cohort.subjects)}


def plan_folds(folds: Mapping[int, Sequence[Fold]]) -> list[Plan]:
    """One plan per seed: all folds of its cross-validation.

    Raises:
        ProbeError: a subject stands in two parts of a fold, or in test more than once under a seed.
    """
    for seed, parts in folds.items():
        tested: set[str] = set()
        for number, fold in enumerate(parts, start=1):
            groups = [set(fold.train), set(fold.validation), set(fold.test)]
            shared = (groups[0] & groups[1]) | (groups[2] & (groups[0] | groups[1] | tested))
            if shared:
                raise ProbeError(
                    f"A subject must stand in one part of a fold and in test once per seed, but seed {seed}, fold "
                    f"{number} repeats {', '.join(sorted(shared)[:5])}. Make the folds with fold_subjects."
                )
            tested |= groups[2]
    return [Plan(split=CROSS_VALIDATION, seed=seed, folds=tuple(parts)) for seed, parts in folds.items()]


def plan_holdout(
    cohort: Cohort, subsets: Mapping[int, Sequence[str]] | None, seeds: Sequence[int], note: Note
) -> list[Plan]:
    """One plan per training size and seed, on the cohort's own splits.

    Args:
        cohort: whose splits they are.
        subsets: by size asked for, the training subjects; the whole training split if None. A size that has fewer
            subjects than asked uses those there are and says so; one that adds none to the size before is left out.
        seeds: of the heads.
        note: takes sentences for the reader.

    Raises:
        ProbeError: a subset holds a subject from outside the training split.
    """
    members: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for recording in cohort.recordings:
        members.setdefault(recording.split, set()).add(recording.subject)
    chosen = {len(members["train"]): tuple(sorted(members["train"]))} if subsets is None else subsets
    plans = []
    largest = max((len(names) for names in chosen.values()), default=0)
    seen = set()
    for asked, names in sorted(chosen.items()):
        if len(names) < asked:
            note(f"{asked} training subjects were asked for, {len(names)} are there and used.")
        if len(names) in seen:
            continue
        seen.add(len(names))
        strangers = sorted(set(names) - members["train"])
        if strangers:
            raise ProbeError(f"A training subset must come from the training split, but holds {strangers[:5]}.")
        fold = Fold(
            train=tuple(names), validation=tuple(sorted(members["validation"])), test=tuple(sorted(members["test"]))
        )
        plans += [Plan(split=TEST, seed=seed, folds=(fold,), largest=len(names) == largest) for seed in seeds]
    return plans


def gather_parts(
    embeddings: Embeddings, owners: Mapping[str, Int64[np.ndarray, " rows"]], task: Task, plan: Plan, note: Note
) -> list[Part]:
    """The plan's folds as rows of windows with a known label; folds that cannot be fitted are left out with a note.

    Args:
        embeddings: of all windows.
        owners: rows of each subject, see `map_owners`.
        task: whose labels count.
        plan: the folds.
        note: takes sentences for the reader.
    """
    labels = embeddings.find_labels(task.name)
    parts = []
    for number, fold in enumerate(plan.folds):
        rows, people = {}, {}
        for name, subjects in (("train", fold.train), ("validation", fold.validation), ("test", fold.test)):
            taken = [owners[subject] for subject in subjects if subject in owners]
            joined = np.sort(np.concatenate(taken)) if taken else np.empty(0, np.int64)
            rows[name] = joined[labels[joined] != UNKNOWN]
            people[name] = len(np.unique(embeddings.subject[rows[name]]))
        where = f"{task.title}, seed {plan.seed}, fold {number + 1}" if len(plan.folds) > 1 else task.title
        try:
            check_training(labels[rows["train"]], len(task.classes))
        except ProbeError as error:
            note(f"{where}: left out. {error}")
            continue
        if not len(rows["test"]):
            note(f"{where}: no test window has a label.")
            continue
        counts = np.bincount(labels[rows["train"]], minlength=len(task.classes))
        missing = [name for name, count in zip(task.classes, counts, strict=True) if count == 0]
        if missing:
            note(f"{where}: no training window is {', '.join(missing)}, which is then never predicted.")
        parts.append(Part(**rows, training_subjects=people["train"]))
    return parts

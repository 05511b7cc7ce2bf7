"""Which windows train, choose and test a probe: held-out splits with nested subsets, or folds over subjects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from physioray.data.cohort import Cohort, LockedSplitError
from physioray.data.splits import Fold
from physioray.embeddings import Embeddings
from physioray.probe import ProbeError, check_training
from physioray.results import CROSS_VALIDATION, TEST, VALIDATION, VALIDATION_CROSS_VALIDATION
from physioray.signals import UNKNOWN, LookupMiss, Task
from physioray.storage import hash_value

Note = Callable[[str], None]

INNER_FRACTION = 0.15
"""Share of the training subjects that choose the penalty where the validation subjects are scored."""


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


def check_scored(cohort: Cohort, scored: str) -> None:
    """Refuse scores of test subjects on a cohort whose test split is locked.

    Raises:
        LookupMiss: `scored` is neither `test` nor `validation`.
        LockedSplitError: test was asked for and is locked.
    """
    if scored not in (TEST, VALIDATION):
        raise LookupMiss(f"What is scored must be {TEST} or {VALIDATION}, but got {scored!r}.")
    if scored == TEST and cohort.test_locked:
        raise LockedSplitError(
            f"Test scores must not be computed while settings are chosen: the test split of {cohort.location} is "
            "locked. Ask for scored='validation', or open the cohort without test_locked once all is chosen."
        )


def plan_folds(folds: Mapping[int, Sequence[Fold]], *, cohort: Cohort | None = None, scored: str = TEST) -> list[Plan]:
    """One plan per seed: all folds of its cross-validation.

    Args:
        folds: by seed.
        cohort: whose test subjects must not be among them where settings are still chosen.
        scored: `test`, or `validation` while settings are still chosen.

    Raises:
        ProbeError: a subject stands in two parts of a fold, or in test more than once under a seed.
        LockedSplitError: settings are still chosen, and a fold holds a subject of the test split.
    """
    reserved = set(cohort.list_subjects("test")) if cohort is not None and scored == VALIDATION else set()
    split = VALIDATION_CROSS_VALIDATION if scored == VALIDATION else CROSS_VALIDATION
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
            leaking = sorted(reserved & (groups[0] | groups[1] | groups[2]))
            if leaking:
                raise LockedSplitError(
                    f"Settings must be chosen without the test subjects, but seed {seed}, fold {number} holds "
                    f"{', '.join(leaking[:5])}. Make the folds of the other labelled subjects (choose_protocol "
                    "does on a locked cohort)."
                )
    return [Plan(split=split, seed=seed, folds=tuple(parts)) for seed, parts in folds.items()]


def hold_out_inner(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training subjects who train, and those who choose the penalty; always the same for the same people.

    INNER_FRACTION of them choose, rounded up, at least one trains. Where validation subjects are scored to choose
    settings, they must not also choose the penalty: the best of five would be scored on what it was picked by.
    """
    ordered = sorted(names, key=lambda name: hash_value(["inner", name]))
    kept = min(math.ceil(INNER_FRACTION * len(ordered)), max(len(ordered) - 1, 0))
    return tuple(sorted(ordered[kept:])), tuple(sorted(ordered[:kept]))


def plan_holdout(
    cohort: Cohort,
    subsets: Mapping[int, Sequence[str]] | None,
    seeds: Sequence[int],
    note: Note,
    *,
    scored: str = TEST,
) -> list[Plan]:
    """One plan per training size and seed, on the cohort's own splits.

    Scored on test, the validation subjects choose the penalty. Scored on validation, a part of the training subjects
    does (`hold_out_inner`), and no test subject is in the plan.

    Args:
        cohort: whose splits they are.
        subsets: by size asked for, the training subjects; the whole training split if None. A size that has fewer
            subjects than asked uses those there are and says so; one that adds none to the size before is left out.
        seeds: of the heads.
        note: takes sentences for the reader.
        scored: `test`, or `validation` while settings are still chosen.

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
        validation, test = (tuple(sorted(members[part])) for part in ("validation", "test"))
        if scored == VALIDATION:
            train, inner = hold_out_inner(names)
            fold = Fold(train=train, validation=inner, test=validation)
        else:
            fold = Fold(train=tuple(names), validation=validation, test=test)
        plans += [Plan(split=scored, seed=seed, folds=(fold,), largest=len(names) == largest) for seed in seeds]
    if scored == VALIDATION:
        note(
            "For choosing settings: scored on the validation subjects, the penalty chosen by "
            f"{INNER_FRACTION:.0%} of the training subjects; no test subject was read."
        )
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

"""Divides subjects into pretraining, training, validation and test, and refuses a division that leaks.

Rule (Fang et al. 2024, section 3.1, gives only the numbers 657/117/219 of 993 labelled subjects): of the sorted
and seeded-shuffled labelled subjects 22 % are test, 15 % of the rest validation, both rounded up. Unlabelled
subjects serve pretraining alone. The unit is always the subject: all nights of a subject share one split.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from physioray.config import SplitConfig
from physioray.signals import SPLITS, Split
from physioray.storage import Location

SMALL_COHORT = 100
"""Below this many labelled subjects splits are stratified by age class and cross-validation is what is reported."""

SPLITS_FILE = "splits.json"

AgeClass = Literal["younger", "older", "unknown"]


class SplitError(ValueError):
    """A division of subjects that leaks or cannot be made; the message names the subjects."""


@dataclass(frozen=True, kw_only=True)
class SubjectSummary:
    """What dividing needs to know of a subject: whether any night has stages or arousals, and the age class."""

    labelled: bool
    age_class: AgeClass = "unknown"


@dataclass(frozen=True, kw_only=True)
class Division:
    """Who is in which split, and the nested training subsets.

    Attributes:
        splits: subjects of every split, sorted; every split of `signals.SPLITS` is a key.
        training_subsets: for each size its subjects in order; a smaller subset begins every larger one.
        seed: of the shuffle.
        stratified: True if the shuffle was stratified by age class.
        notes: sentences a reader of the card must know, for example that sizes were scaled down.
    """

    splits: Mapping[Split, tuple[str, ...]]
    training_subsets: Mapping[int, tuple[str, ...]]
    seed: int
    stratified: bool = False
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> int:
        """Number of labelled subjects: those of training, validation and test."""
        return sum(len(self.splits[name]) for name in SPLITS if name != "pretrain")

    def map_subjects(self) -> dict[str, Split]:
        """The split of every subject."""
        return {subject: name for name, members in self.splits.items() for subject in members}

    def to_dict(self) -> dict[str, Any]:
        """The division as plain JSON values."""
        return {
            "notes": list(self.notes),
            "seed": self.seed,
            "splits": {name: list(self.splits[name]) for name in SPLITS},
            "stratified": self.stratified,
            "training_subsets": {str(size): list(names) for size, names in self.training_subsets.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One fold of a cross-validation by subject."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def classify_age(age: float | None, threshold: float) -> AgeClass:
    """Say whether an age in years counts as older (at least `threshold`), younger, or is unknown."""
    if age is None:
        return "unknown"
    return "older" if age >= threshold else "younger"


def divide_subjects(subjects: Mapping[str, SubjectSummary], settings: SplitConfig) -> Division:
    """Divide subjects by the 22 % / 15 % rule and make the nested training subsets.

    Below `SMALL_COHORT` labelled subjects the shuffle is stratified by age class where ages are known, and the
    subset sizes scale down with the training split. With one or two labelled subjects training comes first, then
    test, and validation stays empty; `notes` says so.

    Args:
        subjects: by subject id.
        settings: fractions, seed and subset sizes.

    Returns:
        A division that `check_division` has passed.
    """
    labelled = sorted(name for name, summary in subjects.items() if summary.labelled)
    unlabelled = sorted(name for name, summary in subjects.items() if not summary.labelled)
    small = len(labelled) < SMALL_COHORT
    strata = {name: subjects[name].age_class for name in labelled}
    stratified = small and len(set(strata.values())) > 1
    order = _order_subjects(labelled, [settings.seed], strata if stratified else None)
    # Training is never empty while a labelled subject exists; test comes before validation.
    test = min(_round_up(settings.test_fraction * len(order)), max(len(order) - 1, 0))
    rest = len(order) - test
    validation = min(_round_up(settings.validation_fraction * rest), max(rest - 1, 0))
    train = order[test + validation :]
    sizes = _subset_sizes(len(train), settings.subset_sizes, scale=small)
    division = Division(
        splits={
            "pretrain": tuple(unlabelled),
            "train": tuple(sorted(train)),
            "validation": tuple(sorted(order[test : test + validation])),
            "test": tuple(sorted(order[:test])),
        },
        training_subsets={size: tuple(train[:size]) for size in sizes},
        seed=settings.seed,
        stratified=stratified,
        notes=_describe_smallness(len(labelled), stratified, sizes, settings.subset_sizes) if small else (),
    )
    check_division(division, subjects)
    return division


def _round_up(value: float) -> int:
    # 0.07 x 100 is 7.000000000000001 in floating point and must still be 7.
    return math.ceil(value - 1e-9)


def _order_subjects(names: Sequence[str], seed: Sequence[int], strata: Mapping[str, str] | None) -> list[str]:
    """Shuffle sorted names; with strata, spread each stratum evenly so that every stretch holds its share."""
    names = sorted(names)
    shuffled = [names[i] for i in np.random.default_rng(list(seed)).permutation(len(names))]
    if strata is None:
        return shuffled
    totals = Counter(strata[name] for name in shuffled)
    seen: Counter[str] = Counter()
    places: dict[str, float] = {}
    for name in shuffled:
        places[name] = (seen[strata[name]] + 0.5) / totals[strata[name]]
        seen[strata[name]] += 1
    # The sort is stable, so the shuffle decides between equal places.
    return sorted(shuffled, key=places.__getitem__)


def scale_sizes(train: int, sizes: Sequence[int]) -> list[int]:
    """Training-set sizes for a cohort with `train` training subjects: the largest becomes all of them."""
    return _subset_sizes(train, sizes, scale=True)


def _subset_sizes(train: int, sizes: Sequence[int], *, scale: bool) -> list[int]:
    if train == 0:
        return []
    if scale and sizes:
        scaled = {max(2, _round_up(size * train / max(sizes))) for size in sizes}
        return sorted({min(size, train) for size in scaled} | {train})
    kept = [size for size in sorted(set(sizes)) if size < train]
    return kept if len(kept) == len(set(sizes)) else [*kept, train]


def _describe_smallness(
    labelled: int, stratified: bool, sizes: Sequence[int], wanted: Sequence[int]
) -> tuple[str, ...]:
    if labelled == 0:
        return ("No subject has labels: all serve pretraining, and nothing can be trained for or scored.",)
    notes = [f"A small cohort of {labelled} labelled subjects (fewer than {SMALL_COHORT})."]
    if labelled == 1:
        notes.append("The one labelled subject is for training: there is nobody to test on.")
    elif labelled == 2:
        notes.append("Of the two labelled subjects one is for training and one for test: validation is empty.")
    if labelled > 1:
        notes.append("What is reported is cross-validation by subject over all labelled subjects.")
    if stratified:
        notes.append("Splits are stratified by age class.")
    notes.append(
        f"Training subsets of {', '.join(map(str, sizes))} subjects stand in for {', '.join(map(str, wanted))}."
    )
    return tuple(notes)


def check_division(division: Division, subjects: Iterable[str] | None = None) -> None:
    """Refuse a division that leaks: a subject twice, or a training subset that is not nested within training.

    Args:
        division: to be checked.
        subjects: if given, exactly these must have been divided.

    Raises:
        SplitError: naming the first subjects that break the rule.
    """
    if set(division.splits) != set(SPLITS):
        raise SplitError(f"The splits must be {', '.join(SPLITS)}, but got {', '.join(sorted(division.splits))}.")
    where: dict[str, str] = {}
    for name in SPLITS:
        for subject in division.splits[name]:
            if subject in where:
                raise SplitError(
                    f"A subject must be in one split once, but {subject!r} is in {where[subject]} and {name}. "
                    "Divide the subjects again."
                )
            where[subject] = name
    if subjects is not None:
        expected = set(subjects)
        wrong = sorted(expected ^ set(where))
        if wrong:
            raise SplitError(
                f"The splits must hold exactly the {len(expected)} subjects of the cohort, but differ in "
                f"{_name_some(wrong)}. Divide the subjects again."
            )
    _check_subsets(division)


def _check_subsets(division: Division) -> None:
    train = set(division.splits["train"])
    smaller: tuple[str, ...] = ()
    for size, members in sorted(division.training_subsets.items()):
        if len(set(members)) != size or len(members) != size:
            raise SplitError(f"A training subset of {size} must hold {size} subjects, but has {len(set(members))}.")
        outside = sorted(set(members) - train)
        if outside:
            raise SplitError(f"A training subset must lie within training, but {size} holds {_name_some(outside)}.")
        if members[: len(smaller)] != smaller:
            raise SplitError(f"Training subsets must be nested, but {size} does not begin with that of {len(smaller)}.")
        smaller = members


def check_recordings(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse recordings of one subject in two splits.

    Args:
        rows: each with `recording`, `subject` and `split`, as in a cohort's manifest.

    Raises:
        SplitError: naming the subject and both recordings.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        known = first.setdefault(row["subject"], row)
        if known["split"] != row["split"]:
            raise SplitError(
                f"All recordings of a subject must be in one split, but those of {row['subject']!r} are not: "
                f"{known['recording']} is in {known['split']}, {row['recording']} in {row['split']}."
            )


def read_division(cohort: Location) -> Division:
    """Read the division that a cohort publishes in its `splits.json`, and check it.

    Raises:
        SplitError: the file leaks (it may have been edited by hand).
    """
    content = (cohort / SPLITS_FILE).read_json()
    division = Division(
        splits={name: tuple(members) for name, members in content["splits"].items()},
        training_subsets={int(size): tuple(names) for size, names in content["training_subsets"].items()},
        seed=content["seed"],
        stratified=content["stratified"],
        notes=tuple(content["notes"]),
    )
    check_division(division)
    return division


def fold_subjects(
    subjects: Sequence[str],
    folds: int,
    seed: int,
    validation_fraction: float,
    strata: Mapping[str, str] | None = None,
) -> list[Fold]:
    """Make the folds of a cross-validation by subject: each subject is in test exactly once.

    Args:
        subjects: their ids, in any order.
        folds: wanted; with fewer subjects each fold tests one of them.
        seed: another seed gives other folds.
        validation_fraction: of the subjects that a fold does not test, rounded up; training keeps at least
            one subject, so with two subjects validation is empty.
        strata: a class per subject (for example its age class) that every fold holds its share of.

    Raises:
        SplitError: fewer than two subjects, fewer than two folds, or a subject named twice.
    """
    repeated = sorted(name for name, count in Counter(subjects).items() if count > 1)
    if repeated:
        raise SplitError(f"Subjects must be named once each, but {_name_some(repeated)} are repeated.")
    if len(subjects) < 2 or folds < 2:
        raise SplitError(
            f"Cross-validation by subject needs at least 2 subjects and 2 folds, but got {len(subjects)} labelled "
            f"subjects and {folds} folds. Add recordings of another subject, or leave this evaluation out."
        )
    order = _order_subjects(subjects, [seed], strata)
    bounds = np.linspace(0, len(order), min(folds, len(order)) + 1).round().astype(int)
    result = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rest = _order_subjects(order[:start] + order[stop:], [seed, number + 1], strata)
        kept = min(_round_up(validation_fraction * len(rest)), len(rest) - 1)
        result.append(
            Fold(
                train=tuple(sorted(rest[kept:])),
                validation=tuple(sorted(rest[:kept])),
                test=tuple(sorted(order[start:stop])),
            )
        )
    return result


def shrink_fold(fold: Fold, size: int, seed: Sequence[int], strata: Mapping[str, str] | None = None) -> Fold:
    """The same fold with at most `size` training subjects; with the same seed a smaller set begins every larger one.

    Args:
        fold: whose validation and test stay as they are.
        size: training subjects wanted.
        seed: of the order in which subjects are taken.
        strata: a class per subject that every training set holds its share of.
    """
    order = _order_subjects(fold.train, [*seed, 7], strata)
    return replace(fold, train=tuple(sorted(order[:size])))


def _name_some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more

"""Subjects are divided by the paper's rule, and a leak is a failed run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physioray.config import SplitConfig
from physioray.data.splits import (
    Division,
    SplitError,
    SubjectSummary,
    check_division,
    check_recordings,
    classify_age,
    divide_subjects,
    fold_subjects,
    read_division,
)
from physioray.storage import open_location


def _subjects(labelled: int, unlabelled: int = 0, older_every: int = 0) -> dict[str, SubjectSummary]:
    found = {}
    for number in range(labelled):
        age_class = "unknown" if not older_every else "older" if number % older_every == 0 else "younger"
        found[f"tr{number:04d}"] = SubjectSummary(labelled=True, age_class=age_class)
    found |= {f"te{number:04d}": SubjectSummary(labelled=False) for number in range(unlabelled)}
    return found


def _sizes(division: Division) -> tuple[int, ...]:
    return tuple(len(division.splits[name]) for name in ("pretrain", "train", "validation", "test"))


def test_the_papers_993_labelled_subjects_give_219_117_657() -> None:
    division = divide_subjects(_subjects(993, 989), SplitConfig())
    assert _sizes(division) == (989, 657, 117, 219)
    assert list(division.training_subsets) == [25, 50, 100, 250, 500]
    assert not division.stratified and division.notes == ()


def test_training_subsets_are_beginnings_of_one_order_that_is_not_the_alphabet() -> None:
    subsets = divide_subjects(_subjects(993), SplitConfig()).training_subsets
    assert subsets[500][:25] == subsets[25] and subsets[500][:250] == subsets[250]
    assert list(subsets[25]) != sorted(subsets[25])


def test_the_division_depends_on_the_seed_and_not_on_the_order_of_arrival() -> None:
    subjects = _subjects(120, 10)
    backwards = dict(reversed(subjects.items()))
    assert divide_subjects(subjects, SplitConfig()) == divide_subjects(backwards, SplitConfig())
    other = divide_subjects(subjects, SplitConfig(seed=43))
    assert other.splits["test"] != divide_subjects(subjects, SplitConfig()).splits["test"]


def test_two_hundred_subjects_get_the_subset_of_all_there_are() -> None:
    division = divide_subjects(_subjects(200), SplitConfig())
    assert list(division.training_subsets) == [25, 50, 100, len(division.splits["train"])]


def test_a_small_cohort_is_stratified_by_age_and_says_that_its_sizes_are_scaled() -> None:
    subjects = _subjects(40, older_every=4)
    division = divide_subjects(subjects, SplitConfig())
    assert division.stratified
    assert _sizes(division) == (0, 26, 5, 9)
    for name in ("train", "validation", "test"):
        members = division.splits[name]
        older = sum(subjects[member].age_class == "older" for member in members)
        assert abs(older - len(members) / 4) <= 1
    assert list(division.training_subsets) == [2, 3, 6, 13, 26]
    text = " ".join(division.notes)
    assert "40 labelled subjects" in text and "stratified" in text and "2, 3, 6, 13, 26" in text
    assert "cross-validation" in text


def test_without_ages_a_small_cohort_is_not_called_stratified() -> None:
    assert not divide_subjects(_subjects(21), SplitConfig()).stratified


@pytest.mark.parametrize(
    ("labelled", "expected"),
    [(0, (2, 0, 0, 0)), (1, (2, 1, 0, 0)), (2, (2, 1, 0, 1)), (3, (2, 1, 1, 1)), (4, (2, 2, 1, 1)), (7, (2, 4, 1, 2))],
)
def test_tiny_cohorts_are_divided_and_say_what_is_missing(labelled: int, expected: tuple[int, ...]) -> None:
    division = divide_subjects(_subjects(labelled, 2), SplitConfig())
    assert _sizes(division) == expected
    assert division.notes
    if labelled == 1:
        assert "nobody to test on" in " ".join(division.notes)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.sampled_from(["older", "younger", "unknown"]), max_size=130),
    unlabelled=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_no_division_ever_leaks_or_loses_a_subject(classes: list, unlabelled: int, seed: int) -> None:
    subjects = {f"s{i}": SubjectSummary(labelled=True, age_class=name) for i, name in enumerate(classes)}
    subjects |= {f"u{i}": SubjectSummary(labelled=False) for i in range(unlabelled)}
    division = divide_subjects(subjects, SplitConfig(seed=seed))
    together = [name for members in division.splits.values() for name in members]
    assert sorted(together) == sorted(subjects)
    assert set(division.splits["pretrain"]) == {f"u{i}" for i in range(unlabelled)}
    assert division.labelled == len(classes)
    assert not classes or division.splits["train"]


def test_a_subject_in_two_splits_is_refused_by_name() -> None:
    division = divide_subjects(_subjects(30), SplitConfig())
    leaked = division.splits["test"][0]
    splits = dict(division.splits) | {"train": (*division.splits["train"], leaked)}
    with pytest.raises(SplitError, match=leaked):
        check_division(replace(division, splits=splits))


def test_a_subject_twice_in_one_split_is_refused() -> None:
    division = divide_subjects(_subjects(30), SplitConfig())
    splits = dict(division.splits) | {"test": division.splits["test"] * 2}
    with pytest.raises(SplitError, match="one split once"):
        check_division(replace(division, splits=splits))


def test_a_forgotten_or_foreign_subject_is_refused() -> None:
    subjects = _subjects(30)
    division = divide_subjects(subjects, SplitConfig())
    with pytest.raises(SplitError, match="'stranger'"):
        check_division(division, [*subjects, "stranger"])
    with pytest.raises(SplitError, match="tr0000"):
        check_division(division, [name for name in subjects if name != "tr0000"])


def test_subsets_must_be_nested_within_training_and_of_their_size() -> None:
    division = divide_subjects(_subjects(120), SplitConfig())
    subsets = dict(division.training_subsets)
    with pytest.raises(SplitError, match="nested"):
        check_division(replace(division, training_subsets=subsets | {50: tuple(reversed(subsets[50]))}))
    with pytest.raises(SplitError, match="within training"):
        outside = (division.splits["test"][0], *subsets[25][1:])
        check_division(replace(division, training_subsets={25: outside}))
    with pytest.raises(SplitError, match="must hold 25"):
        check_division(replace(division, training_subsets={25: subsets[25][:24]}))


def test_two_nights_of_a_subject_in_two_splits_are_refused() -> None:
    rows = [
        {"recording": "night1", "subject": "ann", "split": "train"},
        {"recording": "night2", "subject": "ann", "split": "test"},
    ]
    with pytest.raises(SplitError, match="night1 is in train, night2 in test"):
        check_recordings(rows)
    check_recordings(rows[:1] * 2)


def test_the_published_file_reads_back_and_a_leak_in_it_is_found(tmp_path) -> None:
    division = divide_subjects(_subjects(40, 3, older_every=2), SplitConfig())
    cohort = open_location(tmp_path)
    (cohort / "splits.json").write_json(division.to_dict())
    assert read_division(cohort) == division
    content = division.to_dict()
    content["splits"]["test"].append(content["splits"]["pretrain"][0])
    (cohort / "splits.json").write_json(content)
    with pytest.raises(SplitError, match="pretrain and test"):
        read_division(cohort)


def test_every_subject_knows_its_split() -> None:
    division = divide_subjects(_subjects(10, 1), SplitConfig())
    splits = division.map_subjects()
    assert len(splits) == 11 and splits["te0000"] == "pretrain"
    assert {name for name, split in splits.items() if split == "test"} == set(division.splits["test"])


@pytest.mark.parametrize("count", [2, 3, 5, 21, 99])
def test_each_subject_is_tested_once_and_folds_do_not_leak(count: int) -> None:
    names = [f"s{i}" for i in range(count)]
    folds = fold_subjects(names, 5, 0, 0.15)
    assert len(folds) == min(5, count)
    assert sorted(name for fold in folds for name in fold.test) == sorted(names)
    for fold in folds:
        assert sorted((*fold.train, *fold.validation, *fold.test)) == sorted(names)
        assert fold.train and fold.test
        assert fold.validation or count == 2


def test_folds_are_seeded_and_hold_their_share_of_each_stratum() -> None:
    names = [f"s{i:02d}" for i in range(40)]
    strata = {name: "older" if i % 2 else "younger" for i, name in enumerate(names)}
    folds = fold_subjects(names, 5, 3, 0.15, strata)
    assert folds == fold_subjects(list(reversed(names)), 5, 3, 0.15, strata)
    assert folds != fold_subjects(names, 5, 4, 0.15, strata)
    for fold in folds:
        assert abs(sum(strata[name] == "older" for name in fold.test) - len(fold.test) / 2) <= 1
        assert abs(sum(strata[name] == "older" for name in fold.validation) - len(fold.validation) / 2) <= 1


def test_folds_of_one_subject_or_of_a_repeated_one_are_refused() -> None:
    with pytest.raises(SplitError, match="at least 2 subjects"):
        fold_subjects(["only"], 5, 0, 0.15)
    with pytest.raises(SplitError, match="'twin'"):
        fold_subjects(["twin", "twin", "other"], 2, 0, 0.15)


def test_an_age_is_older_from_the_threshold_on() -> None:
    assert [classify_age(age, 55.0) for age in (54.9, 55.0, None)] == ["younger", "older", "unknown"]

"""What a sweep varies: names are found or refused with near ones, and every corner is built before anything runs."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from physioray.config import MaskConfig, ProbeConfig
from physioray.presets import find_preset
from physioray.search_space import (
    Choice,
    apply_parameters,
    check_space,
    choice,
    flatten_settings,
    integers,
    list_grid,
    loguniform,
    uniform,
)
from physioray.signals import LookupMiss

TINY = find_preset("tiny")
BASE = {
    "model": TINY.model,
    "objective": TINY.objective,
    "train": TINY.train,
    "probe": ProbeConfig(),
    "training_subjects": 50,
}


def test_a_dotted_name_changes_one_nested_field_and_nothing_else() -> None:
    changed = apply_parameters(BASE, {"objective.mask.hidden_ratio": 0.5, "training_subjects": 10})
    assert changed["objective"] == replace(TINY.objective, mask=replace(TINY.objective.mask, hidden_ratio=0.5))
    assert changed["training_subjects"] == 10
    assert changed["train"] == TINY.train and BASE["training_subjects"] == 50
    before, after = flatten_settings(BASE), flatten_settings(changed)
    assert {name for name in after if after[name] != before[name]} == {
        "objective.mask.hidden_ratio",
        "training_subjects",
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("objective.mask.hiden_ratio", "objective.mask.hidden_ratio"),
        ("objective.mask.ratio", "objective.mask.hidden_ratio"),
        ("learning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("training_subject", "training_subjects"),
    ],
)
def test_a_misspelt_setting_is_an_error_that_names_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(LookupMiss, match=near):
        check_space(BASE, {name: uniform(0.1, 0.5)})


@pytest.mark.parametrize("name", ["objective.mask", "train.learning_rate.x", "training_subjects.x"])
def test_a_name_must_end_at_a_single_field(name: str) -> None:
    with pytest.raises(LookupMiss, match="must"):
        check_space(BASE, {name: uniform(0.1, 0.5)})


def test_a_corner_that_a_config_refuses_is_found_before_anything_runs() -> None:
    space = {"model.width": choice([32, 48]), "model.heads": choice([2, 5])}
    with pytest.raises(ValueError, match=r"\{'model.width': 32, 'model.heads': 5\} is not: .*multiple of heads"):
        check_space(BASE, space)
    check_space(BASE, {"model.width": choice([30, 40]), "model.heads": choice([2, 5])})


def test_of_a_very_large_space_every_value_is_still_built_once() -> None:
    space = {f"extra{number}": choice([1, 2, 3, 4]) for number in range(8)}
    base = BASE | dict.fromkeys(space, 1)
    check_space(base, space)
    with pytest.raises(ValueError, match=r"hidden_ratio.*1.5"):
        check_space(base, space | {"objective.mask.hidden_ratio": choice([0.3, 1.5, 0.6])})


def test_whole_numbers_and_truth_values_keep_their_kind() -> None:
    with pytest.raises(ValueError, match="whole number"):
        check_space(BASE, {"model.layers": uniform(1, 4)})
    with pytest.raises(ValueError, match="same kind"):
        check_space(BASE, {"objective.mask.drop": choice([0, 1])})
    check_space(BASE, {"model.layers": integers(1, 4), "objective.mask.drop": choice([True, False])})


def test_tuples_and_words_can_be_chosen() -> None:
    space = {"train.betas": choice([(0.9, 0.95), (0.9, 0.999)]), "objective.weighting": choice(["modality", "token"])}
    assert [point["train.betas"] for point in list_grid(space)] == [(0.9, 0.95)] * 2 + [(0.9, 0.999)] * 2
    assert apply_parameters(BASE, list_grid(space)[-1])["objective"].weighting == "token"


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform(0.5, 0.5),
        lambda: loguniform(0.0, 1.0),
        lambda: uniform(0.1, 0.5, step=-0.1),
        lambda: choice([]),
        lambda: choice([1, 2, 1]),
        lambda: choice([MaskConfig()]),
    ],
)
def test_ranges_and_choices_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_an_empty_space_and_a_grid_over_a_stepless_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        check_space(BASE, {})
    with pytest.raises(ValueError, match=r"step.*train.learning_rate"):
        list_grid({"train.learning_rate": loguniform(1e-4, 1e-2)})


@given(
    low=some.integers(-50, 50),
    count=some.integers(1, 12),
    step=some.sampled_from([0.05, 0.1, 0.25, 1.0]),
    values=some.lists(some.integers(0, 99), min_size=1, max_size=4, unique=True),
)
def test_a_grid_is_every_combination_once_with_the_last_name_fastest(low, count, step, values) -> None:
    space = {"a": uniform(low * step, (low + count) * step, step=step), "b": Choice(values=tuple(values))}
    points = [(point["a"], point["b"]) for point in list_grid(space)]
    expected = list(itertools.product([low * step + k * step for k in range(count + 1)], values))
    assert [b for _, b in points] == [b for _, b in expected]
    assert [a for a, _ in points] == pytest.approx([a for a, _ in expected], abs=1e-9)

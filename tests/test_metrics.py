import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from physioray.metrics import (
    METRICS,
    _score_confusions,
    aggregate_score,
    bootstrap_by_subject,
    count_confusion,
    draw_subjects,
    explain_rarity,
    explain_undefined,
    find_metric,
    score_predictions,
    weigh_confusions,
)
from physioray.signals import TASKS, LookupMiss

SLEEP, AGE = TASKS["sleep"], TASKS["age"]


def guess(classes, n, seed, skill=1.5):
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes)) + skill * np.eye(classes)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return true, probabilities.argmax(1), probabilities


@pytest.mark.parametrize("task", [SLEEP, AGE])
def test_scores_equal_those_of_scikit_learn_on_windows_with_a_label(task):
    true, predicted, probabilities = guess(len(task.classes), 400, 1)
    labels = true.copy()
    labels[::7] = -1
    known = labels >= 0
    scores = score_predictions(task, labels, predicted, probabilities)
    true, predicted, probabilities = true[known], predicted[known], probabilities[known]
    auroc = (
        reference.roc_auc_score(true, probabilities[:, 1])
        if len(task.classes) == 2
        else reference.roc_auc_score(true, probabilities, multi_class="ovr")
    )
    expected = {
        "balanced_accuracy": reference.balanced_accuracy_score(true, predicted),
        "kappa": reference.cohen_kappa_score(true, predicted),
        "auroc": auroc,
        "f1_macro": reference.f1_score(true, predicted, average="macro"),
        "f1_weighted": reference.f1_score(true, predicted, average="weighted"),
        "accuracy": reference.accuracy_score(true, predicted),
    }
    assert tuple(scores) == METRICS
    assert scores == pytest.approx(expected)


def test_a_class_missing_from_the_truth_is_left_out_of_balanced_accuracy_and_leaves_auroc_without_a_value():
    true = np.array([0, 0, 1, 1, 2])
    predicted = np.array([0, 3, 1, 1, 2])
    probabilities = np.eye(5)[predicted]
    scores = score_predictions(SLEEP, true, predicted, probabilities)
    assert scores["balanced_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert scores["f1_macro"] == pytest.approx(reference.f1_score(true, predicted, average="macro", zero_division=0))
    assert scores["auroc"] is None
    assert "N3, REM" in explain_undefined(SLEEP, true, predicted)["auroc"]


def test_one_class_only_leaves_kappa_and_auroc_without_a_value_and_no_label_leaves_none():
    same = np.ones(6, int)
    scores = score_predictions(AGE, same, same, np.tile([0.2, 0.8], (6, 1)))
    assert scores["kappa"] is None and scores["auroc"] is None
    assert scores["balanced_accuracy"] == 1.0
    nothing = score_predictions(AGE, -same, same, np.tile([0.2, 0.8], (6, 1)))
    assert set(nothing.values()) == {None}
    assert "no window" in explain_undefined(AGE, -same, same)["accuracy"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(2, 8))
def test_the_metrics_of_a_draw_equal_scikit_learn_with_the_draw_as_weights(seed, classes, subjects):
    generator = np.random.default_rng(seed)
    n = 60
    true, predicted = generator.integers(0, classes, n), generator.integers(0, classes, n)
    owner = generator.integers(0, subjects, n)
    weights = draw_subjects(subjects, 3, seed)
    drawn = _score_confusions(weigh_confusions(classes, true, predicted, owner, weights))
    for i, weight in enumerate(weights):
        sample = weight[owner]
        kept = sample > 0
        if not kept.any():
            continue
        arguments = (true[kept], predicted[kept])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "balanced_accuracy": reference.balanced_accuracy_score(*arguments, sample_weight=sample[kept]),
                "kappa": reference.cohen_kappa_score(*arguments, sample_weight=sample[kept]),
                "f1_macro": reference.f1_score(*arguments, average="macro", sample_weight=sample[kept]),
                "f1_weighted": reference.f1_score(*arguments, average="weighted", sample_weight=sample[kept]),
                "accuracy": reference.accuracy_score(*arguments, sample_weight=sample[kept]),
            }
        for metric, value in expected.items():
            np.testing.assert_allclose(drawn[metric][i], value, atol=1e-9, err_msg=metric)


@pytest.mark.parametrize("task", [SLEEP, AGE])
def test_intervals_equal_a_bootstrap_that_copies_the_windows_of_the_subjects_drawn(task):
    true, predicted, probabilities = guess(len(task.classes), 300, 4)
    probabilities = probabilities.round(2)  # ties
    subject = np.arange(300) // 30 + 100
    fast = bootstrap_by_subject(task, true, predicted, probabilities, subject, draws=40, seed=3)
    slow = []
    for weight in draw_subjects(10, 40, 3):
        rows = np.concatenate([np.flatnonzero(subject == 100 + s) for s in range(10) for _ in range(int(weight[s]))])
        slow.append(score_predictions(task, true[rows], predicted[rows], probabilities[rows]))
    for metric in METRICS:
        expected = np.percentile([scores[metric] for scores in slow], [2.5, 97.5])
        np.testing.assert_allclose(fast[metric], expected, atol=1e-9, err_msg=metric)


def test_many_distinct_scores_are_grouped_with_an_error_far_below_the_interval(monkeypatch):
    true, predicted, probabilities = guess(2, 6000, 5, skill=0.5)
    subject = np.arange(6000) // 300
    grouped = bootstrap_by_subject(AGE, true, predicted, probabilities, subject, 100, 0)["auroc"]
    monkeypatch.setattr("physioray.metrics.SCORE_BINS", 10**9)
    exact = bootstrap_by_subject(AGE, true, predicted, probabilities, subject, 100, 0)["auroc"]
    np.testing.assert_allclose(grouped, exact, atol=1e-5)


def test_an_interval_by_subject_is_wider_than_one_by_window_when_subjects_differ():
    generator = np.random.default_rng(0)
    subject = np.repeat(np.arange(12), 100)
    true = generator.integers(0, 2, 1200)
    right = generator.random(1200) < np.repeat(generator.uniform(0.3, 1, 12), 100)
    predicted = np.where(right, true, 1 - true)
    probabilities = np.eye(2)[predicted]
    people = bootstrap_by_subject(AGE, true, predicted, probabilities, subject, 300, 0)["accuracy"]
    windows = bootstrap_by_subject(AGE, true, predicted, probabilities, np.arange(1200), 300, 0)["accuracy"]
    assert people[1] - people[0] > 3 * (windows[1] - windows[0])


def test_one_subject_has_no_interval():
    true, predicted, probabilities = guess(2, 20, 0)
    intervals = bootstrap_by_subject(AGE, true, predicted, probabilities, np.zeros(20, int), 50, 0)
    assert set(intervals.values()) == {None}


def test_a_metric_that_most_draws_leave_undefined_has_no_interval():
    # Only one of three subjects holds the second class: 8 of 27 draws lack it; with 30 copies of the first
    # kind most draws do not.
    true = np.array([0, 0, 1])
    predicted = np.array([0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    assert bootstrap_by_subject(AGE, true, predicted, probabilities, np.arange(3), 400, 0)["auroc"] is not None
    nothing = bootstrap_by_subject(AGE, true * 0, predicted, probabilities, np.arange(3), 400, 0)
    assert nothing["auroc"] is None


def test_the_aggregate_reproduces_the_paper():
    paper = aggregate_score({"sleep": 0.744, "age": 0.719, "arousal": 0.637})
    assert paper == pytest.approx(1.144, abs=1e-3)
    assert aggregate_score({"sleep": 0.2, "age": 0.5}) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least one task"):
        aggregate_score({})
    with pytest.raises(LookupMiss, match="sleep, age, arousal"):
        aggregate_score({"slep": 0.5})


def test_a_metric_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(LookupMiss, match="balanced_accuracy, kappa"):
        find_metric("balanced")


def test_the_confusion_counts_known_windows_only():
    counts = count_confusion(AGE, np.array([0, 1, -1, 1]), np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(counts, [[1, 0], [1, 1]])


def test_a_class_of_few_windows_is_named_with_its_people():
    true, subject = np.repeat([0, 1], [200, 7]), np.arange(207) % 3
    sentence = explain_rarity(AGE, true, subject)
    assert "only 7 scored windows, of 3 of 3 people" in sentence and AGE.classes[1] in sentence
    assert explain_rarity(AGE, np.repeat([0, 1], [200, 20]), np.arange(220) % 3) == ""
    # A class that does not occur at all is another matter: guessing is then right more often.
    assert explain_rarity(SLEEP, np.zeros(50, int), np.zeros(50, int)) == ""
    assert explain_rarity(SLEEP, np.zeros(0, int), np.zeros(0, int)) == ""

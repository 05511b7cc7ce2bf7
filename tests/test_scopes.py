"""What is scored beside all windows: sleep alone, patients, every person; and cohorts that lack classes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as reference

from physioray.config import ProbeConfig
from physioray.data.splits import fold_subjects
from physioray.embeddings import EmbeddingError, Embeddings
from physioray.evaluate import evaluate_probe
from physioray.metrics import METRICS, aggregate_score, balance_confusions, score_subjects
from physioray.report import describe_results
from physioray.results import (
    ScoreRow,
    read_results,
    read_subject_scores,
    write_results,
    write_subject_scores,
)
from physioray.score_tables import find_chance, tabulate_headline, tabulate_scopes
from physioray.scoring import Answers, count_confusions, vote_by_subject
from physioray.signals import TASKS
from physioray.storage import open_location
from tests.test_evaluate import describe, make_folds, take
from tests.written_cohorts import write_cohort

CONFIG = ProbeConfig(seeds=(0, 1), penalties=(1e-3, 1e-1), bootstrap_draws=100, folds=4)
QUICK = replace(CONFIG, seeds=(0,))
CONVERGED = ("probe_converged",)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    splits = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    return write_cohort(tmp_path_factory.mktemp("cohort"), [30] * 12, modalities=("eeg",), splits=splits)


@pytest.fixture(scope="module")
def crossed(cohort):
    return evaluate_probe(
        describe(cohort, 1.0),
        cohort,
        CONFIG,
        features="pretrained",
        folds=make_folds(cohort, CONFIG),
        evaluations=CONVERGED,
    )


def select(evaluation, task, seed):
    return [row for row in evaluation.predictions.to_pylist() if (row["task"], row["seed"]) == (task, seed)]


def test_arousal_is_also_scored_on_windows_whose_true_stage_is_known_and_not_wake(cohort, crossed):
    stage = cohort.read_labels("sleep")
    rows = [row for row in select(crossed, "arousal", 0) if stage[row["window_id"]] > 0]
    true, predicted = np.array([(row["true"], row["predicted"]) for row in rows]).T
    found = take(crossed, task="arousal", seed=0, metric="balanced_accuracy", scope="sleep_windows")[0]
    assert found.value == pytest.approx(reference.balanced_accuracy_score(true, predicted))
    assert found.windows == len(rows) == int((stage > 0).sum()) < cohort.windows
    assert found.low < found.value < found.high
    whole = take(crossed, task="arousal", seed=0, metric="balanced_accuracy")[0]
    assert whole.windows == cohort.windows and whole.value != found.value


def test_windows_without_a_stage_are_left_out_of_the_sleep_score(cohort, monkeypatch):
    stage = cohort.read_labels("sleep")
    stage[::2] = -1
    original = type(cohort).read_labels
    monkeypatch.setattr(
        type(cohort), "read_labels", lambda self, task: stage if task == "sleep" else original(self, task)
    )
    found = evaluate_probe(
        describe(cohort, 1.0), cohort, replace(QUICK, tasks=("arousal",)), features="untrained", evaluations=CONVERGED
    )
    test = np.arange(270, 360)
    assert take(found, task="arousal", metric="accuracy", scope="sleep_windows")[0].windows == (stage[test] > 0).sum()


def test_age_is_also_decided_once_per_patient_by_the_mean_probability_of_the_windows(crossed):
    rows = select(crossed, "age", 1)
    votes = {}
    for row in rows:
        votes.setdefault((row["subject"], row["true"]), []).append(row["p1"])
    true = np.array([key[1] for key in votes])
    chosen = np.array([int(np.mean(values) > 0.5) for values in votes.values()])
    found = take(crossed, task="age", seed=1, scope="patients", metric="balanced_accuracy")[0]
    assert found.value == pytest.approx(reference.balanced_accuracy_score(true, chosen))
    assert (found.subjects, found.windows, found.classes) == (12, 360, 2)
    auroc = take(crossed, task="age", seed=1, scope="patients", metric="auroc")[0]
    assert auroc.value == pytest.approx(reference.roc_auc_score(true, [np.mean(values) for values in votes.values()]))
    assert take(crossed, task="sleep", scope="patients") == []


def test_a_vote_counts_every_window_of_a_person_once():
    answers = Answers(
        window_id=np.arange(5),
        true=np.array([0, 0, 1, 1, 0]),
        probabilities=np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.4, 0.6], [0.1, 0.9]]),
        subject=np.array([3, 3, 7, 7, 7]),
        training_subjects=1,
    )
    voted = vote_by_subject(answers, 2)
    np.testing.assert_allclose(voted.probabilities, [[0.55, 0.45], [0.3, 0.7]])
    assert voted.true.tolist() == [0, 1] and voted.subject.tolist() == [3, 7]


def test_every_person_has_a_row_of_scores_that_scikit_learn_confirms(crossed, tmp_path):
    table = crossed.subject_scores.to_pylist()
    assert len(table) == 12 * 2 * 4  # people x seeds x (three tasks, and arousal during sleep)
    mine = [row for row in select(crossed, "sleep", 0) if row["subject"] == "rec004"]
    true, predicted = np.array([(row["true"], row["predicted"]) for row in mine]).T
    row = next(
        row
        for row in table
        if (row["subject"], row["task"], row["seed"], row["scope"]) == ("rec004", "sleep", 0, "windows")
    )
    assert row["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(true, predicted))
    assert row["kappa"] == pytest.approx(reference.cohen_kappa_score(true, predicted))
    probabilities = np.array([[entry[f"p{k}"] for k in range(5)] for entry in mine])
    assert row["auroc"] == pytest.approx(
        np.mean([reference.roc_auc_score(true == k, probabilities[:, k]) for k in range(5)]), abs=1e-6
    )
    assert row["windows"] == 30 and row["classes"] == len(np.unique(true))
    age = [row for row in table if row["task"] == "age"]
    assert all(row["auroc"] is None and row["classes"] == 1 for row in age)  # a person has one age
    place = open_location(tmp_path / "subject_scores.parquet")
    write_subject_scores(place, [crossed.subject_scores])
    assert read_subject_scores(place).equals(crossed.subject_scores)


def test_scores_of_people_leave_out_nobody_and_take_ties_by_half():
    true, predicted = np.array([0, 1, 1, 0, 0]), np.array([0, 1, 0, 1, 0])
    probabilities = np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8], [0.9, 0.1], [0.7, 0.3]])
    scores = score_subjects(TASKS["age"], true, predicted, probabilities, np.array([0, 0, 0, 1, 1]), 2)
    assert tuple(scores) == METRICS
    assert scores["auroc"][0] == pytest.approx(0.75) and np.isnan(scores["auroc"][1])
    assert scores["balanced_accuracy"].tolist() == pytest.approx([0.75, 0.5])


def test_the_aggregates_interval_draws_the_same_people_for_all_tasks(cohort, crossed):
    aggregate = take(crossed, task="aggregate", seed=0)[0]
    assert aggregate.low < aggregate.value < aggregate.high
    generator = np.random.default_rng(0)
    weights = generator.multinomial(12, np.full(12, 1 / 12), size=CONFIG.bootstrap_draws)
    gains = []
    for task in TASKS.values():
        rows = select(crossed, task.name, 0)
        counts = np.zeros((12, len(task.classes), len(task.classes)))
        for row in rows:
            counts[cohort.subjects.index(row["subject"]), row["true"], row["predicted"]] += 1
        drawn = np.array([sum(w * c for w, c in zip(line, counts, strict=True)) for line in weights])
        gains.append(balance_confusions(drawn) / task.chance - 1)
    low, high = np.percentile(np.mean(gains, 0), [2.5, 97.5])
    assert (aggregate.low, aggregate.high) == pytest.approx((low, high))


def test_confusion_matrices_count_every_prediction_once(crossed):
    counts = count_confusions(crossed.predictions)
    assert set(counts) == {(task, "pretrained", "probe_converged", seed) for task in TASKS for seed in (0, 1)}
    rows = select(crossed, "sleep", 1)
    expected = reference.confusion_matrix([row["true"] for row in rows], [row["predicted"] for row in rows])
    np.testing.assert_array_equal(counts["sleep", "pretrained", "probe_converged", 1], expected)


def test_where_a_cohort_lacks_classes_guessing_is_one_over_those_that_occur_and_tables_say_so(cohort, tmp_path):
    vectors = describe(cohort, 2.0)
    sleep = vectors.labels["sleep"].copy()
    sleep[sleep >= 3] = -1
    three = replace(vectors, labels=dict(vectors.labels) | {"sleep": sleep})
    found = evaluate_probe(three, cohort, QUICK, features="untrained", evaluations=CONVERGED)
    row = take(found, task="sleep", metric="balanced_accuracy")[0]
    assert row.classes == 3 and row.chance == pytest.approx(1 / 3)
    values = {task: take(found, task=task, metric="balanced_accuracy")[0].value for task in TASKS}
    aggregate = take(found, task="aggregate")[0]
    assert aggregate.value == pytest.approx(
        np.mean([values["sleep"] * 3 - 1, values["age"] * 2 - 1, values["arousal"] * 2 - 1])
    )
    assert "guessing sleep scores 1/3" in aggregate.note
    assert aggregate_score({"sleep": 0.4}, {"sleep": 4}) == pytest.approx(0.6)
    assert find_chance(found.scores, "sleep") == (
        pytest.approx(1 / 3),
        "Sleep stage: only 3 of 5 classes occur, so guessing scores 1/3",
    )
    write_results(open_location(tmp_path / "results.jsonl"), found.scores)
    text = describe_results(open_location(tmp_path))
    assert "0.333" in text and "guessing scores 1/3" in text
    # A score above 1/5 and below 1/3 does not clear chance.
    low = [replace(row, value=0.3, low=0.25, high=0.35)]
    assert tabulate_headline(low).rows[0].cells[0].above_chance is False
    assert tabulate_headline([replace(low[0], classes=5)]).rows[0].cells[0].above_chance is True


def test_scores_of_an_older_version_are_read_as_those_of_all_windows(tmp_path, crossed):
    place = open_location(tmp_path / "results.jsonl")
    write_results(place, take(crossed, task="sleep"))
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    for line in lines:
        del line["scope"], line["classes"]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_results(place)
    assert {(row.scope, row.classes, row.chance) for row in rows} == {("windows", 0, 0.2)}


def test_other_scopes_stand_in_a_table_of_their_own_and_not_in_the_headline(crossed):
    headline = tabulate_headline(crossed.scores)
    assert headline.rows[0].cells[1].value == pytest.approx(
        np.mean([row.value for row in take(crossed, task="age", metric="balanced_accuracy")])
    )
    table = tabulate_scopes(crossed.scores)
    assert table.columns == ("Age, by patient vote", "Arousal, windows of sleep")
    assert table.rows[0].cells[0].value == pytest.approx(
        np.mean([row.value for row in take(crossed, task="age", metric="balanced_accuracy", scope="patients")])
    )
    assert tabulate_scopes([row for row in crossed.scores if row.scope == "windows"]) is None


def test_embeddings_of_another_cohort_are_refused(cohort):
    vectors = describe(cohort, 1.0)
    shifted = replace(vectors, window_id=vectors.window_id + 5)
    swapped = replace(vectors, subject=vectors.subject[::-1].copy())
    for other in (shifted, swapped):
        with pytest.raises(EmbeddingError, match=r"are of another cohort.*Embed this cohort again"):
            evaluate_probe(other, cohort, QUICK, features="untrained")


def test_labels_missing_for_a_whole_split_are_a_row_that_says_so(cohort):
    vectors = describe(cohort, 2.0)
    for split, rows, phrase in (
        ("test", slice(270, 360), "no test window has a label"),
        ("train", slice(0, 180), "A probe needs training windows with a label, but got none"),
    ):
        sleep = vectors.labels["sleep"].copy()
        sleep[rows] = -1
        other = replace(vectors, labels=dict(vectors.labels) | {"sleep": sleep})
        found = evaluate_probe(other, cohort, QUICK, features="untrained", evaluations=CONVERGED)
        row = take(found, task="sleep")[0]
        assert row.value is None and phrase in row.note, split
        assert take(found, task="age", metric="accuracy")[0].value is not None
        assert take(found, task="aggregate")[0].note.startswith("over age, arousal only")


def test_a_class_absent_from_a_training_subset_is_noted_and_the_larger_one_is_scored(cohort):
    vectors = describe(cohort, 2.0)
    sleep = vectors.labels["sleep"].copy()
    sleep[:60][sleep[:60] == 3] = -1
    other = replace(vectors, labels=dict(vectors.labels) | {"sleep": sleep})
    names = cohort.list_subjects("train")
    found = evaluate_probe(
        other, cohort, QUICK, features="untrained", subsets={2: names[:2], 6: names}, evaluations=CONVERGED
    )
    rows = take(found, task="sleep", metric="balanced_accuracy")
    assert [row.training_subjects for row in rows] == [2, 6] and all(row.value is not None for row in rows)
    assert any("no training window is N3" in note for note in found.notes)


def test_folds_of_one_seed_give_the_same_scores_whichever_tasks_stand_beside(cohort):
    vectors = describe(cohort, 1.0)
    folds = {0: fold_subjects(cohort.subjects, 4, 0, 0.2)}
    config = replace(QUICK, recipe_min_steps=50, recipe_passes=1)
    together = evaluate_probe(vectors, cohort, config, features="untrained", folds=folds)
    alone = evaluate_probe(vectors, cohort, replace(config, tasks=("age",)), features="untrained", folds=folds)
    assert isinstance(together.scores[0], ScoreRow) and isinstance(vectors, Embeddings)
    for evaluation in ("probe_converged", "probe_recipe"):
        first, second = (
            [row.value for row in take(found, task="age", evaluation=evaluation)] for found in (together, alone)
        )
        assert first == pytest.approx(second, abs=1e-6)

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pytest

from physioray.compare import ComparisonError, compare_paired, state_chance, state_difference
from physioray.config import ProbeConfig
from physioray.data.gather import GatherSource
from physioray.data.splits import fold_subjects
from physioray.divisions import map_owners
from physioray.embeddings import EmbeddingError, Embeddings, embed_windows
from physioray.evaluate import evaluate_probe
from physioray.metrics import METRICS
from physioray.probe import ProbeError
from physioray.results import (
    ScoreRow,
    read_predictions,
    read_results,
    write_predictions,
    write_results,
)
from physioray.signals import LookupMiss, find_task
from physioray.storage import StorageError, open_location
from tests.written_cohorts import write_cohort

CONFIG = ProbeConfig(
    seeds=(0, 1), penalties=(1e-3, 1e-1), recipe_min_steps=150, recipe_learning_rate=1e-2, bootstrap_draws=50, folds=4
)
QUICK = dataclasses.replace(CONFIG, seeds=(0,))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    splits = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    return write_cohort(tmp_path_factory.mktemp("cohort"), [30] * 12, modalities=("eeg",), splits=splits)


def describe(cohort, skill, seed=0, features=8):
    """Embeddings that carry the labels with a given skill; age is the subject's."""
    generator = np.random.default_rng(seed)
    ids = np.arange(cohort.windows)
    recording, _ = cohort.locate(ids)
    subject = np.array([item.subject_index for item in cohort.recordings])[recording]
    labels = {task: cohort.read_labels(task) for task in ("sleep", "age", "arousal")}
    vectors = generator.normal(size=(len(ids), features))
    vectors[:, :5] += skill * np.eye(5)[labels["sleep"]]
    vectors[:, 5] += skill * labels["age"]
    return Embeddings(vectors.astype(np.float32), labels, subject.astype(np.int64), recording.astype(np.int64), ids)


def make_folds(cohort, config=CONFIG):
    return {seed: fold_subjects(cohort.subjects, config.folds, seed, 0.2) for seed in config.seeds}


def take(evaluation, /, **wanted):
    wanted = {"scope": "windows"} | wanted
    return [row for row in evaluation.scores if all(getattr(row, name) == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def crossed(cohort):
    return evaluate_probe(
        describe(cohort, 2.0),
        cohort,
        CONFIG,
        features="pretrained",
        pretraining="mae_drop",
        config_hash="abc",
        folds=make_folds(cohort),
    )


def test_cross_validation_tests_every_subject_once_per_seed_and_scores_all_predictions_together(cohort, crossed):
    table = crossed.predictions.to_pylist()
    for task in ("sleep", "age", "arousal"):
        for seed in CONFIG.seeds:
            ids = [
                row["window_id"]
                for row in table
                if (row["task"], row["seed"], row["evaluation"]) == (task, seed, "probe_converged")
            ]
            assert sorted(ids) == list(range(cohort.windows))
    row = take(crossed, task="sleep", metric="balanced_accuracy", evaluation="probe_converged", seed=0)[0]
    assert (row.split, row.windows, row.subjects) == ("cross_validation", 360, 12)
    assert (row.pretraining, row.features, row.config_hash) == ("mae_drop", "pretrained", "abc")
    assert row.simulated and row.cohort_fingerprint == cohort.fingerprint
    assert 0.5 < row.low < row.value < row.high <= 1
    mine = [
        (entry["true"], entry["predicted"])
        for entry in table
        if (entry["task"], entry["seed"], entry["evaluation"]) == ("sleep", 0, "probe_converged")
    ]
    true, predicted = np.array(mine).T
    assert row.value == pytest.approx(np.mean([np.mean(predicted[true == k] == k) for k in range(5)]))


def test_every_seed_draws_other_folds_and_every_metric_has_a_row(crossed):
    values = {
        row.seed: row.value for row in take(crossed, task="sleep", metric="accuracy", evaluation="probe_converged")
    }
    assert set(values) == set(CONFIG.seeds) and len(set(values.values())) == 2
    assert [row.metric for row in take(crossed, task="age", evaluation="probe_recipe", seed=1)] == list(METRICS)


def test_the_aggregate_is_taken_per_seed_over_all_tasks(crossed):
    for evaluation in ("probe_converged", "probe_recipe"):
        for seed in CONFIG.seeds:
            parts = take(crossed, metric="balanced_accuracy", evaluation=evaluation, seed=seed)
            assert len(parts) == 3
            expected = np.mean([row.value / find_task(row.task).chance - 1 for row in parts])
            aggregate = take(crossed, task="aggregate", evaluation=evaluation, seed=seed)
            assert [row.value for row in aggregate] == pytest.approx([expected])
            assert aggregate[0].note == ""


def test_predictions_say_where_in_which_night_a_window_stands(crossed):
    rows = [row for row in crossed.predictions.to_pylist() if row["recording"] == "rec003" and row["task"] == "age"]
    first = min(rows, key=lambda row: row["window_id"])
    assert (first["window_id"], first["window"], first["start"], first["subject"]) == (90, 0, 0.0, "rec003")
    assert first["p0"] + first["p1"] == pytest.approx(1, abs=1e-5) and first["p2"] is None


def test_held_out_test_subjects_are_scored_once_and_the_converged_solver_says_it_has_no_spread(cohort):
    found = evaluate_probe(describe(cohort, 2.0), cohort, CONFIG, features="untrained")
    rows = take(found, task="sleep", metric="balanced_accuracy")
    assert [(row.evaluation, row.seed) for row in rows] == [
        ("probe_converged", 0),
        ("probe_recipe", 0),
        ("probe_recipe", 1),
    ]
    assert {row.split for row in rows} == {"test"} and {row.subjects for row in rows} == {3}
    assert {row.training_subjects for row in rows} == {6}
    assert {name for name in found.predictions.column("recording").to_pylist()} == {"rec009", "rec010", "rec011"}
    assert any("no spread" in note for note in found.notes)


def test_no_label_of_a_test_subject_reaches_the_probe(cohort):
    honest = describe(cohort, 2.0)
    scrambled = {task: values.copy() for task, values in honest.labels.items()}
    test = np.isin(honest.recording, (9, 10, 11))
    for values in scrambled.values():
        values[test] = np.random.default_rng(0).permutation(values[test])
    other = dataclasses.replace(honest, labels=scrambled)
    first, second = (
        evaluate_probe(vectors, cohort, QUICK, features="untrained").predictions for vectors in (honest, other)
    )
    assert first.column("p0").equals(second.column("p0"))
    assert not first.column("true").equals(second.column("true"))


def test_standardisation_sees_the_training_windows_only(cohort):
    honest = describe(cohort, 2.0)
    shifted = honest.vectors.copy()
    rows = np.isin(honest.recording, (9,))
    shifted[rows] *= 1000
    other = dataclasses.replace(honest, vectors=shifted)
    tables = [
        evaluate_probe(vectors, cohort, QUICK, features="untrained", evaluations=("probe_converged",)).predictions
        for vectors in (honest, other)
    ]
    ids = np.isin(tables[0].column("window_id").to_numpy(), honest.window_id[rows])
    kept = [table.column("p1").to_numpy()[~ids] for table in tables]
    np.testing.assert_allclose(kept[0], kept[1], atol=1e-6)


def test_nested_subsets_give_a_score_each_and_too_few_subjects_are_named(cohort):
    names = [item.subject for item in cohort.recordings if item.split == "train"]
    subsets = {2: names[:2], 4: names[:4], 25: names}
    found = evaluate_probe(describe(cohort, 2.0), cohort, QUICK, features="untrained", subsets=subsets)
    rows = take(found, task="sleep", metric="balanced_accuracy", evaluation="probe_converged")
    assert [row.training_subjects for row in rows] == [2, 4, 6]
    assert any("25 training subjects were asked for, 6 are there" in note for note in found.notes)
    assert len(found.predictions) == 90 * 3 * 2  # the largest subset only
    with pytest.raises(ProbeError, match="rec011"):
        evaluate_probe(describe(cohort, 2.0), cohort, QUICK, features="untrained", subsets={1: ["rec011"]})


def test_a_task_without_labels_is_skipped_with_a_row_that_says_so_and_the_others_go_on(cohort):
    vectors = describe(cohort, 2.0)
    labels = dict(vectors.labels) | {"arousal": np.full(cohort.windows, -1, np.int8)}
    del labels["age"]
    found = evaluate_probe(
        dataclasses.replace(vectors, labels=labels),
        cohort,
        QUICK,
        features="untrained",
        folds=make_folds(cohort, QUICK),
    )
    assert take(found, task="sleep", metric="kappa")[0].value > 0
    skipped = {row.task: row for row in found.scores if row.note.startswith("skipped")}
    assert set(skipped) == {"age", "arousal"}
    assert "no window has a label" in skipped["arousal"].note and skipped["arousal"].value is None
    assert "sleep, arousal only" in skipped["age"].note
    assert take(found, task="aggregate")[0].note == "over sleep only"
    assert any(note.startswith("Arousal is skipped") for note in found.notes)


def test_one_class_only_or_nan_embeddings_skip_with_a_reason_instead_of_a_crash(cohort):
    vectors = describe(cohort, 2.0)
    young = dataclasses.replace(vectors, labels=dict(vectors.labels) | {"age": np.zeros(cohort.windows, np.int8)})
    found = evaluate_probe(young, cohort, QUICK, features="untrained")
    assert "all 360 labelled windows are of one class, younger" in take(found, task="age")[0].note
    broken = vectors.vectors.copy()
    broken[7, 2] = np.nan
    found = evaluate_probe(dataclasses.replace(vectors, vectors=broken), cohort, QUICK, features="untrained")
    assert {row.value for row in found.scores} == {None}
    assert "1 of 360 windows" in found.scores[0].note and "window ids 7)" in found.scores[0].note
    assert len(found.predictions) == 0


def test_a_class_that_one_fold_lacks_is_noted_and_scored_all_the_same(cohort):
    vectors = describe(cohort, 2.0)
    sleep = vectors.labels["sleep"].copy()
    sleep[(sleep == 3) & (vectors.recording != 0)] = -1  # N3 in one subject only
    found = evaluate_probe(
        dataclasses.replace(vectors, labels=dict(vectors.labels) | {"sleep": sleep}),
        cohort,
        QUICK,
        features="untrained",
        folds=make_folds(cohort, QUICK),
    )
    assert any("no training window is N3, which is then never predicted" in note for note in found.notes)
    assert take(found, task="sleep", metric="balanced_accuracy")[0].value > 0.5


def test_a_fold_that_trains_on_one_class_is_left_out_with_a_note(cohort):
    folds = make_folds(cohort, QUICK)
    young = [item.subject for item in cohort.recordings if item.index % 2 == 0]
    folds[0][0] = dataclasses.replace(
        folds[0][0], train=tuple(name for name in folds[0][0].train if name in young), validation=()
    )
    found = evaluate_probe(
        describe(cohort, 2.0), cohort, QUICK, features="untrained", folds=folds, evaluations=("probe_converged",)
    )
    row = take(found, task="age", metric="accuracy")[0]
    assert row.subjects == 9 and row.value > 0.5
    assert any("Age, seed 0, fold 1: left out" in note for note in found.notes)


def test_folds_that_leak_a_subject_are_refused(cohort):
    folds = make_folds(cohort, QUICK)
    tested = folds[0][1].test[0]
    folds[0][1] = dataclasses.replace(folds[0][1], train=(*folds[0][1].train, tested))
    with pytest.raises(ProbeError, match=tested):
        evaluate_probe(describe(cohort, 2.0), cohort, QUICK, features="untrained", folds=folds)


def test_without_validation_windows_the_middle_penalty_holds_and_is_noted(cohort):
    folds = {0: [dataclasses.replace(fold, validation=()) for fold in make_folds(cohort, QUICK)[0]]}
    found = evaluate_probe(describe(cohort, 2.0), cohort, QUICK, features="untrained", folds=folds)
    assert any("middle penalty C = 0.1" in note for note in found.notes)


def test_an_evaluation_that_does_not_exist_is_answered_with_those_that_do(cohort):
    with pytest.raises(LookupMiss, match="probe_converged, probe_recipe"):
        evaluate_probe(describe(cohort, 2.0), cohort, QUICK, features="untrained", evaluations=("probe",))


def evaluate_quickly(cohort, skill, features, seed=0, config=CONFIG):
    return evaluate_probe(
        describe(cohort, skill, seed),
        cohort,
        config,
        features=features,
        folds=make_folds(cohort, config),
        evaluations=("probe_converged",),
    ).predictions


def test_a_paired_difference_is_significant_for_better_features_and_not_for_equal_ones(cohort):
    good, poor, other = (
        evaluate_quickly(cohort, skill, name, seed)
        for skill, name, seed in ((2.5, "pretrained", 1), (0.5, "untrained", 1), (2.5, "untrained", 2))
    )
    better = compare_paired(good, poor, "sleep", draws=200)
    assert better.is_above and better.value == pytest.approx(better.first_value - better.second_value)
    assert better.low < better.value < better.high and (better.seeds, better.subjects, better.windows) == (2, 12, 360)
    sentence = state_difference(better)
    assert "pretraining has overtaken the untrained encoder" in sentence and f"{better.value:+.3f}" in sentence
    worse = compare_paired(poor, good, "sleep", draws=200)
    assert worse.is_below and worse.value == pytest.approx(-better.value) and worse.low == pytest.approx(-better.high)
    equal = compare_paired(good, other, "sleep", draws=200)
    assert not equal.is_above and not equal.is_below
    assert "has not overtaken the untrained encoder: the difference cannot be told from 0" in state_difference(equal)


def test_pairing_takes_out_what_subjects_share(cohort):
    """The interval of the difference is far narrower than the two scores' own when both err on the same people."""
    table = evaluate_quickly(cohort, 1.0, "pretrained", config=QUICK)
    rows = table.to_pylist()
    changed = [dict(row, features="untrained") for row in rows]
    for row in changed[::20]:
        row["predicted"] = (row["predicted"] + 1) % 5
    difference = compare_paired(table, pa.Table.from_pylist(changed, schema=table.schema), "sleep", draws=200)
    assert difference.high - difference.low < 0.1


def test_evaluations_on_other_windows_are_not_compared(cohort):
    table = evaluate_quickly(cohort, 1.0, "pretrained", config=QUICK)
    with pytest.raises(ComparisonError, match="same windows"):
        compare_paired(table, table.slice(100), "sleep")
    with pytest.raises(ComparisonError, match="probe_recipe"):
        compare_paired(table, table, "sleep", evaluation="probe_recipe")


def test_chance_is_cleared_by_the_interval_not_by_the_value():
    assert "clears chance, 0.20" in state_chance("sleep", 0.5, 0.4)
    assert "does not clear chance, 0.50" in state_chance("age", 0.6, 0.49)


def test_where_classes_lack_the_score_of_guessing_is_said_and_nothing_is_claimed() -> None:
    sentence = state_chance("sleep", 0.25, 0.25, classes=4)
    assert "only 4 of 5 classes occur" in sentence and "0.25" in sentence and "clears" not in sentence


def test_results_come_back_as_written_and_a_broken_line_is_named(tmp_path, crossed):
    place = open_location(tmp_path / "results.jsonl")
    write_results(place, crossed.scores)
    assert read_results(place) == crossed.scores
    first = json.loads(place.read_text().splitlines()[0])
    assert set(first) == {field.name for field in dataclasses.fields(ScoreRow)}
    place.write_text(place.read_text() + '{"task": "sleep"}\n')
    with pytest.raises(StorageError, match=f"Line {len(crossed.scores) + 1} "):
        read_results(place)


def test_a_score_that_is_nan_is_never_written(tmp_path, crossed):
    place = open_location(tmp_path / "results.jsonl")
    with pytest.raises(ValueError):
        write_results(place, [dataclasses.replace(crossed.scores[0], value=math.nan)])
    assert not place.exists()


def test_predictions_come_back_as_written(tmp_path, crossed):
    place = open_location(tmp_path / "predictions.parquet")
    write_predictions(place, [crossed.predictions])
    assert read_predictions(place).equals(crossed.predictions)


def test_embeddings_come_back_as_saved_and_a_missing_file_says_what_to_do(tmp_path, cohort):
    vectors = describe(cohort, 1.0)
    place = open_location(tmp_path / "embeddings.arrow")
    vectors.save(place)
    loaded = Embeddings.load(place)
    np.testing.assert_array_equal(loaded.vectors, vectors.vectors)
    for name in ("subject", "recording", "window_id"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(vectors, name))
    assert list(loaded.labels) == list(vectors.labels)
    with pytest.raises(StorageError, match="Embed again"):
        Embeddings.load(open_location(tmp_path / "nothing.arrow"))
    place.write_bytes(b"half a file")
    with pytest.raises(StorageError, match="Embed again"):
        Embeddings.load(place)


def test_embedding_goes_over_every_window_of_a_source_with_any_description(cohort):
    source = GatherSource(cohort, cohort.find_windows(), batch_size=50)
    found = embed_windows(
        lambda batch: np.stack([batch.signals["eeg"].std(1), batch.window_id], 1), source.iterate_all()
    )
    assert found.vectors.dtype == np.float32 and len(found) == cohort.windows
    np.testing.assert_array_equal(found.vectors[:, 1], found.window_id)
    np.testing.assert_array_equal(found.labels["sleep"], cohort.read_labels("sleep"))
    chosen = found.select(found.labels["sleep"] == 2)
    assert set(chosen.labels["sleep"]) == {2} and len(chosen) == len(chosen.vectors)
    with pytest.raises(LookupMiss, match="sleep, age, arousal"):
        found.find_labels("slep")


def test_embedding_refuses_nothing_and_a_wrong_number_of_rows(cohort):
    with pytest.raises(EmbeddingError, match="at least one batch"):
        embed_windows(lambda batch: np.zeros((len(batch), 2)), [])
    source = GatherSource(cohort, cohort.find_windows(), batch_size=50)
    with pytest.raises(EmbeddingError, match="50 rows"):
        embed_windows(lambda batch: np.zeros((len(batch) - 1, 2)), source.iterate_all())


def test_owners_find_the_windows_of_every_subject_in_any_order(cohort):
    vectors = describe(cohort, 1.0)
    shuffled = np.random.default_rng(0).permutation(cohort.windows)
    mixed = Embeddings(
        vectors.vectors[shuffled],
        {task: values[shuffled] for task, values in vectors.labels.items()},
        vectors.subject[shuffled],
        vectors.recording[shuffled],
        vectors.window_id[shuffled],
    )
    for number, name in enumerate(cohort.subjects):
        assert set(mixed.subject[map_owners(mixed, cohort)[name]]) == {number}
        assert len(map_owners(mixed, cohort)[name]) == 30

"""Heads that are kept with a model, and how its scores fall without a modality."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.absences import list_subsets, measure_absences
from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import WindowReader
from physioray.embeddings import Embeddings
from physioray.origins import complete_run, open_model
from physioray.pretrained import PretrainedModel
from physioray.probe import balance_accuracy, choose_head, fit_path
from physioray.readouts import fit_readouts, load_readouts, save_readouts
from physioray.storage import Location, StorageError, open_location
from tests.trained_runs import PROBE, write_trained_run
from tests.written_cohorts import write_cohort


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Location, Cohort]:
    return write_trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(trained: tuple[Location, Cohort]) -> PretrainedModel:
    return open_model(trained[0])


def make_embeddings(cohort: Cohort, seed: int = 0) -> Embeddings:
    """Vectors of noise with some of the stage in the first number."""
    ids = cohort.find_windows()
    labels = {task: cohort.read_labels(task) for task in ("sleep", "age", "arousal")}
    vectors = np.random.default_rng(seed).standard_normal((len(ids), 6)).astype(np.float32)
    vectors[:, 0] += labels["sleep"]
    recording = cohort.locate(ids)[0]
    subject = np.array([item.subject_index for item in cohort.recordings], np.int64)[recording]
    return Embeddings(vectors=vectors, labels=labels, subject=subject, recording=recording, window_id=ids)


def test_a_kept_head_is_the_solver_s_on_the_training_subjects_with_the_penalty_of_validation(
    trained: tuple[Location, Cohort],
) -> None:
    cohort = trained[1]
    found = make_embeddings(cohort)
    readouts, missing = fit_readouts(found, cohort, PROBE, cross_validated=False)
    labels, split = found.labels["sleep"], np.array([item.split for item in cohort.recordings])[found.recording]
    train, validation = split == "train", split == "validation"
    heads = fit_path(found.vectors[train], labels[train], 5, PROBE.penalties)
    head = choose_head(heads, found.vectors[validation], labels[validation])
    np.testing.assert_array_equal(readouts["sleep"].head.weight, head.weight)
    assert (readouts["sleep"].head.penalty, readouts["sleep"].training_subjects) == (head.penalty, 4)
    assert readouts["sleep"].validation_subjects == 2 and missing == {}


def test_held_out_test_subjects_never_enter_a_kept_head_and_cross_validated_ones_do(
    trained: tuple[Location, Cohort],
) -> None:
    cohort = trained[1]
    first = make_embeddings(cohort)
    test = np.array([item.split == "test" for item in cohort.recordings])[first.recording]
    other = replace(first, vectors=np.where(test[:, None], 7.0, first.vectors).astype(np.float32))

    def weigh(embeddings: Embeddings, crossed: bool) -> np.ndarray:
        return fit_readouts(embeddings, cohort, PROBE, cross_validated=crossed)[0]["sleep"].head.weight

    np.testing.assert_array_equal(weigh(first, False), weigh(other, False))
    assert not np.array_equal(weigh(first, True), weigh(other, True))


def test_a_task_without_labels_has_a_reason_instead_of_a_head(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, [12, 12], splits=["train", "validation"], modalities=("eeg",))
    found = make_embeddings(cohort)
    found.labels["age"][:] = -1
    readouts, missing = fit_readouts(found, cohort, ProbeConfig(penalties=(1.0,)), cross_validated=False)
    assert set(readouts) == {"sleep", "arousal"} and "label" in missing["age"]


def test_kept_heads_come_back_to_the_bit_with_classes_that_are_never_predicted(
    trained: tuple[Location, Cohort], tmp_path: Path
) -> None:
    cohort = trained[1]
    found = make_embeddings(cohort)
    found.labels["sleep"][found.labels["sleep"] == 3] = -1
    readouts, _ = fit_readouts(found, cohort, PROBE, cross_validated=False)
    place = open_location(str(tmp_path))
    save_readouts(place, readouts, {"why": "a test"})
    again, facts = load_readouts(place)
    assert facts == {"why": "a test"} and list(again) == ["sleep", "age", "arousal"]
    for name, item in readouts.items():
        np.testing.assert_array_equal(item.predict(found.vectors), again[name].predict(found.vectors))
    assert again["sleep"].predict(found.vectors)[:, 3].max() == 0 and "N3" in again["sleep"].note


def test_damaged_heads_are_an_error_that_names_the_remedy(trained: tuple[Location, Cohort], tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    save_readouts(place, fit_readouts(make_embeddings(trained[1]), trained[1], PROBE, cross_validated=False)[0], {})
    (place / "heads.safetensors").write_bytes(b"\x80\x04K\x00.")
    with pytest.raises(StorageError, match="Export the run again"):
        load_readouts(place)


def test_every_subset_of_few_modalities_is_measured_and_of_many_all_but_one_and_each_alone() -> None:
    assert list_subsets(["eeg", "ecg"]) == [("eeg", "ecg"), ("eeg",), ("ecg",)]
    four = list_subsets(["eeg", "eog", "emg", "ecg"])
    assert len(four) == len(set(four)) == 15
    assert {len(subset) for subset in list_subsets(["eeg", "eog", "emg", "ecg", "airflow"])} == {5, 4, 1}
    assert list_subsets(["eeg"]) == [("eeg",)]


def score_slowly(model: PretrainedModel, cohort: Cohort, subset: tuple[str, ...]) -> float:
    """Balanced accuracy on sleep, window by window, with all but a subset declared absent."""
    batch = WindowReader(cohort).read(cohort.find_windows(splits=["validation"]))
    true, predicted = [], []
    for row in range(len(batch)):
        here = {name: bool(batch.present[name][row]) and name in subset for name in cohort.modalities}
        if any(here.values()):
            signals = {
                name: torch.from_numpy(batch.signals[name][row : row + 1]).float() * cohort.modalities[name].step
                for name in here
            }
            present = {name: torch.tensor([value]) for name, value in here.items()}
            vector = model(signals, present).detach().numpy()
            true.append(batch.labels["sleep"][row])
            predicted.append(model.readouts["sleep"].predict(vector).argmax())
    return balance_accuracy(np.array(true, np.int64), np.array(predicted, np.int64))


@pytest.mark.parametrize("subset", [("eeg", "eog", "emg", "ecg"), ("eog", "emg", "ecg"), ("eog", "emg"), ("emg",)])
def test_a_score_without_modalities_is_that_of_windows_in_which_they_are_absent(
    trained: tuple[Location, Cohort], model: PretrainedModel, subset: tuple[str, ...]
) -> None:
    rows = model.description["missing_modalities"]["rows"]
    row = next(item for item in rows if item["task"] == "sleep" and item["present"] == list(subset))
    assert row["value"] == pytest.approx(score_slowly(model, trained[1], subset))
    assert set(row["absent"]) | set(subset) == set(model.modalities)


def test_the_modality_that_carries_the_stage_is_the_one_whose_loss_costs(model: PretrainedModel) -> None:
    measured = model.description["missing_modalities"]
    rows = {tuple(row["absent"]): row for row in measured["rows"] if row["task"] == "sleep"}
    assert rows[()]["change"] == 0
    assert rows[("eeg",)]["change"] < -0.2 < rows[("ecg",)]["change"]
    # Two people drawn from two are no sample: below three no interval is drawn.
    assert rows[("eeg",)]["change_low"] is None and rows[("eeg",)]["change_high"] is None
    assert "SIMULATED" in measured["sentence"] and "2 labelled validation subjects" in measured["sentence"]


def test_with_three_people_or_more_a_change_stands_in_its_interval(tmp_path: Path, model: PretrainedModel) -> None:
    cohort = write_cohort(tmp_path, [12] * 5, splits=["train", "validation", "validation", "validation", "validation"])
    found = measure_absences(model.encoder, model.readouts, cohort)
    rows = {tuple(row["absent"]): row for row in found["rows"] if row["task"] == "sleep"}
    assert rows[("eeg",)]["change_low"] < rows[("eeg",)]["change"] < rows[("eeg",)]["change_high"] < 0
    assert rows[()]["low"] < rows[()]["value"] < rows[()]["high"]


def test_windows_that_have_nothing_of_a_subset_are_not_scored(model: PretrainedModel) -> None:
    rows = {tuple(row["present"]): row for row in model.description["missing_modalities"]["rows"]}
    assert rows[("emg",)]["windows"] < rows[("eeg",)]["windows"]


def test_many_windows_are_thinned_and_that_is_said(trained: tuple[Location, Cohort], model: PretrainedModel) -> None:
    found = measure_absences(model.encoder, model.readouts, trained[1], most_windows=10)
    assert found["windows"] == 10 and "thinned evenly from 48" in found["sentence"]


def test_without_labelled_validation_subjects_the_sentence_says_so(tmp_path: Path, model: PretrainedModel) -> None:
    cohort = write_cohort(tmp_path, [4, 4], splits=["train", "test"])
    found = measure_absences(model.encoder, model.readouts, cohort)
    assert found["rows"] == [] and found["sentence"].startswith("Not measured")


def test_a_run_without_heads_gets_them_from_its_cohort_and_keeps_them(tmp_path: Path) -> None:
    run, _ = write_trained_run(tmp_path, complete=False)
    told: list[str] = []
    assert set(open_model(run, say=told.append).readouts) == {"sleep", "age", "arousal"}
    assert told and open_model(run, say=told.append) and len(told) == 1


def test_heads_of_other_weights_are_fitted_again(tmp_path: Path) -> None:
    run, _ = write_trained_run(tmp_path)
    readouts, facts = load_readouts(run)
    save_readouts(run, readouts, facts | {"weights_sha256": "of another pass"})
    told: list[str] = []
    open_model(run, say=told.append)
    assert told and load_readouts(run)[1]["weights_sha256"] != "of another pass"


def test_embeddings_of_other_weights_are_not_used_for_heads(tmp_path: Path) -> None:
    run, cohort = write_trained_run(tmp_path, complete=False)
    make_embeddings(cohort).save(run / "embeddings.arrow")
    complete_run(run, cohort=cohort, probe=PROBE)
    assert load_readouts(run)[0]["sleep"].head.weight.shape == (5, 32)


def test_a_run_is_not_completed_from_another_cohort(tmp_path: Path) -> None:
    run, _ = write_trained_run(tmp_path, complete=False)
    other = write_cohort(tmp_path / "other", [24] * 3, seed=5)
    with pytest.raises(StorageError, match="its own cohort"):
        complete_run(run, cohort=other)

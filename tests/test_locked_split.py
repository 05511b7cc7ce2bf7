"""While settings are chosen nobody can read the test split, and nothing that is chosen depends on it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort, LockedSplitError
from physioray.data.gather import GatherSource, WindowReader
from physioray.data.splits import fold_subjects
from physioray.divisions import hold_out_inner, plan_holdout
from physioray.embeddings import embed_windows
from physioray.evaluate import evaluate_probe
from physioray.finetune import FinetuneJob, evaluate_finetuning
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, find_pretraining_windows, pretrain
from physioray.protocol import choose_protocol, find_labelled_windows
from physioray.strategies import find_strategy
from tests.written_cohorts import write_cohort

CONFIG = ProbeConfig(
    seeds=(0, 1),
    penalties=(1e-3, 1e-1),
    recipe_min_steps=60,
    recipe_passes=1,
    recipe_learning_rate=1e-2,
    bootstrap_draws=20,
    folds=3,
)
SPLITS = ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
TINY = find_preset("tiny")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), [24] * 10, modalities=("eeg", "ecg"), splits=SPLITS)  # type: ignore[arg-type]


@pytest.fixture()
def bare(cohort: Cohort, tmp_path: Path) -> Cohort:
    """The same cohort after somebody has taken the test subjects' shards away."""
    folder = tmp_path / "bare"
    shutil.copytree(cohort.location.path, folder)
    for name in ("rec007", "rec008"):
        (folder / "shards" / f"{name}.arrow").unlink()
    (folder / "shards" / "rec009.arrow").write_bytes(b"nothing that can be read")
    return Cohort.open(folder)


def describe(cohort: Cohort):
    source = GatherSource(cohort, cohort.find_windows(), batch_size=50)
    return embed_windows(
        lambda batch: np.log(batch.signals["eeg"].reshape(len(batch), 6, -1).std(2)), source.iterate_all()
    )


def test_a_locked_test_split_lists_its_subjects_and_gives_nothing_else(cohort: Cohort) -> None:
    locked, theirs = cohort.lock_test(), cohort.find_windows(splits=["test"])
    assert locked.test_locked and not cohort.test_locked and locked.lock_test() is locked
    assert Cohort.open(cohort.location.path, test_locked=True).test_locked
    assert locked.list_subjects("test") == ("rec007", "rec008", "rec009") and locked.subjects == cohort.subjects
    assert not np.isin(theirs, locked.find_windows()).any() and len(locked.find_windows()) == 7 * 24
    for task in ("sleep", "age", "arousal"):
        assert set(locked.read_labels(task)[theirs]) == {-1}
        np.testing.assert_array_equal(locked.read_labels(task)[: 7 * 24], cohort.read_labels(task)[: 7 * 24])
    assert not locked.read_column("present_eeg")[theirs].any() and np.isnan(locked.read_column("start")[theirs]).all()
    attempts = [
        lambda: locked.find_windows(splits=["train", "test"]),
        lambda: locked.find_windows(subjects=["rec000", "rec008"]),
        lambda: locked.open_shard(locked.recordings[9]),
        lambda: WindowReader(locked).read(theirs[:2]),
        lambda: GatherSource(locked, theirs, batch_size=4),
        lambda: find_pretraining_windows(locked, ["test"], ["eeg"]),
        lambda: plan_and_score_test(locked),
    ]
    for attempt in attempts:
        with pytest.raises(LockedSplitError, match=r"must not be.*while settings are chosen.*open the cohort without"):
            attempt()


def plan_and_score_test(locked: Cohort):
    return evaluate_probe(describe(locked), locked, CONFIG, features="untrained")


@pytest.mark.ray
def test_batches_through_ray_are_locked_too(cohort: Cohort) -> None:
    from physioray.data.stream import StreamSource

    with pytest.raises(LockedSplitError):
        StreamSource(cohort.lock_test(), cohort.find_windows(), batch_size=8)


def test_selection_scores_the_validation_subjects_and_reads_nothing_of_test(cohort: Cohort, bare: Cohort) -> None:
    """Both kinds of probe, from embeddings of everybody and from a cohort whose test shards are gone."""
    whole = describe(cohort)
    with pytest.raises(Exception, match=r"rec007|rec008|rec009|No such file"):
        describe(bare)
    first = evaluate_probe(whole, cohort, CONFIG, features="untrained", scored="validation")
    second = evaluate_probe(describe(bare.lock_test()), bare, CONFIG, features="untrained", scored="validation")
    assert [row for row in first.scores if row.value is None] == []
    assert first.scores == second.scores and first.predictions.equals(second.predictions)
    assert {row.split for row in first.scores} == {"validation"}
    assert set(first.predictions.column("subject").to_pylist()) == {"rec005", "rec006"}
    assert set(first.subject_scores.column("subject").to_pylist()) == {"rec005", "rec006"}
    assert any("no test subject was read" in note for note in first.notes)


def test_who_chooses_the_penalty_is_not_scored_and_is_the_same_every_time(cohort: Cohort) -> None:
    train = cohort.list_subjects("train")
    rest, inner = hold_out_inner(train)
    assert len(inner) == 1 and sorted((*rest, *inner)) == sorted(train)
    assert hold_out_inner(train[::-1]) == (rest, inner)
    assert hold_out_inner(["one"]) == (("one",), ())
    plans = plan_holdout(cohort, {2: train[:2], 5: train}, (0, 1), lambda _: None, scored="validation")
    assert [(len(plan.folds[0].train), plan.seed, plan.split) for plan in plans] == [
        (1, 0, "validation"),
        (1, 1, "validation"),
        (4, 0, "validation"),
        (4, 1, "validation"),
    ]
    for plan in plans:
        assert plan.folds[0].test == ("rec005", "rec006")
        assert set(plan.folds[0].train) | set(plan.folds[0].validation) <= set(train)


def test_a_small_cohort_selects_by_cross_validation_over_everybody_but_the_test_subjects(
    cohort: Cohort, bare: Cohort
) -> None:
    tables = []
    for place in (cohort.lock_test(), bare.lock_test()):
        protocol = choose_protocol(place, CONFIG)
        assert protocol.scored == "validation" and "test" not in protocol.splits
        assert protocol.labelled == tuple(f"rec{i:03d}" for i in range(7))
        assert "all 7 labelled subjects who are not in the test split" in protocol.sentence
        assert "everybody but the validation and test subjects" in protocol.sentence
        windows = find_labelled_windows(place, protocol, ("eeg", "ecg"))
        assert len(windows) == 7 * 24
        found = evaluate_probe(
            describe(place), place, CONFIG, features="untrained", folds=protocol.folds, scored=protocol.scored
        )
        tables.append(found)
    assert tables[0].scores == tables[1].scores
    assert {row.split for row in tables[0].scores} == {"validation_cross_validation"}
    assert {row.subjects for row in tables[0].scores} == {7}


def test_a_large_locked_cohort_selects_on_its_validation_subjects(cohort: Cohort) -> None:
    protocol = choose_protocol(cohort.lock_test(), replace(CONFIG, cross_validate_below=10))
    assert (protocol.folds, protocol.scored, protocol.splits) == (None, "validation", ("pretrain", "train"))
    assert choose_protocol(cohort, replace(CONFIG, cross_validate_below=10)).scored == "test"


def test_folds_with_a_test_subject_are_refused_while_settings_are_chosen(cohort: Cohort) -> None:
    folds = {0: fold_subjects(cohort.subjects, 3, 0, 0.15)}
    with pytest.raises(LockedSplitError, match=r"rec00[789]"):
        evaluate_probe(describe(cohort), cohort, CONFIG, features="untrained", folds=folds, scored="validation")


def test_pretraining_and_finetuning_for_selection_read_nothing_of_test(bare: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "pretrained"
    preset = replace(TINY, train=replace(TINY.train, passes=1))
    pretrain(
        PretrainJob.from_strategy(
            find_strategy("multimae_drop"), preset, cohort=str(bare.location), out=str(out), threads=1
        )
    )
    job = FinetuneJob(
        cohort=str(bare.location),
        out=str(tmp_path / "finetuned"),
        task="sleep",
        checkpoint=str(out / "checkpoints" / "last.pt"),
        train=replace(TINY.finetune, passes=1),
        threads=1,
    )
    config = replace(CONFIG, tasks=("sleep",), seeds=(0,))
    found = evaluate_finetuning(job, config, scored="validation")
    assert {(row.split, row.subjects, row.training_subjects) for row in found.scores} == {("validation", 2, 4)}
    assert set(found.predictions.column("subject").to_pylist()) == {"rec005", "rec006"}

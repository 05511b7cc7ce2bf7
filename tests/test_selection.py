"""Nothing of the test subjects reaches code that chooses between models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort, LockedSplitError
from physioray.data.gather import GatherSource
from physioray.embeddings import embed_windows
from physioray.evaluate import evaluate_probe
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, load_encoder, make_encode, pretrain
from physioray.selection import SELECTION_SPLITS, VALIDATION, VALIDATION_FOLDS, fold_selection
from physioray.signals import UNKNOWN
from physioray.storage import open_location
from tests.written_cohorts import write_cohort

PROBE = ProbeConfig(tasks=("sleep", "age"), seeds=(0, 1), folds=2, bootstrap_draws=10, recipe_min_steps=10)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return write_cohort(tmp_path / "cohort", [20] * 12)


def test_windows_labels_and_signals_of_test_subjects_cannot_be_read(cohort: Cohort) -> None:
    locked = cohort.lock_test()
    theirs = cohort.find_windows(splits=["test"])
    assert len(theirs)
    assert not np.intersect1d(locked.find_windows(), theirs).size
    for task in ("sleep", "age", "arousal"):
        assert (locked.read_labels(task)[theirs] == UNKNOWN).all()
        others = locked.find_windows()
        assert (locked.read_labels(task)[others] == cohort.read_labels(task)[others]).all()
    assert not locked.read_column("present_eeg")[theirs].any()
    subject = next(item.subject for item in cohort.recordings if item.split == "test")
    for ask in (
        lambda: locked.find_windows(splits=["train", "test"]),
        lambda: locked.find_windows(subjects=[subject]),
        lambda: locked.open_shard(next(item for item in locked.recordings if item.split == "test")),
        lambda: list(GatherSource(locked, theirs, batch_size=8).iterate_all()),
    ):
        with pytest.raises(LockedSplitError, match="must not be read while settings are chosen"):
            ask()
    assert len(cohort.find_windows(splits=["test"])) == len(theirs), "the cohort itself is not locked"


@pytest.mark.parametrize("below, split", [(100, VALIDATION_FOLDS), (1, VALIDATION)])
def test_no_fold_of_a_selection_holds_a_test_subject(cohort: Cohort, below: int, split: str) -> None:
    folds, name = fold_selection(cohort, replace(PROBE, cross_validate_below=below))
    assert name == split
    test = {item.subject for item in cohort.recordings if item.split == "test"}
    for parts in folds.values():
        for fold in parts:
            groups = [set(fold.train), set(fold.validation), set(fold.test)]
            assert all(groups)
            assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
            assert not test & (groups[0] | groups[1] | groups[2])
    if split == VALIDATION:
        scored = {item.subject for item in cohort.recordings if item.split == "validation"}
        assert all(set(fold.test) == scored for parts in folds.values() for fold in parts)


def test_fewer_training_subjects_begin_the_larger_set_and_nothing_else_changes(cohort: Cohort) -> None:
    whole, _ = fold_selection(cohort, PROBE)
    small, _ = fold_selection(cohort, PROBE, training_subjects=2)
    for seed in whole:
        for one, two in zip(whole[seed], small[seed], strict=True):
            assert len(two.train) == 2 and set(two.train) <= set(one.train)
            assert (one.validation, one.test) == (two.validation, two.test)


def test_a_choice_is_the_same_when_the_test_subjects_files_are_gone(cohort: Cohort, tmp_path: Path) -> None:
    def choose(folder: Path, out: Path) -> list[float | None]:
        opened = Cohort.open(folder).lock_test()
        preset = find_preset("tiny")
        job = PretrainJob.from_preset(preset, cohort=str(folder), out=str(out), splits=SELECTION_SPLITS)
        pretrain(replace(job, train=replace(preset.train, passes=1)))
        encoder = load_encoder(open_location(out) / "checkpoints" / "last.pt")
        source = GatherSource(opened, opened.find_windows(splits=["train", "validation"]), batch_size=16)
        embeddings = embed_windows(make_encode(encoder, source.modalities), source.iterate_all())
        folds, _ = fold_selection(opened, PROBE)
        found = evaluate_probe(embeddings, opened, PROBE, features="pretrained", folds=folds, scored="validation")
        return [row.value for row in found.scores]

    whole = choose(tmp_path / "cohort", tmp_path / "whole")
    blind = tmp_path / "blind"
    shutil.copytree(tmp_path / "cohort", blind)
    for item in cohort.recordings:
        if item.split == "test":
            (blind / item.file).unlink()
    assert choose(blind, tmp_path / "run") == whole

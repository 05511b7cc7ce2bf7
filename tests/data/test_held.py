"""Windows that are kept on the device: the same batches and losses, and a plain refusal where they do not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.held import HeldSource
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    names = ("eeg", "eog", "emg", "ecg", "airflow")
    rows = [30, 7, 21, 40, 20]
    return write_cohort(tmp_path_factory.mktemp("cohort"), rows, modalities=names, absent={"emg": 0.2})


@pytest.mark.parametrize("arguments", [{}, {"rank": 1, "world_size": 2}, {"pairs": True}])
def test_batches_are_the_gathered_ones(cohort: Cohort, arguments: dict) -> None:
    settings = {"batch_size": 16, "seed": 4, "modalities": ("eeg", "airflow")} | arguments
    ids = cohort.find_windows()[3:]  # not from the first window on
    gathered, held = GatherSource(cohort, ids, **settings), HeldSource(cohort, ids, **settings)
    assert gathered.count_steps() == held.count_steps() > 2
    pairs = [*zip(gathered.iterate_pass(1, 1), held.iterate_pass(1, 1), strict=True)]
    pairs += [*zip(gathered.iterate_all(), held.iterate_all(), strict=True)]
    for one, other in pairs:
        assert np.array_equal(one.window_id, other.window_id)
        assert np.array_equal(one.recording, other.recording) and np.array_equal(one.subject, other.subject)
        for mine, theirs in ((one.signals, other.signals), (one.present, other.present), (one.labels, other.labels)):
            assert list(mine) == list(theirs)
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
            assert all(mine[name].dtype == theirs[name].dtype for name in mine)


def test_losses_are_the_same_bit_for_bit(cohort: Cohort, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    job = PretrainJob(
        cohort=str(cohort.location),
        out=str(tmp_path / "disk"),
        model=replace(TINY.model, modalities=("eeg", "emg", "airflow")),
        train=replace(TINY.train, passes=2),
        threads=1,
    )
    disk = pretrain(job)
    held = pretrain(replace(job, out=str(tmp_path / "held"), keep_on_device=True))
    assert held.step_losses == disk.step_losses
    assert [r["validation_loss"] for r in held.history] == [r["validation_loss"] for r in disk.history]


def test_windows_that_do_not_fit_are_refused_with_both_sizes(cohort: Cohort) -> None:
    ids = cohort.find_windows()
    needed = len(ids) * 2 * 3000
    HeldSource(cohort, ids, batch_size=16, modalities=("eeg",), most_bytes=needed)
    with pytest.raises(ValueError, match=r"at most 0\.0007\d* GB, but 118 windows of eeg take 0\.000708 GB.*keep_on"):
        HeldSource(cohort, ids, batch_size=16, modalities=("eeg",), most_bytes=needed - 1)

"""Ray Data and Ray Train against the same work in one process, on a real local cluster."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physioray.data.batches import Batch
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.storage import StorageError
from tests.written_cohorts import write_cohort

pytestmark = pytest.mark.ray
TINY = find_preset("tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from physioray.distribute import join_cluster

    with join_cluster(cpus=4):
        yield


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    # 67 files of unequal length: no multiple of a batch, a block or the number of workers.
    rows = [5 + (7 * index) % 11 for index in range(67)]
    names = ("eeg", "eog", "emg", "ecg", "airflow")
    return write_cohort(tmp_path_factory.mktemp("cohort"), rows, modalities=names, absent={"emg": 0.2})


def assert_same(one: Batch, other: Batch) -> None:
    assert np.array_equal(one.window_id, other.window_id)
    assert np.array_equal(one.recording, other.recording) and np.array_equal(one.subject, other.subject)
    for mine, theirs in ((one.signals, other.signals), (one.present, other.present), (one.labels, other.labels)):
        assert list(mine) == list(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert np.array_equal(mine[name], theirs[name])


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_batches_are_the_gathered_ones(cohort: Cohort, workers: int) -> None:
    from physioray.data.stream import StreamSource

    for rank in range(workers):
        arguments = {"batch_size": 31, "seed": 4, "rank": rank, "world_size": workers, "modalities": ("eeg", "airflow")}
        gathered = GatherSource(cohort, cohort.find_windows(), **arguments)
        streamed = StreamSource(cohort, cohort.find_windows(), **arguments)
        assert gathered.count_steps() == streamed.count_steps()
        for number, first in ((0, 0), (1, 3)):
            pairs = zip(gathered.iterate_pass(number, first), streamed.iterate_pass(number, first), strict=True)
            for one, other in pairs:
                assert_same(one, other)
        for one, other in zip(gathered.iterate_all(), streamed.iterate_all(), strict=True):
            assert_same(one, other)


def make_job(cohort: Cohort, out: Path) -> PretrainJob:
    model = replace(TINY.model, modalities=("eeg", "emg", "ecg", "airflow"))
    settings = replace(TINY.train, passes=2, batch_size=64)
    return PretrainJob(cohort=str(cohort.location), out=str(out), model=model, train=settings, threads=1)


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_losses_under_ray_train_are_those_of_one_process(cohort: Cohort, tmp_path: Path, workers: int) -> None:
    from physioray.distribute import Resources, pretrain_on_cluster

    alone = pretrain(make_job(cohort, tmp_path / "alone")).history
    together = pretrain_on_cluster(make_job(cohort, tmp_path / "together"), Resources(workers=workers)).history
    assert [r["step"] for r in together] == [r["step"] for r in alone]
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
        assert other["loss_by_modality"] == pytest.approx(one["loss_by_modality"], rel=1e-5)


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_goes_on_from_its_checkpoint(cohort: Cohort, tmp_path: Path) -> None:
    from physioray.distribute import Resources, pretrain_on_cluster

    job = make_job(cohort, tmp_path / "killed")
    job = replace(job, train=replace(job.train, passes=8, checkpoint_minutes=0.0))
    last, killed = tmp_path / "killed" / "checkpoints" / "last.pt", []

    def kill() -> None:
        while not last.exists():
            time.sleep(0.02)
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                killed.append(int(folder.name))
                os.kill(killed[-1], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    history = pretrain_on_cluster(job, Resources(workers=1)).history
    killer.join()
    alone = pretrain(replace(job, out=str(tmp_path / "alone"))).history
    assert killed
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in alone], rel=1e-5)


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_what_a_worker_refuses_reaches_the_user_without_pages_of_frames(cohort: Cohort, tmp_path: Path) -> None:
    from physioray.distribute import Resources, pretrain_on_cluster

    job = make_job(cohort, tmp_path)
    job = replace(job, train=replace(job.train, passes=1))
    pretrain(job)
    changed = replace(job, train=replace(job.train, learning_rate=0.5))
    with pytest.raises(StorageError, match=r"learning_rate: 0.001 and not 0.5"):
        pretrain_on_cluster(changed, Resources(retries=0))


@pytest.mark.usefixtures("cluster")
def test_workers_that_would_leave_no_cpu_for_reading_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    from physioray.distribute import Resources, pretrain_on_cluster

    with pytest.raises(ValueError, match=r"a CPU for reading beside the workers' 4, but it has 4"):
        pretrain_on_cluster(make_job(cohort, tmp_path), Resources(workers=4))

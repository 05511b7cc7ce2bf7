"""The training loop: resuming, precision, schedule, and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.checkpoint import load_checkpoint
from physioray.config import MaskConfig, ReconstructionConfig, TrainConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.objectives.loss import LossParts
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import find_preset
from physioray.pretrain import (
    PretrainJob,
    build_autoencoder,
    choose_passes,
    find_pretraining_windows,
    load_autoencoder,
    make_encode,
    pretrain,
)
from physioray.storage import Location, StorageError, open_location
from physioray.train import TrainingDiverged, find_learning_rate, make_optimizer, train
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), [30, 45, 21, 40, 20], absent={"emg": 0.2, "ecg": 0.1})


def make_job(cohort: Cohort, out: Path, **changes: object) -> PretrainJob:
    settings = replace(TINY.train, **changes)  # type: ignore[arg-type]
    return PretrainJob(
        cohort=str(cohort.location), out=str(out), model=TINY.model, objective=TINY.objective, train=settings, threads=1
    )


def losses(history: list[dict]) -> list[tuple]:
    return [
        (r["pass"], r["step"], r["loss"], tuple(r["loss_by_modality"].items()), r["validation_loss"]) for r in history
    ]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(cohort: Cohort, tmp_path: Path) -> None:
    one = pretrain(make_job(cohort, tmp_path / "a"))
    same = pretrain(make_job(cohort, tmp_path / "b"))
    other = pretrain(make_job(cohort, tmp_path / "c", seed=1))
    assert one.step_losses == same.step_losses and losses(one.history) == losses(same.history)
    assert one.step_losses != other.step_losses


def test_training_lowers_the_loss_of_every_modality(cohort: Cohort, tmp_path: Path) -> None:
    history = pretrain(make_job(cohort, tmp_path, passes=6)).history
    for name, first in history[0]["loss_by_modality"].items():
        assert history[-1]["loss_by_modality"][name] < first
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


class Interrupt(Exception):
    pass


class InterruptAt:
    """A reporter that breaks the run off right after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def report_step(self, state, steps, waited, elapsed) -> None:  # noqa: ARG002
        if state.step == self.step:
            raise Interrupt

    def report_pass(self, history, step_losses) -> None:
        pass


@pytest.mark.parametrize("step", [3, 6, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_broken_off_inside_a_pass_goes_on_loss_for_loss(
    cohort: Cohort, tmp_path: Path, step: int, dropout: float
) -> None:
    ids = find_pretraining_windows(cohort, ["train", "pretrain"], TINY.model.modalities)
    config = replace(TINY.train, checkpoint_minutes=0.0)

    def run(folder: Path, at: int | None) -> list[dict]:
        return train(
            model=build_autoencoder(replace(TINY.model, dropout=dropout), 0),
            objective=MaskedReconstruction(TINY.objective),  # type: ignore[arg-type]
            source=GatherSource(cohort, ids, batch_size=config.batch_size),
            config=config,
            folder=open_location(folder),
            reporter=None if at is None else InterruptAt(at),
        ).history

    undisturbed = run(tmp_path / "whole", None)
    with pytest.raises(Interrupt):
        run(tmp_path / "cut", step)
    resumed = run(tmp_path / "cut", None)
    assert losses(resumed) == losses(undisturbed)
    one, other = (load_checkpoint(open_location(tmp_path / name / "last.pt")) for name in ("whole", "cut"))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


@pytest.mark.slow
def test_a_run_killed_with_sigkill_inside_a_pass_equals_an_undisturbed_one(cohort: Cohort, tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from physioray.data.cohort import Cohort
from physioray.pretrain import pretrain
from tests.test_train import make_job
pretrain(make_job(Cohort.open({str(cohort.location)!r}), Path(sys.argv[1]), passes=6, checkpoint_minutes=0.0))
"""
    undisturbed = pretrain(make_job(cohort, tmp_path / "whole", passes=6, checkpoint_minutes=0.0)).history
    out = tmp_path / "killed"
    last = out / "checkpoints" / "last.pt"
    killed_inside = False
    for _ in range(2):
        worker = subprocess.Popen([sys.executable, "-c", script, str(out)], start_new_session=True)
        deadline, seen = time.monotonic() + 60, set()
        while worker.poll() is None and time.monotonic() < deadline and len(seen) < 4:
            if last.exists():
                seen.add(last.stat().st_mtime_ns)
            time.sleep(0.002)
        os.killpg(worker.pid, signal.SIGKILL) if worker.poll() is None else None
        worker.wait()
        state = load_checkpoint(open_location(str(last)))["state"]
        killed_inside |= state["step_in_pass"] > 0
    assert killed_inside
    assert not list(out.rglob("*.part")) or load_checkpoint(open_location(str(last)))
    resumed = pretrain(make_job(cohort, out, passes=6, checkpoint_minutes=0.0)).history
    assert losses(resumed) == losses(undisturbed)


def test_a_finished_run_is_not_run_again(cohort: Cohort, tmp_path: Path) -> None:
    first = pretrain(make_job(cohort, tmp_path))
    again = pretrain(make_job(cohort, tmp_path))
    assert again.step_losses == [] and losses(again.history) == losses(first.history)


def test_a_checkpoint_of_other_settings_is_refused_with_both_values(cohort: Cohort, tmp_path: Path) -> None:
    pretrain(make_job(cohort, tmp_path))
    with pytest.raises(StorageError, match=r"learning_rate: 0.001 and not 0.002"):
        pretrain(make_job(cohort, tmp_path, learning_rate=0.002))


def test_a_checkpoint_of_another_cohort_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    pretrain(make_job(cohort, tmp_path / "run"))
    other = write_cohort(tmp_path / "other", [30, 45, 21, 40, 20], seed=5)
    with pytest.raises(StorageError, match="its cohort is"):
        pretrain(make_job(other, tmp_path / "run"))


def test_a_damaged_checkpoint_is_a_clear_error(cohort: Cohort, tmp_path: Path) -> None:
    pretrain(make_job(cohort, tmp_path))
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(StorageError, match="cannot be read"):
        pretrain(make_job(cohort, tmp_path))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_single(cohort: Cohort, tmp_path: Path, precision: str) -> None:
    single = pretrain(make_job(cohort, tmp_path / "fp32"))
    half = pretrain(make_job(cohort, tmp_path / "half", precision=precision))
    np.testing.assert_allclose(half.step_losses, single.step_losses, rtol=0.02)


def test_a_loss_that_is_not_a_number_is_named_with_its_step_and_keeps_the_last_good_checkpoint(
    cohort: Cohort, tmp_path: Path
) -> None:
    def objective(model, windows, draw) -> LossParts:  # noqa: ARG001
        value = sum(p.sum() for p in model.parameters()) * 0 + 1
        bad = value / 0 * 0 if draw.step == 9 else value
        return LossParts(sums={"eeg": value, "eog": bad}, counts={"eeg": value.detach(), "eog": value.detach()})

    ids = find_pretraining_windows(cohort, ["train", "pretrain"], TINY.model.modalities)
    with pytest.raises(TrainingDiverged, match=r"eog is not at step 9 \(pass 1\)"):
        train(
            model=build_autoencoder(TINY.model, 0),
            objective=objective,
            source=GatherSource(cohort, ids, batch_size=16),
            config=TINY.train,
            folder=open_location(tmp_path),
        )
    kept = load_checkpoint(open_location(tmp_path / "last.pt"))
    assert kept["state"]["pass_number"] == 1
    assert all(torch.isfinite(value).all() for value in kept["model"].values())


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(cohort: Cohort, tmp_path: Path) -> None:
    history = pretrain(make_job(cohort, tmp_path, passes=5, learning_rate=0.05)).history
    best = load_checkpoint(open_location(tmp_path / "checkpoints" / "best.pt"))["state"]
    lowest = min(range(5), key=lambda number: history[number]["validation_loss"])
    assert best["pass_number"] == lowest + 1


def test_kept_passes_hold_the_weights_of_their_pass(cohort: Cohort, tmp_path: Path) -> None:
    job = replace(make_job(cohort, tmp_path), keep_passes=(0, 2, 3))
    pretrain(job)
    folder = open_location(tmp_path / "checkpoints")
    start, last = load_autoencoder(folder / "pass-0000.pt"), load_autoencoder(folder / "pass-0003.pt")
    fresh, final = build_autoencoder(TINY.model, 0), load_autoencoder(folder / "last.pt")
    for name, value in fresh.state_dict().items():
        assert torch.equal(start.state_dict()[name], value)
        assert torch.equal(last.state_dict()[name], final.state_dict()[name])
    assert (folder / "pass-0002.pt").exists() and not (folder / "pass-0001.pt").exists()


def test_whoever_listens_hears_of_every_pass_and_may_end_the_run_which_then_goes_on(
    cohort: Cohort, tmp_path: Path
) -> None:
    job, heard = make_job(cohort, tmp_path), []

    def listen(passes: int, folder: Location) -> None:
        heard.append((passes, load_checkpoint(folder / "checkpoints" / "last.pt")["state"]["pass_number"]))
        if heard == [(1, 1), (2, 2)]:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        pretrain(job, after_pass=listen)
    pretrain(job, after_pass=listen)
    assert heard == [(1, 1), (2, 2), (2, 2), (3, 3)], "on resuming, the last finished pass is told again"


def test_parameters_unused_in_a_step_have_zero_gradients_and_still_decay(cohort: Cohort) -> None:
    # A cohort window without ecg in a batch of one: its decoder takes part with gradient zero, on every worker alike.
    model = build_autoencoder(TINY.model, 0)
    before = model.find_decoder("ecg").projection.weight.detach().clone()
    ids = cohort.find_windows()
    lacking = ids[~cohort.read_column("present_ecg")[ids]][:4]
    config = replace(TINY.train, passes=1, warmup_passes=0, weight_decay=0.1)
    objective = MaskedReconstruction(ReconstructionConfig(mask=MaskConfig(drop=False)))
    train(model=model, objective=objective, source=GatherSource(cohort, lacking, batch_size=4), config=config)  # type: ignore[arg-type]
    after = model.find_decoder("ecg").projection.weight.detach()
    torch.testing.assert_close(after, before * (1 - config.learning_rate * config.weight_decay))


def test_biases_norms_and_learned_vectors_are_not_decayed() -> None:
    model = build_autoencoder(TINY.model, 0)
    decayed, spared = make_optimizer(model, TINY.train).param_groups
    assert decayed["weight_decay"] > 0 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {n for n in names.values() if "mask_token" in n or "vectors" in n or n.endswith("bias")} <= spared_names
    assert all("norm" not in names[id(p)] for p in decayed["params"])


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = TrainConfig(passes=100, warmup_passes=10, learning_rate=1.0)
    rates = [find_learning_rate(config, step, 5) for step in range(500)]
    assert rates[0] == pytest.approx(1 / 50) and max(rates) == rates[50] == pytest.approx(1.0)
    assert rates[275] == pytest.approx(0.5, abs=0.01) and rates[499] < 1e-4
    assert (np.diff(rates[:50]) > 0).all() and (np.diff(rates[50:]) < 0).all()


def test_passes_of_the_curve_are_spread_evenly_over_magnitudes() -> None:
    assert choose_passes(25) == (0, 1, 2, 5, 10, 20, 25)
    assert choose_passes(1) == (0, 1)


def test_embeddings_do_not_depend_on_the_batch_a_window_comes_in(cohort: Cohort) -> None:
    encode = make_encode(build_autoencoder(TINY.model, 0).encoder, cohort.modalities)
    ids = cohort.find_windows()
    together = np.concatenate([encode(b) for b in GatherSource(cohort, ids, batch_size=64).iterate_all()])
    apart = np.concatenate([encode(b) for b in GatherSource(cohort, ids, batch_size=7).iterate_all()])
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)

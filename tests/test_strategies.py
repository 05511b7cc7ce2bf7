"""Every row of the paper's tables is a config of the same path."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.config import ContrastiveConfig, LateFusionConfig, ReconstructionConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.presets import find_preset
from physioray.pretrain import (
    PretrainJob,
    choose_checkpoint,
    load_autoencoder,
    load_encoder,
    load_model,
    make_encode,
    pretrain,
)
from physioray.signals import PAPER_MODALITIES, LookupMiss
from physioray.storage import StorageError, open_location
from physioray.strategies import (
    STRATEGIES,
    build_model,
    build_objective,
    describe_settings,
    find_strategy,
    name_strategy,
    restore_settings,
)
from physioray.train import make_optimizer
from tests.written_cohorts import write_cohort

TINY = find_preset("tiny")
ROWS_OF_THE_PAPER = (
    "multimae_drop",
    "multimae",
    "simclr",
    "clip_pairwise",
    "clip_leave_one_out",
    "scratch",
    *(f"{kind}_{name}" for kind in ("mae", "scratch") for name in PAPER_MODALITIES),
)
PRETRAINED = tuple(name for name in ROWS_OF_THE_PAPER if not name.startswith("scratch"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    absent = {"emg": 0.3, "ecg": 0.2, "eog": 0.2}
    return write_cohort(tmp_path_factory.mktemp("cohort"), [24, 40, 22, 20], absent=absent)


def make_job(name: str, cohort: Cohort, out: Path, passes: int = 1) -> PretrainJob:
    job = PretrainJob.from_strategy(
        find_strategy(name), TINY, cohort=str(cohort.location), out=str(out), threads=1, keep_passes=(0,)
    )
    return replace(job, train=replace(job.train, passes=passes))


def test_every_row_of_tables_1_and_2_has_a_strategy() -> None:
    assert set(ROWS_OF_THE_PAPER) <= set(STRATEGIES)


@pytest.mark.parametrize("name", PRETRAINED)
def test_every_strategy_pretrains_keeps_what_it_is_and_embeds_any_window(
    name: str, cohort: Cohort, tmp_path: Path
) -> None:
    job = make_job(name, cohort, tmp_path)
    history = pretrain(job).history
    assert np.isfinite(history[-1]["loss"]) and np.isfinite(history[-1]["validation_loss"])
    folder = open_location(tmp_path / "checkpoints")
    encoder, start = load_encoder(folder / "last.pt"), load_encoder(folder / "pass-0000.pt")
    source = GatherSource(cohort, cohort.find_windows(), batch_size=32, modalities=job.model.modalities)
    batch = next(b for b in source.iterate_all())
    here = np.any(list(batch.present.values()), axis=0)
    ids = batch.window_id[here]
    batch = source.reader.read(ids)
    vectors, first = (make_encode(item, cohort.modalities)(batch) for item in (encoder, start))
    assert vectors.shape == (len(ids), encoder.features) and np.isfinite(vectors).all()
    assert not np.allclose(vectors, first)
    untrained = build_model(job.model, job.train.seed).encoder
    np.testing.assert_array_equal(first, make_encode(untrained, cohort.modalities)(batch))
    assert json.loads((tmp_path / "config.json").read_text())["strategy"] == name


@pytest.mark.parametrize("name", ROWS_OF_THE_PAPER)
def test_a_strategy_is_known_again_by_its_settings_and_they_survive_json(name: str) -> None:
    strategy = find_strategy(name)
    model = strategy.fit_model(TINY.model)
    assert name_strategy(model, strategy.objective) == name
    for settings in (model, strategy.objective):
        if settings is not None:
            assert restore_settings(json.loads(json.dumps(describe_settings(settings)))) == settings


def test_only_modality_drop_takes_the_last_checkpoint() -> None:
    chosen = {name: find_strategy(name).fit_train(TINY.train).select for name in PRETRAINED}
    assert [name for name, select in chosen.items() if select == "last"] == ["multimae_drop"]


def test_the_best_checkpoint_is_used_only_where_it_was_asked_for_and_exists(tmp_path: Path) -> None:
    folder, best = open_location(tmp_path), replace(TINY.train, select="best")
    assert choose_checkpoint(folder, best).name == "last.pt"
    (folder / "best.pt").write_bytes(b"x")
    assert choose_checkpoint(folder, best).name == "best.pt"
    assert choose_checkpoint(folder, replace(best, select="last")).name == "last.pt"


def test_late_fusion_has_one_encoder_per_modality_and_a_unimodal_strategy_one_modality() -> None:
    late = find_strategy("clip_pairwise").fit_model(TINY.model)
    assert isinstance(late, LateFusionConfig) and late.modalities == TINY.model.modalities
    assert find_strategy("mae_ecg").fit_model(TINY.model).modalities == ("ecg",)


def test_an_unknown_strategy_is_answered_with_those_that_exist() -> None:
    with pytest.raises(LookupMiss, match=r"multimae_drop, multimae, .*but got 'mae_eg'. Did you mean .*mae_eeg"):
        find_strategy("mae_eg")


def test_a_strategy_whose_modality_the_cohort_lacks_is_refused() -> None:
    with pytest.raises(LookupMiss, match="mae_airflow must have airflow, but there are only eeg"):
        find_strategy("mae_airflow").fit_model(TINY.model)


def test_scratch_is_no_pretraining(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scratch starts from scratch"):
        make_job("scratch", cohort, tmp_path)


def test_an_unknown_kind_of_settings_is_answered_with_those_that_exist() -> None:
    with pytest.raises(LookupMiss, match="fused, late_fusion, reconstruction, contrastive, but is 'diffusion'"):
        restore_settings({"kind": "diffusion"})


def test_a_contrastive_checkpoint_reconstructs_nothing(cohort: Cohort, tmp_path: Path) -> None:
    pretrain(make_job("clip_pairwise", cohort, tmp_path))
    place = open_location(tmp_path / "checkpoints") / "last.pt"
    assert type(load_model(place)).__name__ == "LateFusion"
    with pytest.raises(StorageError, match="masked autoencoder, but holds LateFusion"):
        load_autoencoder(place)


def test_objectives_are_built_by_the_kind_of_their_settings() -> None:
    kinds = {
        type(build_objective(ContrastiveConfig(method=method))).__name__  # type: ignore[arg-type]
        for method in ("simclr", "pairwise", "leave_one_out")
    }
    assert len(kinds) == 3 and type(build_objective(ReconstructionConfig())).__name__ == "MaskedReconstruction"


def test_a_learned_temperature_is_trained_and_never_decayed() -> None:
    model = build_model(LateFusionConfig(model=TINY.model, learned_temperature=True), 0)
    _, spared = make_optimizer(model, TINY.train).param_groups
    assert any(parameter is dict(model.named_parameters())["log_scale"] for parameter in spared["params"])

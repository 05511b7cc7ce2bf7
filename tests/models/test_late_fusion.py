"""Late fusion: encoders that know nothing of each other, and what stands where a modality is absent."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.config import LateFusionConfig, ModelConfig, from_dict, to_dict
from physioray.data.gather import GatherSource
from physioray.models.fused import FusedEncoder
from physioray.models.late_fusion import LateFusion
from physioray.presets import PRESETS
from physioray.pretrain import make_encode
from tests.models.test_fused import all_present, make_windows
from tests.written_cohorts import write_cohort

TINY = LateFusionConfig(model=PRESETS["tiny"].model)
NAMES = TINY.modalities
WIDTH = TINY.model.width


def build(config: LateFusionConfig = TINY, seed: int = 0) -> LateFusion:
    torch.manual_seed(seed)
    return LateFusion(config).eval()


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def place(name: str, names: Sequence[str] = NAMES) -> slice:
    return slice(names.index(name) * WIDTH, (names.index(name) + 1) * WIDTH)


def test_at_paper_size_parity_takes_two_layers_and_the_parameters_of_the_fused_encoder() -> None:
    paper = PRESETS["paper"].model
    with torch.device("meta"):
        fused = FusedEncoder(paper)
        parity = LateFusion(LateFusionConfig(model=paper, layers_per_modality="parity"))
        same = LateFusion(LateFusionConfig(model=paper))
    assert parity.config.layers == 2 and same.config.layers == 8
    assert count(parity.encoder) == pytest.approx(count(fused), rel=0.01)
    assert count(same.encoder) > 3 * count(fused)


def test_the_projection_goes_from_512_over_256_to_128_at_paper_size() -> None:
    with torch.device("meta"):
        model = LateFusion(LateFusionConfig(model=PRESETS["paper"].model))
    for projection in model.projections.values():
        shapes = [tuple(p.shape) for p in projection.parameters() if p.ndim == 2]
        assert shapes == [(256, 512), (128, 256)]


def test_an_embedding_is_that_of_each_modalitys_own_encoder_side_by_side() -> None:
    model, signals, present = build(), make_windows(3), all_present(3)
    together = model.embed(signals, present)
    assert together.shape == (3, model.features) == (3, 4 * WIDTH)
    for name in NAMES:
        alone = FusedEncoder(replace(TINY.model, modalities=(name,))).eval()
        alone.load_state_dict(model.encoder.find_encoder(name).state_dict())
        expected = alone.embed({name: signals[name]}, {name: present[name]})
        torch.testing.assert_close(together[:, place(name)], expected, rtol=1e-5, atol=1e-6)


def test_one_modality_never_reaches_the_embedding_of_another() -> None:
    model, signals, present = build(), make_windows(3), all_present(3)
    before = model.embed(signals, present)
    after = model.embed(signals | {"ecg": torch.randn(3, 3000)}, present)
    for name in NAMES:
        assert torch.equal(before[:, place(name)], after[:, place(name)]) == (name != "ecg")


def test_an_absent_modality_is_zeros_whatever_its_samples_are_and_changes_nothing_else() -> None:
    model, signals, present = build(), make_windows(4), all_present(4)
    whole, projected = model.embed(signals, present), model.project(signals, present)
    signals["emg"][1:3] = float("nan")
    present["emg"][1:3] = False
    partial, fewer = model.embed(signals, present), model.project(signals, present)
    assert (partial[1:3, place("emg")] == 0).all() and (fewer["emg"][1:3] == 0).all()
    torch.testing.assert_close(partial[[0, 3]], whole[[0, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fewer["emg"][[0, 3]], projected["emg"][[0, 3]], rtol=1e-4, atol=1e-5)
    for name in ("eeg", "eog", "ecg"):
        assert torch.equal(partial[:, place(name)], whole[:, place(name)])
        assert torch.equal(fewer[name], projected[name])


def test_a_modality_absent_from_the_whole_batch_gets_no_gradient_and_the_others_finite_ones() -> None:
    model, signals, present = build(), make_windows(3), all_present(3)
    present["ecg"][:] = False
    projected = model.project(signals, present)
    assert (projected["ecg"] == 0).all()
    sum(value.square().sum() for value in projected.values()).backward()
    for name, parameter in model.named_parameters():
        if "ecg" in name:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_the_order_in_the_config_changes_neither_weights_nor_embeddings() -> None:
    turned = build(LateFusionConfig(model=replace(TINY.model, modalities=NAMES[::-1])))
    signals, present = make_windows(2), all_present(2)
    assert torch.equal(turned.embed(signals, present), build().embed(signals, present))


def test_a_window_without_any_modality_is_refused() -> None:
    present = all_present(3)
    for here in present.values():
        here[1] = False
    with pytest.raises(ValueError, match="1 of 3 have none"):
        build().embed(make_windows(3), present)


def test_modalities_of_other_rates_are_embedded_too() -> None:
    names = ("eeg", "airflow", "spo2")
    model = build(LateFusionConfig(model=replace(TINY.model, modalities=names)))
    assert model.embed(make_windows(2, names), all_present(2, names)).shape == (2, 3 * WIDTH)


def test_the_probe_path_takes_late_fusion_as_it_takes_the_fused_encoder(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, [9, 4], absent={"emg": 0.5})
    source = GatherSource(cohort, cohort.find_windows(), batch_size=8)
    encode = make_encode(build().encoder, source.modalities)  # type: ignore[arg-type]
    found = np.concatenate([encode(batch) for batch in source.iterate_all()])
    absent = ~cohort.read_column("present_emg").astype(bool)
    assert found.shape == (13, 4 * WIDTH) and 0 < absent.sum() < 13
    assert np.array_equal((found[:, place("emg")] == 0).all(1), absent)


def test_the_learned_temperature_is_a_parameter_that_stays_within_its_limits() -> None:
    model = build(LateFusionConfig(model=TINY.model, learned_temperature=True))
    assert "log_scale" in model.state_dict() and build().find_scale() is None
    for value, expected in ((0.0, 1.0), (-3.0, 1.0), (1.0, float(np.e)), (50.0, float(np.exp(4.6)))):
        model.log_scale.data.fill_(value)  # type: ignore[union-attr]
        scale = model.find_scale()
        assert scale is not None and scale.item() == pytest.approx(expected, rel=1e-5)
        # At a limit too there is a gradient, or a temperature that once touched it would stay for ever.
        assert torch.autograd.grad(scale, model.log_scale)[0].item() == pytest.approx(expected, rel=1e-5)


def test_settings_survive_json_and_wrong_ones_are_refused() -> None:
    for layers in ("parity", 3):
        config = replace(TINY, layers_per_modality=layers)
        assert from_dict(LateFusionConfig, to_dict(config)) == config
    with pytest.raises(ValueError, match="same, parity or a number"):
        replace(TINY, layers_per_modality=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        LateFusionConfig(model=ModelConfig(width=6, heads=2))

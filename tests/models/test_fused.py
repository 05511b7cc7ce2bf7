"""The fused transformer: what it may and may not see."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from physioray.config import ModelConfig
from physioray.models.fused import FusedEncoder, MaskedAutoencoder, lay_out
from physioray.models.tokenizer import ChunkTokenizer, make_positions
from physioray.models.transformer import Attention
from physioray.presets import PRESETS, find_preset
from physioray.signals import find_modality

TINY = PRESETS["tiny"].model
NAMES = TINY.modalities


def build(kind: type, config: ModelConfig = TINY, seed: int = 0):
    torch.manual_seed(seed)
    return kind(config).eval()


def make_windows(rows: int, names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, find_modality(name).samples, generator=generator) for name in names}


def make_visible(
    rows: int, names: tuple[str, ...] = NAMES, share: float = 0.3, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visible = {name: torch.rand(rows, 30, generator=generator) < share for name in names}
    visible[names[0]][:, 0] = True
    return visible


def all_present(rows: int, names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    return {name: torch.ones(rows, dtype=torch.bool) for name in names}


def test_the_paper_preset_has_about_54_million_parameters() -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(PRESETS["paper"].model)
    encoder = sum(p.numel() for p in model.encoder.blocks.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(54e6, rel=0.01)
    assert encoder == pytest.approx(25.2e6, rel=0.01)


def test_a_missing_preset_is_answered_with_those_that_exist() -> None:
    with pytest.raises(KeyError, match="paper, small, tiny"):
        find_preset("smal")


def test_hidden_chunks_are_never_looked_at() -> None:
    model, signals, visible = build(MaskedAutoencoder), make_windows(6), make_visible(6)
    before = model(signals, visible, all_present(6))
    changed = {
        name: torch.where(visible[name].repeat_interleave(100, 1), signal, torch.full_like(signal, float("nan")))
        for name, signal in signals.items()
    }
    after = model(changed, visible, all_present(6))
    for name in NAMES:
        assert torch.equal(before[name], after[name])


def test_windows_of_a_batch_do_not_touch_each_other_and_padding_stays_out() -> None:
    # Windows with different numbers of visible tokens are padded; each must come out as if it were alone.
    model, signals, visible = build(MaskedAutoencoder), make_windows(5), make_visible(5)
    counts = torch.stack([v.sum(1) for v in visible.values()], 1).sum(1)
    assert len(counts.unique()) > 1
    together = model(signals, visible, all_present(5))
    pooled = model.encoder(signals, visible).pool()
    for row in range(5):
        one = {name: signal[row : row + 1] for name, signal in signals.items()}
        shown = {name: value[row : row + 1] for name, value in visible.items()}
        alone = model(one, shown, all_present(1))
        for name in NAMES:
            torch.testing.assert_close(together[name][row : row + 1], alone[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[row : row + 1], model.encoder(one, shown).pool(), rtol=1e-4, atol=1e-5)


def test_explicit_masks_are_right_for_any_batch_size() -> None:
    # Two windows with two visible tokens each must keep two each, not four.
    visible = {name: torch.zeros(2, 30, dtype=torch.bool) for name in NAMES}
    visible["eeg"][0, [3, 7]] = visible["ecg"][1, [1, 29]] = True
    layout = lay_out(visible, torch.device("cpu"))
    assert layout.width == 2 and layout.real is None
    assert layout.slots["eeg"].tolist() == [0, 1] and layout.slots["ecg"].tolist() == [2, 3]


def test_the_order_of_modalities_does_not_matter() -> None:
    model = build(MaskedAutoencoder)
    turned = MaskedAutoencoder(replace(TINY, modalities=NAMES[::-1])).eval()
    turned.load_state_dict(model.state_dict())
    signals, visible = make_windows(3), make_visible(3)
    one, other = model(signals, visible, all_present(3)), turned(signals, visible, all_present(3))
    for name in NAMES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_an_absent_modality_changes_nothing_whatever_its_samples_are() -> None:
    encoder, signals, present = build(FusedEncoder), make_windows(4), all_present(4)
    present["emg"] = torch.tensor([True, False, False, True])
    before = encoder.embed(signals, present)
    signals["emg"] = signals["emg"].clone()
    signals["emg"][1:3] = 1e6
    assert torch.equal(before, encoder.embed(signals, present))
    fewer = build(FusedEncoder, replace(TINY, modalities=("eeg", "eog", "ecg")))
    fewer.load_state_dict({k: v for k, v in encoder.state_dict().items() if "emg" not in k})
    torch.testing.assert_close(before[1:3], fewer.embed(signals, present)[1:3], rtol=1e-4, atol=1e-5)


def test_a_modality_absent_from_the_whole_batch_leaves_finite_gradients() -> None:
    model, signals, present = build(MaskedAutoencoder), make_windows(3), all_present(3)
    present["ecg"][:] = False
    visible = {name: value & present[name][:, None] for name, value in make_visible(3).items()}
    outputs = model(signals, visible, present)
    assert "ecg" not in outputs
    sum(out.square().mean() for out in outputs.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_window_without_any_visible_token_is_refused() -> None:
    visible = make_visible(2)
    for value in visible.values():
        value[1] = False
    with pytest.raises(ValueError, match="1 of 2 have none"):
        build(FusedEncoder)(make_windows(2), visible)


def test_modalities_of_other_rates_have_their_own_chunks() -> None:
    names = ("eeg", "airflow", "spo2")
    model = build(MaskedAutoencoder, replace(TINY, modalities=names))
    outputs = model(make_windows(2, names), make_visible(2, names), all_present(2, names))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        "eeg": (2, 30, 100),
        "airflow": (2, 30, 25),
        "spo2": (2, 30, 4),
    }


def test_attention_asked_for_its_weights_gives_the_same_result_and_rows_that_sum_to_one() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4, 0.1).eval()
    tokens, real = torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.bool)
    real[1, 5:] = False
    for allowed in (None, real):
        weights: list[torch.Tensor] = []
        explicit = attention(tokens, tokens, allowed, weights)
        torch.testing.assert_close(attention(tokens, tokens, allowed), explicit, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 4, 7))
    assert (weights[0][1, :, :, 5:] == 0).all()


def test_the_tokenizer_is_the_convolution_it_says_it_is() -> None:
    torch.manual_seed(0)
    tokenizer = ChunkTokenizer(100, 16, channels=8, kernel=21, pool=4)
    chunks = torch.randn(5, 100)
    features = torch.nn.functional.max_pool1d(tokenizer.convolution(chunks[:, None]), 4)
    flat = torch.nn.functional.gelu(features).transpose(1, 2).flatten(1)
    torch.testing.assert_close(tokenizer(chunks), tokenizer.norm(tokenizer.projection(flat)), rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_time_and_all_differ() -> None:
    positions = make_positions(torch.arange(30.0), 8)
    assert positions[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert positions[3, 2].item() == pytest.approx(torch.tensor(3 / 10000 ** (2 / 8)).sin().item(), rel=1e-5)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_a_shared_mask_token_is_one_parameter() -> None:
    shared = build(MaskedAutoencoder, replace(TINY, mask_token="shared"))
    assert sum("mask_token" in name for name, _ in shared.named_parameters()) == 1
    shared(make_windows(1), make_visible(1), all_present(1))


def test_dropout_acts_in_training_only() -> None:
    encoder = build(FusedEncoder, replace(TINY, dropout=0.5))
    signals, visible = make_windows(2), make_visible(2)
    assert torch.equal(encoder(signals, visible).tokens, encoder(signals, visible).tokens)
    encoder.train()
    assert not torch.equal(encoder(signals, visible).tokens, encoder(signals, visible).tokens)


def test_compiled_layers_keep_the_names_of_weights_and_the_numbers() -> None:
    # In a process without run-time type checks, which torch.compile cannot look through. The graphs are caught as for
    # a GPU, but run as they are: to generate code takes a minute here.
    code = """
import torch
from physioray.models.fused import MaskedAutoencoder
from physioray.models.transformer import compile_blocks
from tests.models.test_fused import NAMES, all_present, build, make_visible, make_windows
model, compiled = build(MaskedAutoencoder), build(MaskedAutoencoder)
compile_blocks(compiled, backend="eager")
assert list(compiled.state_dict()) == list(model.state_dict())
signals, visible = make_windows(6), make_visible(6)
one, other = model(signals, visible, all_present(6)), compiled(signals, visible, all_present(6))
for name in NAMES:
    torch.testing.assert_close(one[name], other[name])
assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]

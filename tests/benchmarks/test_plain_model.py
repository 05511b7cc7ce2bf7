"""What training is measured against: the plain version gives the same numbers, and the operations are counted right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from physioray.objectives.masking import draw_visible
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import find_preset
from physioray.pretrain import build_autoencoder
from physioray.signals import find_modality
from physioray.tensors import Draw, WindowTensors
from tests.benchmarks.operations import count_step_operations
from tests.benchmarks.plain_model import copy_weights, measure_plain_loss

pytestmark = pytest.mark.plain

ROWS = 6
DRAW = Draw(seed=3, pass_number=1, step=2)


def make_windows(names: tuple[str, ...]) -> WindowTensors:
    generator = torch.Generator().manual_seed(0)
    return WindowTensors(
        signals={name: torch.randn(ROWS, find_modality(name).samples, generator=generator) for name in names},
        present={name: torch.ones(ROWS, dtype=torch.bool) for name in names},
        labels={},
        window_id=np.arange(ROWS),
    )


@pytest.mark.parametrize(("preset", "autocast"), [("tiny", False), ("small", False), ("tiny", True)])
def test_the_plain_version_gives_the_same_loss_and_the_same_gradients(preset: str, autocast: bool) -> None:
    sizes = find_preset(preset)
    model = build_autoencoder(replace(sizes.model, dropout=0.0), 0).train()
    plain = copy_weights(model).train()
    windows = make_windows(sizes.model.modalities)
    visible = draw_visible(windows.present, model.tokens, windows.window_id, DRAW, sizes.objective.mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = MaskedReconstruction(sizes.objective)(model, windows, DRAW)
        ours = parts.combine(parts.stack()[1])
        outputs = plain(windows.signals, torch.cat(list(visible.values()), 1))
        theirs = measure_plain_loss(outputs, windows.signals, visible)
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if autocast else 1e-5, atol=0.0)
    if autocast:
        return
    ours.backward()
    theirs.backward()
    assert len(list(model.parameters())) > len(list(plain.parameters()))  # query, key and value are one there
    tokenizer, peer = model.encoder.tokenizers["eeg"], plain.tokenizers["eeg"]
    own = {
        "convolution": (tokenizer.convolution.weight, peer[0].weight),
        "convolution's bias": (tokenizer.convolution.bias, peer[0].bias),
        "projection's bias": (tokenizer.projection.bias, peer[4].bias),
        "attention": (model.encoder.blocks[0].attention.output.weight, plain.layers[0].self_attn.out_proj.weight),
        "mask token": (model.find_decoder("eog").mask_token, plain.decoders["eog"].mask_token),
        "last layer": (model.find_decoder("ecg").projection.weight, plain.decoders["ecg"].projection.weight),
    }
    for name, (one, other) in own.items():
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-3, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_operations_are_those_that_pytorch_counts(preset: str) -> None:
    sizes = find_preset(preset)
    model = build_autoencoder(sizes.model, 0).train()
    windows = make_windows(sizes.model.modalities)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        parts = MaskedReconstruction(sizes.objective)(model, windows, DRAW)
        parts.combine(parts.stack()[1]).backward()
    assert counter.get_total_flops() == ROWS * count_step_operations(sizes.model, visible=36)


def test_operations_of_the_presets_are_those_the_goals_were_set_with() -> None:
    counted = {name: count_step_operations(find_preset(name).model, visible=36) for name in ("small", "paper")}
    assert counted["small"] == pytest.approx(0.56e9, rel=0.02)
    assert counted["paper"] == pytest.approx(10.4e9, rel=0.01)

"""Masked reconstruction: guess the hidden seconds of every modality from the visible ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from physioray.config import ReconstructionConfig
from physioray.objectives.loss import LossParts
from physioray.objectives.masking import check_visible, draw_visible, find_hidden
from physioray.tensors import Draw, WindowTensors, move_tensor


@runtime_checkable
class Reconstructor(Protocol):
    """A model that fills in hidden tokens."""

    tokens: Mapping[str, int]

    def __call__(
        self,
        signals: Mapping[str, Float[Tensor, "b _"]],
        visible: Mapping[str, Bool[Tensor, "b _"]],
        present: Mapping[str, Bool[Tensor, "b"]],
    ) -> Mapping[str, Float[Tensor, "b _ _"]]:
        """Reconstructed chunks `(B, tokens, samples)` per modality."""
        ...


class MaskedReconstruction:
    """The objective of the paper's MultiMAE, with or without modality drop (section 3.3)."""

    def __init__(self, config: ReconstructionConfig) -> None:
        self.config = config

    def __call__(
        self,
        model: Reconstructor | Callable[..., object],
        windows: WindowTensors,
        draw: Draw,
        visible: Mapping[str, Bool[Tensor, "b _"]] | None = None,
    ) -> LossParts:
        """Hide tokens as `draw` says, reconstruct, and measure the squared error on the hidden ones.

        Args:
            model: fills in hidden tokens.
            windows: with the modalities of the model at the least.
            draw: keys the choice of tokens.
            visible: `(B, tokens)` per modality of the model, instead of the drawn choice.

        Raises:
            ValueError: `visible` does not fit the windows.
        """
        tokens: Mapping[str, int] = model.tokens  # type: ignore[union-attr]
        if visible is None:
            visible = draw_visible(windows.present, tokens, windows.window_id, draw, self.config.mask)
        else:
            check_visible(visible, windows.present, tokens)
        outputs = model(windows.signals, visible, windows.present)
        return measure_reconstruction(outputs, windows.signals, find_hidden(windows.present, visible), self.config)  # type: ignore[arg-type]


def measure_reconstruction(
    outputs: Mapping[str, Float[Tensor, "b _ _"]],
    signals: Mapping[str, Float[Tensor, "b _"]],
    hidden: Mapping[str, Bool[Tensor, "b _"]],
    config: ReconstructionConfig,
) -> LossParts:
    """Mean squared error of hidden chunks, summed and counted per modality.

    L = 1/M sum_m 1/|H_m| sum_{(b,t) in H_m} ||y_bt - x_bt||^2 / samples, over the M modalities that have a
    hidden token (section 3.3: the loss is taken on dropped tokens only; the mean of modality means is an
    assumption, see ReconstructionConfig.weighting).
    """
    sums, counts = {}, {}
    for name, output in outputs.items():
        rows, tokens, samples = output.shape
        device = output.device
        target = signals[name].view(rows, tokens, samples)
        if config.normalise_target:
            spread, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (spread + 1e-6).sqrt()
        weight = move_tensor(hidden[name], device).float()
        error = (output.float() - target.float()).square().mean(-1)
        # A hidden token is chosen by multiplication with 0 or 1, so absent signals must be finite: ingest writes zeros.
        sums[name] = (error * weight).sum()
        counts[name] = weight.sum()
    return LossParts(sums=sums, counts=counts, weighting="part" if config.weighting == "modality" else "item")

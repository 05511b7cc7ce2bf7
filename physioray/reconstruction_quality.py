"""How well hidden signal is filled in, beside guessing each modality's mean; and some windows to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from physioray.config import MaskConfig
from physioray.models.fused import MaskedAutoencoder
from physioray.objectives.masking import draw_visible, find_hidden, show_all
from physioray.observation import TokenGrid
from physioray.subject_sums import Number, SubjectSums, to_number
from physioray.tensors import VALIDATION_PASS, Draw, WindowTensors

SCATTERED, WHOLE = "scattered", "whole"
HIDDEN_WAYS = (SCATTERED, WHOLE)
"""Tokens hidden at random among all modalities; or one modality hidden whole and all others visible."""


@dataclass(frozen=True)
class Example:
    """One modality of one window: `(samples,)` signal and reconstruction, `(tokens,)` True where it was visible."""

    target: Float[np.ndarray, " samples"]
    output: Float[np.ndarray, " samples"]
    visible: Bool[np.ndarray, " tokens"]


class ReconstructionSums:
    """Squared errors of hidden samples by subject, and the examples.

    The same tokens are hidden for every model, whatever it was trained with: they are drawn as the paper's MultiMAE
    does, without drop, keyed by (seed, window).

    Args:
        grid: the modalities.
        hidden_ratio: share of a window's tokens hidden in the scattered way.
        seed: of the hidden tokens.
        examples: ids of the windows to keep.
    """

    def __init__(self, grid: TokenGrid, hidden_ratio: float, seed: int, examples: Int[np.ndarray, " n"]) -> None:
        self.grid, self.seed = grid, seed
        self.mask = MaskConfig(hidden_ratio=hidden_ratio, drop=False)
        self.kept_ids = tuple(int(number) for number in examples)
        self.examples: dict[int, dict[str, Example]] = {}
        self.numbers = SubjectSums()
        self.windows = 0

    def merge(self, other: ReconstructionSums) -> None:
        """Add what another reader has summed over other windows."""
        self.numbers.merge(other.numbers)
        self.examples |= other.examples
        self.windows += other.windows

    @torch.no_grad()
    def add(self, model: MaskedAutoencoder, windows: WindowTensors, subject: Int[np.ndarray, " b"]) -> None:
        """Reconstruct some windows of the subjects `(B,)` in both ways, and add them."""
        draw = Draw(seed=self.seed, pass_number=VALIDATION_PASS, step=0)
        visible = draw_visible(windows.present, model.tokens, windows.window_id, draw, self.mask)
        outputs = model(windows.signals, visible, windows.present)
        sums = np.zeros((len(windows), len(HIDDEN_WAYS), len(self.grid.names), 4))
        hidden = find_hidden(windows.present, visible)
        for number, name in enumerate(self.grid.names):
            if name in outputs:
                sums[:, 0, number] = _sum_errors(outputs[name], windows.signals[name], hidden[name])
            sums[:, 1, number] = self._hide_whole(model, windows, name)
        self.numbers.add(subject, sums=sums)
        self.windows += len(windows)
        self._keep_examples(windows, outputs, visible)

    def _hide_whole(
        self, model: MaskedAutoencoder, windows: WindowTensors, name: str
    ) -> Float[np.ndarray, "b moments"]:
        """Errors of one modality of which nothing is visible, where the window has another one."""
        sums = np.zeros((len(windows), 4))
        others = [windows.present[other] for other in self.grid.names if other != name]
        here = windows.present[name] & torch.stack(others).any(0) if others else torch.zeros(len(windows)).bool()
        rows = here.nonzero().flatten()
        if not len(rows):
            return sums
        placed = {other: signal[rows.to(signal.device)] for other, signal in windows.signals.items()}
        present = {other: value[rows] for other, value in windows.present.items()}
        visible = show_all(present, model.tokens) | {name: torch.zeros(len(rows), model.tokens[name]).bool()}
        output = model(placed, visible, present)[name]
        sums[rows.numpy()] = _sum_errors(output, placed[name], ~visible[name])
        return sums

    def _keep_examples(
        self, windows: WindowTensors, outputs: Mapping[str, Tensor], visible: Mapping[str, Tensor]
    ) -> None:
        for row in np.flatnonzero(np.isin(windows.window_id, self.kept_ids)):
            kept = {}
            for name in self.grid.names:
                if bool(windows.present[name][row]):
                    kept[name] = Example(
                        target=windows.signals[name][row].float().cpu().numpy(),
                        output=outputs[name][row].flatten().float().cpu().numpy(),
                        visible=visible[name][row].numpy().copy(),
                    )
            self.examples[int(windows.window_id[row])] = kept

    def list_numbers(self, *, draws: int, seed: int) -> list[Number]:
        """Errors per way of hiding and modality, with intervals by subject.

        `reconstruction_error`: mean squared error of hidden samples, in squared scales of the recording.
        `reconstruction_relative`: that divided by the error of guessing the modality's mean (over the same hidden
        samples): 1 if nothing is known, 0 if everything is. Of `all`: the mean over modalities.
        """
        estimate = self.numbers.estimate(_divide, draws=draws, seed=seed)
        stacked = self.numbers.stack()["sums"]
        found = []
        for i, way in enumerate(HIDDEN_WAYS):
            for j, name in enumerate((*self.grid.names, "all")):
                samples = stacked[:, i, j, 3] if name != "all" else stacked[:, i, :, 3].sum(-1)
                for k, (quantity, reference) in enumerate((("error", None), ("relative", 1.0))):
                    found.append(
                        Number(
                            quantity=f"reconstruction_{quantity}",
                            place=way,
                            modality=name,
                            value=to_number(estimate.value[i, j, k]),
                            low=to_number(estimate.low[i, j, k]),
                            high=to_number(estimate.high[i, j, k]),
                            reference=reference,
                            windows=self.windows,
                            subjects=int((samples > 0).sum()),
                        )
                    )
        return found


def _sum_errors(
    output: Float[Tensor, "b tokens samples"], signal: Float[Tensor, "b _"], hidden: Bool[Tensor, "b tokens"]
) -> Float[np.ndarray, "b moments"]:
    """Per window over its hidden samples: squared error, sum, sum of squares, count."""
    target = signal.view(output.shape).double()
    weight = hidden.to(output.device).double()
    moments = ((output.double() - target).square().sum(-1), target.sum(-1), target.square().sum(-1))
    parts = [(moment * weight).sum(1) for moment in moments]
    return torch.stack([*parts, weight.sum(1) * output.shape[-1]], -1).cpu().numpy()


def _divide(totals: Mapping[str, Any]) -> np.ndarray:
    """Error and relative error `(draws, ways, modalities + 1, 2)`; the last modality is the mean of the others."""
    error, first, second, count = np.moveaxis(totals["sums"], -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = error / count
        spread = second - first**2 / count
        relative = np.where(spread > 0, error / spread, np.nan)
    parts = []
    for values in (mean, relative):
        known = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            together = np.where(known, values, 0.0).sum(-1, keepdims=True) / known.sum(-1, keepdims=True)
        parts.append(np.concatenate([values, together], -1))
    return np.stack(parts, -1)

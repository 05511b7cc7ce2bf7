"""Which modality moves the units of an encoder: source variance of every layer, absolute and relative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.special import softmax
from torch import Tensor

from physioray.observation import TokenGrid, name_states, observe
from physioray.strategies import Encoder
from physioray.subject_sums import Estimate, Number, SubjectSums, to_number
from physioray.tensors import WindowTensors

NORMAL_QUANTILE = 1.959964
"""Of a two-sided 95 % interval."""


@dataclass(frozen=True)
class SourceDraws:
    """Windows that lend one modality: `(D, samples)` signals per modality, from windows that have it."""

    signals: Mapping[str, Float[Tensor, "d _"]]


@dataclass(frozen=True)
class RelativeVariance:
    """Relative source variance, mean over units: `(states, modalities)` each, places as `observation.name_states`.

    Attributes:
        softmax: the paper's form; about 1 / modalities wherever variances are small, whatever their proportions.
        share: SV_m / sum of SV, over the units that vary at all; does not depend on the scale of the units.
        softmax_error, share_error: standard errors of the mean over units.
    """

    softmax: Estimate
    share: Estimate
    softmax_error: Float[np.ndarray, "states modalities"]
    share_error: Float[np.ndarray, "states modalities"]


class SourceVarianceSums:
    """Source variance summed over contexts, by the context's subject.

    Args:
        grid: the modalities.
        layers: of the encoder.
    """

    def __init__(self, grid: TokenGrid, layers: int) -> None:
        self.grid, self.layers = grid, layers
        self.numbers = SubjectSums()
        self.contexts = 0

    def merge(self, other: SourceVarianceSums) -> None:
        """Add what another reader has summed over other contexts."""
        self.numbers.merge(other.numbers)
        self.contexts += other.contexts

    def add(self, subject: int, variance: Float[np.ndarray, "modalities states units"]) -> None:
        """Add one context; rows of modalities that it lacks are NaN."""
        known = np.isfinite(variance).all((1, 2))
        filled = np.where(known[:, None, None], variance, 0.0)
        self.numbers.add(np.array([subject]), variance=filled[None], contexts=known[None].astype(np.float64))
        self.contexts += 1

    def average(self) -> Float[np.ndarray, "modalities states units"]:
        """Source variance of every unit, mean over contexts."""
        totals = {name: array.sum(0, keepdims=True) for name, array in self.numbers.stack().items()}
        return _average(totals)[0]

    def relate(self, *, draws: int, seed: int) -> RelativeVariance:
        """Relative source variance with intervals by subject of the contexts, and standard errors over units.

        RSV_m(a) = softmax over m of SV_m(a), SV averaged over contexts first (Fang et al. 2024, section 4.4).
        """
        variance = self.average()
        shares = _share(variance)
        softened = _soften(variance)
        return RelativeVariance(
            softmax=self.numbers.estimate(_mean_softmax, draws=draws, seed=seed),
            share=self.numbers.estimate(_mean_share, draws=draws, seed=seed),
            softmax_error=_standard_error(softened),
            share_error=_standard_error(shares),
        )

    def list_numbers(self, *, draws: int, seed: int) -> list[Number]:
        """Relative source variance per place and modality, and its drift from the first to the last layer.

        `source_variance_softmax` and `source_variance_share`: see RelativeVariance. `source_variance_drift`: share
        behind the last layer less that behind the first; of `all`, half the sum of the absolute drifts (0 none, 1
        from one modality to another). `source_variance_imbalance`: half the sum of the shares' distances from
        1 / modalities in the embedding (0 if all count alike).
        """
        related = self.relate(draws=draws, seed=seed)
        # Modalities that no context has are in no share, so they do not count.
        count, people = int(np.isfinite(self.average()).all((1, 2)).sum()), len(self.numbers)
        found = []
        for form, estimate, error in (
            ("softmax", related.softmax, related.softmax_error),
            ("share", related.share, related.share_error),
        ):
            for i, place in enumerate(name_states(self.layers)):
                for j, name in enumerate(self.grid.names):
                    value, reach = estimate.value[i, j], NORMAL_QUANTILE * error[i, j]
                    found.append(
                        Number(
                            quantity=f"source_variance_{form}",
                            place=place,
                            modality=name,
                            value=to_number(value),
                            low=to_number(estimate.low[i, j]),
                            high=to_number(estimate.high[i, j]),
                            unit_low=to_number(value - reach),
                            unit_high=to_number(value + reach),
                            reference=1 / count,
                            windows=self.contexts,
                            subjects=people,
                        )
                    )
        drift = self.numbers.estimate(_measure_drift, draws=draws, seed=seed)
        titles = [("source_variance_drift", name) for name in (*self.grid.names, "all")]
        for k, (quantity, modality) in enumerate([*titles, ("source_variance_imbalance", "all")]):
            found.append(
                Number(
                    quantity=quantity,
                    place="embedding" if quantity.endswith("imbalance") else f"layer 1 to {self.layers}",
                    modality=modality,
                    value=to_number(drift.value[k]),
                    low=to_number(drift.low[k]),
                    high=to_number(drift.high[k]),
                    reference=0.0,
                    windows=self.contexts,
                    subjects=people,
                )
            )
        return found


def measure_source_variance(
    encoder: Encoder, draws: SourceDraws, context: WindowTensors, *, batch_size: int
) -> Iterator[Float[np.ndarray, "modalities states units"]]:
    """How much each unit varies when one modality of a window is exchanged and the others are held fixed.

    SV_m(a) = Var over x_m of f_a(x_m, all others fixed), f the mean over tokens, one yield per window of `context`
    (Fang et al. 2024, section 4.4, after Kleinman et al. 2023). Modalities that a context lacks stay absent, and
    have no variance of their own (NaN).

    Args:
        encoder: in evaluation mode.
        draws: what is put in the place of each modality.
        context: what is held fixed.
        batch_size: windows encoded at once.
    """
    grid = TokenGrid.of(encoder.tokens)
    for row in range(len(context)):
        parts: dict[str, np.ndarray] = {}
        for name in grid.names:
            if bool(context.present[name][row]):
                states = _exchange(encoder, draws, context, row, name, batch_size)
                parts[name] = states.var(axis=1, ddof=1)
        shape = next(iter(parts.values())).shape
        yield np.stack([parts.get(name, np.full(shape, np.nan)) for name in grid.names])


def _exchange(
    encoder: Encoder, draws: SourceDraws, context: WindowTensors, row: int, name: str, batch_size: int
) -> Float[np.ndarray, "states draws units"]:
    """Token means with each draw of one modality in the place of the context's own."""
    lent = draws.signals[name]
    collected = []
    for first in range(0, len(lent), batch_size):
        part = lent[first : first + batch_size]
        count = len(part)
        signals = {other: context.signals[other][row].expand(count, -1) for other in encoder.tokens}
        present: dict[str, Bool[Tensor, "b"]] = {
            other: context.present[other][row].expand(count) for other in encoder.tokens
        }
        windows = WindowTensors(
            signals=signals | {name: part},
            present=present,
            labels={},
            window_id=_repeat(int(context.window_id[row]), count),
        )
        states = observe(encoder, windows, attention=False).states
        collected.append(torch.stack(states).double().cpu().numpy())
    return np.concatenate(collected, 1)


def _repeat(number: int, count: int) -> Int64[np.ndarray, " count"]:
    return np.full(count, number, np.int64)


def _average(totals: Mapping[str, Any]) -> np.ndarray:
    """Mean over contexts `(draws, modalities, states, units)`, over those that have the modality."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals["variance"] / totals["contexts"][:, :, None, None]


def _share(variance: Float[np.ndarray, "*draws modalities states units"]) -> np.ndarray:
    """SV_m / sum of SV over the modalities that have one; NaN for units that do not vary."""
    total = np.nansum(variance, axis=-3, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, variance / total, np.nan)


def _soften(variance: Float[np.ndarray, "*draws modalities states units"]) -> np.ndarray:
    """Softmax over the modalities that have a source variance, NaN for the others."""
    known = np.isfinite(variance)
    with np.errstate(invalid="ignore"):
        return np.where(known, softmax(np.where(known, variance, -np.inf), axis=-3), np.nan)


def _mean_units(values: np.ndarray) -> np.ndarray:
    """Mean over the units that have a value, `(..., states, modalities)`; NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(known, values, 0.0).sum(-1) / known.sum(-1)
    return np.moveaxis(means, -2, -1)


def _mean_softmax(totals: Mapping[str, Any]) -> np.ndarray:
    return _mean_units(_soften(_average(totals)))


def _mean_share(totals: Mapping[str, Any]) -> np.ndarray:
    return _mean_units(_share(_average(totals)))


def _measure_drift(totals: Mapping[str, Any]) -> np.ndarray:
    """Drift per modality, of all, and imbalance `(draws, modalities + 2)`."""
    shares = _mean_share(totals)  # (draws, states, modalities); states: tokens, layers, embedding
    drift = shares[:, -2] - shares[:, 1]
    known = np.isfinite(shares[:, -1]).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        away = 0.5 * np.nansum(np.abs(shares[:, -1] - 1 / known), -1)
    return np.concatenate([drift, 0.5 * np.nansum(np.abs(drift), -1, keepdims=True), away[:, None]], -1)


def _standard_error(values: Float[np.ndarray, "modalities states units"]) -> np.ndarray:
    """Of the mean over units, `(states, modalities)`; NaN with fewer than two units that vary."""
    known = np.isfinite(values)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(-1, keepdims=True) / count[..., None]
        spread = np.where(known, (values - mean) ** 2, 0.0).sum(-1) / (count - 1)
        return np.where(count > 1, np.sqrt(spread / count), np.nan).T

"""Who attends to whom: mean attention of every layer, attention rollout, and the numbers behind the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from physioray.observation import Observation, TokenGrid
from physioray.subject_sums import Number, SubjectSums, to_number

ROLLOUT = "rollout"

NEAR_SECONDS = 1.0
"""Tokens that start at most so far apart count as simultaneous."""

_SUMMARIES = ("off_modality", "within_1s", "off_modality_within_1s", "entropy", "specificity")


def roll_out(attention: Sequence[Float[Tensor, "b t t"]]) -> Float[Tensor, "b t t"]:
    """How much of each output token comes from each input token, through all layers.

    R = A_L ... A_2 A_1 with A_l = 0.5 W_l + 0.5 I, W_l the attention averaged over heads and I standing for the
    residual path (Abnar and Zuidema 2020; Fang et al. 2024, section 4.4). The rows of present tokens sum to one.

    Args:
        attention: per layer, first layer first.
    """
    rolled = None
    for weights in attention:
        identity = torch.eye(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        step = 0.5 * weights + 0.5 * identity
        rolled = step if rolled is None else step @ rolled
    assert rolled is not None
    return rolled


class AttentionSums:
    """Attention summed over windows: maps of every layer and of the rollout, and numbers by subject.

    Absent tokens are in no sum: every pair of tokens has its own count of the windows that have both. The rollout is
    that of each window, averaged; not the rollout of averaged maps.

    Args:
        grid: the tokens.
        layers: of the encoder.
    """

    def __init__(self, grid: TokenGrid, layers: int) -> None:
        self.grid, self.layers = grid, layers
        self.maps = np.zeros((layers + 1, len(grid), len(grid)))
        self.pairs = np.zeros((len(grid), len(grid)), np.int64)
        self.numbers = SubjectSums()
        self.windows = 0

    @property
    def places(self) -> list[str]:
        """Names of the maps, in order."""
        return [*(f"layer {number}" for number in range(1, self.layers + 1)), ROLLOUT]

    def add(self, observed: Observation, subject: Int[np.ndarray, " b"]) -> None:
        """Add some windows of the subjects `(B,)`."""
        present = observed.present.to(observed.attention[0].device)
        rolled = roll_out(observed.attention) * (present[:, :, None] & present[:, None, :])
        maps = torch.stack([*observed.attention, rolled], 1)
        self.maps += maps.double().sum(0).cpu().numpy()
        here = observed.present.double()
        self.pairs += (here.T @ here).long().numpy()
        rows, windows = summarise_maps(maps, present, self.grid)
        self.numbers.add(subject, rows=rows, windows=windows)
        self.windows += len(subject)

    def merge(self, other: AttentionSums) -> None:
        """Add what another reader has summed over other windows."""
        # Not in place: what has come from another process may be read-only.
        self.maps = self.maps + other.maps
        self.pairs = self.pairs + other.pairs
        self.numbers.merge(other.numbers)
        self.windows += other.windows

    def average(self) -> Float[np.ndarray, "maps t t"]:
        """Mean maps of all layers and the rollout; NaN where no window has both tokens."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.pairs > 0, self.maps / self.pairs, np.nan)

    def list_numbers(self, *, draws: int, seed: int) -> list[Number]:
        """Every number with its interval by subject, beside what uniform attention would give.

        `attention_to_M`: share of attention that goes to M. `attention_off_modality`: to other modalities than the
        attending token's own. `attention_within_1s`: to tokens at most a second away, of any modality;
        `attention_off_modality_within_1s`: both. `attention_alignment`: of what goes to other modalities, the part
        within a second. `attention_entropy`: 1 if attention is uniform over the window's tokens, 0 if on one.
        `attention_specificity`: by how much that entropy rises when the attending tokens' attention is averaged
        first: 0 if all attend to the same tokens (vertical bands), whichever they are.
        """
        estimate = self.numbers.estimate(_divide, draws=draws, seed=seed)
        reference = _find_reference(self.grid, self.layers)
        windows = self.numbers.stack()["windows"]
        groups = (*self.grid.names, "all")
        found = []
        for i, place in enumerate(self.places):
            for j, modality in enumerate(groups):
                for k, quantity in enumerate(name_quantities(self.grid)):
                    found.append(
                        Number(
                            quantity=quantity,
                            place=place,
                            modality=modality,
                            value=to_number(estimate.value[i, j, k]),
                            low=to_number(estimate.low[i, j, k]),
                            high=to_number(estimate.high[i, j, k]),
                            reference=to_number(reference[i, j, k]),
                            windows=int(windows[:, j].sum()),
                            subjects=int((windows[:, j] > 0).sum()),
                        )
                    )
        return found


def name_quantities(grid: TokenGrid) -> list[str]:
    """Names of the numbers about attention, in order."""
    own = [*(f"to_{name}" for name in grid.names), *_SUMMARIES, "alignment"]
    return [f"attention_{name}" for name in own]


def summarise_maps(
    maps: Float[Tensor, "b maps t t"], present: Tensor, grid: TokenGrid
) -> tuple[Float[np.ndarray, "b maps groups quantities"], Float[np.ndarray, "b groups"]]:
    """Numbers of every window and map: means over the attending tokens of each modality, and of all together.

    Returns:
        The means, zero where a window lacks the modality, and 1 where it has it and 0 where not.
    """
    owner = torch.from_numpy(grid.list_owners()).to(maps.device)
    seconds = torch.from_numpy(grid.list_seconds()).to(maps.device)
    own = torch.nn.functional.one_hot(owner, len(grid.names)).to(maps.dtype)  # (t, modalities)
    other = (owner[:, None] != owner[None]).to(maps.dtype)
    near = ((seconds[:, None] - seconds[None]).abs() <= NEAR_SECONDS).to(maps.dtype)
    groups = torch.cat([own.T, torch.ones_like(own.T[:1])])  # (groups, t)
    weight = groups[None] * present[:, None].to(maps.dtype)
    counts = weight.sum(-1)
    weight = weight / counts.clamp(min=1)[..., None]
    # Entropies in units of the largest that the window's tokens allow.
    largest = present.sum(1).clamp(min=2).to(maps.dtype).log()[:, None, None]
    entropy = _entropy(maps) / largest
    parts = [maps @ own, (maps * other).sum(-1, keepdim=True), (maps * near).sum(-1, keepdim=True)]
    parts += [(maps * near * other).sum(-1, keepdim=True), entropy[..., None]]
    means = torch.einsum("bgt,bmtq->bmgq", weight, torch.cat(parts, -1))
    together = _entropy(torch.einsum("bgt,bmtk->bmgk", weight, maps)) / largest
    specificity = (together - means[..., -1]).clamp(min=0)
    rows = torch.cat([means, specificity[..., None]], -1)
    return rows.double().cpu().numpy(), (counts > 0).double().cpu().numpy()


def _entropy(maps: Float[Tensor, "*shape t"]) -> Float[Tensor, "*shape"]:
    return torch.special.entr(maps).sum(-1)


def _divide(totals: Mapping[str, Any]) -> np.ndarray:
    """Means per window, and behind them the part of attention to other modalities that is within a second."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals["rows"] / totals["windows"][:, None, :, None]
        first = means.shape[-1] - len(_SUMMARIES)
        off, both = (means[..., first + _SUMMARIES.index(name)] for name in ("off_modality", "off_modality_within_1s"))
        alignment = np.where(off > 0, both / off, np.nan)
    return np.concatenate([means, alignment[..., None]], -1)


def _find_reference(grid: TokenGrid, layers: int) -> Float[np.ndarray, "maps groups quantities"]:
    """The numbers of an encoder that attends to all tokens alike, all modalities present."""
    uniform = torch.full((1, len(grid), len(grid)), 1 / len(grid), dtype=torch.float64)
    maps = torch.stack([uniform] * layers + [roll_out([uniform] * layers)], 1)
    rows, windows = summarise_maps(maps, torch.ones(1, len(grid), dtype=torch.bool), grid)
    return _divide({"rows": rows, "windows": windows})[0]

"""Runs an encoder as training does and keeps what passes through it: attention of every layer, and token means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from physioray.models.fused import Encoded, FusedEncoder, Layout
from physioray.models.late_fusion import LateFusionEncoder
from physioray.signals import MODALITIES, find_modality
from physioray.strategies import Encoder
from physioray.tensors import WindowTensors


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a window in one order: modality after modality, as in `signals.MODALITIES`, each in time.

    Attributes:
        counts: tokens per modality.
    """

    counts: Mapping[str, int]

    @classmethod
    def of(cls, tokens: Mapping[str, int]) -> TokenGrid:
        """The grid of an encoder's tokens, whatever their order in its config."""
        return cls({name: tokens[name] for name in MODALITIES if name in tokens})

    def __len__(self) -> int:
        return sum(self.counts.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities in order."""
        return tuple(self.counts)

    def find_first(self, name: str) -> int:
        """Place of a modality's first token."""
        before = self.names[: self.names.index(name)]
        return sum(self.counts[other] for other in before)

    def list_owners(self) -> Int64[np.ndarray, " tokens"]:
        """Number of each token's modality."""
        return np.repeat(np.arange(len(self.counts)), list(self.counts.values()))

    def list_seconds(self) -> Float[np.ndarray, " tokens"]:
        """Second at which each token starts."""
        parts = [np.arange(count) * float(find_modality(name).token_seconds) for name, count in self.counts.items()]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Observation:
    """What an encoder did with some windows.

    Attributes:
        attention: per layer `(B, T, T)`, mean over heads, attending tokens in rows, tokens in the grid's order;
            rows and columns of absent tokens are zero. Empty if it was not asked for.
        states: `(B, units)` token means: before the first layer, after each, and the embedding (behind the last norm).
        present: `(B, T)` True where a token's modality was recorded.
    """

    attention: list[Float[Tensor, "b t t"]]
    states: list[Float[Tensor, "b units"]]
    present: Bool[Tensor, "b t"]


class _HeadMeans:
    """Keeps of each layer's weights the mean over heads, so that no layer's full weights outlive it."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def append(self, value: Tensor, /) -> None:
        self.means.append(value.float().mean(1))


def name_states(layers: int) -> list[str]:
    """Names of the places where `observe` takes token means."""
    return ["tokens", *(f"layer {number}" for number in range(1, layers + 1)), "embedding"]


@torch.no_grad()
def observe(encoder: Encoder, windows: WindowTensors, *, attention: bool = True) -> Observation:
    """Run an encoder on everything that was recorded in some windows, and look on.

    The weights are those of training and so is the path: only where attention is asked for are its weights written
    out instead of fused (equal to 1e-5).

    Args:
        encoder: in evaluation mode.
        windows: each with at least one of the encoder's modalities.
        attention: also keep the attention.

    Raises:
        ValueError: a window has no modality of the encoder.
    """
    grid = TokenGrid.of(encoder.tokens)
    here = [windows.present[name][:, None].expand(-1, count) for name, count in grid.counts.items()]
    present = torch.cat(here, 1)
    if isinstance(encoder, FusedEncoder):
        maps, states = _observe_fused(encoder, windows.signals, windows.present, grid, attention)
        return Observation(maps, states, present)
    assert isinstance(encoder, LateFusionEncoder)
    if not bool(present.any(1).all()):
        empty = int((~present.any(1)).sum())
        raise ValueError(f"Every window must have one of {', '.join(grid.names)}, but {empty} have none.")
    return Observation(*_observe_apart(encoder, windows, grid, attention), present)


def _observe_fused(
    encoder: FusedEncoder,
    signals: Mapping[str, Float[Tensor, "b _"]],
    present: Mapping[str, Bool[Tensor, "b"]],
    grid: TokenGrid,
    attention: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    weights = _HeadMeans()
    states: list[Tensor] = []
    visible = {name: present[name][:, None].expand(-1, count) for name, count in encoder.tokens.items()}
    encoded = encoder(signals, visible, weights if attention else None, states)
    layout = encoded.layout
    pooled = [Encoded(tokens, layout).pool().float() for tokens in states]
    places = _place_tokens(layout, grid, len(encoded.tokens)) if attention else torch.empty(0)
    maps = [_unpack(packed, places, len(grid)) for packed in weights.means]
    return maps, [*pooled, encoded.pool().float()]


def _observe_apart(
    encoder: LateFusionEncoder, windows: WindowTensors, grid: TokenGrid, attention: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """One encoder per modality: maps are blocks on the diagonal, units stand side by side, zero where absent."""
    rows, layers = len(windows), encoder.config.layers
    some = windows.signals[grid.names[0]]
    maps = [some.new_zeros(rows, len(grid), len(grid)) for _ in range(layers if attention else 0)]
    states = [some.new_zeros(rows, len(grid.counts), encoder.config.model.width) for _ in range(layers + 2)]
    for number, (name, count) in enumerate(grid.counts.items()):
        here = windows.present[name].nonzero().flatten()
        if not len(here):
            continue
        shown = windows.signals[name][here.to(some.device)]
        alone = TokenGrid({name: count})
        whole = {name: torch.ones(len(here), dtype=torch.bool)}
        parts, means = _observe_fused(encoder.find_encoder(name), {name: shown}, whole, alone, attention)
        first, placed = grid.find_first(name), here.to(some.device)
        for full, part in zip(maps, parts, strict=True):
            full[placed, first : first + count, first : first + count] = part
        for full, mean in zip(states, means, strict=True):
            full[placed, number] = mean
    return maps, [state.flatten(1) for state in states]


def _place_tokens(layout: Layout, grid: TokenGrid, rows: int) -> Int64[Tensor, "b v"]:
    """Place in the grid of every packed token; the grid's length where a window has fewer."""
    any_slot = next(iter(layout.slots.values()))
    places = torch.full((rows * layout.width,), len(grid), dtype=torch.long, device=any_slot.device)
    for name in layout.slots:
        places[layout.slots[name]] = layout.columns[name] + grid.find_first(name)
    return places.view(rows, layout.width)


def _unpack(packed: Float[Tensor, "b v v"], places: Tensor, total: int) -> Float[Tensor, "b t t"]:
    """Maps of packed tokens as maps of all, zero where one is absent; padding goes to a place that is cut off."""
    full = packed.new_zeros(len(packed), total + 1, total + 1)
    row = torch.arange(len(packed), device=packed.device)[:, None, None]
    full[row, places[:, :, None], places[:, None, :]] = packed
    return full[:, :total, :total]

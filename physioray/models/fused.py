"""The fused transformer: one encoder over the tokens of all modalities, and its masked autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from physioray.config import ModelConfig
from physioray.models.heads import ReconstructionDecoder, fill_queries
from physioray.models.tokenizer import ChunkTokenizer, make_positions
from physioray.models.transformer import Block, Sink, initialise, make_vector
from physioray.signals import find_modality
from physioray.tensors import move_tensor


@dataclass(frozen=True)
class Layout:
    """Where the visible tokens of a batch lie after packing.

    Attributes:
        rows, columns: per modality `(k,)`, window and token number of its visible tokens.
        slots: per modality `(k,)`, their place in the packed tokens: window * V + slot.
        width: V, the largest number of visible tokens of a window.
        real: `(B, V)`, False where a window has fewer; None if all have V.
    """

    rows: Mapping[str, Int64[Tensor, "_"]]
    columns: Mapping[str, Int64[Tensor, "_"]]
    slots: Mapping[str, Int64[Tensor, "_"]]
    width: int
    real: Bool[Tensor, "b v"] | None


@dataclass(frozen=True)
class Encoded:
    """Visible tokens after the encoder `(B, V, width)`, its final norm applied, and where they came from."""

    tokens: Float[Tensor, "b v width"]
    layout: Layout

    def pool(self) -> Float[Tensor, "b width"]:
        """Mean over the window's tokens, padding left out (Fang et al. 2024, section 3.4)."""
        if self.layout.real is None:
            return self.tokens.mean(1)
        weight = self.layout.real[..., None].to(self.tokens.dtype)
        return (self.tokens * weight).sum(1) / weight.sum(1)


def lay_out(visible: Mapping[str, Bool[Tensor, "b _"]], device: torch.device) -> Layout:
    """Pack the visible tokens of every window to the left.

    Args:
        visible: `(B, tokens)` per modality, on the CPU so that no size has to be fetched from a device.
        device: where the layout is used.

    Raises:
        ValueError: a window has no visible token.
    """
    together = torch.cat(list(visible.values()), 1)
    counts = together.sum(1)
    if len(counts) and int(counts.min()) == 0:
        empty = int((counts == 0).sum())
        raise ValueError(f"Every window must have a visible token, but {empty} of {len(counts)} have none.")
    width = int(counts.max()) if len(counts) else 0
    slot = together.cumsum(1) - 1
    rows, columns, slots, first = {}, {}, {}, 0
    for name, shown in visible.items():
        row, column = shown.nonzero(as_tuple=True)
        rows[name], columns[name] = move_tensor(row, device), move_tensor(column, device)
        slots[name] = move_tensor(row * width + slot[row, first + column], device)
        first += shown.shape[1]
    ragged = bool((counts != width).any())
    real = move_tensor(torch.arange(width)[None] < counts[:, None], device) if ragged else None
    return Layout(rows=rows, columns=columns, slots=slots, width=width, real=real)


class FusedEncoder(nn.Module):
    """One transformer over the one-second tokens of all modalities (Fang et al. 2024, section 3.2).

    It is given the signals and which tokens are visible, and never computes the others. Modalities are keys: their
    order changes nothing but rounding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        modalities = [find_modality(name) for name in config.modalities]
        self.tokens = {item.name: item.tokens for item in modalities}
        self.tokenizers = nn.ModuleDict(
            {
                item.name: ChunkTokenizer(
                    item.samples // item.tokens,
                    config.width,
                    channels=config.tokenizer_channels,
                    kernel=config.tokenizer_kernel,
                    pool=config.tokenizer_pool,
                )
                for item in modalities
            }
        )
        self.modality_vectors = nn.ParameterDict({item.name: make_vector(config.width) for item in modalities})
        for item in modalities:
            seconds = torch.arange(item.tokens) * float(item.token_seconds)
            self.register_buffer(f"positions_{item.name}", make_positions(seconds, config.width), persistent=False)
        sizes = (config.width, config.heads, config.mlp_ratio, config.dropout)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(initialise)

    @property
    def features(self) -> int:
        """Size of an embedding."""
        return self.config.width

    def find_positions(self, name: str) -> Float[Tensor, "tokens width"]:
        """Position vectors of a modality's tokens."""
        return getattr(self, f"positions_{name}")

    def forward(
        self,
        signals: Mapping[str, Float[Tensor, "b _"]],
        visible: Mapping[str, Bool[Tensor, "b _"]],
        weights: Sink | None = None,
        states: Sink | None = None,
    ) -> Encoded:
        """Encode the visible tokens.

        Args:
            signals: `(B, samples)` per modality; more modalities than the model's are ignored.
            visible: `(B, tokens)` per modality of the model, on the CPU.
            weights: a list or other sink that receives each layer's attention weights `(B, heads, V, V)`.
            states: the same for the tokens `(B, V, width)` before the first layer and after each, not normed.

        Raises:
            ValueError: a window has no visible token.
        """
        shown = {name: visible[name] for name in self.tokens}
        any_signal = signals[next(iter(self.tokens))]
        layout = lay_out(shown, any_signal.device)
        parts = [self._tokenize(name, signals[name], layout) for name in self.tokens]
        slots = torch.cat([layout.slots[name] for name in self.tokens])
        together = torch.cat(parts)
        packed = together.new_zeros(any_signal.shape[0] * layout.width, self.config.width)
        tokens = packed.index_copy(0, slots, together).view(any_signal.shape[0], layout.width, -1)
        if states is not None:
            states.append(tokens)
        for block in self.blocks:
            tokens = block(tokens, layout.real, weights)
            if states is not None:
                states.append(tokens)
        return Encoded(tokens=self.norm(tokens), layout=layout)

    def _tokenize(self, name: str, signal: Float[Tensor, "b samples"], layout: Layout) -> Float[Tensor, "k width"]:
        row, column = layout.rows[name], layout.columns[name]
        chunks = signal.unflatten(1, (self.tokens[name], -1))[row, column]
        tokens = self.tokenizers[name](chunks)
        return tokens + (self.find_positions(name)[column] + self.modality_vectors[name]).to(tokens.dtype)

    def embed(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b width"]:
        """One vector per window, from all that was recorded in it."""
        visible = {name: present[name][:, None].expand(-1, count) for name, count in self.tokens.items()}
        return self(signals, visible).pool()


class MaskedAutoencoder(nn.Module):
    """The encoder with one decoder per modality (Fang et al. 2024, section 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FusedEncoder(config)
        self.tokens = self.encoder.tokens
        self.decoders = nn.ModuleDict(
            {
                name: ReconstructionDecoder(config, find_modality(name).samples // count, config.modalities)
                for name, count in self.tokens.items()
            }
        )
        self.shared_mask_token = make_vector(config.width) if config.mask_token == "shared" else None
        if self.shared_mask_token is not None:
            for name in self.tokens:
                self.find_decoder(name).mask_token = None
        self.decoders.apply(initialise)

    def find_decoder(self, name: str) -> ReconstructionDecoder:
        """The decoder of a modality."""
        return cast(ReconstructionDecoder, self.decoders[name])

    def forward(
        self,
        signals: Mapping[str, Float[Tensor, "b _"]],
        visible: Mapping[str, Bool[Tensor, "b _"]],
        present: Mapping[str, Bool[Tensor, "b"]],
    ) -> dict[str, Float[Tensor, "b _ _"]]:
        """Reconstructed chunks `(B, tokens, samples)` of every modality that any window of the batch has."""
        encoded = self.encoder(signals, visible)
        return {
            name: self._decode(name, encoded, visible[name].shape[0])
            for name in self.tokens
            if bool(present[name].any())
        }

    def _decode(self, name: str, encoded: Encoded, rows: int) -> Float[Tensor, "b tokens samples"]:
        decoder, layout = self.find_decoder(name), encoded.layout
        flat = encoded.tokens.flatten(0, 1)
        mask_token = decoder.mask_token if self.shared_mask_token is None else self.shared_mask_token
        assert mask_token is not None
        count = self.tokens[name]
        places = layout.rows[name] * count + layout.columns[name]
        queries = fill_queries(mask_token, (rows, count), places, flat[layout.slots[name]])
        queries = queries + self.encoder.find_positions(name) + decoder.modality_vectors[name]
        origin = torch.cat(
            [
                self.encoder.find_positions(other)[layout.columns[other]] + decoder.modality_vectors[other]
                for other in self.tokens
            ]
        )
        slots = torch.cat([layout.slots[other] for other in self.tokens])
        context = flat.index_add(0, slots, origin.to(flat.dtype)).view_as(encoded.tokens)
        return decoder(queries.to(flat.dtype), context, layout.real)

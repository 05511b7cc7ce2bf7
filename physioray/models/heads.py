"""What sits behind an encoder: the decoders that reconstruct, and the linear heads that classify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from physioray.config import ModelConfig
from physioray.models.transformer import Block, CrossBlock, initialise, make_vector


class ReconstructionDecoder(nn.Module):
    """Reconstructs one modality (Fang et al. 2024, section 3.3).

    The modality's tokens, a mask token where one is hidden, attend to the visible tokens of all modalities, then to
    each other, and are projected to samples. Positions and a vector per modality are added to both sides.

    Args:
        config: width, heads, depth.
        samples: samples of one chunk of this modality.
        modalities: names of all modalities, for their vectors.
    """

    def __init__(self, config: ModelConfig, samples: int, modalities: Sequence[str]) -> None:
        super().__init__()
        self.mask_token: nn.Parameter | None = make_vector(config.width)
        self.modality_vectors = nn.ParameterDict({name: make_vector(config.width) for name in modalities})
        sizes = (config.width, config.heads, config.mlp_ratio, config.dropout)
        self.cross = CrossBlock(*sizes, residual=config.decoder_residual)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, samples)

    def forward(
        self,
        queries: Float[Tensor, "b tokens width"],
        context: Float[Tensor, "b visible width"],
        real: Bool[Tensor, "b visible"] | None,
    ) -> Float[Tensor, "b tokens samples"]:
        """Chunks of this modality, in the scale of the input."""
        tokens = self.cross(queries, context, real)
        for block in self.blocks:
            tokens = block(tokens)
        return self.projection(self.norm(tokens))


class LinearHead(nn.Linear):
    """One linear layer from an embedding to the classes of a task (Fang et al. 2024, section 3.4)."""


@runtime_checkable
class WindowEncoder(Protocol):
    """Whatever makes one vector of a window: the fused transformer, or one encoder per modality."""

    tokens: Mapping[str, int]

    @property
    def features(self) -> int:
        """Size of an embedding."""
        ...

    def embed(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b features"]:
        """One vector per window."""
        ...


class Classifier(nn.Module):
    """A trunk and a linear head: the trunk's normed tokens, averaged, are mapped to classes (section 3.4).

    Args:
        encoder: the trunk, pretrained or not; an nn.Module that is a WindowEncoder.
        classes: of the task.
        frozen: the trunk's weights get no gradient, and it stays in evaluation mode (no dropout), so that its
            embeddings are those of the pretrained encoder throughout.
    """

    def __init__(self, encoder: nn.Module, classes: int, *, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        self.head = LinearHead(self.find_trunk().features, classes)
        initialise(self.head)
        if frozen:
            encoder.requires_grad_(False)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of a window per modality."""
        return self.find_trunk().tokens

    def find_trunk(self) -> WindowEncoder:
        """The encoder, as what makes embeddings."""
        return cast(WindowEncoder, cast(Any, self.encoder))

    def train(self, mode: bool = True) -> Classifier:
        """Training or evaluation mode; a frozen trunk stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b classes"]:
        """Logits of every class, from all that was recorded in a window."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            embedding = self.find_trunk().embed(signals, present)
        return self.head(embedding)


def fill_queries(
    mask_token: Float[Tensor, "width"],
    shape: tuple[int, int],
    places: Int64[Tensor, "k"],
    tokens: Float[Tensor, "k width"],
) -> Float[Tensor, "b tokens width"]:
    """A modality's tokens with the mask token at hidden places.

    Args:
        mask_token: stands wherever no token is given.
        shape: (B, tokens of the modality).
        places: where the visible tokens belong, counted through the batch: row * tokens + token.
        tokens: the encoder's output for them.
    """
    rows, count = shape
    queries = mask_token.to(tokens.dtype).expand(rows * count, -1)
    return queries.index_copy(0, places, tokens).view(rows, count, -1)

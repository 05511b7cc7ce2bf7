"""Late fusion: one encoder per modality, joined only behind the encoders; what the contrastive baselines train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from physioray.config import LateFusionConfig
from physioray.models.fused import FusedEncoder
from physioray.models.transformer import initialise
from physioray.signals import MODALITIES


class LateFusionEncoder(nn.Module):
    """One transformer per modality, each of the class a unimodal model has (Fang et al. 2024, appendix F.1).

    The modalities' embeddings are concatenated in the order of `signals.MODALITIES`, whatever the order in the
    config, so that a checkpoint means the same everywhere.
    """

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(name for name in MODALITIES if name in config.modalities)
        self.encoders = nn.ModuleDict(
            {
                name: FusedEncoder(replace(config.model, modalities=(name,), layers=config.layers))
                for name in self.modalities
            }
        )
        self.tokens = {name: self.find_encoder(name).tokens[name] for name in self.modalities}

    @property
    def features(self) -> int:
        """Size of an embedding: modalities x width."""
        return len(self.modalities) * self.config.model.width

    def find_encoder(self, name: str) -> FusedEncoder:
        """The encoder of a modality."""
        return cast(FusedEncoder, self.encoders[name])

    def encode(
        self, name: str, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> tuple[Int64[Tensor, "k"], Float[Tensor, "k width"]]:
        """One modality's pooled embeddings, of the windows that have it.

        Returns:
            The rows `(k,)` that have the modality, and their embeddings `(k, width)`; k may be 0.
        """
        signal = signals[name]
        rows = present[name].nonzero().flatten()
        placed = rows.to(signal.device)
        if len(rows) == 0:
            return placed, signal.new_zeros(0, self.config.model.width)
        visible = {name: torch.ones(len(rows), self.tokens[name], dtype=torch.bool)}
        shown = signal if len(rows) == len(signal) else signal[placed]
        return placed, self.find_encoder(name)({name: shown}, visible).pool()

    def embed(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b features"]:
        """One vector per window: the modalities' embeddings side by side, zeros where one is absent.

        Raises:
            ValueError: a window has no modality at all.
        """
        anything = torch.stack([present[name] for name in self.modalities]).any(0)
        if not bool(anything.all()):
            empty = int((~anything).sum())
            raise ValueError(
                f"Every window must have one of {', '.join(self.modalities)}, "
                f"but {empty} of {len(anything)} have none. Leave them out."
            )
        parts = [
            _spread(*self.encode(name, signals, present), rows_in_all=len(present[name])) for name in self.modalities
        ]
        return torch.cat(parts, 1)


class LateFusion(nn.Module):
    """The encoders with a projection per modality, which pretraining compares and which is discarded afterwards.

    The projection is width -> width / 2 -> width / 4: 512 -> 256 -> 128 in the paper (Fang et al. 2024, appendix
    F.1).
    """

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = LateFusionEncoder(config)
        width = config.model.width
        activation = nn.ReLU if config.projection_activation == "relu" else nn.GELU
        self.projections = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, width // 2), activation(), nn.Linear(width // 2, width // 4))
                for name in self.encoder.modalities
            }
        )
        self.projections.apply(initialise)
        self.log_scale = nn.Parameter(torch.zeros(())) if config.learned_temperature else None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the embedding."""
        return self.encoder.modalities

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of a window per modality."""
        return self.encoder.tokens

    @property
    def features(self) -> int:
        """Size of an embedding: modalities x width."""
        return self.encoder.features

    def embed(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b features"]:
        """One vector per window, without the projections; see LateFusionEncoder.embed."""
        return self.encoder.embed(signals, present)

    def project(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> dict[str, Float[Tensor, "b _"]]:
        """What the contrastive objectives compare: `(B, width / 4)` per modality.

        Row i is window i. Where the modality is absent the row is zero and carries no gradient, and `present` says
        so; only windows that have a modality pass through its encoder.
        """
        projected = {}
        for name in self.modalities:
            rows, pooled = self.encoder.encode(name, signals, present)
            # A projection has biases, so absent rows are left out before it and zero behind it.
            projected[name] = _spread(rows, self.projections[name](pooled), rows_in_all=len(present[name]))
        return projected

    def find_scale(self) -> Float[Tensor, ""] | None:
        """The learned factor exp(t) on similarities, or None if the temperature is fixed.

        After SleepFM: t starts at 0 and is brought back into its limits after every step (here: before its next use).
        """
        if self.log_scale is None:
            return None
        low, high = self.config.log_scale_limits
        with torch.no_grad():
            self.log_scale.clamp_(low, high)
        return self.log_scale.exp()


def _spread(rows: Int64[Tensor, "k"], values: Float[Tensor, "k width"], rows_in_all: int) -> Float[Tensor, "b width"]:
    """Values of some windows at their rows of the batch, zeros elsewhere."""
    return values.new_zeros(rows_in_all, values.shape[1]).index_copy(0, rows, values)

"""The ways to pretrain that the paper compares, as named settings, and what is built from settings.

A strategy is a row of Fang et al. 2024, Tables 1 and 2: which modalities, which model, which objective, which
checkpoint. Sizes come from a preset, so every strategy exists in every size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from physioray.config import (
    ContrastiveConfig,
    LateFusionConfig,
    MaskConfig,
    ModelConfig,
    ReconstructionConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from physioray.models.fused import FusedEncoder, MaskedAutoencoder
from physioray.models.late_fusion import LateFusion, LateFusionEncoder
from physioray.objectives.contrastive import ContrastiveObjective, build_contrast
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.signals import MODALITIES, LookupMiss

ModelSettings = ModelConfig | LateFusionConfig
ObjectiveSettings = ReconstructionConfig | ContrastiveConfig
Model = MaskedAutoencoder | LateFusion
Encoder = FusedEncoder | LateFusionEncoder

KINDS: Mapping[str, type[ModelSettings | ObjectiveSettings]] = {
    "fused": ModelConfig,
    "late_fusion": LateFusionConfig,
    "reconstruction": ReconstructionConfig,
    "contrastive": ContrastiveConfig,
}
"""Kinds of models and objectives, as they stand in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One row of the paper's tables.

    Attributes:
        name: as in result files.
        title: as in tables.
        modalities: those the model is made for; all that the cohort holds if None.
        objective: what is pretrained for; None trains from scratch on each task instead.
        late_fusion: one encoder per modality instead of one for all.
        select: which checkpoint is used, that of the lowest validation loss or the last one (section 3.5: the last
            with modality drop, where the validation loss is noisy, the best everywhere else).
    """

    name: str
    title: str
    modalities: tuple[str, ...] | None = None
    objective: ObjectiveSettings | None = None
    late_fusion: bool = False
    select: Literal["best", "last"] = "best"

    def fit_model(self, sizes: ModelConfig) -> ModelSettings:
        """The strategy's model in a preset's sizes; `sizes.modalities` are those of the cohort.

        Raises:
            LookupMiss: the cohort lacks a modality that the strategy needs.
        """
        missing = [name for name in self.modalities or () if name not in sizes.modalities]
        if missing:
            raise LookupMiss(
                f"The strategy {self.name} must have {', '.join(missing)}, but there are only "
                f"{', '.join(sizes.modalities)}. Ingest with --modalities, or choose another strategy."
            )
        model = sizes if self.modalities is None else replace(sizes, modalities=self.modalities)
        return LateFusionConfig(model=model) if self.late_fusion else model

    def fit_train(self, train: TrainConfig) -> TrainConfig:
        """A preset's training with the strategy's choice of checkpoint."""
        return replace(train, select=self.select)


def _list_strategies() -> list[Strategy]:
    whole = ReconstructionConfig(mask=MaskConfig(drop=False))
    rows = [
        Strategy(
            name="multimae_drop", title="MultiMAE + modality drop", objective=ReconstructionConfig(), select="last"
        ),
        Strategy(name="multimae", title="MultiMAE", objective=whole),
        Strategy(name="scratch", title="From scratch"),
    ]
    contrasts: dict[str, ContrastiveConfig] = {
        "SimCLR-style": ContrastiveConfig(method="simclr"),
        "CLIP, pairwise": ContrastiveConfig(method="pairwise"),
        "CLIP, leave one out": ContrastiveConfig(method="leave_one_out"),
    }
    for title, config in contrasts.items():
        name = config.method if config.method == "simclr" else f"clip_{config.method}"
        rows.append(Strategy(name=name, title=title, objective=config, late_fusion=True))
    for name in MODALITIES:
        # Section 4.1; 0.7 of a single modality's 30 tokens leaves 9 visible (the ratio is an assumption).
        rows.append(Strategy(name=f"mae_{name}", title=f"MAE, {name} alone", modalities=(name,), objective=whole))
        rows.append(Strategy(name=f"scratch_{name}", title=f"From scratch, {name} alone", modalities=(name,)))
    return rows


STRATEGIES: Mapping[str, Strategy] = {strategy.name: strategy for strategy in _list_strategies()}
"""Every row of Tables 1 and 2 (for all modalities this package knows, not the paper's four alone)."""


def find_strategy(name: str) -> Strategy:
    """Look a strategy up by name.

    Raises:
        LookupMiss: no such strategy; the message lists those that exist.
    """
    if name not in STRATEGIES:
        raise LookupMiss.among("A strategy", STRATEGIES, name)
    return STRATEGIES[name]


def name_strategy(model: ModelSettings, objective: ObjectiveSettings | None) -> str:
    """The name of settings in result files, by what they do: a variant keeps its strategy's name."""
    alone = f"_{model.modalities[0]}" if len(model.modalities) == 1 else ""
    if objective is None:
        return f"scratch{alone}"
    if isinstance(objective, ContrastiveConfig):
        return objective.method if objective.method == "simclr" else f"clip_{objective.method}"
    if alone:
        return f"mae{alone}"
    dropping = objective.mask.drop and objective.mask.drop_probability > 0
    return "multimae_drop" if dropping else "multimae"


def build_model(config: ModelSettings, seed: int) -> Model:
    """An untrained model with what it needs in pretraining; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LateFusion(config) if isinstance(config, LateFusionConfig) else MaskedAutoencoder(config)


def build_objective(config: ObjectiveSettings) -> MaskedReconstruction | ContrastiveObjective:
    """The objective of some settings."""
    return build_contrast(config) if isinstance(config, ContrastiveConfig) else MaskedReconstruction(config)


def describe_settings(config: ModelSettings | ObjectiveSettings) -> dict[str, Any]:
    """Settings of a model or an objective as plain values, with their kind."""
    kind = next(name for name, kind in KINDS.items() if type(config) is kind)
    return {"kind": kind, **to_dict(config)}


def restore_settings(values: Mapping[str, Any]) -> ModelSettings | ObjectiveSettings:
    """What `describe_settings` has described.

    Raises:
        LookupMiss: the kind is unknown; the message lists those that exist.
    """
    kind = str(values.get("kind"))
    if kind not in KINDS:
        raise LookupMiss(f"The kind of settings must be one of {', '.join(KINDS)}, but is {kind!r}.")
    return from_dict(KINDS[kind], {name: value for name, value in values.items() if name != "kind"})

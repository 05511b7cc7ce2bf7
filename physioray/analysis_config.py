"""Settings of the look inside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from physioray.config import assume, require, require_choice
from physioray.signals import SPLITS


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """How a checkpoint is looked into (Fang et al. 2024, section 4.4): on how much, and with which choices.

    Attributes:
        splits: whose windows, in order: the next split's only where those before have too few.
        windows: how many for attention and reconstruction.
        contexts, draws: of the source variance; one modality is exchanged `draws` times in each context.
        hidden_ratio: share of tokens hidden for the reconstructions; the same tokens for every checkpoint.
        examples: windows whose reconstruction is kept to be drawn.
    """

    splits: tuple[str, ...] = ("test", "validation", "train")
    windows: int = assume(1000, "attention maps: mean over 1,000 windows")
    contexts: int = assume(32, "source variance: mean over 32 contexts")
    draws: int = assume(128, "source variance: 128 draws of a modality in each context")
    hidden_ratio: float = 0.7
    examples: int = 2
    batch_size: int = 32
    seed: int = 0
    bootstrap_draws: int = 500

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("contexts", 1), ("draws", 2), ("batch_size", 1), ("examples", 0)):
            require(
                getattr(self, name) >= least, f"AnalysisConfig.{name} must be at least {least}", getattr(self, name)
            )
        require(0 < self.hidden_ratio < 1, "AnalysisConfig.hidden_ratio must be in (0, 1)", self.hidden_ratio)
        for split in self.splits:
            require_choice("AnalysisConfig.splits", split, SPLITS)

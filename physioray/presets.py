"""Named sizes of the whole recipe: the paper's, one for small machines, one for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from physioray.config import ModelConfig, ProbeConfig, ReconstructionConfig, TrainConfig
from physioray.signals import LookupMiss


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, how it is pretrained and probed, and how it is trained on a task (finetuned, or from scratch)."""

    model: ModelConfig
    objective: ReconstructionConfig = ReconstructionConfig()
    train: TrainConfig
    finetune: TrainConfig
    probe: ProbeConfig = ProbeConfig()


PRESETS: Mapping[str, Preset] = {
    # Fang et al. 2024, sections 3.2 and 3.5. One pass over 1.52 million windows is 1,484 steps.
    "paper": Preset(
        model=ModelConfig(),
        train=TrainConfig(),
        # 200 passes, the same rate for encoder and head, the weights with the lowest validation error.
        finetune=TrainConfig(passes=200, batch_size=512, weight_decay=0.01, select="best"),
    ),
    # For two cores and some thousand windows. No dropout: with it, losses would depend on the number of workers.
    "small": Preset(
        model=ModelConfig(width=128, layers=4, heads=4, dropout=0.0),
        train=TrainConfig(
            passes=25, batch_size=64, learning_rate=1e-3, warmup_passes=2, precision="fp32", checkpoint_minutes=2
        ),
        finetune=TrainConfig(
            passes=10,
            batch_size=64,
            learning_rate=3e-4,
            warmup_passes=1,
            weight_decay=0.01,
            precision="fp32",
            checkpoint_minutes=2,
            select="best",
        ),
    ),
    # For tests: a second on one core.
    "tiny": Preset(
        model=ModelConfig(width=32, layers=2, heads=2, dropout=0.0, tokenizer_channels=8),
        train=TrainConfig(
            passes=3, batch_size=16, learning_rate=1e-3, warmup_passes=1, precision="fp32", checkpoint_minutes=2
        ),
        finetune=TrainConfig(
            passes=3,
            batch_size=16,
            learning_rate=1e-3,
            warmup_passes=1,
            weight_decay=0.01,
            precision="fp32",
            checkpoint_minutes=2,
            select="best",
        ),
        probe=ProbeConfig(recipe_passes=20, recipe_min_steps=200, bootstrap_draws=100),
    ),
}


def find_preset(name: str) -> Preset:
    """Look a preset up by name.

    Raises:
        LookupMiss: no such preset; the message lists those that exist.
    """
    if name not in PRESETS:
        raise LookupMiss.among("A preset", PRESETS, name)
    return PRESETS[name]

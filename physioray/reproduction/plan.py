"""What a reproduction of the paper consists of: strategies and tables, sweeps, figures, in three sizes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from physioray.analysis_config import AnalysisConfig
from physioray.config import SplitConfig
from physioray.grid_plan import GridConfig, find_grid
from physioray.grid_report import narrow_grid
from physioray.search_space import Distribution, choice, loguniform, uniform
from physioray.signals import LookupMiss
from physioray.sweep_setup import Evaluation, SweepSetup, choose_sizes, set_up_sweep
from physioray.trials import Here


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """One of the paper's sweeps.

    Attributes:
        name: of its folder.
        title: as the page heads it.
        question: what it asks, in a sentence.
        space: what is varied besides the number of training subjects.
        sizes: numbers of training subjects, scaled to the cohort; all of them at once if empty.
        strategy: what is pretrained.
        trials: how many of a search; None for every combination.
        evaluations: how trials are scored; one sweep each.
    """

    name: str
    title: str
    question: str
    space: Mapping[str, Distribution]
    sizes: tuple[int, ...] = ()
    strategy: str = "multimae_drop"
    trials: int | None = None
    evaluations: tuple[Evaluation, ...] = ("probe",)

    def set_up(self, options: argparse.Namespace, evaluation: Evaluation) -> SweepSetup:
        """The sweep on a cohort; options as of `parts.make_options`."""
        space = dict(self.space)
        if self.sizes:
            space = {"training_subjects": choice(list(choose_sizes(options, self.sizes))), **space}
        searched: dict[str, Any] = (
            {} if self.trials is None else {"sampler": "tpe", "trials": self.trials, "halving": True}
        )
        place = Here(device=options.device)
        return set_up_sweep(options, space, evaluation=evaluation, strategy=self.strategy, place=place, **searched)


def _sweep_ratios(ratios: list[float], **changes: Any) -> SweepRecipe:
    space = {"objective.mask.drop": choice([True, False]), "objective.mask.hidden_ratio": choice(ratios)}
    return SweepRecipe(
        name="mask_ratio",
        title="Figure 3: how much to hide, with and without modality drop",
        question="Which share of hidden tokens is best, with few and with many training subjects? The paper's best is "
        "0.7 in all with 25 subjects, by full finetuning; with 500 the share hardly matters.",
        space=space,
        sizes=(25, 500),
        **changes,
    )


def _sweep_sizes(sizes: tuple[int, ...]) -> SweepRecipe:
    return SweepRecipe(
        name="training_size",
        title="How many labelled people a pretrained encoder needs",
        question="How does the score rise with the number of training subjects (the paper's tables have 25 and 500)?",
        space={},
        sizes=sizes,
    )


def _sweep_drop(trials: int) -> SweepRecipe:
    return SweepRecipe(
        name="modality_drop",
        title="How often to drop a modality, and for how many windows at once",
        question="Is one dropped modality in every batch (section 3.3) the best dose?",
        space={
            "objective.mask.drop_probability": uniform(0.0, 1.0),
            "objective.mask.drop_scope": choice(["batch", "sample"]),
        },
        trials=trials,
    )


def _sweep_temperature(trials: int) -> SweepRecipe:
    return SweepRecipe(
        name="temperature",
        title="The temperature of the contrastive losses",
        question="How sharp should similarities be weighed? The paper prints no value (appendix F); 0.1 is ours.",
        space={
            "objective.temperature": loguniform(0.02, 1.0),
            "objective.method": choice(["simclr", "pairwise", "leave_one_out"]),
        },
        strategy="clip_leave_one_out",
        trials=trials,
    )


RATIOS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]

FIGURES: Mapping[str, str] = {"scratch": "From scratch", "multimae": "MultiMAE", "multimae_drop": "MultiMAE + drop"}
"""Strategies whose inside is drawn side by side (Figures 2, 4 and 6), and what the page calls them."""


@dataclass(frozen=True, kw_only=True)
class ReproductionConfig:
    """How much of the paper is computed, and at what size.

    Attributes:
        name: of the preset.
        grid: strategies and tables.
        sweeps: in order.
        analysis: of the figures.
        left_out: by title, what this preset does not run, and why.
    """

    name: str
    grid: GridConfig
    sweeps: tuple[SweepRecipe, ...]
    analysis: AnalysisConfig = AnalysisConfig()
    left_out: Mapping[str, str] = field(default_factory=dict)


_SIZES = SplitConfig().subset_sizes
_FULL = (_sweep_sizes(tuple(_SIZES)), _sweep_drop(20), _sweep_temperature(20))
_SMALLER = "not part of the preset smoke; the presets small and paper run it"

PRESETS: Mapping[str, ReproductionConfig] = {
    # Shows that every part runs and what fills it; its scores and pictures mean nothing.
    "smoke": ReproductionConfig(
        name="smoke",
        grid=find_grid("smoke"),
        sweeps=(_sweep_ratios([0.3, 0.7, 0.9]), _sweep_sizes((25, 500))),
        analysis=AnalysisConfig(windows=200, contexts=6, draws=24, bootstrap_draws=200),
        left_out={item.title: _SMALLER for item in _FULL[1:]},
    ),
    "small": ReproductionConfig(name="small", grid=find_grid("small"), sweeps=(_sweep_ratios(RATIOS), *_FULL)),
    "paper": ReproductionConfig(
        name="paper",
        grid=find_grid("paper"),
        sweeps=(_sweep_ratios(RATIOS, evaluations=("probe", "finetune")), *_FULL),
    ),
}


def find_reproduction(name: str, *, passes: int | None = None, finetune_seeds: int | None = None) -> ReproductionConfig:
    """Look a preset up by name; pretrainings over other passes and other repetitions of trainings, where given.

    Raises:
        LookupMiss: no such preset; the message lists those that exist.
    """
    if name not in PRESETS:
        raise LookupMiss(f"A preset of the reproduction must be one of {', '.join(PRESETS)}, but got {name!r}.")
    found = PRESETS[name]
    return replace(found, grid=narrow_grid(found.grid, None, passes, finetune_seeds, False))

"""Which cells of the paper's tables are computed on a cohort: strategies, training-set sizes, folds and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physioray.config import ProbeConfig, SplitConfig
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold, read_division, scale_sizes, shrink_fold
from physioray.presets import find_preset
from physioray.pretrain import find_pretraining_windows, fit_modalities
from physioray.protocol import Protocol, choose_protocol, find_labelled_windows
from physioray.signals import LookupMiss
from physioray.strategies import find_strategy

FLOORS = ("untrained", "band_powers")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which cells of the paper's tables are computed, and at what size.

    Attributes:
        name: of the preset that this is.
        sizes: name in `presets.PRESETS` for the models and trainings.
        pretrained: strategies that are pretrained and probed.
        finetuned: of these, those that are also finetuned in full.
        scratch: strategies trained on the tasks without pretraining.
        passes, finetune_passes: instead of the preset's; None keeps them.
        probe: tasks, seeds, folds of every probe.
        finetune_seeds: repetitions of every training on a task.
        finetune_tasks: tasks that are trained on; all of the probe's if None.
        whole: trainings on tasks at every training-set size, not at the largest alone.
        sizes_asked: how many training-set sizes at most, smallest and largest among them; all of them if None.
    """

    name: str
    sizes: str
    pretrained: tuple[str, ...] = ()
    finetuned: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    passes: int | None = None
    finetune_passes: int | None = None
    probe: ProbeConfig = ProbeConfig()
    finetune_seeds: int = 5
    finetune_tasks: tuple[str, ...] | None = None
    whole: bool = False
    sizes_asked: int | None = None


PRETRAINED = ("mae_eeg", "mae_emg", "mae_eog", "mae_ecg", "multimae_drop", "multimae")
CONTRASTIVE = ("clip_leave_one_out", "clip_pairwise", "simclr")
FINETUNED = ("mae_eeg", "mae_emg", "mae_eog", "mae_ecg", "multimae_drop")
SCRATCHES = ("scratch_eeg", "scratch_emg", "scratch_eog", "scratch_ecg", "scratch")

GRIDS: Mapping[str, GridConfig] = {
    # Everything once and small: shows that every cell can be filled, and what fills it. Its scores mean nothing.
    "smoke": GridConfig(
        name="smoke",
        sizes="tiny",
        pretrained=PRETRAINED + CONTRASTIVE,
        finetuned=FINETUNED,
        scratch=SCRATCHES,
        passes=2,
        finetune_passes=2,
        probe=ProbeConfig(seeds=(0,), folds=2, bootstrap_draws=100, recipe_passes=20, recipe_min_steps=200),
        finetune_seeds=1,
        sizes_asked=2,
    ),
    "small": GridConfig(
        name="small",
        sizes="small",
        pretrained=PRETRAINED + CONTRASTIVE,
        finetuned=FINETUNED,
        scratch=SCRATCHES,
    ),
    "paper": GridConfig(
        name="paper",
        sizes="paper",
        pretrained=PRETRAINED + CONTRASTIVE,
        finetuned=FINETUNED,
        scratch=SCRATCHES,
    ),
}


def find_grid(name: str) -> GridConfig:
    """Look a grid up by name.

    Raises:
        LookupMiss: no such grid; the message lists those that exist.
    """
    if name not in GRIDS:
        raise LookupMiss.among("A preset of the tables", GRIDS, name)
    return GRIDS[name]


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """A grid laid out on a cohort.

    Attributes:
        cohort: opened.
        protocol: who is pretrained on and scored.
        pretrained, finetuned, scratch: strategies whose modalities the cohort holds.
        sizes: numbers of training subjects asked for, ascending; the last is everybody.
        subsets: by size, the training subjects of a held-out evaluation; empty in cross-validation.
        strata: a class per subject that small training sets keep their share of.
        windows: `(n,)` labelled windows with any modality.
        pretraining_windows: number of windows of a pass of pretraining.
        notes: what was left out, and why.
    """

    cohort: Cohort
    protocol: Protocol
    pretrained: tuple[str, ...]
    finetuned: tuple[str, ...]
    scratch: tuple[str, ...]
    sizes: tuple[int, ...]
    subsets: Mapping[int, tuple[str, ...]]
    strata: Mapping[str, str]
    windows: NDArray[np.int64]
    pretraining_windows: int
    notes: tuple[str, ...]

    def folds_of(self, size: int) -> dict[int, list[Fold]] | None:
        """By seed, the folds with `size` training subjects each; None where test subjects are held out."""
        if self.protocol.folds is None:
            return None
        return {seed: self._shrink(parts, size, seed) for seed, parts in self.protocol.folds.items()}

    def fold(self, size: int, seed: int) -> list[Fold]:
        """The folds of one seed; a single one where test subjects are held out."""
        if self.protocol.folds is not None:
            return self._shrink(self.protocol.folds[seed], size, seed)
        members = {
            name: tuple(sorted({item.subject for item in self.cohort.recordings if item.split == name}))
            for name in ("validation", "test")
        }
        return [Fold(train=self.subsets[size], validation=members["validation"], test=members["test"])]

    def _shrink(self, folds: Sequence[Fold], size: int, seed: int) -> list[Fold]:
        if size == self.sizes[-1]:
            return list(folds)
        return [shrink_fold(fold, size, [seed, number], self.strata) for number, fold in enumerate(folds)]


def plan_grid(cohort: Cohort, config: GridConfig) -> GridPlan:
    """Lay a grid out on a cohort: scale the sizes, leave out strategies whose modality the cohort lacks.

    Raises:
        ValueError: no subject has labels, or too few for the protocol.
    """
    protocol = choose_protocol(cohort, config.probe)
    if not protocol.labelled or protocol.folds == {}:
        raise ValueError(f"A grid must have labelled subjects to score, but: {protocol.sentence}")
    notes: list[str] = []
    fitted = {
        group: _fit_strategies(getattr(config, group), cohort, config.sizes, notes)
        for group in ("pretrained", "finetuned", "scratch")
    }
    age = cohort.read_labels("age")
    strata = {item.subject: str(age[item.first]) for item in cohort.recordings}
    subsets: Mapping[int, tuple[str, ...]] = {}
    if protocol.folds is None:
        subsets = read_division(cohort.location).training_subsets
        sizes = tuple(sorted(subsets))
    else:
        smallest = min(len(fold.train) for folds in protocol.folds.values() for fold in folds)
        sizes = tuple(scale_sizes(smallest, SplitConfig().subset_sizes))
    if config.sizes_asked is not None and len(sizes) > config.sizes_asked:
        chosen = np.linspace(0, len(sizes) - 1, config.sizes_asked).round().astype(int)
        sizes = tuple(sizes[number] for number in chosen)
    everything = tuple(cohort.modalities)
    return GridPlan(
        cohort=cohort,
        protocol=protocol,
        sizes=sizes,
        subsets=subsets,
        strata=strata,
        windows=find_labelled_windows(cohort, protocol, everything),
        pretraining_windows=len(find_pretraining_windows(cohort, protocol.splits, everything)),
        notes=tuple(dict.fromkeys(notes)),
        **fitted,
    )


def _fit_strategies(names: Sequence[str], cohort: Cohort, sizes: str, notes: list[str]) -> tuple[str, ...]:
    model = fit_modalities(find_preset(sizes).model, cohort)
    fitted = []
    for name in names:
        try:
            find_strategy(name).fit_model(model)
        except LookupMiss as error:
            notes.append(str(error))
        else:
            fitted.append(name)
    return tuple(fitted)

"""What the conformance suites run over: every encoder and every objective is listed here once.

Modalities of three rates and lengths are used, so that nothing passes that is built for four modalities of 100 Hz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from physioray.config import ContrastiveConfig, LateFusionConfig, MaskConfig, ReconstructionConfig
from physioray.models.fused import FusedEncoder, MaskedAutoencoder
from physioray.models.heads import Classifier
from physioray.models.late_fusion import LateFusion, LateFusionEncoder
from physioray.objectives.augment import augment
from physioray.objectives.classification import WeightedCrossEntropy
from physioray.objectives.contrastive import LeaveOneOutContrast, NeighbourContrast, PairwiseContrast
from physioray.objectives.masking import draw_visible
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import find_preset
from physioray.signals import find_modality
from physioray.tensors import Draw, WindowTensors
from tests.conformance import references

NAMES = ("eeg", "ecg", "airflow")
TINY = replace(find_preset("tiny").model, modalities=NAMES)
DRAW = Draw(seed=3, pass_number=1, step=2)


def make_windows(rows: int, seed: int = 0, absent: bool = True) -> WindowTensors:
    """Windows of noise; with `absent`, every modality is absent somewhere and neighbours differ in what they have."""
    generator = torch.Generator().manual_seed(seed)
    signals = {name: torch.randn(rows, find_modality(name).samples, generator=generator) for name in NAMES}
    number = torch.arange(rows)
    lacks = {"eeg": number % 5 == 4, "ecg": number % 5 == 1, "airflow": number % 5 >= 3}
    present = {name: ~lacks[name] if absent else torch.ones(rows, dtype=torch.bool) for name in NAMES}
    signals = {name: signal * present[name][:, None] for name, signal in signals.items()}
    labels = {"sleep": (number * 7) % 6 - 1}
    return WindowTensors(signals=signals, present=present, labels=labels, window_id=np.arange(100, 100 + rows))


def take(windows: WindowTensors, rows: Sequence[int]) -> WindowTensors:
    """Some windows, in the order given."""
    chosen = list(rows)
    return WindowTensors(
        signals={name: value[chosen] for name, value in windows.signals.items()},
        present={name: value[chosen] for name, value in windows.present.items()},
        labels={name: value[chosen] for name, value in windows.labels.items()},
        window_id=windows.window_id[chosen],
    )


def spoil(windows: WindowTensors, value: float = 1e4) -> WindowTensors:
    """The same windows with other samples wherever a modality is absent."""
    signals = {
        name: torch.where(windows.present[name][:, None], signal, torch.full_like(signal, value))
        for name, signal in windows.signals.items()
    }
    return replace(windows, signals=signals)


def lose(windows: WindowTensors, name: str) -> WindowTensors:
    """The windows that still have something when a modality is taken from all of them."""
    present = windows.present | {name: torch.zeros(len(windows), dtype=torch.bool)}
    rows = torch.stack(list(present.values())).any(0).nonzero().flatten().tolist()
    return take(replace(windows, present=present), rows)


@dataclass(frozen=True, kw_only=True)
class ListedEncoder:
    """How a class of encoders is built for some modalities."""

    kind: type[nn.Module]
    build: Callable[[tuple[str, ...]], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ListedObjective:
    """How an objective and its model are built.

    Attributes:
        kind: the class.
        build, model: make the objective, and a model for some modalities.
        reference: the loss as a plain number, slowly, from a float64 model.
        unit: windows that belong together in a batch.
        additive: the sums of two batches are those of the batch of both (nothing is compared across windows).
        hides: a mask config if the objective hides tokens.
    """

    kind: type
    name: str
    build: Callable[[], Any]
    model: Callable[[tuple[str, ...]], nn.Module]
    reference: Callable[[nn.Module, WindowTensors], float]
    unit: int = 1
    additive: bool = True
    hides: MaskConfig | None = None


def build(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()


def resize(names: tuple[str, ...]) -> Any:
    return replace(TINY, modalities=names)


def late(names: tuple[str, ...]) -> LateFusionConfig:
    return LateFusionConfig(model=resize(names))


def classify(encoder: nn.Module) -> Classifier:
    torch.manual_seed(1)
    return Classifier(encoder, 5).eval()


ENCODERS = (
    ListedEncoder(kind=FusedEncoder, build=lambda names: build(FusedEncoder, resize(names))),
    ListedEncoder(kind=LateFusionEncoder, build=lambda names: build(LateFusionEncoder, late(names))),
    ListedEncoder(kind=LateFusion, build=lambda names: build(LateFusion, late(names))),
)

WEIGHTS = [0.4, 3.0, 1.0, 0.0, 0.7]
MASKS = {
    "uniform": MaskConfig(drop=False),
    "drop": MaskConfig(),
    "dirichlet": MaskConfig(sampler="dirichlet", drop=False),
    "subset": MaskConfig(sampler="subset", drop=False),
}


def _reconstruction(name: str, mask: MaskConfig) -> ListedObjective:
    def reference(model: nn.Module, windows: WindowTensors) -> float:
        visible = draw_visible(windows.present, model.tokens, windows.window_id, DRAW, mask)  # type: ignore[arg-type]
        return references.reconstruct(model, windows, visible)

    return ListedObjective(
        kind=MaskedReconstruction,
        name=f"reconstruction-{name}",
        build=lambda: MaskedReconstruction(ReconstructionConfig(mask=mask)),
        model=lambda names: build(MaskedAutoencoder, resize(names)),
        reference=reference,
        hides=mask,
    )


def _contrast(kind: Any, method: Any, refer: Callable[[dict[str, Tensor], dict[str, Tensor], float], float]) -> Any:
    config = ContrastiveConfig(method=method)

    def reference(model: nn.Module, windows: WindowTensors) -> float:
        signals = windows.signals
        if method == "simclr":
            signals = augment(signals, windows.present, windows.window_id, DRAW, config.augment)
        projected = model.project({n: s.double() for n, s in signals.items()}, windows.present)  # type: ignore[operator]
        return refer(projected, dict(windows.present), config.temperature)

    return ListedObjective(
        kind=kind,
        name=f"contrast-{method}",
        build=lambda: kind(config),
        model=lambda names: build(LateFusion, late(names)),
        reference=reference,
        unit=2 if kind.pairs else 1,
        additive=False,
    )


def _classification(name: str, trunk: ListedEncoder) -> ListedObjective:
    return ListedObjective(
        kind=WeightedCrossEntropy,
        name=f"classification-{name}",
        build=lambda: WeightedCrossEntropy("sleep", WEIGHTS),
        model=lambda names: classify(trunk.build(names)),
        reference=lambda model, windows: references.classify(model, windows, "sleep", WEIGHTS),
    )


OBJECTIVES = (
    *(_reconstruction(name, mask) for name, mask in MASKS.items()),
    _contrast(NeighbourContrast, "simclr", references.compare_neighbours),
    _contrast(PairwiseContrast, "pairwise", references.compare_pairs),
    _contrast(LeaveOneOutContrast, "leave_one_out", references.compare_with_rest),
    _classification("fused", ENCODERS[0]),
    _classification("late", ENCODERS[1]),
)

"""Classification: the labelled classes of a task are guessed, rare ones counting as much as frequent ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from physioray.objectives.loss import LossParts
from physioray.tensors import Draw, WindowTensors


@runtime_checkable
class WindowClassifier(Protocol):
    """A model that gives every window a logit per class."""

    def __call__(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b classes"]:
        """Logits `(B, classes)`."""
        ...


class WeightedCrossEntropy:
    """The objective of finetuning and of training from scratch (Fang et al. 2024, section 3.4).

    L = sum_i w_{y_i} (-log p_i(y_i)) / sum_i w_{y_i} over the windows i with a known label, all workers together.

    Args:
        task: whose labels are guessed; also the name of the loss part.
        weights: `(classes,)` class weights w, from the training windows; 0 for a class that none of them has.
    """

    def __init__(self, task: str, weights: Sequence[float]) -> None:
        if len(weights) < 2 or min(weights) < 0 or max(weights) <= 0:
            raise ValueError(
                f"Class weights of {task} must be two or more, not negative and not all 0, but are {list(weights)}. "
                "Take them from the labels of the training windows."
            )
        self.task, self.weights = task, tuple(float(weight) for weight in weights)

    def __call__(
        self,
        model: WindowClassifier | Callable[..., object],
        windows: WindowTensors,
        draw: Draw,  # noqa: ARG002
    ) -> LossParts:
        """Classify and compare with the labels; nothing is drawn."""
        logits = model(windows.signals, windows.present)
        assert isinstance(logits, Tensor)
        return measure_classification(logits, windows.labels[self.task], self.task, self.weights)


def measure_classification(
    logits: Float[Tensor, "b classes"], labels: Int64[Tensor, "b"], task: str, weights: Sequence[float]
) -> LossParts:
    """The loss of WeightedCrossEntropy from logits; windows whose label is -1 (unknown) add nothing."""
    by_class = torch.tensor(weights, device=logits.device, dtype=torch.float32)
    known = labels >= 0
    weight = torch.where(known, by_class[labels.clamp(min=0)], 0.0)
    errors = functional.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    return LossParts(sums={task: (errors * weight).sum()}, counts={task: weight.sum()}, weighting="item")

"""Weighted cross-entropy against a slow, obvious reference."""

import math

import numpy as np
import pytest
import torch

from physioray.objectives.classification import WeightedCrossEntropy, measure_classification
from physioray.tensors import Draw, WindowTensors

WEIGHTS = [0.3, 4.0, 0.0]


def make_case(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, -1, 0, 2, 0, -1, 1, 0])[:rows]
    return torch.randn(rows, 3, generator=generator), labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> float:
    total = weight = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label >= 0:
            probability = math.exp(row[label]) / sum(math.exp(value) for value in row)
            total -= WEIGHTS[label] * math.log(probability)
            weight += WEIGHTS[label]
    return total / weight


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_the_loss_is_that_of_the_reference_also_for_weights_below_one(rows: int) -> None:
    case = make_case(rows)
    parts = measure_classification(*case, "sleep", WEIGHTS)
    assert float(parts.combine(parts.stack()[1])) == pytest.approx(reference(*case), rel=1e-5)


def test_windows_without_a_label_change_nothing_and_get_no_gradient() -> None:
    logits, labels = make_case()
    logits = logits.requires_grad_()
    parts = measure_classification(logits, labels, "sleep", WEIGHTS)
    parts.sums["sleep"].backward()
    assert logits.grad is not None and not logits.grad[labels == -1].any() and logits.grad[labels == 1].any()
    changed = torch.where((labels == -1)[:, None], 50.0, logits.detach())
    assert torch.equal(measure_classification(changed, labels, "sleep", WEIGHTS).stack(), parts.stack())


def test_a_batch_without_any_label_is_a_loss_of_zero() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    parts = measure_classification(logits, torch.full((4,), -1), "sleep", WEIGHTS)
    loss = parts.combine(parts.stack()[1])
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_shares_of_workers_add_up_to_the_loss_of_the_global_batch() -> None:
    logits, labels = make_case()
    whole = measure_classification(logits, labels, "sleep", WEIGHTS)
    shares = [measure_classification(logits[rank::2], labels[rank::2], "sleep", WEIGHTS) for rank in range(2)]
    totals = shares[0].stack() + shares[1].stack()
    together = sum(float(share.combine(totals[1])) for share in shares)
    assert together == pytest.approx(float(whole.combine(whole.stack()[1])), rel=1e-6)


def test_the_objective_takes_the_labels_of_its_task_and_every_present_modality() -> None:
    seen = []

    def model(signals: dict, present: dict) -> torch.Tensor:
        seen.append((signals, present))
        return logits

    logits, labels = make_case()
    windows = WindowTensors(
        signals={"eeg": torch.zeros(9, 4)},
        present={"eeg": torch.ones(9, dtype=torch.bool)},
        labels={"age": torch.zeros(9, dtype=torch.int64), "sleep": labels},
        window_id=np.arange(9),
    )
    parts = WeightedCrossEntropy("sleep", WEIGHTS)(model, windows, Draw(seed=0, pass_number=0, step=0))
    assert seen == [(windows.signals, windows.present)]
    assert torch.equal(parts.stack(), measure_classification(logits, labels, "sleep", WEIGHTS).stack())


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0]])
def test_weights_that_no_loss_can_have_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more, not negative and not all 0"):
        WeightedCrossEntropy("age", weights)

"""What every objective must do; see listed.OBJECTIVES."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from physioray.objectives.loss import LossParts
from tests.conformance.listed import DRAW, NAMES, OBJECTIVES, ListedObjective, lose, make_windows, spoil, take

pytestmark = pytest.mark.parametrize("listed", OBJECTIVES, ids=lambda item: item.name)


def measure(listed: ListedObjective, model: nn.Module, windows) -> LossParts:
    return listed.build()(model, windows, DRAW)


def combine(parts: LossParts) -> torch.Tensor:
    return parts.combine(parts.stack()[1])


@pytest.mark.parametrize("rows", [4, 10])
def test_the_loss_is_that_of_a_slow_reference_in_double_precision(listed: ListedObjective, rows: int) -> None:
    model, windows = listed.model(NAMES), make_windows(rows)
    loss = float(combine(measure(listed, model, windows)).detach())
    assert loss == pytest.approx(listed.reference(copy.deepcopy(model).double(), windows), rel=2e-4)


def test_the_order_of_modalities_does_not_matter(listed: ListedObjective) -> None:
    model, turned, windows = listed.model(NAMES), listed.model(NAMES[::-1]), make_windows(8)
    turned.load_state_dict(model.state_dict())
    one, other = combine(measure(listed, model, windows)), combine(measure(listed, turned, windows))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_absent_modality_never_enters_the_loss(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(10)
    spoiled = measure(listed, model, spoil(windows))
    assert torch.equal(measure(listed, model, windows).stack(), spoiled.stack())
    combine(spoiled).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_when_a_modality_is_absent_from_the_whole_batch(
    listed: ListedObjective, name: str
) -> None:
    model, windows = listed.model(NAMES), lose(make_windows(12), name)
    windows = take(windows, range(len(windows) // listed.unit * listed.unit))
    loss = combine(measure(listed, model, windows))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and gradients and all(torch.isfinite(value).all() for value in gradients)


def test_the_order_of_windows_in_a_batch_does_not_matter(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(10)
    order = np.random.default_rng(0).permutation(10 // listed.unit)
    rows = (order[:, None] * listed.unit + np.arange(listed.unit)[None]).flatten()
    one, other = measure(listed, model, windows).stack(), measure(listed, model, take(windows, rows)).stack()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_smallest_batch_gives_a_finite_loss_and_gradient(listed: ListedObjective) -> None:
    model = listed.model(NAMES)
    loss = combine(measure(listed, model, take(make_windows(4), range(2, 2 + listed.unit))))
    loss.backward()
    assert torch.isfinite(loss) and float(loss.detach()) >= 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_batches_of_any_size_add_up_where_windows_are_not_compared(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(7)
    if not listed.additive:
        # What is compared must be told apart the worse the more there is to compare it with.
        few, many = (measure(listed, model, make_windows(rows, absent=False)) for rows in (4, 16))
        assert float(combine(few).detach()) < float(combine(many).detach())
        return
    whole = measure(listed, model, windows)
    parts = [measure(listed, model, take(windows, range(first, min(first + 3, 7)))) for first in (0, 3, 6)]
    for name, total in whole.sums.items():
        zero = torch.zeros(())
        torch.testing.assert_close(sum(p.sums.get(name, zero) for p in parts), total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(p.counts.get(name, zero) for p in parts), whole.counts[name])


def test_half_precision_is_close_to_single(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(10)
    single = float(combine(measure(listed, model, windows)).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = measure(listed, model, windows)
    assert all(value.dtype == torch.float32 for value in parts.sums.values())
    assert float(combine(parts).detach()) == pytest.approx(single, rel=0.03)


def test_the_same_draw_gives_the_same_loss(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(6)
    assert torch.equal(measure(listed, model, windows).stack(), measure(listed, model, windows).stack())

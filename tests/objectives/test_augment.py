"""Augmentations: keyed, of the stated strength, and blind to everything but the window itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physioray.config import AugmentConfig
from physioray.objectives.augment import add_noise, augment, draw_normal, silence_block
from physioray.tensors import Draw

DRAW = Draw(seed=3, pass_number=5, step=0)


def make_windows(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    signals = {
        "eeg": 1 + 3 * torch.randn(rows, 3000, generator=generator),
        "airflow": torch.randn(rows, 750, generator=generator),
    }
    return signals, {name: torch.ones(rows, dtype=torch.bool) for name in signals}, np.arange(100, 100 + rows)


def splitmix(key: int, count: int) -> list[int]:
    """SplitMix64 with Python's whole numbers."""
    numbers = []
    for index in range(1, count + 1):
        state = (key + index * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(state ^ (state >> 31))
    return numbers


def test_normal_numbers_are_splitmix_and_box_muller() -> None:
    for key in (0, 12345, -987654321, -(2**63)):
        numbers = splitmix(key % 2**64, 4)
        radius = [math.sqrt(-2 * math.log(((number >> 40) + 1) / 2**24)) for number in numbers]
        angle = [2 * math.pi * (number % 2**24) / 2**24 for number in numbers]
        expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
        found = draw_normal(torch.tensor([key]), 7)[0]
        torch.testing.assert_close(found.double(), torch.tensor(expected[:7]).double(), rtol=1e-4, atol=1e-5)


def test_normal_numbers_are_normal_and_rows_are_unrelated() -> None:
    numbers = draw_normal(torch.arange(64), 3000).double()
    assert numbers.mean().item() == pytest.approx(0, abs=0.01)
    assert numbers.std().item() == pytest.approx(1, abs=0.01)
    assert (numbers.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)
    assert numbers.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    related = torch.corrcoef(numbers).fill_diagonal_(0)
    assert related.abs().max() < 6 / math.sqrt(3000)
    assert torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1].abs() < 0.015


def test_noise_has_a_quarter_of_the_windows_own_spread() -> None:
    signals, _, ids = make_windows(20)
    added = add_noise(signals["eeg"], "eeg", ids, DRAW, 0.25) - signals["eeg"]
    torch.testing.assert_close(added.std(1), 0.25 * signals["eeg"].std(1), rtol=0.06, atol=0)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_the_silence_is_one_stretch_of_the_stated_length(share: float, seed: int) -> None:
    silenced = silence_block(torch.ones(8, 200), "eeg", np.arange(8), Draw(seed=seed, pass_number=0, step=0), share)
    for row in (silenced == 0).int():
        assert int(row.sum()) == round(share * 200)
        assert int((row.diff() == 1).sum()) + int(row[0]) <= 1


def test_the_silence_reaches_both_ends_and_everywhere_between() -> None:
    silenced = silence_block(torch.ones(2000, 40), "eeg", np.arange(2000), DRAW, 0.25) == 0
    first = silenced.int().argmax(1)
    assert torch.bincount(first, minlength=31).min() > 30 and int(first.max()) == 30


def test_a_window_is_disturbed_alike_in_any_batch_order_and_company() -> None:
    signals, present, ids = make_windows(6)
    whole = augment(signals, present, ids, DRAW, AugmentConfig())
    rows = np.array([4, 1])
    part = {name: signal[rows] for name, signal in reversed(signals.items())}
    again = augment(part, {name: here[rows] for name, here in present.items()}, ids[rows], DRAW, AugmentConfig())
    for name in signals:
        torch.testing.assert_close(again[name], whole[name][rows])
    elsewhere = augment(signals, present, ids, Draw(seed=3, pass_number=5, step=9, rank=1), AugmentConfig())
    assert all(torch.equal(whole[name], elsewhere[name]) for name in signals)


def test_passes_seeds_windows_and_modalities_draw_anew() -> None:
    same = torch.ones(2, 400) + torch.arange(400) / 100
    views = [
        augment({name: same}, {name: torch.ones(2, dtype=torch.bool)}, np.array([7, 8]), draw, AugmentConfig())[name]
        for name, draw in (
            ("eeg", DRAW),
            ("eog", DRAW),
            ("eeg", Draw(seed=3, pass_number=6, step=0)),
            ("eeg", Draw(seed=4, pass_number=5, step=0)),
        )
    ]
    rows = torch.cat(views)
    assert torch.cdist(rows, rows).fill_diagonal_(1e9).min() > 1


def test_an_absent_modality_and_strength_zero_leave_the_signal_alone() -> None:
    signals, present, ids = make_windows(3)
    present["eeg"][1] = False
    signals["eeg"][1] = float("nan")
    disturbed = augment(signals, present, ids, DRAW, AugmentConfig())
    assert disturbed["eeg"][1].isnan().all() and disturbed["eeg"][[0, 2]].isfinite().all()
    untouched = augment(signals, present, ids, DRAW, AugmentConfig(noise=0, block=0))
    assert torch.equal(untouched["airflow"], signals["airflow"])
    assert not torch.equal(disturbed["airflow"], signals["airflow"])


def test_strengths_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="noise must not be negative"):
        AugmentConfig(noise=-0.1)
    with pytest.raises(ValueError, match=r"block must be in \[0, 1\)"):
        AugmentConfig(block=1.0)

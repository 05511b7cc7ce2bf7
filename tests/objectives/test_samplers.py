"""How the visible tokens are shared among the modalities."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physioray.config import MaskConfig, ReconstructionConfig
from physioray.objectives.masking import SAMPLERS, SamplerCase, count_visible, draw_visible
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.tensors import Draw, WindowTensors

TOKENS = {"eeg": 30, "ecg": 30, "airflow": 10, "spo2": 2}
DRAW = Draw(seed=0, pass_number=0, step=0)


def choose(config: MaskConfig, rows: int = 500, present: dict | None = None, draw: Draw = DRAW) -> np.ndarray:
    """Visible tokens `(rows, modalities)` counted per modality."""
    present = present or {name: torch.ones(rows, dtype=torch.bool) for name in TOKENS}
    visible = draw_visible(present, TOKENS, np.arange(rows), draw, config)
    return np.stack([shown.sum(1).numpy() for shown in visible.values()], 1)


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.lists(st.integers(1, 15), min_size=1, max_size=12),
    ratio=st.floats(0.05, 0.95),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    concentration=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    drop=st.booleans(),
)
def test_every_sampler_shows_the_exact_count_and_only_present_tokens(
    pattern: list[int], ratio: float, sampler: str, concentration: float, drop: bool
) -> None:
    bits = np.array(pattern)
    present = {name: torch.from_numpy((bits >> i & 1).astype(bool)) for i, name in enumerate(TOKENS)}
    config = MaskConfig(
        hidden_ratio=ratio,
        sampler=sampler,  # type: ignore[arg-type]
        concentration=concentration,
        drop=drop,
        drop_scope="sample",
    )
    found = choose(config, len(bits), present)
    here = np.stack([value.numpy() for value in present.values()], 1)
    counts = np.array(list(TOKENS.values()))
    wanted = count_visible((here * counts).sum(1), ratio)
    if drop:  # a dropped modality may leave fewer tokens than would be visible; then all that are left are
        undropped = choose(MaskConfig(hidden_ratio=1e-9, drop=True, drop_scope="sample"), len(bits), present).sum(1)
        wanted = np.minimum(wanted, undropped)
    assert np.array_equal(found.sum(1), wanted)
    assert (found[~here] == 0).all() and (wanted >= 1).all()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_samplers_follow_seed_pass_and_window_and_not_the_batch(sampler: str) -> None:
    config = MaskConfig(sampler=sampler, drop=False)  # type: ignore[arg-type]
    present = {name: torch.ones(40, dtype=torch.bool) for name in TOKENS}
    whole = draw_visible(present, TOKENS, np.arange(40), DRAW, config)
    part = draw_visible({n: p[:7] for n, p in present.items()}, TOKENS, np.arange(40)[5:12], DRAW, config)
    other = draw_visible(present, TOKENS, np.arange(40), Draw(seed=0, pass_number=1, step=0), config)
    assert all(torch.equal(whole[name][5:12], part[name]) for name in TOKENS)
    assert any(not torch.equal(whole[name], other[name]) for name in TOKENS)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("drop", [False, True])
def test_the_order_of_modalities_changes_no_choice(sampler: str, drop: bool) -> None:
    config = MaskConfig(sampler=sampler, drop=drop)  # type: ignore[arg-type]
    present = {name: torch.from_numpy(np.arange(60) % 7 != place) for place, name in enumerate(TOKENS)}
    turned = dict(reversed(TOKENS.items()))
    one, other = (draw_visible(present, tokens, np.arange(60), DRAW, config) for tokens in (TOKENS, turned))
    assert list(other) == list(turned) and all(torch.equal(one[name], other[name]) for name in TOKENS)


def apportion(shares: list[float], capacity: list[int], seats: int) -> list[int]:
    """Sainte-Lague, one seat after the other."""
    given = [0] * len(shares)
    for _ in range(seats):
        quotient = [
            share / (count + 0.5) if count < most else -1.0
            for share, count, most in zip(shares, given, capacity, strict=True)
        ]
        given[int(np.argmax(quotient))] += 1
    return given


def test_the_dirichlet_sampler_apportions_its_shares_one_token_after_the_other() -> None:
    from physioray.objectives import masking

    config, rows = MaskConfig(sampler="dirichlet", drop=False), 50
    found = choose(config, rows)
    bits = masking.hash_keys(0, masking._SHARES, 0, np.arange(rows)[:, None], masking._key_names(list(TOKENS))[None])
    # With concentration 1 a gamma variate is an exponential one, whose inverse distribution is -log(1 - u).
    shares = -np.log1p(-(bits >> np.uint64(11)).astype(np.float64) / 2.0**53)
    for row in range(rows):
        assert found[row].tolist() == apportion(shares[row].tolist(), list(TOKENS.values()), int(found[row].sum()))


def test_large_concentrations_share_equally_and_small_ones_favour_one_modality() -> None:
    tokens = {"eeg": 30, "eog": 30, "emg": 30, "ecg": 30}
    present = {name: torch.ones(400, dtype=torch.bool) for name in tokens}

    def spread(concentration: float) -> float:
        config = MaskConfig(sampler="dirichlet", concentration=concentration, drop=False)
        visible = draw_visible(present, tokens, np.arange(400), DRAW, config)
        return float(np.stack([shown.sum(1).numpy() for shown in visible.values()], 1).std(1).mean())

    assert spread(1e5) < 0.2 < spread(1.0) < spread(0.1)


def test_subsets_of_every_size_occur_that_hold_enough_tokens() -> None:
    # 7 of 72 tokens are visible: one modality of 30 or 10 is enough, that of 2 needs company.
    found = choose(MaskConfig(hidden_ratio=0.9, sampler="subset", drop=False), 2000) > 0
    sizes = np.bincount(found.sum(1), minlength=5)
    assert sizes[0] == 0 and (sizes[1:4] > 50).all()
    assert not (found.sum(1) == 1)[found[:, 3]].any()
    alone = found[found.sum(1) == 1].sum(0)
    assert alone[3] == 0 and (alone[:3] > 50).all()


class Copier:
    """Reconstructs every hidden chunk as zeros."""

    tokens: ClassVar = {"eeg": 3, "ecg": 3}

    def __call__(self, signals: dict, visible: dict, present: dict) -> dict:  # noqa: ARG002
        self.seen = visible
        return {name: torch.zeros(len(signal), 3, signal.shape[1] // 3) for name, signal in signals.items()}


def make_windows(rows: int) -> WindowTensors:
    present = {name: torch.ones(rows, dtype=torch.bool) for name in Copier.tokens}
    signals = {name: torch.arange(rows * 6.0).view(rows, 6) for name in Copier.tokens}
    return WindowTensors(signals=signals, present=present, labels={}, window_id=np.arange(rows))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_explicit_choice_is_used_as_it_is_for_any_batch_size(rows: int) -> None:
    visible = {name: torch.zeros(rows, 3, dtype=torch.bool) for name in Copier.tokens}
    visible["eeg"][:, 0] = True
    windows, model = make_windows(rows), Copier()
    parts = MaskedReconstruction(ReconstructionConfig())(model, windows, DRAW, visible)
    assert model.seen is visible
    assert parts.counts["eeg"] == 2 * rows and parts.counts["ecg"] == 3 * rows
    wanted = sum(float(windows.signals["eeg"][row, 2:].double().square().sum()) / 2 for row in range(rows))
    assert float(parts.sums["eeg"]) == pytest.approx(wanted)


def test_an_explicit_choice_that_does_not_fit_is_refused() -> None:
    objective, windows = MaskedReconstruction(ReconstructionConfig()), make_windows(2)
    whole = {name: torch.ones(2, 3, dtype=torch.bool) for name in Copier.tokens}
    with pytest.raises(ValueError, match="must be given for eeg, ecg, but were for eeg"):
        objective(Copier(), windows, DRAW, {"eeg": whole["eeg"]})
    with pytest.raises(ValueError, match=r"eeg must have the shape \(2, 3\), but have \(1, 3\)"):
        objective(Copier(), windows, DRAW, {name: value[:1] for name, value in whole.items()})
    windows.present["ecg"][1] = False
    with pytest.raises(ValueError, match="3 of ecg are absent"):
        objective(Copier(), windows, DRAW, whole)
    nothing = {name: torch.zeros(2, 3, dtype=torch.bool) for name in Copier.tokens}
    with pytest.raises(ValueError, match="2 have none"):
        objective(Copier(), windows, DRAW, nothing)


def test_a_case_is_what_a_sampler_gets_and_its_queue_decides() -> None:
    def first_come(case: SamplerCase) -> np.ndarray:
        return np.broadcast_to(np.arange(case.counts.sum(), dtype=np.uint64), case.noise.shape)

    patched = pytest.MonkeyPatch()
    with patched.context() as change:
        change.setitem(SAMPLERS, "uniform", first_come)  # type: ignore[arg-type]
        found = choose(MaskConfig(drop=False, hidden_ratio=0.5), 3)
    assert found.tolist() == [[30, 6, 0, 0]] * 3

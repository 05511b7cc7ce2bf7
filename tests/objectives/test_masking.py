"""Which tokens are visible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physioray.config import MaskConfig
from physioray.objectives.masking import count_visible, draw_visible, find_hidden, show_all
from physioray.tensors import Draw

TOKENS = {"eeg": 30, "eog": 30, "emg": 30, "ecg": 30}
UNIFORM = MaskConfig(drop=False)


def everything(rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(rows, dtype=torch.bool) for name in TOKENS}


def stack(visible: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(visible.values()), 1)


@pytest.mark.parametrize("config", [UNIFORM, MaskConfig()])
def test_both_arms_of_the_paper_see_36_of_120_tokens(config: MaskConfig) -> None:
    visible = draw_visible(everything(200), TOKENS, np.arange(200), Draw(seed=0, pass_number=3, step=5), config)
    assert (stack(visible).sum(1) == 36).all()


def test_a_step_drops_one_modality_of_the_whole_batch_and_all_are_dropped_alike_often() -> None:
    dropped = []
    for step in range(400):
        visible = draw_visible(
            everything(8), TOKENS, np.arange(8), Draw(seed=1, pass_number=0, step=step), MaskConfig()
        )
        unseen = [name for name, shown in visible.items() if not shown.any()]
        assert len(unseen) == 1
        dropped.append(unseen[0])
    counts = [dropped.count(name) for name in TOKENS]
    assert min(counts) > 70 and max(counts) < 130


def test_without_drop_tokens_of_every_modality_are_seen_alike_often() -> None:
    visible = draw_visible(everything(2000), TOKENS, np.arange(2000), Draw(seed=0, pass_number=0, step=0), UNIFORM)
    share = stack(visible).float().mean(0)
    assert abs(share - 0.3).max() < 0.05


def test_masks_follow_the_window_and_not_its_batch_or_worker() -> None:
    ids = np.arange(100, 160)
    draw = Draw(seed=2, pass_number=4, step=9)
    whole = stack(draw_visible(everything(60), TOKENS, ids, draw, MaskConfig()))
    for rank in range(2):
        here = ids[rank::2]
        share = stack(
            draw_visible(everything(30), TOKENS, here, Draw(seed=2, pass_number=4, step=9, rank=rank), MaskConfig())
        )
        assert torch.equal(share, whole[rank::2])


def test_masks_change_with_seed_and_pass_and_window() -> None:
    def draw(seed: int, number: int, first: int) -> torch.Tensor:
        return stack(
            draw_visible(
                everything(4), TOKENS, np.arange(first, first + 4), Draw(seed=seed, pass_number=number, step=0), UNIFORM
            )
        )

    base = draw(0, 0, 0)
    assert not torch.equal(base, draw(1, 0, 0))
    assert not torch.equal(base, draw(0, 1, 0))
    assert not torch.equal(base, draw(0, 0, 4))


def test_drop_scopes_draw_per_rank_and_per_window() -> None:
    def unseen(config: MaskConfig, rank: int) -> torch.Tensor:
        draw = Draw(seed=0, pass_number=0, step=3, rank=rank)
        visible = draw_visible(everything(64), TOKENS, np.arange(64), draw, config)
        return torch.stack([~shown.any(1) for shown in visible.values()], 1).float().argmax(1)

    assert len({int(unseen(MaskConfig(drop_scope="rank"), rank)[0]) for rank in range(12)}) > 1
    assert len(unseen(MaskConfig(drop_scope="sample"), 0).unique()) == 4
    assert len(unseen(MaskConfig(drop_scope="batch"), 0).unique()) == 1


def test_drop_probability_is_the_share_of_steps_that_drop() -> None:
    config = MaskConfig(drop_probability=0.25)
    happened = 0
    for step in range(800):
        visible = draw_visible(everything(1), TOKENS, np.arange(1), Draw(seed=0, pass_number=0, step=step), config)
        # 36 of 120 at random leave a modality of 30 tokens unseen less than once in 10,000 draws.
        happened += any(not shown.any() for shown in visible.values())
    assert 150 < happened < 250


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.lists(st.integers(1, 15), min_size=1, max_size=12),
    ratio=st.floats(0.05, 0.95),
    drop=st.booleans(),
    scope=st.sampled_from(["batch", "rank", "sample"]),
)
def test_any_presence_gives_an_exact_count_of_present_tokens(
    pattern: list[int], ratio: float, drop: bool, scope: str
) -> None:
    bits = np.array(pattern)
    present = {name: torch.from_numpy((bits >> i & 1).astype(bool)) for i, name in enumerate(TOKENS)}
    config = MaskConfig(hidden_ratio=ratio, drop=drop, drop_scope=scope)  # type: ignore[arg-type]
    visible = draw_visible(present, TOKENS, np.arange(len(bits)), Draw(seed=0, pass_number=0, step=0), config)
    here = torch.stack(list(present.values()), 1).sum(1).numpy()
    wanted = count_visible(here * 30, ratio)
    if drop:  # a dropped modality leaves fewer tokens to choose from, but never none
        wanted = np.minimum(wanted, np.where(here > 1, here - 1, 1) * 30)
    assert np.array_equal(stack(visible).sum(1).numpy(), wanted)
    assert (wanted >= 1).all()
    for name in TOKENS:
        assert not visible[name][~present[name]].any()
        hidden = find_hidden(present, visible)[name]
        assert torch.equal(hidden | visible[name], present[name][:, None].expand(-1, 30))
        assert not (hidden & visible[name]).any()


def test_showing_all_shows_the_present_ones() -> None:
    present = everything(3) | {"emg": torch.tensor([True, False, True])}
    visible = show_all(present, TOKENS)
    assert visible["emg"].sum(1).tolist() == [30, 0, 30] and visible["eeg"].all()

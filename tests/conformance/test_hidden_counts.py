"""Objectives that hide tokens hide exactly as many as they say."""

import pytest

from physioray.objectives.masking import count_visible, draw_visible
from tests.conformance.listed import DRAW, NAMES, OBJECTIVES, ListedObjective, make_windows

HIDING = [item for item in OBJECTIVES if item.hides is not None]


@pytest.mark.parametrize("listed", HIDING, ids=lambda item: item.name)
def test_the_hidden_count_is_exact(listed: ListedObjective) -> None:
    model, windows = listed.model(NAMES), make_windows(10)
    parts = listed.build()(model, windows, DRAW)
    assert listed.hides is not None
    tokens = sum(windows.present[name].numpy() * count for name, count in model.tokens.items())  # type: ignore[union-attr]
    hidden = int((tokens - count_visible(tokens, listed.hides.hidden_ratio)).sum())
    visible = draw_visible(windows.present, model.tokens, windows.window_id, DRAW, listed.hides)  # type: ignore[arg-type]
    assert sum(float(value) for value in parts.counts.values()) == hidden
    assert int(sum(shown.sum() for shown in visible.values())) == int(tokens.sum()) - hidden

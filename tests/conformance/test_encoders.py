"""What every encoder must do; see listed.ENCODERS."""

import copy

import pytest
import torch
from torch import nn

from physioray.models.heads import Classifier, WindowEncoder
from tests.conformance.listed import ENCODERS, NAMES, ListedEncoder, lose, make_windows, spoil, take

pytestmark = pytest.mark.parametrize("listed", ENCODERS, ids=lambda item: item.kind.__name__)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def embed(encoder: nn.Module, windows) -> torch.Tensor:
    return encoder.embed(windows.signals, windows.present)  # type: ignore[operator]


def test_it_is_of_the_listed_class_and_speaks_the_protocol(listed: ListedEncoder) -> None:
    encoder = listed.build(NAMES)
    assert type(encoder) is listed.kind and isinstance(encoder, WindowEncoder)
    assert set(encoder.tokens) == set(NAMES)
    assert embed(encoder, make_windows(3)).shape == (3, encoder.features)


def test_the_order_of_modalities_does_not_matter(listed: ListedEncoder) -> None:
    encoder, turned = listed.build(NAMES), listed.build(NAMES[::-1])
    turned.load_state_dict(encoder.state_dict())
    windows = make_windows(6)
    torch.testing.assert_close(embed(encoder, windows), embed(turned, windows), **CLOSE)


def test_an_absent_modality_changes_nothing_whatever_stands_in_its_place(listed: ListedEncoder) -> None:
    encoder, windows = listed.build(NAMES), make_windows(10)
    assert torch.equal(embed(encoder, windows), embed(encoder, spoil(windows)))
    assert not torch.allclose(embed(encoder, windows), embed(encoder, make_windows(10, absent=False)))


def test_padding_stays_out_and_a_batch_of_one_is_the_row_of_a_batch(listed: ListedEncoder) -> None:
    encoder, windows = listed.build(NAMES), make_windows(7)
    together = embed(encoder, windows)
    for row in range(7):
        torch.testing.assert_close(embed(encoder, take(windows, [row])), together[row : row + 1], **CLOSE)


def test_a_ragged_last_batch_and_another_order_give_the_same_rows(listed: ListedEncoder) -> None:
    encoder, windows = listed.build(NAMES), make_windows(7)
    together = embed(encoder, windows)
    parts = torch.cat([embed(encoder, take(windows, range(first, min(first + 3, 7)))) for first in (0, 3, 6)])
    torch.testing.assert_close(parts, together, **CLOSE)
    order = [4, 0, 6, 2, 5, 1, 3]
    torch.testing.assert_close(embed(encoder, take(windows, order)), together[order], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_zero_for_a_modality_absent_from_the_whole_batch(
    listed: ListedEncoder, name: str
) -> None:
    encoder = listed.build(NAMES)
    embed(encoder, spoil(lose(make_windows(6), name))).square().sum().backward()
    gradients = {key: value.grad for key, value in encoder.named_parameters() if value.grad is not None}
    assert gradients and all(torch.isfinite(value).all() for value in gradients.values())
    tokenizer = [value for key, value in gradients.items() if name in key.split(".") and "tokenizers" in key]
    assert all(not value.any() for value in tokenizer)
    assert any(value.any() for value in gradients.values())


def test_single_precision_is_close_to_double_and_half_precision_to_single(listed: ListedEncoder) -> None:
    encoder, windows = listed.build(NAMES), make_windows(6)
    single = embed(encoder, windows)
    double = copy.deepcopy(encoder).double()
    exact = double.embed({n: s.double() for n, s in windows.signals.items()}, windows.present)  # type: ignore[operator]
    torch.testing.assert_close(single.double(), exact, **CLOSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = embed(encoder, windows)
    assert 0 < float(((half.float() - single).norm() / single.norm()).detach()) < 0.03


def test_a_frozen_trunk_is_really_frozen(listed: ListedEncoder) -> None:
    encoder = listed.build(NAMES)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        elif hasattr(module, "dropout"):
            module.dropout = 0.5
    before = copy.deepcopy(encoder.state_dict())
    model, windows = Classifier(encoder, 5, frozen=True).train(), make_windows(6)
    start = embed(encoder, windows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(windows.signals, windows.present).square().mean().backward()
        optimizer.step()
        model.train()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(embed(encoder, windows), start) and model.head.weight.grad is not None
    thawed = Classifier(encoder, 5).train()
    assert not torch.equal(embed(encoder, windows), embed(encoder, windows)) and thawed.encoder.training


def test_a_window_without_any_modality_is_refused(listed: ListedEncoder) -> None:
    windows = make_windows(3)
    for name in NAMES:
        windows.present[name][1] = False
    with pytest.raises(ValueError, match="1 of 3 have none"):
        embed(listed.build(NAMES), windows)

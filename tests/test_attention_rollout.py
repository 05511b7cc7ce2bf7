"""Attention and its rollout: the same numbers as slow references, whatever is absent, however readers share them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physioray.attention_rollout import ROLLOUT, AttentionSums, name_quantities, roll_out
from physioray.config import LateFusionConfig
from physioray.models.fused import FusedEncoder
from physioray.models.late_fusion import LateFusionEncoder
from physioray.observation import Observation, TokenGrid, observe
from tests.analysis_references import roll_out_slowly, summarise_slowly
from tests.conformance.listed import NAMES, TINY, make_windows, spoil, take

NUMBERS = {"draws": 20, "seed": 0}


def build(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    encoder = FusedEncoder(TINY) if kind == "fused" else LateFusionEncoder(LateFusionConfig(model=TINY))
    with torch.no_grad():  # untrained attention is nearly uniform: make it choose
        for name, parameter in encoder.named_parameters():
            if "attention.query" in name or "attention.key_value" in name:
                parameter.mul_(4)
    return encoder.eval()


@pytest.mark.parametrize("kind", ["fused", "apart"])
def test_looking_on_changes_nothing_about_the_embedding(kind: str) -> None:
    encoder, windows = build(kind), make_windows(7)
    with torch.no_grad():
        fused_path = encoder.embed(windows.signals, windows.present)
    for attention in (True, False):
        seen = observe(encoder, windows, attention=attention)
        torch.testing.assert_close(seen.states[-1], fused_path, rtol=1e-5, atol=1e-5)
        assert len(seen.attention) == (TINY.layers if attention else 0)
    assert len(seen.states) == TINY.layers + 2


@pytest.mark.parametrize("kind", ["fused", "apart"])
def test_rows_of_present_tokens_sum_to_one_and_absent_tokens_are_in_no_map(kind: str) -> None:
    encoder, windows = build(kind), make_windows(10)
    seen = observe(encoder, windows)
    here = seen.present
    assert not here.all()
    sums = AttentionSums(TokenGrid.of(encoder.tokens), TINY.layers)
    sums.add(seen, np.zeros(10, int))
    rolled = roll_out(seen.attention)
    for weights in (*seen.attention, rolled):
        torch.testing.assert_close((weights.sum(-1))[here], torch.ones(int(here.sum())), rtol=0, atol=1e-5)
        assert weights[here][~here[:, None].expand(-1, here.shape[1], -1)[here]].abs().max() == 0
    for weights in seen.attention:
        assert weights[~here].abs().max() == 0
    # Samples of an absent modality have no say either.
    for one, other in zip(seen.attention, observe(encoder, spoil(windows)).attention, strict=True):
        assert torch.equal(one, other)


def test_every_token_of_a_packed_window_lands_in_its_own_place() -> None:
    # Each window alone, with only its own modalities in the model, gives the block that it has in the whole map.
    encoder, windows = build("fused"), make_windows(5)
    grid, whole = TokenGrid.of(encoder.tokens), observe(build("fused"), windows)
    for row in range(5):
        names = tuple(name for name in NAMES if windows.present[name][row])
        alone = FusedEncoder(replace(TINY, modalities=names)).eval()
        alone.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in alone.state_dict()})
        small = observe(alone, take(windows, [row]))
        places = np.concatenate([grid.find_first(n) + np.arange(grid.counts[n]) for n in grid.names if n in names])
        for big, little in zip(whole.attention, small.attention, strict=True):
            torch.testing.assert_close(big[row][places][:, places], little[0], rtol=1e-4, atol=1e-6)


def test_the_rollout_is_that_of_a_slow_reference() -> None:
    generator = np.random.default_rng(0)
    attention = generator.dirichlet(np.ones(9), (3, 4, 9))  # layers, windows
    fast = roll_out([torch.from_numpy(layer) for layer in attention]).numpy()
    for window in range(4):
        np.testing.assert_allclose(fast[window], roll_out_slowly(attention[:, window]), atol=1e-12)
    np.testing.assert_allclose(fast.sum(-1), 1.0, atol=1e-12)
    assert not np.allclose(fast, roll_out([torch.from_numpy(layer) for layer in attention[::-1]]).numpy())


def test_every_number_is_that_of_a_slow_reference() -> None:
    encoder, windows = build("fused", 1), make_windows(6)
    grid, seen = TokenGrid.of(encoder.tokens), observe(encoder, windows)
    sums = AttentionSums(grid, TINY.layers)
    sums.add(seen, np.array([3, 3, 3, 8, 8, 8]))
    found = {(n.quantity, n.place, n.modality): n for n in sums.list_numbers(**NUMBERS)}
    maps = [*seen.attention, roll_out(seen.attention)]
    owner, seconds = grid.list_owners().tolist(), grid.list_seconds().tolist()
    for weights, place in zip(maps, sums.places, strict=True):
        for group, modality in (({0}, grid.names[0]), ({2}, grid.names[2]), ({0, 1, 2}, "all")):
            slow = []
            for row in range(6):
                here = seen.present[row].tolist()
                if any(here[i] for i in range(len(owner)) if owner[i] in group):
                    weight = weights[row].double().tolist()
                    slow.append(summarise_slowly(weight, here, owner, seconds, group))
            for key in slow[0]:
                name = key if not key.startswith("to_") else f"to_{grid.names[int(key[3:])]}"
                number = found[f"attention_{name}", place, modality]
                assert number.value == pytest.approx(np.mean([item[key] for item in slow]), abs=2e-6), (key, place)
                assert number.windows == len(slow) and number.subjects == 2
            off = np.mean([item["off_modality"] for item in slow])
            aligned = np.mean([item["off_modality_within_1s"] for item in slow]) / off
            assert found["attention_alignment", place, modality].value == pytest.approx(aligned, abs=1e-5)


def test_uniform_attention_gets_the_references_and_a_band_has_no_specificity() -> None:
    grid = TokenGrid({"eeg": 30, "ecg": 30})
    present = torch.ones(2, 60, dtype=torch.bool)
    band = torch.zeros(2, 60, 60)
    band[:, :, 17] = 1.0
    for weights in (torch.full((2, 60, 60), 1 / 60), band):
        sums = AttentionSums(grid, 1)
        sums.add(Observation([weights], [], present), np.array([0, 1]))
        found = {(n.quantity, n.place, n.modality): n for n in sums.list_numbers(**NUMBERS)}
        assert found["attention_specificity", "layer 1", "all"].value == pytest.approx(0, abs=1e-6)
        if weights is not band:
            for number in found.values():
                assert number.value == pytest.approx(number.reference, abs=1e-5), number
    assert found["attention_entropy", "layer 1", "all"].value == 0
    assert found["attention_off_modality", "layer 1", "eeg"].value == 0
    assert found["attention_off_modality", "layer 1", "ecg"].value == pytest.approx(1)
    assert found["attention_off_modality", ROLLOUT, "all"].value == pytest.approx(0.25)


def test_one_encoder_per_modality_never_leaves_its_block() -> None:
    encoder = build("apart")
    sums = AttentionSums(TokenGrid.of(encoder.tokens), TINY.layers)
    sums.add(observe(encoder, make_windows(8)), np.arange(8))
    owner = sums.grid.list_owners()
    assert np.nanmax(sums.average()[:, owner[:, None] != owner[None]]) == 0
    numbers = {(n.quantity, n.place): n for n in sums.list_numbers(**NUMBERS) if n.modality == "all"}
    assert numbers["attention_off_modality", ROLLOUT].value == 0
    assert numbers["attention_alignment", ROLLOUT].value is None


def test_pairs_of_tokens_have_their_own_counts_and_a_pair_that_never_meets_has_no_mean() -> None:
    encoder, windows = build("fused"), take(make_windows(10), [1, 3, 6])  # ecg absent in 1 and 6, airflow in 3
    seen = observe(encoder, windows)
    sums = AttentionSums(TokenGrid.of(encoder.tokens), TINY.layers)
    sums.add(seen, np.arange(3))
    owner, maps = sums.grid.list_owners(), sums.average()
    ecg, airflow = (np.flatnonzero(owner == sums.grid.names.index(name)) for name in ("ecg", "airflow"))
    assert np.isnan(maps[:, ecg[0], airflow[0]]).all() and sums.pairs[ecg[0], airflow[0]] == 0
    assert sums.pairs[ecg[0], ecg[0]] == 1 and sums.pairs[airflow[0], airflow[0]] == 2
    expected = torch.stack([seen.attention[0][0], seen.attention[0][2]]).mean(0)[airflow][:, airflow]
    np.testing.assert_allclose(maps[0][np.ix_(airflow, airflow)], expected, atol=1e-7)


@pytest.mark.parametrize("kind", ["fused", "apart"])
def test_three_readers_together_have_what_one_has(kind: str) -> None:
    encoder, windows, owner = build(kind), make_windows(11), np.arange(11) % 4
    grid = TokenGrid.of(encoder.tokens)
    whole, parts = AttentionSums(grid, TINY.layers), [AttentionSums(grid, TINY.layers) for _ in range(3)]
    whole.add(observe(encoder, windows), owner)
    for rank, part in enumerate(parts):
        rows = list(range(rank, 11, 3))
        part.add(observe(encoder, take(windows, rows)), owner[rows])
    merged = parts[2]
    for part in parts:
        part.maps.flags.writeable = part.pairs.flags.writeable = False  # as they come from a cluster
    merged.merge(parts[0])
    merged.merge(parts[1])
    assert merged.windows == 11 and np.array_equal(merged.pairs, whole.pairs)
    np.testing.assert_allclose(merged.average(), whole.average(), rtol=1e-4, atol=1e-5)
    for one, other in zip(merged.list_numbers(**NUMBERS), whole.list_numbers(**NUMBERS), strict=True):
        for key in ("value", "low", "high"):
            mine, theirs = (np.nan if getattr(n, key) is None else getattr(n, key) for n in (one, other))
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True), one


def test_memory_does_not_grow_with_windows() -> None:
    encoder, windows = build("fused"), make_windows(6)
    sums = AttentionSums(TokenGrid.of(encoder.tokens), TINY.layers)
    sizes = []
    for _ in range(3):
        sums.add(observe(encoder, windows), np.zeros(6, int))
        sizes.append(sum(a.nbytes for own in sums.numbers.sums.values() for a in own.values()) + sums.maps.nbytes)
    assert sizes[0] == sizes[2] and sums.windows == 18
    assert len(name_quantities(sums.grid)) == 9

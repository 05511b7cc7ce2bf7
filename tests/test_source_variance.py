"""Source variance against a slow reference, with unused and absent sources."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from physioray.observation import TokenGrid, name_states
from physioray.source_variance import SourceDraws, SourceVarianceSums, measure_source_variance
from tests.analysis_references import vary_slowly
from tests.conformance.listed import NAMES, TINY, make_windows, take
from tests.test_attention_rollout import build

NUMBERS = {"draws": 40, "seed": 1}


def make_draws(count: int = 9) -> SourceDraws:
    return SourceDraws({name: signal * 2 for name, signal in make_windows(count, 5, absent=False).signals.items()})


def embed_alone(encoder):
    def embed(signals):
        present = {name: torch.ones(1, dtype=torch.bool) for name in signals}
        with torch.no_grad():
            return encoder.embed({name: signal[None] for name, signal in signals.items()}, present)[0].double().numpy()

    return embed


@pytest.mark.parametrize("kind", ["fused", "apart"])
def test_source_variance_of_the_embedding_is_that_of_a_slow_reference(kind: str) -> None:
    encoder, draws, windows = build(kind), make_draws(), make_windows(2, absent=False)
    grid = TokenGrid.of(encoder.tokens)
    for row, fast in enumerate(measure_source_variance(encoder, draws, windows, batch_size=4)):
        assert fast.shape == (3, TINY.layers + 2, encoder.features)
        context = {name: windows.signals[name][row] for name in NAMES}
        for number, name in enumerate(grid.names):
            slow = vary_slowly(embed_alone(encoder), context, name, draws.signals[name])
            np.testing.assert_allclose(fast[number, -1], slow, rtol=1e-3, atol=1e-9)


def test_a_source_that_is_not_used_has_no_variance() -> None:
    # The tokens of the airflow are made constant: whatever breathes, nothing changes.
    encoder = build("fused")
    with torch.no_grad():
        encoder.tokenizers["airflow"].norm.weight.zero_()
    (variance,) = measure_source_variance(encoder, make_draws(8), make_windows(1), batch_size=4)
    unused = TokenGrid.of(encoder.tokens).names.index("airflow")
    assert variance[unused].max() < 1e-12 < 1e-6 < np.delete(variance, unused, 0).max(-1).min()
    sums = SourceVarianceSums(TokenGrid.of(encoder.tokens), TINY.layers)
    sums.add(0, variance)
    share = sums.relate(**NUMBERS).share.value[:, unused]
    assert share.max() < 1e-6


def test_units_of_another_modality_s_encoder_do_not_vary() -> None:
    encoder = build("apart")
    (variance,) = measure_source_variance(encoder, make_draws(8), make_windows(1), batch_size=4)
    blocks = variance.reshape(3, TINY.layers + 2, 3, TINY.width)
    for source in range(3):
        for units in range(3):
            assert (blocks[source, 1:, units].max() < 1e-9) == (source != units)


def test_a_modality_that_a_context_lacks_has_no_variance_there_and_spoils_no_mean() -> None:
    encoder, windows = build("fused"), make_windows(10)
    grid, draws = TokenGrid.of(encoder.tokens), make_draws(4)
    sums = SourceVarianceSums(grid, TINY.layers)
    chosen = take(windows, [0, 1])  # the second lacks ecg
    for row, variance in enumerate(measure_source_variance(encoder, draws, chosen, batch_size=8)):
        lacks = [not bool(chosen.present[name][row]) for name in grid.names]
        assert np.isnan(variance).all((1, 2)).tolist() == lacks
        sums.add(row, variance)
        if row == 0:
            first = variance
    ecg = grid.names.index("ecg")
    np.testing.assert_allclose(sums.average()[ecg], first[ecg])
    assert np.isfinite(sums.average()).all()


def test_softmax_share_drift_and_intervals_are_what_their_names_say() -> None:
    generator = np.random.default_rng(0)
    grid = TokenGrid({"eeg": 30, "ecg": 30})
    sums, all_variances = SourceVarianceSums(grid, 2), []
    for subject in range(5):
        variance = generator.gamma(1.0, size=(2, 4, 6))
        sums.add(subject, variance)
        all_variances.append(variance)
    mean = np.mean(all_variances, 0)
    found = {(n.quantity, n.place, n.modality): n for n in sums.list_numbers(**NUMBERS)}
    share = mean / mean.sum(0)
    for i, place in enumerate(name_states(2)):
        number = found["source_variance_softmax", place, "ecg"]
        values = softmax(mean, 0)[1, i]
        assert number.value == pytest.approx(values.mean())
        reach = 1.96 * values.std(ddof=1) / np.sqrt(6)
        assert number.unit_high == pytest.approx(values.mean() + reach, rel=1e-4)
        assert found["source_variance_share", place, "eeg"].value == pytest.approx(share[0, i].mean())
        assert number.low < number.value < number.high and number.reference == 0.5 and number.subjects == 5
    drift = share[1, 2].mean() - share[1, 1].mean()
    assert found["source_variance_drift", "layer 1 to 2", "ecg"].value == pytest.approx(drift)
    assert found["source_variance_drift", "layer 1 to 2", "all"].value == pytest.approx(abs(drift))
    away = abs(share[1, 3].mean() - 0.5)
    assert found["source_variance_imbalance", "embedding", "all"].value == pytest.approx(away)


def test_contexts_shared_among_readers_add_up() -> None:
    generator = np.random.default_rng(1)
    grid = TokenGrid({"eeg": 30, "ecg": 30})
    contexts = [(number % 3, generator.gamma(1.0, size=(2, 3, 4))) for number in range(7)]
    whole, one, two = (SourceVarianceSums(grid, 1) for _ in range(3))
    for number, (subject, variance) in enumerate(contexts):
        whole.add(subject, variance)
        (one if number % 2 else two).add(subject, variance)
    one.merge(two)
    assert one.contexts == 7
    np.testing.assert_allclose(one.average(), whole.average(), rtol=1e-12)
    for a, b in zip(one.list_numbers(**NUMBERS), whole.list_numbers(**NUMBERS), strict=True):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


def test_a_modality_that_no_context_has_is_in_no_share() -> None:
    generator = np.random.default_rng(2)
    three, two = (SourceVarianceSums(TokenGrid({name: 30 for name in names}), 1) for names in (NAMES, NAMES[:2]))
    for subject in range(4):
        variance = generator.gamma(1.0, size=(3, 3, 5))
        variance[2] = np.nan
        three.add(subject, variance)
        two.add(subject, variance[:2])
    found = {(n.quantity, n.place, n.modality): n for n in three.list_numbers(**NUMBERS)}
    for number in two.list_numbers(**NUMBERS):
        assert found.pop((number.quantity, number.place, number.modality)) == number
    assert found and all(n.modality == NAMES[2] and n.value is None for n in found.values())

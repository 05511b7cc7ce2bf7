"""Reconstruction errors beside guessing the mean, against sums written out."""

import numpy as np
import pytest
import torch

from physioray.models.fused import MaskedAutoencoder
from physioray.observation import TokenGrid
from physioray.reconstruction_quality import SCATTERED, WHOLE, ReconstructionSums
from tests.conformance.listed import TINY, make_windows, take

NUMBERS = {"draws": 20, "seed": 0}


def build() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(TINY).eval()


def measure(model, windows, owner, kept=()) -> ReconstructionSums:
    sums = ReconstructionSums(TokenGrid.of(model.tokens), 0.7, 0, np.array(kept, int))
    sums.add(model, windows, np.asarray(owner))
    return sums


class Oracle(MaskedAutoencoder):
    """Fills in half of the true signal, so that every error is known: (x / 2)^2."""

    def forward(self, signals, visible, present):
        self.seen = [*getattr(self, "seen", []), visible]
        names = [name for name in self.tokens if bool(present[name].any())]
        return {name: (signals[name] / 2).unflatten(1, (self.tokens[name], -1)) for name in names}


def test_errors_are_those_of_hidden_samples_of_present_modalities_alone() -> None:
    model, windows = Oracle(TINY).eval(), make_windows(10)
    sums = measure(model, windows, np.arange(10) // 5, kept=(103,))
    found = {(n.quantity, n.place, n.modality): n for n in sums.list_numbers(**NUMBERS)}
    scattered = model.seen[0]
    for name in sums.grid.names:
        chunks = windows.signals[name].double().unflatten(1, (30, -1)).numpy()
        here = windows.present[name].numpy()
        hidden = here[:, None] & ~scattered[name].numpy()
        others = np.any([windows.present[other].numpy() for other in sums.grid.names if other != name], 0)
        for way, chosen in ((SCATTERED, hidden), (WHOLE, np.repeat((here & others)[:, None], 30, 1))):
            samples = chunks[chosen].ravel()
            error = found["reconstruction_error", way, name]
            assert error.value == pytest.approx(np.mean((samples / 2) ** 2), rel=1e-5)
            relative = np.mean((samples / 2) ** 2) / samples.var()
            assert found["reconstruction_relative", way, name].value == pytest.approx(relative, rel=1e-5)
            assert error.subjects == 2
    parts = [found["reconstruction_relative", WHOLE, name].value for name in sums.grid.names]
    assert found["reconstruction_relative", WHOLE, "all"].value == pytest.approx(np.mean(parts))
    # The kept window lacks airflow; of what is there, signal, output and visible seconds are kept.
    assert set(sums.examples) == {103} and set(sums.examples[103]) == {"eeg", "ecg"}
    kept = sums.examples[103]["eeg"]
    np.testing.assert_allclose(kept.output, kept.target / 2, rtol=1e-6)
    assert np.array_equal(kept.visible, scattered["eeg"][3].numpy())


def test_a_modality_hidden_whole_is_filled_in_from_the_others_alone() -> None:
    model, windows = build(), make_windows(4, absent=False)
    before = measure(model, windows, np.zeros(4, int)).numbers.stack()["sums"][0, 1]
    changed = make_windows(4, absent=False)
    changed.signals["ecg"].mul_(-1.0)  # the same squares, another signal
    after = measure(model, changed, np.zeros(4, int)).numbers.stack()["sums"][0, 1]
    names = TokenGrid.of(model.tokens).names
    ecg = names.index("ecg")
    # Error and mean of the ecg change with its sign, but the model's output does not: e = (y - x)^2.
    signal = windows.signals["ecg"].double()
    outputs = model(windows.signals, {n: torch.full((4, 30), n != "ecg") for n in names}, windows.present)["ecg"]
    filled = outputs.detach().double().flatten(1)
    assert before[ecg, 0] / before[ecg, 3] == pytest.approx(float((filled - signal).square().mean()), rel=1e-4)
    assert after[ecg, 0] / after[ecg, 3] == pytest.approx(float((filled + signal).square().mean()), rel=1e-4)


def test_the_same_seconds_are_hidden_whatever_the_batch_and_readers_add_up() -> None:
    model, windows, owner = build(), make_windows(9), np.arange(9) % 2
    whole = measure(model, windows, owner, kept=(101, 104))
    one, two = (
        measure(model, take(windows, rows), owner[rows], (101, 104)) for rows in ([1, 5, 7], [0, 2, 3, 4, 6, 8])
    )
    one.merge(two)
    assert sorted(one.examples) == [101, 104] and one.windows == 9
    for a, b in zip(one.list_numbers(**NUMBERS), whole.list_numbers(**NUMBERS), strict=True):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-4)


def test_a_single_modality_cannot_be_filled_in_from_others() -> None:
    from dataclasses import replace

    model = MaskedAutoencoder(replace(TINY, modalities=("eeg",))).eval()
    numbers = measure(model, take(make_windows(10), [0, 1, 2]), [0, 1, 2]).list_numbers(**NUMBERS)
    assert {n.place for n in numbers if n.value is not None} == {SCATTERED}
    assert all(n.subjects == 0 for n in numbers if n.place == WHOLE)

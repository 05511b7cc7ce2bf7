import importlib.util
import os

import numpy as np
import pytest

from physioray.baselines import band_powers, list_bands, name_features
from physioray.config import ProbeConfig
from physioray.data.batches import Batch
from physioray.data.cohort import StoredModality
from physioray.signals import MODALITIES

STEP = 8.0 / 32767


def store(name):
    modality = MODALITIES[name]
    return StoredModality(name=name, rate=modality.rate, samples=modality.samples, step=STEP)


def make_batch(signals, present=None):
    n = len(next(iter(signals.values())))
    stored = {name: np.rint(values / STEP).astype(np.int16) for name, values in signals.items()}
    here = {name: np.ones(n, bool) for name in signals} | (present or {})
    ids = np.arange(n)
    return Batch(signals=stored, present=here, labels={}, window_id=ids, recording=ids, subject=ids)


def sine(name, frequency, n=2):
    modality = MODALITIES[name]
    return np.tile(np.sin(2 * np.pi * frequency * np.arange(modality.samples) / modality.rate), (n, 1))


def describe(signals, present=None):
    modalities = {name: store(name) for name in signals}
    powers = band_powers(make_batch(signals, present), modalities)
    return dict(zip(name_features(modalities), powers.T, strict=True))


@pytest.mark.parametrize(
    ("modality", "frequency", "band"),
    [
        ("eeg", 2.0, "delta"),
        ("eeg", 6.0, "theta"),
        ("eeg", 10.0, "alpha"),
        ("eeg", 14.0, "sigma"),
        ("eog", 20.0, "beta"),
        ("emg", 38.0, "gamma"),
        ("airflow", 0.25, "breath"),
        ("spo2", 0.07, "slow"),
    ],
)
def test_a_sine_has_its_power_in_its_own_band(modality, frequency, band):
    powers = describe({modality: sine(modality, frequency)})
    bands = [f"{modality}_{name}" for name in list_bands(store(modality))]
    assert max(bands, key=lambda name: powers[name][0]) == f"{modality}_{band}"


def test_white_noise_of_unit_variance_is_zero_in_every_band_and_twice_the_amplitude_adds_log_four():
    noise = np.random.default_rng(0).normal(size=(200, 3000))
    once, twice = describe({"emg": np.clip(noise, -7, 7)}), describe({"emg": np.clip(noise / 2, -7, 7)})
    for band in list_bands(store("emg")):
        # Welch with 14 segments scatters; its mean over 200 windows does not.
        assert np.log10(np.mean(10 ** once[f"emg_{band}"])) == pytest.approx(0, abs=0.02)
        np.testing.assert_allclose(once[f"emg_{band}"] - twice[f"emg_{band}"], np.log10(4), atol=0.01)


def test_bands_that_filter_or_rate_do_not_pass_are_left_out():
    assert "gamma" not in list_bands(store("eeg"))  # band-pass to 30 Hz
    assert "gamma" in list_bands(store("emg"))
    assert set(list_bands(store("spo2"))) == {"slow", "breath", "fast_breath"} - {"pulse"}
    slow = StoredModality(name="airflow", rate=4, samples=120, step=STEP)
    assert "pulse" not in list_bands(slow)


def test_an_absent_modality_is_zero_and_flagged_and_leaves_the_others_alone():
    signals = {"eeg": sine("eeg", 2.0), "airflow": sine("airflow", 0.25)}
    full = describe(signals)
    missing = describe(signals, {"eeg": np.array([True, False])})
    np.testing.assert_array_equal(missing["eeg_present"], [1, 0])
    assert all(missing[f"eeg_{band}"][1] == 0 for band in list_bands(store("eeg")))
    for name, values in full.items():
        assert missing[name][0] == values[0]
        if name.startswith("airflow"):
            np.testing.assert_array_equal(missing[name], values)


def test_a_window_of_zeros_has_finite_powers():
    powers = describe({name: np.zeros((1, MODALITIES[name].samples)) for name in ("eeg", "chest", "spo2")})
    assert all(np.isfinite(values).all() for values in powers.values())


@pytest.mark.real
@pytest.mark.slow
def test_band_powers_of_the_real_excerpts_score_as_measured_before():
    folder = os.environ.get("PHYSIORAY_REAL_DATA")
    if not folder:
        pytest.skip("PHYSIORAY_REAL_DATA does not name a folder with the real recordings")
    if importlib.util.find_spec("physioray.data.convert") is None:
        pytest.skip("reading recordings is not there yet")
    embeddings = embed_excerpts(os.path.join(folder, "cinc2018_excerpts"))
    assert len(embeddings) == 2016
    scores = score_random_splits(embeddings, draws=8)
    # 0.56 +- 0.02 over random 13/3/5 splits; the error of a mean over 8 splits is about 0.01.
    assert np.mean(scores) == pytest.approx(0.56, abs=0.03)


def embed_excerpts(folder):
    """Band powers of all excerpts, by the package's own reading and conversion."""
    from physioray.config import IngestConfig
    from physioray.data.convert import convert_recording
    from physioray.data.gather import view_tensor
    from physioray.data.records import list_records
    from physioray.data.subjects import read_discontinuities
    from physioray.embeddings import embed_windows
    from physioray.signals import PAPER_MODALITIES, label_column, present_column
    from physioray.storage import open_location

    source, modalities = open_location(folder), {name: store(name) for name in PAPER_MODALITIES}
    jumps = read_discontinuities(source)

    def read_batches():
        for number, entry in enumerate(list_records(source)):
            found = jumps.get(entry.name, ())
            table = convert_recording(source, entry, IngestConfig(), subject=None, discontinuities=found).table
            table, rows = table.combine_chunks(), np.arange(len(table))
            yield Batch(
                signals={
                    name: view_tensor(table.column(name).combine_chunks(), modality.samples)
                    for name, modality in modalities.items()
                },
                present={name: table.column(present_column(name)).to_numpy() for name in modalities},
                labels={"sleep": table.column(label_column("sleep")).to_numpy()},
                window_id=rows + number * 10_000,
                recording=np.full(len(rows), number),
                subject=np.full(len(rows), number),
            )

    return embed_windows(lambda batch: band_powers(batch, modalities), read_batches())


def score_random_splits(embeddings, draws):
    from physioray.metrics import score_predictions
    from physioray.probe import choose_head, fit_path
    from physioray.signals import TASKS

    labels, scores = embeddings.labels["sleep"], []
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(np.unique(embeddings.recording))
        train, validation, test = (
            np.isin(embeddings.recording, part) & (labels >= 0) for part in (order[:13], order[13:16], order[16:])
        )
        heads = fit_path(embeddings.vectors[train], labels[train], 5, ProbeConfig().penalties)
        head = choose_head(heads, embeddings.vectors[validation], labels[validation])
        probabilities = head.predict(embeddings.vectors[test])
        scores.append(
            score_predictions(TASKS["sleep"], labels[test], probabilities.argmax(1), probabilities)["balanced_accuracy"]
        )
    return scores

"""A model for others: what `physioray export` writes and `physioray.load` gives back."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import physioray
from physioray.cli import main
from physioray.config import IngestConfig
from physioray.data.arrays import prepare_signals
from physioray.data.convert import convert_recording
from physioray.data.gather import WindowReader, view_tensor
from physioray.data.records import RecordEntry, read_header
from physioray.data.waveforms import read_waveforms
from physioray.export import export_model
from physioray.finetune import FinetuneJob, classify_windows, describe_finetuning, finetune
from physioray.models.heads import Classifier
from physioray.origins import open_model
from physioray.presets import find_preset
from physioray.pretrained import PretrainedModel, load_model
from physioray.signals import LookupMiss, find_modality
from physioray.storage import Location, StorageError, is_committed, open_location
from physioray.strategies import build_model
from tests.data.record_files import CHANNELS, make_signal, write_record
from tests.trained_runs import write_trained_run

SETTINGS = IngestConfig()
NAMES = {"F3-M2": "eeg", "E1-M2": "eog", "Chin1-Chin2": "emg", "ECG": "ecg"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return write_trained_run(tmp_path_factory.mktemp("trained"))[0]


@pytest.fixture(scope="module")
def exported(run: Location) -> Path:
    out = Path(run.path).parent / "exported"
    export_model(run, open_location(str(out)))
    return out


@pytest.fixture(scope="module")
def model(exported: Path) -> PretrainedModel:
    return physioray.load(exported)


def make_arrays(seconds: float = 95, rate: float = 256.0, names: tuple[str, ...] = ("eeg", "ecg")) -> dict:
    generator = np.random.default_rng(1)
    return {name: (generator.standard_normal(round(seconds * rate)) * 20, rate) for name in names}


README_LINES = """import physioray
model = physioray.load("MODEL")
vectors = model.embed({"eeg": (eeg, 256.0)})
"""
"""As they stand in the README, section "Weights and embeddings out"."""


def test_the_three_lines_of_the_readme_give_a_vector_per_window(exported: Path) -> None:
    names = {"eeg": make_arrays()["eeg"][0]}
    exec(README_LINES.replace("MODEL", str(exported)), names)
    assert names["vectors"].shape == (3, 32) and names["vectors"].dtype == torch.float32
    assert torch.isfinite(names["vectors"]).all()


def test_the_lines_of_the_model_card_run_as_they_stand(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    lines = re.findall(r"^    (.+)$", card.split("## Use")[1].split("Give whole")[0], re.MULTILINE)
    names = {name: values for name, (values, _) in make_arrays(names=("eeg", "eog")).items()}
    assert len(lines) == 3
    exec("\n".join(lines).replace("THIS_FOLDER", str(exported)), names)
    assert names["vectors"].shape == (3, 32)


def test_an_exported_model_gives_the_run_s_embeddings_and_probabilities_to_the_bit(
    run: Location, model: PretrainedModel
) -> None:
    arrays, original = make_arrays(), open_model(run)
    np.testing.assert_array_equal(model.embed(arrays).numpy(), original.embed(arrays).numpy())
    for name, values in original.classify(arrays).items():
        np.testing.assert_array_equal(values, model.classify(arrays)[name])
        np.testing.assert_allclose(values.sum(1), 1)
    assert model.description["missing_modalities"] == json.loads(json.dumps(original.description["missing_modalities"]))


@pytest.mark.parametrize("rate", [200, 256, 500])
def test_arrays_are_prepared_as_ingest_prepares_a_recording_to_one_step(tmp_path: Path, rate: int) -> None:
    signal = make_signal(125, rate)
    signal[40 * rate : 55 * rate, 2] = 3  # chin electrode off: that window is absent
    write_record(tmp_path, "night", signal, rate=rate)
    source, entry = open_location(str(tmp_path)), RecordEntry(name="night", path="night")
    table = convert_recording(source, entry, SETTINGS, subject=None).table.combine_chunks()
    header = read_header(source, entry)
    raw = read_waveforms(source, entry, header, [0, 1, 2, 4]).samples
    arrays = {NAMES[list(CHANNELS)[k]]: (raw[k] / header.channels[k].gain, float(rate)) for k in raw}
    night = prepare_signals(arrays, SETTINGS)
    assert len(night) == 4 and not night.present["emg"].all() and night.absent == {}
    for name in SETTINGS.modalities:
        present = table.column(f"present_{name}").to_numpy()
        np.testing.assert_array_equal(present, night.present[name])
        stored = view_tensor(table.column(name).chunk(0), find_modality(name).samples).astype(int)
        assert np.abs(stored - night.signals[name]).max() <= 1, "one quantisation step"


def test_embeddings_of_arrays_are_those_of_the_cohort_s_windows(tmp_path: Path, model: PretrainedModel) -> None:
    write_record(tmp_path, "night", make_signal(95))
    source, entry = open_location(str(tmp_path)), RecordEntry(name="night", path="night")
    table = convert_recording(source, entry, SETTINGS, subject=None).table.combine_chunks()
    signals = {name: view_tensor(table.column(name).chunk(0), 3000) for name in model.modalities}
    present = {name: table.column(f"present_{name}").to_numpy() for name in model.modalities}
    header = read_header(source, entry)
    raw = read_waveforms(source, entry, header, [0, 1, 2, 4]).samples
    arrays = {NAMES[list(CHANNELS)[k]]: (raw[k] / header.channels[k].gain, 200.0) for k in raw}
    np.testing.assert_allclose(model.embed(arrays).numpy(), model.embed_windows(signals, present), atol=5e-3)


def test_any_subset_of_the_modalities_and_windows_without_any_are_taken(model: PretrainedModel) -> None:
    arrays = make_arrays(125, names=("ecg",))
    arrays["ecg"][0][35 * 256 : 40 * 256] = np.nan
    vectors = model.embed(arrays)
    assert vectors.shape == (4, 32) and torch.isnan(vectors[1]).all() and torch.isfinite(vectors[[0, 2, 3]]).all()
    assert np.isnan(model.classify(arrays)["sleep"][1]).all()
    jumped = model.embed(make_arrays(125), jumps=[45.0, 60.0])
    assert torch.isnan(jumped[1]).all() and torch.isfinite(jumped[[0, 2, 3]]).all()


def test_signals_that_cannot_be_used_are_errors_that_say_what_must_hold(model: PretrainedModel) -> None:
    eeg, rate = make_arrays()["eeg"]
    with pytest.raises(LookupMiss, match="eeg, eog, emg, ecg"):
        model.embed({"flow": (eeg, rate)})
    with pytest.raises(ValueError, match="same time"):
        model.embed({"eeg": (eeg, rate), "ecg": (eeg[: len(eeg) // 2], rate)})
    with pytest.raises(ValueError, match="At least one signal"):
        model.embed({})
    with pytest.raises(ValueError, match="30 s or more"):
        model.embed({"eeg": (eeg[:100], rate)})
    with pytest.raises(ValueError, match="one dimension"):
        model.embed({"eeg": (eeg[None], rate)})
    with pytest.raises(ValueError, match="above 0 Hz"):
        model.embed({"eeg": (eeg, 0.0)})
    slow = model.prepare({"eeg": (eeg, rate), "ecg": (eeg[::4], rate / 4)})
    assert "must be at least 100 Hz" in slow.absent["ecg"] and not slow.present["ecg"].any()


def test_importing_physioray_is_light_and_loading_needs_no_ray(exported: Path) -> None:
    code = (
        "import sys, physioray\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.modules['ray'] = None\nimport numpy as np\n"
        f"model = physioray.load({str(exported)!r})\n"
        "print(model.embed({'eeg': (np.random.default_rng(0).standard_normal(6000), 100.0)}).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[2, 32]" in done.stdout


def test_nothing_in_an_export_is_unpickled_and_damage_is_named(exported: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for path in exported.iterdir():
        (trap / path.name).write_bytes(path.read_bytes())
    bomb = type("Bomb", (), {"__reduce__": lambda _: (Path.touch, (tmp_path / "ran",))})
    (trap / "weights.safetensors").write_bytes(pickle.dumps(bomb()))
    with pytest.raises(StorageError, match="Export the run again"):
        load_model(str(trap))
    assert not (tmp_path / "ran").exists()
    (trap / "heads.json").unlink()
    with pytest.raises(StorageError, match="lacks heads"):
        load_model(str(trap))
    with pytest.raises(StorageError, match="physioray export RUN"):
        load_model(str(tmp_path))


def test_the_model_card_says_data_splits_scores_floors_licence_and_that_all_is_simulated(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("# multimae_drop (trained on SIMULATED signals)")
    for words in (
        "Licence of the data: not stated",
        "Untrained encoder",
        "Band powers",
        "without eeg",
        "pretrain, train",
    ):
        assert words in card, words
    assert "| eeg | uV | 100 Hz | 0.1-30 Hz |" in card and "fitted on 4 subjects" in card
    assert "ModelConfig.mlp_ratio" in card and "{{" not in card and "None" not in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert str(exported.parent) not in card + (exported / "config.json").read_text(), "no path of this machine"


def test_an_export_is_whole_or_not_there_and_touches_no_other_folder(run: Location, exported: Path) -> None:
    assert is_committed(open_location(str(exported)))
    with pytest.raises(StorageError, match="empty folder or an older export"):
        export_model(run, run)
    export_model(run, open_location(str(exported)))
    assert is_committed(open_location(str(exported)))


def test_the_command_says_what_it_wrote(run: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", run.path, str(tmp_path / "m")]) == 0
    assert "SIMULATED" in capsys.readouterr().out
    assert main(["export", str(tmp_path), str(tmp_path / "n")]) == 1
    assert "must be a run's folder" in capsys.readouterr().err and not (tmp_path / "n").exists()


def test_encoders_of_one_modality_each_and_slower_rates_are_exported_alike(tmp_path: Path) -> None:
    run, cohort = write_trained_run(tmp_path, strategy="clip_leave_one_out", modalities=("eeg", "emg", "airflow"))
    export_model(run, open_location(str(tmp_path / "m")))
    model = physioray.load(tmp_path / "m")
    assert model.modalities == ("eeg", "emg", "airflow") and model.features == 96
    flow = np.random.default_rng(0).standard_normal(90 * 32)
    assert torch.isfinite(model.embed({"airflow": (flow, 32.0)})).all()
    batch = WindowReader(cohort).read(np.arange(5))
    np.testing.assert_array_equal(
        model.embed_windows(batch.signals, batch.present), open_model(run).embed_windows(batch.signals, batch.present)
    )


def test_a_finetuned_checkpoint_brings_its_own_head(tmp_path: Path) -> None:
    run, cohort = write_trained_run(tmp_path)
    preset = find_preset("tiny")
    out = tmp_path / "tuned"
    job = FinetuneJob(
        cohort=str(cohort.location),
        out=str(out),
        task="sleep",
        checkpoint=f"{run}/checkpoints/last.pt",
        train=replace(preset.finetune, passes=1),
        threads=1,
    )
    finetune(job)
    open_location(str(out / "config.json")).write_json(describe_finetuning(job))
    model = open_model(open_location(str(out / "checkpoints" / "best.pt")))
    assert list(model.readouts) == ["sleep"] and set(model.description["without_head"]) == {"age", "arousal"}
    windows = cohort.find_windows(splits=["test"])
    batch = WindowReader(cohort).read(windows)
    found = model.predict(model.embed_windows(batch.signals, batch.present))["sleep"]
    classifier = Classifier(build_model(preset.model, 0).encoder, 5)
    content = torch.load(out / "checkpoints" / "best.pt", weights_only=True)
    classifier.load_state_dict(content["model"])
    np.testing.assert_allclose(found, classify_windows(classifier, cohort, windows), atol=1e-5)
    measured = model.description["missing_modalities"]
    assert measured["rows"] and "the weights were chosen on them" in measured["sentence"]
    with pytest.raises(StorageError, match="Name the run's folder"):
        open_model(open_location(f"{run}/checkpoints/best.pt"))

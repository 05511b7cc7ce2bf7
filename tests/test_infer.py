"""Somebody's own recordings, read by a trained model: `physioray infer`."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import edfio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from physioray.cli import main
from physioray.data.records import RejectedRecording
from physioray.data.selection import find_recordings
from physioray.export import write_model
from physioray.infer import EDF_STAGES, infer_recording
from physioray.origins import open_model
from physioray.pretrained import PretrainedModel
from physioray.signals import STAGES
from physioray.storage import Location, StorageError, is_committed, open_location
from tests.data.record_files import CHANNELS, make_signal, write_notes, write_record
from tests.trained_runs import write_trained_run

EEG = {"C3-M2": "1/uV"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return write_trained_run(tmp_path_factory.mktemp("trained"))[0]


@pytest.fixture(scope="module")
def model(run: Location) -> PretrainedModel:
    return open_model(run)


@pytest.fixture(scope="module")
def night(model: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes with a scoring; the electrode of the chin is off in the third window, all are in the sixth."""
    folder = tmp_path_factory.mktemp("night")
    signal = make_signal(300)
    signal[12000:18000, 2] = 3
    signal[30000:36000] = 5
    write_notes(write_record(folder, "mine", signal), [(6000, "W"), (24000, "N2")])
    source, entries = find_recordings(open_location(str(folder / "mine.hea")))
    infer_recording(source, entries[0], model, open_location(str(folder / "out")))
    return folder


def read_csv(place: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(place.read_text())))


def save(model: PretrainedModel, folder: Path) -> Path:
    write_model(model, open_location(str(folder / "model")))
    return folder / "model"


def test_every_window_has_its_embedding_stage_and_probabilities(night: Path) -> None:
    table = pq.ParquetFile(night / "out" / "embeddings.parquet", pre_buffer=False).read(use_threads=False)
    vectors = table.column("embedding").to_pylist()
    assert table.num_rows == 10 and table.column("start").to_pylist() == [30.0 * k for k in range(10)]
    assert vectors[5] is None and all(len(vector) == 32 for k, vector in enumerate(vectors) if k != 5)
    assert not table.column("present_emg")[2].as_py() and table.column("present_eeg")[2].as_py()
    assert table.schema.metadata[b"trained_on"] == b"SIMULATED signals"
    rows = read_csv(night / "out" / "hypnogram.csv")
    assert [row["onset"] for row in rows] == [str(30 * k) for k in range(10)]
    for number, row in enumerate(rows):
        if number == 5:
            assert (row["stage"], row["p_W"], row["present"]) == ("?", "", "")
            continue
        values = np.array([float(row[f"p_{stage}"]) for stage in STAGES])
        assert values.sum() == pytest.approx(1, abs=1e-3) and STAGES[values.argmax()] == row["stage"]
    assert rows[2]["present"] == "eeg+eog+ecg" and rows[0]["trained_on"] == "SIMULATED signals"


def test_the_edf_file_holds_the_same_hypnogram_without_gaps(night: Path) -> None:
    notes = edfio.read_edf(night / "out" / "hypnogram.edf").annotations
    texts = {text: stage for stage, text in EDF_STAGES.items()} | {"Sleep stage ?": "?"}
    stages = [texts[note.text] for note in notes for _ in range(round((note.duration or 0) / 30))]
    assert stages == [row["stage"] for row in read_csv(night / "out" / "hypnogram.csv")]
    ends = [note.onset + (note.duration or 0) for note in notes]
    assert [note.onset for note in notes] == [0.0, *ends[:-1]] and ends[-1] == 300.0
    assert "SIMULATED" in edfio.read_edf(night / "out" / "hypnogram.edf").local_recording_identification


def test_the_page_is_one_file_that_says_what_was_seen_and_that_all_is_simulated(night: Path) -> None:
    page = (night / "out" / "night.html").read_text()
    assert "MODEL TRAINED ON SIMULATED SIGNALS" in page and "<title>SIMULATED: mine" in page
    assert "SIMULATED RECORDING" not in page, "the recording itself is not said to be"
    assert "http-equiv" not in page and "src=" not in page and 'href="http' not in page and page.count("<svg") == 1
    for words in ("F3-M2", "flat 1", "flat 2", "What a missing modality costs", "without eeg", "Untrained encoder"):
        assert words in page, words
    assert "Against the scoring that came with the recording" in page
    assert (night / "out" / "night.png").read_bytes().startswith(b"\x89PNG")
    assert is_committed(open_location(str(night / "out")))


def test_a_recording_with_the_eeg_alone_is_read_and_told_what_the_others_cost(
    model: PretrainedModel, tmp_path: Path
) -> None:
    write_record(tmp_path, "eeg", make_signal(120, 256, EEG), rate=256, channels=EEG)
    source, entries = find_recordings(open_location(str(tmp_path / "eeg")))
    summary = infer_recording(source, entries[0], model, open_location(str(tmp_path / "out")))
    assert set(summary["absent"]) == {"eog", "emg", "ecg"} and summary["usable_windows"] == 4
    rows = model.description["missing_modalities"]["rows"]
    row = next(item for item in rows if item["task"] == "sleep" and item["present"] == ["eeg"])
    page = (tmp_path / "out" / "night.html").read_text()
    assert f"was {row['value']:.3f} instead of {row['whole']:.3f}" in page
    assert "This recording has no eog, emg, ecg" in page


def test_a_combination_that_was_not_measured_is_said_to_be_so(
    model: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = model.description["missing_modalities"]
    fewer = [row for row in measured["rows"] if len(row["present"]) != 2]
    monkeypatch.setitem(model.description, "missing_modalities", measured | {"rows": fewer})
    names = {name: CHANNELS[name] for name in ("F3-M2", "ECG")}
    write_record(tmp_path, "two", make_signal(60, 200, names), channels=names)
    source, entries = find_recordings(open_location(str(tmp_path / "two")))
    infer_recording(source, entries[0], model, open_location(str(tmp_path / "out")))
    assert "was not measured for this combination" in (tmp_path / "out" / "night.html").read_text()


def test_a_finished_reading_is_kept_and_a_changed_recording_is_read_again(
    model: PretrainedModel, tmp_path: Path
) -> None:
    record = write_record(tmp_path, "mine", make_signal(60))
    source, entries = find_recordings(open_location(str(record)))
    out = open_location(str(tmp_path / "out"))
    infer_recording(source, entries[0], model, out)
    before = (tmp_path / "out" / "night.html").stat().st_mtime_ns
    infer_recording(source, entries[0], model, out)
    assert (tmp_path / "out" / "night.html").stat().st_mtime_ns == before
    write_record(tmp_path, "mine", make_signal(90))
    assert infer_recording(source, entries[0], model, out)["windows"] == 3
    write_record(tmp_path, "other", make_signal(60))
    with pytest.raises(StorageError, match="Choose another folder"):
        infer_recording(source, find_recordings(open_location(str(tmp_path / "other")))[1][0], model, out)


def test_a_reading_cut_short_is_made_again(model: PretrainedModel, tmp_path: Path) -> None:
    record = write_record(tmp_path, "mine", make_signal(60))
    source, entries = find_recordings(open_location(str(record)))
    out = open_location(str(tmp_path / "out"))
    infer_recording(source, entries[0], model, out)
    (out / "hypnogram.csv").write_text("onset")
    infer_recording(source, entries[0], model, out)
    assert is_committed(out) and len(read_csv(tmp_path / "out" / "hypnogram.csv")) == 2


def test_jumps_are_found_beside_the_recording_or_one_level_up(model: PretrainedModel, tmp_path: Path) -> None:
    record = write_record(tmp_path / "training", "mine", make_signal(150))
    (tmp_path / "discontinuities.csv").write_text("record,sample\nmine,9000\n")
    assert main(["infer", str(record), str(save(model, tmp_path)), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["jumps"], summary["windows"], summary["windows_dropped_at_jumps"]) == (1, 4, 1)


def test_the_command_prints_what_was_found_and_where(
    run: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = write_record(tmp_path, "mine", make_signal(60), comment="Simulated by physioray")
    assert main(["infer", str(record), run.path, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED signals" in printed and "the recording is SIMULATED" in printed and "night.html" in printed


def test_a_recording_that_cannot_be_used_is_one_line(
    model: PretrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(save(model, tmp_path))
    breathing = {"AIRFLOW": "1/uV"}
    record = write_record(tmp_path, "breath", make_signal(60, 200, breathing), channels=breathing)
    assert main(["infer", str(record), place, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(["infer", str(tmp_path / "nobody"), place, "--out", str(tmp_path / "out")]) == 1
    assert "there is none at" in capsys.readouterr().err
    source, entries = find_recordings(open_location(str(record)))
    with pytest.raises(RejectedRecording, match="At least one modality"):
        infer_recording(source, entries[0], model, open_location(str(tmp_path / "out")))


@pytest.mark.real
def test_a_real_excerpt_with_jumps_every_minute_is_read(
    model: PretrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.environ.get("PHYSIORAY_REAL_DATA")
    if not folder:
        pytest.skip("PHYSIORAY_REAL_DATA names no folder of real recordings")
    record = Path(folder) / "cinc2018_excerpts" / "mx00-9126" / "mx00-9126"
    assert main(["infer", str(record), str(save(model, tmp_path)), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["jumps"], summary["usable_windows"]) == (47, 96)
    assert summary["tasks"]["sleep"]["agreement"]["windows"] == 96 and not summary["simulated_recording"]
    assert "SIMULATED signals" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_is_read_on_the_cluster_one_bad_recording_stops_nothing_and_it_goes_on(
    model: PretrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place, out = tmp_path / "source", str(save(model, tmp_path)), tmp_path / "out"
    for name in ("a", "b", "c"):
        record = write_record(source, name, make_signal(60))
    record.with_suffix(".mat").write_bytes(record.with_suffix(".mat").read_bytes()[:1000])
    assert main(["infer", str(source), place, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "2 recordings read" in printed.out and "cut short" in printed.out and "3/3" in printed.err
    rows = {row["recording"]: row for row in read_csv(out / "ledger.csv")}
    assert [rows[name]["kind"] for name in "abc"] == ["accepted", "accepted", "recording"]
    assert (out / rows["a"]["page"]).exists() and rows["a"]["trained_on"] == "SIMULATED signals"
    before = (out / "a" / "night.html").stat().st_mtime_ns
    write_record(source, "c", make_signal(60))
    assert main(["infer", str(source), place, "--out", str(out), "--strict"]) == 0
    assert "3 recordings read" in capsys.readouterr().out
    assert (out / "a" / "night.html").stat().st_mtime_ns == before and (out / "c" / "hypnogram.edf").exists()
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"weights_sha256": "another"}))
    assert main(["infer", str(source), place, "--out", str(out)]) == 1
    assert "Choose another output folder" in capsys.readouterr().err

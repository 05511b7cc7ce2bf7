"""A folder of EDF from the command line: a dry run, a montage, ingest, the card; every bad file a row of the ledger."""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from physioray.cli import main
from physioray.config import IngestConfig, Montage, from_dict, to_dict
from physioray.data.ledger import describe_identity
from physioray.data.montage import MontageError, parse_montage, read_montage
from physioray.local_cluster import start_local_cluster
from physioray.storage import open_location

from .edf_files import make_trace, set_field, write_edf, write_hypnogram
from .record_files import make_signal, write_record

REAL_DATA = os.environ.get("PHYSIORAY_REAL_DATA")
ROWS = [(0, 30, "Sleep stage W"), (30, 30, "Sleep stage 2"), (60, 60, "Sleep stage 4")]
MONTAGE = """
[channels]
eeg = ["C4-M1", {channel = "C4", minus = "M1"}]
ecg = [{channel = "ECG1", minus = "ECG2"}]

[stages]
"SLEEP-S0" = "W"
"artefact" = "undefined"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_local_cluster(2)
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two sound nights, one of each format, a montage that both need, and files that are broken each in its way."""
    folder = tmp_path / "source"
    hearts = [make_trace(name, unit="mV", spread=0.2, reach=5) for name in ("ECG1", "ECG2")]
    good = write_edf(folder / "good-PSG.edf", [make_trace("C4", rate=256), make_trace("M1"), *hearts])
    write_hypnogram(folder / "good-Hypnogram.edf", ROWS)
    write_record(folder, "old", make_signal())
    (folder / "montage.toml").write_text(MONTAGE.replace('"C4-M1"', '"F3-M2"'))
    shutil.copy(good, folder / "twin.edf")
    (folder / "empty.edf").write_bytes(b"")
    shutil.copy(good, folder / "short.edf")
    (folder / "short.edf").write_bytes((folder / "short.edf").read_bytes()[:50_000])
    shutil.copy(good, folder / "endless.edf")
    set_field(folder / "endless.edf", "records", "99999999")
    write_hypnogram(folder / "lonely-Hypnogram.edf", ROWS, patient="nobody")
    return folder


def test_a_dry_run_says_what_would_be_used_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    before = sorted(source.rglob("*"))
    assert main(["ingest", str(source), str(tmp_path / "cohort"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.lstrip().startswith("good-PSG.edf"))
    for part in ("0.03", "C4 minus M1 (200 Hz, uV, uV)", "ECG1 minus ECG2 (200 Hz, mV, mV)", "absent", "0.03 h scored"):
        assert part in row
    assert "No eog in good-PSG.edf, twin.edf: a channel must be named one of E1-M2" in text
    assert "Sleep stage 4 = N3" in text and "have not been looked at" in text
    assert "old needs both" not in text and "No ecg in old" in text
    for name in ("empty.edf", "short.edf", "endless.edf", "lonely-Hypnogram.edf"):
        assert f"Would be rejected: {name}: " in text
    assert "3 of 7 recordings would be used" in text
    assert not (tmp_path / "cohort").exists() and sorted(source.rglob("*")) == before
    assert main(["ingest", str(source), str(tmp_path / "cohort"), "--dry-run", "--strict"]) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_ingest_takes_both_formats_and_every_bad_file_is_a_row_with_its_reason(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = tmp_path / "cohort"
    assert main(["ingest", str(source), str(cohort)]) == 0
    manifest = json.loads((cohort / "manifest.json").read_text())
    assert [row["recording"] for row in manifest["recordings"]] == ["good-PSG", "old"]
    reasons = {row["path"]: row["reason"] for row in manifest["rejected"]}
    assert sorted(reasons) == ["empty", "endless", "lonely-Hypnogram", "short", "twin"]
    assert "must begin as an EDF file" in reasons["empty"] and "cut short" in reasons["short"]
    assert "annotations only" in reasons["lonely-Hypnogram"] and "that of good-PSG" in reasons["twin"]
    assert manifest["channels"]["eeg"] == {"C4 minus M1": 1, "F3-M2": 1}
    assert manifest["stage_names"] == {"Sleep stage 2": "N2", "Sleep stage 4": "N3", "Sleep stage W": "W"}
    assert manifest["class_counts"]["sleep"] == [1, 0, 1, 2, 0]
    assert manifest["settings"]["montage"]["stages"] == [["SLEEP-S0", "W"], ["artefact", "undefined"]]
    capsys.readouterr()
    assert main(["info", str(cohort)]) == 0
    card = capsys.readouterr().out
    assert "Sleep stage 4 = N3" in card and "chosen by the user for eeg, ecg" in card
    # The same again does nothing; a hypnogram that was corrected has its recording, and only that, made again.
    assert main(["ingest", str(source), str(cohort)]) == 0 and "(0 converted" in capsys.readouterr().out
    write_hypnogram(source / "good-Hypnogram.edf", [(0, 120, "Sleep stage R")])
    assert main(["ingest", str(source), str(cohort)]) == 0
    assert json.loads((cohort / "manifest.json").read_text())["class_counts"]["sleep"] == [0, 0, 0, 0, 4]
    # Another montage is another cohort.
    other = tmp_path / "other.toml"
    other.write_text('[channels]\neeg = "C4"\n')
    assert main(["ingest", str(source), str(cohort), "--channels", str(other)]) == 1
    assert "settings.montage.choices was" in capsys.readouterr().err
    facts = pq.ParquetFile(cohort / "ledger.parquet", pre_buffer=False).read(use_threads=False)
    assert isinstance(facts, pa.Table) and facts.num_rows == 7


def test_a_montage_is_read_in_order_and_is_part_of_the_settings_hash(tmp_path: Path) -> None:
    source = open_location(tmp_path)
    assert read_montage(source) == Montage()
    (tmp_path / "montage.toml").write_text(MONTAGE)
    montage = read_montage(source)
    assert montage.choices == (("eeg", "C4-M1", ""), ("eeg", "C4", "M1"), ("ecg", "ECG1", "ECG2"))
    assert montage.stages == (("SLEEP-S0", "W"), ("artefact", "undefined"))
    with_it, without = IngestConfig(montage=montage), IngestConfig()
    assert describe_identity(source, with_it)["settings_hash"] != describe_identity(source, without)["settings_hash"]
    assert from_dict(IngestConfig, json.loads(json.dumps(to_dict(with_it)))) == with_it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[chanels]\n", "tables must be among channels, stages, but got chanels"),
        ('[channels]\nheeg = "C4"\n', "modalities under [channels] must be among eeg, eog, emg, ecg"),
        ('[channels]\neeg = {channel = "C4", plus = "M1"}\n', "must be among channel, minus, but got plus"),
        ('[channels]\neeg = {minus = "M1"}\n', 'must be a name, or {channel = "A", minus = "B"}'),
        ('[channels]\neeg = {channel = "C4", minus = ""}\n', "must be a name, or"),
        ("[channels]\neeg = [3]\n", "but is 3"),
        ("[channels]\neeg = []\n", "must name at least one channel"),
        ('channels = "C4"\n', "must be a table"),
        ('[stages]\nS2 = "NREM2"\n', "'S2' must mean one of W, N1, N2, N3, REM, undefined, but means 'NREM2'"),
        ("[stages]\nS2 = [1]\n", "but means [1]"),
        ("[channels\n", "must be TOML"),
    ],
)
def test_a_mistake_in_a_montage_is_named_with_what_may_stand_there(text: str, words: str) -> None:
    with pytest.raises(MontageError) as caught:
        parse_montage(text)
    assert words in str(caught.value)


def test_a_montage_that_was_named_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ingest", str(tmp_path), str(tmp_path / "c"), "--channels", str(tmp_path / "none.toml")]
    assert main(arguments) == 1 and "there is none at" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.skipif(not REAL_DATA, reason="PHYSIORAY_REAL_DATA names no folder of real recordings")
def test_the_excerpts_of_sleep_edf_and_slpdb_become_a_cohort(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("sleepedf_excerpt", "slpdb_excerpt"):
        shutil.copytree(Path(str(REAL_DATA), folder), tmp_path / "source" / folder)
    assert main(["ingest", str(tmp_path / "source"), str(tmp_path / "cohort"), "--strict"]) == 0
    assert main(["info", str(tmp_path / "cohort")]) == 0
    manifest = json.loads((tmp_path / "cohort" / "manifest.json").read_text())
    assert manifest["channels"]["eeg"] == {"EEG (C4-A1)": 1, "EEG Fpz-Cz": 1}
    assert manifest["channels"]["ecg"] == {"ECG": 1}
    # The excerpt's first five minutes are wake, far before lights off.
    assert manifest["class_counts"]["sleep"] == [10, 0, 0, 0, 0]
    assert manifest["stage_names"]["Sleep stage 4"] == "N3"
    printed = capsys.readouterr().out
    assert "EMG submental must be sampled at 100 Hz or more, but is at 1 Hz" in printed


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_commands_of_the_readme_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section on own recordings, as it stands: its montage, and its commands of ingest and info."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Your own recordings", 1)[-1].split("\n## ", 1)[0]
    commands = re.findall(r"^ {4}physioray ((?:ingest|info) .*)$", section, re.MULTILINE)
    if "--dry-run" not in section:
        pytest.skip("the README does not show the dry run")
    montage = re.search(r"^( +)\[channels\]\n(?:\1.*\n|\n(?=\1))+", section, re.MULTILINE)
    assert montage is not None and len(commands) >= 3
    monkeypatch.chdir(tmp_path)
    Path("montage.toml").write_text(textwrap.dedent(montage.group()))
    for command in commands:
        words = command.split()
        assert main([{"SOURCE": str(source), "COHORT": "cohort"}.get(word, word) for word in words]) == 0, command
    assert (tmp_path / "cohort" / "manifest.json").exists()

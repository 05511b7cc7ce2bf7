"""The commands on a bucket by URI alone, through a real S3 API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from physioray.checkpoint_scores import score_checkpoint
from physioray.cli import main
from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.simulate import simulate_cohort
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.pretrained import load_model
from physioray.report import write_report
from physioray.results import read_results
from physioray.steps import StepStore
from physioray.storage import Location, is_committed, open_location
from physioray.strategies import find_strategy
from physioray.study import run_study
from tests.buckets import serve_bucket
from tests.written_cohorts import write_cohort

PROBE = ProbeConfig(
    tasks=("sleep",), seeds=(0,), folds=2, penalties=(0.1,), bootstrap_draws=20, recipe_passes=2, recipe_min_steps=20
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an empty bucket on this machine."""
    with serve_bucket("everything") as settings, pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        environment.chdir(tmp_path_factory.mktemp("here"))
        yield "s3://everything"
        # Code that takes a URI for a path makes a folder with the name "s3:".
        assert not list(Path.cwd().iterdir())


def copy(place: Location, there: Location) -> None:
    pafs.copy_files(place.path, there.path, source_filesystem=place.filesystem, destination_filesystem=there.filesystem)


def read_all(folder: Location) -> dict[str, bytes]:
    files = [item for item in folder.list(recursive=True) if item.info().type == pafs.FileType.File]
    return {item.path.removeprefix(folder.path): item.read_bytes() for item in files}


@pytest.fixture(scope="module")
def run(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in the bucket, from a cohort in it, as experiments make one."""
    copy(write_cohort(tmp_path_factory.mktemp("written"), [12] * 8).location, open_location(f"{bucket}/cohort"))
    preset = find_preset("tiny")
    job = PretrainJob.from_strategy(
        find_strategy("multimae_drop"),
        replace(preset, train=replace(preset.train, passes=1)),
        cohort=f"{bucket}/cohort",
        out=f"{bucket}/run",
        keep_passes=(0, 1),
        threads=1,
    )
    write_report(run_study(job, run_pretraining=pretrain, probe=PROBE))
    return f"{bucket}/run"


@pytest.fixture(scope="module")
def source(bucket: str) -> str:
    assert main(["simulate", f"{bucket}/source", "--subjects", "2", "--hours", "0.05"]) == 0
    return f"{bucket}/source"


def test_simulated_nights_in_a_bucket_are_those_of_a_folder_and_an_interrupted_call_is_finished(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_cohort(str(tmp_path / "source"), subjects=2, hours=0.05, seed=0)
    whole = read_all(open_location(tmp_path / "source"))
    assert read_all(open_location(source)) == whole
    for name in ("training/tr03-0001/tr03-0001.hea", "RECORDS"):
        (open_location(source) / name).delete()
    assert main(["simulate", source, "--subjects", "2", "--hours", "0.05"]) == 0
    assert read_all(open_location(source)) == whole
    assert main(["simulate", source, "--subjects", "3", "--hours", "0.05"]) == 1
    assert "Choose another folder" in capsys.readouterr().err


def test_a_study_keeps_checkpoints_results_and_page_in_the_bucket(run: str) -> None:
    place = open_location(run)
    assert {"pass-0000.pt", "last.pt"} <= {item.name for item in (place / "checkpoints").list()}
    history = [json.loads(line) for line in (place / "training.jsonl").read_text().splitlines()]
    assert [record["pass"] for record in history] == [1]
    rows = read_results(place / "results.jsonl")
    assert {row.features for row in rows} == {"pretrained", "untrained", "band_powers"}
    assert "<html" in (place / "report.html").read_text()


def test_a_checkpoint_is_scored_with_steps_in_the_bucket(
    run: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = open_location(f"{bucket}/scores")
    score_checkpoint(run, Cohort.open(f"{bucket}/cohort"), StepStore(out.folder / "steps"), out, probe=PROBE)
    write_report(out)
    assert read_results(out / "results.jsonl")
    assert "<html" in (out / "report.html").read_text()
    capsys.readouterr()
    assert main(["steps", f"{bucket}/steps", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "embed" in printed and "Every file is what it was" in printed


def test_a_model_is_exported_opened_and_used_by_uri(
    run: str, source: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, f"{bucket}/model"]) == 0
    assert is_committed(open_location(f"{bucket}/model"))
    assert load_model(f"{bucket}/model").simulated
    record = f"{source}/training/tr03-0001/tr03-0001"
    assert main(["infer", record, f"{bucket}/model", "--out", f"{bucket}/read"]) == 0
    assert "SIMULATED" in capsys.readouterr().out
    assert is_committed(open_location(f"{bucket}/read"))
    assert "<html" in open_location(f"{bucket}/read/night.html").read_text()


def test_runs_in_a_bucket_are_compared(run: str, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy(open_location(run), open_location(f"{bucket}/other"))
    assert main(["compare", run, f"{bucket}/other", "--out", f"{bucket}/compared"]) == 0
    assert any(item.name.endswith(".html") for item in open_location(f"{bucket}/compared").list())
    assert "+0.000" in capsys.readouterr().out

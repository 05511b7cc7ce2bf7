"""The main job as a user runs it: simulate, ingest, quickstart, and what lies in the run's folder afterwards."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.protocol import choose_protocol
from physioray.report import write_report
from physioray.steps import StepStore
from physioray.storage import open_location
from physioray.study import run_study
from tests.written_cohorts import write_cohort

ROOT = Path(__file__).parent.parent
QUICK = ProbeConfig(seeds=(0, 1), recipe_min_steps=50, recipe_passes=2, bootstrap_draws=20)


def run(*command: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_the_three_commands_of_the_readme_give_a_report(tmp_path: Path) -> None:
    physioray = [sys.executable, "-m", "physioray.cli"]
    run(*physioray, "simulate", "source", "--subjects", "10", "--hours", "0.25", "--seed", "3", folder=tmp_path)
    assert "SIMULATED" in run(*physioray, "ingest", "source", "cohort", folder=tmp_path)
    assert "SIMULATED" in run(*physioray, "info", "cohort", folder=tmp_path)
    quickstart = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), "--cohort", "cohort", "--out", "run"]
    printed = run(*quickstart, "--preset", "tiny", "--passes", "2", folder=tmp_path)
    assert "SIMULATED" in printed and "Untrained encoder" in printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["features"] for row in rows} == {"pretrained", "untrained", "band_powers"}
    assert {row["evaluation"] for row in rows} == {"probe_converged", "probe_recipe"}
    assert {row["task"] for row in rows} >= {"sleep", "age", "arousal"}
    assert {row["seed"] for row in rows if row["value"] is not None} == {0, 1, 2, 3, 4}
    assert all(row["simulated"] is True and row["cohort_fingerprint"] for row in rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "SIMULATED SIGNALS" in page and page.count("<svg") >= 4 and "http-equiv" not in page
    assert "src=" not in page and 'href="http' not in page, "the page must be self-contained"
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def refuse(job: PretrainJob) -> object:
    raise AssertionError(f"{job.out} is pretrained already")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(item.relative_to(folder)): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


def list_steps(run: Path) -> dict[str, float]:
    return {record.identity: record.created for record in StepStore(open_location(run.parent / "steps")).list_steps()}


def make_study(cohort: Cohort, out: Path) -> dict[str, object]:
    preset = find_preset("tiny")
    job = PretrainJob(
        cohort=str(cohort.location),
        out=str(out),
        model=replace(preset.model, modalities=tuple(cohort.modalities)),
        train=replace(preset.train, passes=2),
        keep_passes=(0, 1, 2),
        threads=1,
    )
    run_study(job, run_pretraining=pretrain, probe=QUICK)
    first, made = read_files(out), list_steps(out)
    write_report(run_study(job, run_pretraining=refuse, probe=QUICK))
    again = read_files(out)
    assert {name: again[name] for name in first} == first, "asked again, a study gives what it gave"
    assert list_steps(out) == made, "and computes nothing anew"
    return {"verdict": json.loads((out / "verdict.json").read_text()), "page": (out / "report.html").read_text()}


def test_a_cohort_of_seven_records_with_airflow_goes_through(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "c", [30] * 7, modalities=("eeg", "airflow"), absent={"airflow": 0.3})
    found = make_study(cohort, tmp_path / "run")
    assert any("clears chance" in sentence for sentence in found["verdict"])  # type: ignore[attr-defined]


def test_a_cohort_with_one_labelled_subject_is_pretrained_and_says_why_no_probe_is_fitted(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "c", [30, 30], modalities=("eeg",), splits=["train", "pretrain"])
    found = make_study(cohort, tmp_path / "run")
    assert "at least 2 subjects" in found["verdict"][0]  # type: ignore[index]


def test_large_cohorts_hold_test_subjects_out_and_small_ones_are_cross_validated(tmp_path: Path) -> None:
    splits = (["pretrain"] + ["train"] * 3 + ["validation"] + ["test"] * 2) * 16
    large = write_cohort(tmp_path / "large", [1] * 112, modalities=("spo2",), splits=splits)  # type: ignore[arg-type]
    protocol = choose_protocol(large, ProbeConfig(cross_validate_below=90))
    assert protocol.folds is None and protocol.splits == ("pretrain", "train") and len(protocol.labelled) == 96
    small = choose_protocol(large, ProbeConfig(cross_validate_below=97))
    assert small.folds is not None and "validation" not in small.splits and "test" in small.splits
    for seed, folds in small.folds.items():
        tested = [name for fold in folds for name in fold.test]
        assert sorted(tested) == sorted(small.labelled), seed
        assert all(not set(f.test) & (set(f.train) | set(f.validation)) for f in folds)


def test_held_out_test_subjects_are_scored_once(tmp_path: Path) -> None:
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 3
    cohort = write_cohort(tmp_path / "c", [20] * 11, modalities=("eeg",), splits=splits)  # type: ignore[arg-type]
    preset = find_preset("tiny")
    job = PretrainJob(
        cohort=str(cohort.location),
        out=str(tmp_path / "run"),
        model=replace(preset.model, modalities=("eeg",)),
        train=replace(preset.train, passes=1),
        keep_passes=(0, 1),
        threads=1,
    )
    run_study(job, run_pretraining=pretrain, probe=replace(QUICK, cross_validate_below=5))
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["task"] == "sleep" and row["value"] is not None]
    assert scored and all(row["split"] == "test" and row["subjects"] == 3 for row in scored)

"""`physioray evaluate` as a user types it: scores of a checkpoint, asked for again, and everything it refuses."""

from __future__ import annotations

import importlib
import io
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from physioray.cli import main
from physioray.config import ProbeConfig
from physioray.results import RESULTS_FILE, read_results, read_subject_scores
from physioray.steps import StepStore
from physioray.storage import open_location
from tests.trained_runs import write_trained_run
from tests.written_cohorts import write_cohort

QUICK = {"recipe_passes": 1, "recipe_min_steps": 20, "bootstrap_draws": 20, "folds": 2, "penalties": (1e-2, 1.0)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, its cohort and another one."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_trained_run(folder, complete=False)
    write_cohort(folder / "other", [24] * 8, seed=1)
    write_cohort(folder / "eeg", [24] * 8, modalities=("eeg",), seed=2)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that are fitted in a moment."""
    importlib.import_module("physioray.checkpoint_scores")  # before, as its annotations name the class
    monkeypatch.setattr("physioray.config.ProbeConfig", partial(ProbeConfig, **QUICK))


def evaluate(places: Path, out: Path, *more: str, run: str = "run", cohort: str = "cohort") -> int:
    steps = ("--steps", str(places / "steps"))
    return main(["evaluate", str(places / run), str(places / cohort), "--out", str(out), "--seeds", "1", *steps, *more])


def list_steps(places: Path) -> dict[str, float]:
    return {record.identity: record.created for record in StepStore(open_location(places / "steps")).list_steps()}


def test_a_checkpoint_is_scored_beside_its_floors_and_asking_again_computes_nothing(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    assert evaluate(places, out) == 0
    rows = read_results(open_location(out) / RESULTS_FILE)
    assert {row.features for row in rows} == {"pretrained", "untrained", "band_powers"}
    assert {row.evaluation for row in rows} == {"probe_converged", "probe_recipe"}
    sizes = {row.training_subjects for row in rows if row.task == "sleep"}
    people = read_subject_scores(open_location(out) / "subject_scores.parquet")
    assert set(people.column("training_subjects").to_pylist()) == sizes
    assert {"windows", "sleep_windows"} == set(people.column("scope").to_pylist())
    assert "SIMULATED" in capsys.readouterr().out
    made = list_steps(places)
    assert evaluate(places, tmp_path / "again") == 0
    assert list_steps(places) == made
    assert read_results(open_location(tmp_path / "again") / RESULTS_FILE) == rows


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cohort": "other"}, "must have been pretrained on the cohort it is evaluated on"),
        ({"cohort": "eeg", "more": ("--other-cohort",)}, "lacks eog, emg, ecg and has eeg"),
        ({"run": "cohort"}, "A run's folder must hold checkpoints/last.pt"),
        ({"run": "nothing"}, "A checkpoint must stand at"),
        ({"more": ("--tasks", "sleep,mood")}, "mood"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line_and_nothing_is_written(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, told: str
) -> None:
    assert evaluate(places, tmp_path / "scores", *options.pop("more", ()), **options) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (tmp_path / "scores").exists()


def test_a_folder_that_holds_something_else_is_not_overwritten(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places / "run", tmp_path / "run")
    before = {item: item.read_bytes() for item in (tmp_path / "run").rglob("*") if item.is_file()}
    assert evaluate(places, tmp_path / "run", run=str(tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "must be of one checkpoint and one cohort" in error and "holds a run" in error
    assert {item: item.read_bytes() for item in (tmp_path / "run").rglob("*") if item.is_file()} == before


def test_embeddings_that_are_not_numbers_skip_every_task_with_the_reason(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places / "run", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "last.pt"
    content = torch.load(place, weights_only=True)
    name = next(name for name in content["model"] if name.startswith("encoder") and name.endswith("norm.weight"))
    content["model"][name].fill_(float("nan"))
    sink = io.BytesIO()
    torch.save(content, sink)
    place.write_bytes(sink.getvalue())
    assert evaluate(places, tmp_path / "scores", run=str(tmp_path / "run")) == 0
    rows = read_results(open_location(tmp_path / "scores") / RESULTS_FILE)
    broken = [row for row in rows if row.features == "pretrained"]
    assert broken and all(row.value is None and "finite" in row.note for row in broken)
    assert any(row.value is not None for row in rows if row.features == "untrained"), "the floors are scored"
    assert "finite" in capsys.readouterr().out


def test_a_step_damaged_by_hand_is_named_and_neither_it_nor_earlier_scores_are_overwritten(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places / "cohort", tmp_path / "cohort")
    shutil.copytree(places / "run", tmp_path / "run")
    out = tmp_path / "scores"
    task = ("--tasks", "sleep")
    assert evaluate(tmp_path, out, *task) == 0
    before = (out / RESULTS_FILE).read_bytes()
    victim = next((tmp_path / "steps" / "probe").glob("*/attempt-*/results.jsonl"))
    victim.write_text(victim.read_text().replace("sleep", "sheep"))
    damaged = victim.read_bytes()
    capsys.readouterr()
    assert evaluate(tmp_path, out, *task) == 1
    error = capsys.readouterr().err
    assert "has other content" in error and str(victim) in error and "delete the folder" in error
    assert victim.read_bytes() == damaged and (out / RESULTS_FILE).read_bytes() == before
    assert main(["steps", str(tmp_path / "steps"), "--verify"]) == 1
    assert "damaged" in capsys.readouterr().out
    shutil.rmtree(victim.parent.parent)
    assert evaluate(tmp_path, out, *task) == 0
    assert (out / RESULTS_FILE).read_bytes() == before

"""The command of the paper's tables with everything in a bucket, through a real S3 API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from experiments import tables
from physioray.cli import guard
from physioray.config import ProbeConfig
from physioray.grid import Grid
from physioray.grid_plan import GRIDS, GridConfig
from physioray.grid_report import claim_folder
from physioray.results import read_results
from physioray.step_listing import verify_steps
from physioray.steps import StepStore
from physioray.storage import Location, open_location
from tests.buckets import serve_bucket
from tests.written_cohorts import write_cohort

CONFIG = GridConfig(
    name="smoke",
    sizes="tiny",
    pretrained=("mae_eeg",),
    finetuned=("mae_eeg",),
    passes=1,
    finetune_passes=1,
    probe=ProbeConfig(tasks=("sleep",), seeds=(0,), folds=2, bootstrap_draws=20, recipe_passes=2, recipe_min_steps=20),
    finetune_seeds=1,
    sizes_asked=1,
)


@pytest.fixture()
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    """A bucket with a cohort in it, as a user without a folder of his own sees it."""
    write_cohort(tmp_path / "cohort", [12] * 6, modalities=("eeg",))
    monkeypatch.setenv("PHYSIORAY_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = f"nights-{abs(hash(tmp_path))}"  # the server keeps its buckets from test to test
    with serve_bucket(name) as environment:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        place = open_location(f"s3://{name}/mine")
        pafs.copy_files(str(tmp_path / "cohort"), f"{place.path}/cohort", destination_filesystem=place.filesystem)
        yield place
    assert not list((tmp_path / "here").iterdir()), "a URI was taken for a path"


def command(root: Location) -> list[str]:
    places = ["--cohort", f"{root}/cohort", "--out", f"{root}/tables"]
    return ["tables.py", *places, "--preset", "smoke", "--in-process"]


def test_the_tables_of_a_cohort_in_a_bucket_are_those_of_a_folder(
    bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GRIDS, "smoke", CONFIG)  # type: ignore[arg-type]
    scores = []
    for root in (bucket, open_location(tmp_path)):
        monkeypatch.setattr(sys, "argv", command(root))
        tables.main()
        assert "6 pieces of work are missing" in capsys.readouterr().err
        scores.append(read_results(root / "tables" / "results.jsonl"))
        for name in ("tables.html", "tables.md", "scores.csv", "predictions.parquet"):
            assert (root / "tables" / name).exists()
    assert [row for row in scores[0] if row.value is None and row.task == "sleep" and not row.note] == []
    assert scores[0] == scores[1]
    store = StepStore(bucket / "steps")
    before = {record.identity: (record.state, record.created, record.referred) for record in store.list_steps()}
    assert {(state, referred) for state, _, referred in before.values()} == {("done", True)}
    assert verify_steps(store) == []
    monkeypatch.setattr(sys, "argv", command(bucket))
    capsys.readouterr()
    tables.main()
    assert "0 pieces of work are missing" in capsys.readouterr().err
    assert before == {record.identity: (record.state, record.created, record.referred) for record in store.list_steps()}


def test_tables_of_another_cohort_or_an_unknown_task_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_cohort(tmp_path / "cohort", [12] * 6, modalities=("eeg",))
    grid = Grid(cohort=str(first.location), store=str(tmp_path / "steps"), config=CONFIG)
    claim_folder(grid, open_location(tmp_path / "tables"))
    claim_folder(grid, open_location(tmp_path / "tables"))
    write_cohort(tmp_path / "other" / "cohort", [12] * 6, modalities=("eeg",), seed=1)
    places = ["--cohort", str(tmp_path / "other" / "cohort"), "--out", str(tmp_path / "tables")]
    monkeypatch.setattr(sys, "argv", ["tables.py", *places, "--preset", "smoke"])
    assert guard(tables.main) == 1
    assert "must be of one cohort and preset" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command(open_location(tmp_path)), "--tasks", "mood"])
    assert guard(tables.main) == 1
    assert "mood" in capsys.readouterr().err
    assert not (tmp_path / "steps").exists()


def test_a_step_half_written_in_a_bucket_is_missing_and_one_damaged_there_is_named(
    bucket: Location,
) -> None:
    grid = Grid(cohort=f"{bucket}/cohort", store=f"{bucket}/steps", config=CONFIG)
    work = [item for item in grid.list_work() if item.strategy == "band_powers"]
    grid.do(work[0])
    assert work[0] not in grid.list_missing()
    store = grid.open_store()
    probe = next(record for record in store.list_steps() if record.name == "probe")
    done = (probe.folder / "done.json").read_bytes()
    (probe.folder / "done.json").delete()
    assert work[0] in grid.list_missing(), "without done.json nothing counts as finished"
    (probe.folder / "done.json").write_bytes(done)
    assert work[0] not in grid.list_missing()
    results = next(item for item in probe.folder.list(recursive=True) if item.name == "results.jsonl")
    results.write_text(results.read_text()[:-40])
    assert work[0] in grid.list_missing()
    with pytest.raises(OSError, match="must hold the files it was finished with"):
        grid.do(work[0])

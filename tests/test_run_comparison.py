"""Runs side by side: which compare, which do not and why, and that the difference is the paired one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from physioray.cli import main
from physioray.compare import compare_paired
from physioray.results import read_predictions, read_results, write_predictions, write_results
from physioray.run_comparison import compare_runs, describe_comparison, name_runs, open_run
from physioray.storage import Location, StorageError, open_location
from tests.written_runs import make_predictions, make_rows

WINDOWS = 60


def write_run(folder: Path, *, right: float = 0.0, **changes) -> Location:
    """Scores and predictions of one run; `right` of its wrong windows are made right."""
    place = open_location(str(folder))
    table = make_predictions(WINDOWS)
    floor = table.filter(pc.field("features") == "untrained")
    floor = floor.set_column(floor.schema.names.index("features"), "features", pa.array(["band_powers"] * len(floor)))
    mended = table.column("predicted").to_numpy().copy()
    better = (np.arange(len(mended)) % 100 < 100 * right) & (table.column("features").to_numpy() == "pretrained")
    mended[better] = table.column("true").to_numpy()[better]
    table = table.set_column(table.schema.names.index("predicted"), "predicted", pa.array(mended, pa.int8()))
    rows = [replace(row, **changes) for row in make_rows(tasks=("sleep",), split="test", seeds=(0,))]
    write_results(place / "results.jsonl", rows)
    write_predictions(place / "predictions.parquet", [table, floor])
    (place / "config.json").write_json({"model": {"kind": "fused", "modalities": ["eeg", "ecg"]}})
    return place


def open_runs(*places: Location):
    return [open_run(place.path, name) for place, name in zip(places, "abcdef", strict=False)]


def test_the_difference_is_that_of_the_paired_test_on_the_first_run(tmp_path: Path) -> None:
    places = [write_run(tmp_path / name, right=right) for name, right in (("a", 0.0), ("b", 0.9), ("c", 0.0))]
    found = compare_runs(open_runs(*places), draws=200)
    assert found.names == ["a", "b", "c"] and not found.refusals and found.simulated
    better, same = found.differences
    tables = [
        read_predictions(place / "predictions.parquet").filter(pc.field("features") == "pretrained")
        for place in places[1::-1]
    ]
    expected = compare_paired(*tables, "sleep", draws=200)
    assert (better.first, better.second) == ("b", "a") and better.is_above
    assert (better.value, better.low, better.high) == (expected.value, expected.low, expected.high)
    assert same.value == 0 and same.low == same.high == 0 and not same.is_above and not same.is_below
    text = describe_comparison(found)
    assert text.startswith("SIMULATED SIGNALS") and "above" in text and "cannot be told from 0" in text
    assert any("3 people the intervals are too narrow" in note for note in found.notes)
    # What is written as +0.000 is not called above zero.
    assert not replace(better, low=0.0004).is_above and replace(better, low=0.0006).is_above
    assert not replace(better, high=-0.0004).is_below and replace(better, high=-0.0006).is_below


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cohort_fingerprint": "e" * 20}, "it was scored on another cohort (eeeeeeeeeeee and not ffffffffffff)"),
        ({"training_subjects": 12}, "their folds differ, heads were trained on 12 and 30 people"),
    ],
)
def test_runs_of_another_cohort_or_other_folds_are_refused_with_the_reason(
    tmp_path: Path, changes: dict, words: str
) -> None:
    found = compare_runs(open_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", **changes)))
    assert not found.differences and words in found.refusals[0]


def change_predictions(place: Location, change) -> None:
    write_predictions(place / "predictions.parquet", [change(read_predictions(place / "predictions.parquet"))])


def test_folds_that_only_the_predictions_betray_are_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")

    def turn(table: pa.Table) -> pa.Table:
        predicted = table.column("predicted").to_numpy().copy()
        floor = np.flatnonzero(table.column("features").to_numpy() == "band_powers")
        predicted[floor[:20]] = (predicted[floor[:20]] + 1) % 5
        return table.set_column(table.schema.names.index("predicted"), "predicted", pa.array(predicted, pa.int8()))

    change_predictions(second, turn)
    found = compare_runs(open_runs(first, second))
    assert not found.differences and "the same band powers predict otherwise on 11% of windows" in found.refusals[0]
    # Of other modalities band powers are others, and say nothing about folds.
    (second / "config.json").write_json({"model": {"kind": "late_fusion", "model": {"modalities": ["eeg"]}}})
    assert len(compare_runs(open_runs(first, second)).differences) == 1


def test_other_protocols_seeds_and_labels_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    constants = {"split": (pa.array(["cross_validation"]), "scored by cross validation, the other by test")}
    constants["seed"] = (pa.array([7]), "they share no seed")
    for number, (column, (value, words)) in enumerate(constants.items()):
        other = write_run(tmp_path / f"b{number}")

        def fill(table: pa.Table, column: str = column, value: pa.Array = value) -> pa.Table:
            filled = pa.array([value[0].as_py()] * len(table), table.schema.field(column).type)
            return table.set_column(table.schema.names.index(column), column, filled)

        change_predictions(other, fill)
        assert words in compare_runs(open_runs(first, other)).refusals[0]
    other = write_run(tmp_path / "labels")

    def relabel(table: pa.Table) -> pa.Table:
        shifted = pa.array((table.column("true").to_numpy() + 1) % 5, pa.int8())
        return table.set_column(table.schema.names.index("true"), "true", shifted)

    change_predictions(other, relabel)
    assert "they differ in true" in compare_runs(open_runs(first, other)).refusals[0]


def test_windows_that_one_run_could_not_score_are_left_out_and_said(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change_predictions(second, lambda table: table.filter(pc.field("window_id") >= 10))
    found = compare_runs(open_runs(first, second))
    assert found.differences[0].windows == 3 * WINDOWS - 10
    assert any("10 predictions of one alone are left out" in note for note in found.notes)
    change_predictions(second, lambda table: table.filter(pc.field("window_id") >= 100))
    assert "they share only 80 of 180" in compare_runs(open_runs(first, second)).refusals[0]


def test_a_folder_of_several_strategies_is_refused_with_what_to_do(tmp_path: Path) -> None:
    place = write_run(tmp_path / "tables")
    rows = read_results(place / "results.jsonl")
    theirs = [replace(row, pretraining="simclr") for row in rows if row.features == "pretrained"]
    write_results(place / "results.jsonl", [*rows, *theirs])
    with pytest.raises(
        StorageError, match=r"must hold one strategy, but .*tables holds \w+, simclr.*physioray evaluate"
    ):
        open_run(place.path, "tables")


def test_one_bad_pair_does_not_hide_the_good_one(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", cohort_fingerprint="e" * 20),
        write_run(tmp_path / "c"),
    ]
    found = compare_runs(open_runs(*runs))
    assert len(found.refusals) == 1 and [item.first for item in found.differences] == ["c"]


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert name_runs(["x/one/run", "x/two/run/", "y"]) == ["one/run", "two/run", "y"]
    for paths in (["a"], ["a", "a/"]):
        with pytest.raises(ValueError, match="two or more different runs"):
            name_runs(paths)


def test_the_verb_prints_draws_and_fails_where_nothing_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changes in (("a", {}), ("b", {}), ("c", {"cohort_fingerprint": "e" * 20})):
        write_run(tmp_path / name, **changes)
    paths = [str(tmp_path / name) for name in "abc"]
    assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "another cohort" in printed and "comparison.html" in printed
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<svg") == 1 and "SIMULATED SIGNALS" in page and "another cohort" in page
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [item["verdict"] for item in written["differences"]] == ["cannot be told from 0"]
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["compare", paths[0], paths[2]]) == 1
    assert main(["compare", paths[0], str(tmp_path)]) == 1
    assert "Evaluate it first" in capsys.readouterr().err
    assert len(read_results(open_location(paths[0]) / "results.jsonl")) > 0

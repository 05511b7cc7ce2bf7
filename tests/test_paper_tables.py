"""Filling the paper's tables: which scores go into which cell, and what an empty cell says."""

import dataclasses
import itertools

import pytest

from physioray.paper.levels import NO_LABELS, NOT_RUN, OTHER_SIZE, SKIPPED, UNDEFINED, ScoreBook, TablesError
from physioray.paper.reference import CHANCE, PROBE, read_paper
from physioray.paper.tables import FEW_SUBJECTS, TableContext, fill_tables
from tests.paper_rows import make_context, make_paper_rows, make_row, make_seeds


def fill(rows, **context):
    return {table.name: table for table in fill_tables(rows, read_paper(), make_context(**context))}


def find_row(table, title, evaluation="converged", group=""):
    return next(r for r in table.rows if r.title == title and evaluation in r.evaluation and group in r.group)


@pytest.fixture(scope="module")
def exact():
    return fill(make_paper_rows())


def test_the_papers_own_numbers_fill_every_cell_and_differ_from_the_paper_by_nothing(exact):
    filled = 0
    for number in range(1, 8):
        for row in exact[f"Table {number}"].rows:
            for cell in row.cells:
                if cell.paper.value is not None and row.group != "Random":
                    assert cell.difference == pytest.approx(0, abs=1e-9)
                    # Table 2's aggregate of All has another spread than Table 1's; Tables 5 to 7 print fewer digits.
                    assert cell.ours.spread == pytest.approx(cell.paper.spread, abs=0.0331)
                    filled += 1
    assert filled == 2 * (5 * 4 + 5 * 7 + 5 * 4 + 4 * 3 + 5 * 3 * 2) + 5 * 4 + 5 * 4


def test_rows_stand_in_the_papers_order_with_the_headline_probe_first(exact):
    for table in read_paper().tables:
        expected = []
        for row in table.rows:
            titles = [(row.group, row.title)] * (2 if row.evaluation == PROBE else 1)
            expected += titles
        rows = exact[f"Table {table.number}"].rows
        assert [(row.group, row.title) for row in rows] == expected
        for first, second in itertools.pairwise(rows):
            if (first.group, first.title) == (second.group, second.title):
                assert "headline" in first.evaluation and first.headline
                assert "recipe" in second.evaluation and not second.headline


def test_f1_has_the_weighted_mean_beside_the_papers_and_the_macro_mean_beside_nothing(exact):
    for number in (5, 6, 7):
        table = exact[f"Table {number}"]
        assert [column.subtitle for column in table.columns][2:] == ["F1 (weighted)", "F1 (macro)"]
        assert all(row.cells[3].paper.value is None for row in table.rows)


def test_a_table_of_500_shows_the_largest_training_set_and_one_of_25_the_smallest():
    rows = [make_row(training_subjects=size, value=0.4 + size / 1000) for size in (10, 40, 160)]
    tables = fill(rows)
    large, small = (find_row(tables[name], "All", group="Pretrained").cells[0] for name in ("Table 1", "Table 3"))
    assert (large.ours.value, small.ours.value) == pytest.approx((0.56, 0.41))
    assert "500 in the paper; here Sleep stage 160 (the largest there is)" in tables["Table 1"].sizes
    assert "25 in the paper; here Sleep stage 10 (the smallest there is)" in tables["Table 3"].sizes


def test_folds_that_differ_by_a_subject_are_one_size_and_two_sizes_of_one_seed_are_not():
    jittered = [make_row(split="cross_validation", seed=seed, training_subjects=21 + seed % 2) for seed in range(4)]
    cell = find_row(fill(jittered)["Table 1"], "All", group="Pretrained").cells[0]
    assert cell.ours.seeds == 4
    both = [make_row(split="cross_validation", training_subjects=size, value=size / 10) for size in (2, 3)]
    tables = fill(both)
    assert find_row(tables["Table 1"], "All", group="Pretrained").cells[0].ours.value == pytest.approx(0.3)
    assert find_row(tables["Table 3"], "All", group="Pretrained").cells[0].ours.value == pytest.approx(0.2)


def test_an_empty_cell_says_why():
    skip = {"value": None, "low": None, "high": None, "training_subjects": 0}
    rows = [
        *make_seeds(0.7, 0.01),
        make_row(metric="auroc", value=None, note="needs every class in the truth, but has no window of N3"),
        make_row(task="age", **skip, note="skipped: no window has a label"),
        make_row(task="arousal", **skip, note="skipped: all 900 labelled windows are of one class, none"),
        make_row(pretraining="mae_eeg", training_subjects=50),
    ]
    tables = fill(rows)
    sleep, age, arousal, aggregate = find_row(tables["Table 1"], "All", group="Pretrained").cells
    assert (sleep.status, age.status, arousal.status, aggregate.status) == ("", NO_LABELS, SKIPPED, NOT_RUN)
    assert "one class" in arousal.note
    eeg = find_row(tables["Table 1"], "EEG", group="Pretrained").cells
    assert eeg[0].status == OTHER_SIZE and "500" in eeg[0].note and "only with 50" in eeg[0].note
    # A task without labels is so for the strategies that were not run, too.
    assert find_row(tables["Table 1"], "ECG", group="Pretrained").cells[1].status == NO_LABELS
    assert ScoreBook(rows).find("multimae_drop", "probe_converged", "sleep", "auroc").status == UNDEFINED


def test_a_cohort_smaller_than_every_size_asked_for_says_so():
    cell = find_row(fill([], labelled=12, sizes=(25, 500))["Table 1"], "All", group="Pretrained").cells[0]
    assert cell.status == FEW_SUBJECTS and "12" in cell.note and "25" in cell.note
    assert find_row(fill([], labelled=0)["Table 1"], "All", group="Pretrained").cells[0].status == NO_LABELS


def test_an_aggregate_over_fewer_tasks_has_no_difference_and_says_over_which():
    rows = [*make_seeds(0.7, 0.01), *make_seeds(2.5, 0.05, task="aggregate", metric="aggregate")]
    cell = find_row(fill(rows)["Table 1"], "All", group="Pretrained").cells[3]
    assert cell.ours.value == pytest.approx(2.5) and cell.difference is None
    assert cell.note == "over sleep only"


def test_an_aggregate_of_one_task_gives_way_to_one_of_all_and_never_passes_for_it():
    scored = [make_row(task=task) for task in ("sleep", "age", "arousal")]
    aggregate = {"task": "aggregate", "metric": "aggregate", "low": None, "high": None}
    one = make_row(**aggregate, value=0.1, note="over age only")
    whole = make_row(**aggregate, value=1.1)
    cell = find_row(fill([*scored, one])["Table 1"], "All", group="Pretrained").cells[3]
    assert (cell.ours.value, cell.difference, cell.note) == (0.1, None, "over age only")
    cell = find_row(fill([*scored, one, whole])["Table 1"], "All", group="Pretrained").cells[3]
    assert (cell.ours.value, cell.note) == (1.1, "") and cell.difference == pytest.approx(1.1 - 1.144)


def test_other_modalities_strategies_and_floors_come_after_the_papers_rows_without_its_numbers():
    rows = [
        make_row(),
        make_row(pretraining="mae_airflow"),
        make_row(pretraining="scratch_spo2", evaluation="scratch", features="untrained"),
        make_row(pretraining="my_own_idea"),
        make_row(pretraining="none", features="untrained"),
        make_row(pretraining="none", features="band_powers"),
        make_row(pretraining="my_own_idea", evaluation="finetune"),
    ]
    tables = fill(rows)

    def list_further(name):
        return [(r.group, r.title) for r in tables[name].rows if not r.published and r.headline]

    floors = [("Floors", "Untrained encoder"), ("Floors", "Band powers")]
    assert list_further("Table 1") == [("Scratch", "SPO2"), ("Not in the paper", "AIRFLOW"), *floors]
    assert list_further("Table 2") == [("Not in the paper", "my_own_idea"), *floors]
    assert list_further("Table 4") == [("Not in the paper", "my_own_idea")]
    assert all(cell.paper.value is None for r in tables["Table 1"].rows if not r.published for cell in r.cells)
    published = [r.published for r in tables["Table 1"].rows]
    assert published == sorted(published, reverse=True)


def test_scores_by_patient_and_on_sleep_windows_stay_out_of_the_papers_cells():
    rows = [
        make_row(task="age", value=0.6),
        make_row(task="age", value=0.9, scope="patients"),
        make_row(task="arousal", value=0.55),
        make_row(task="arousal", value=0.52, scope="sleep_windows"),
    ]
    tables = fill(rows)
    cells = find_row(tables["Table 1"], "All", group="Pretrained").cells
    assert (cells[1].ours.value, cells[2].ours.value) == (0.6, 0.55)
    further = tables["Further scores"]
    found = {
        (column.title, column.subtitle): cell.ours.value
        for column, cell in zip(further.columns, further.rows[0].cells, strict=True)
    }
    assert found["Age", "Balanced accuracy, by patient vote"] == 0.9
    assert found["Arousal", "Balanced accuracy, windows of sleep"] == 0.52
    assert found["Age", "Balanced accuracy, all windows"] == 0.6


def test_scores_on_validation_subjects_never_enter_a_table():
    rows = [make_row(split="validation", value=0.99), make_row(split="validation_cross_validation", value=0.98)]
    assert find_row(fill(rows)["Table 1"], "All", group="Pretrained").cells[0].status == NOT_RUN


def test_held_out_scores_are_not_mixed_with_cross_validation():
    rows = [make_row(value=0.7), make_row(value=0.9, split="cross_validation", seed=1)]
    cell = find_row(fill(rows)["Table 1"], "All", group="Pretrained").cells[0]
    assert (cell.ours.value, cell.ours.seeds) == (0.7, 1)


def test_the_same_floor_in_many_files_counts_once_and_other_settings_are_spoken_of():
    floor = make_seeds(0.6, 0.01, pretraining="none", features="untrained")
    other = [dataclasses.replace(row, config_hash="def", value=0.1) for row in make_seeds(0.7, 0.01)[:2]]
    tables = fill([*floor, *floor, *make_seeds(0.7, 0.01), *other])
    assert find_row(tables["Table 1"], "Untrained encoder").cells[0].ours.seeds == 5
    cell = find_row(tables["Table 1"], "All", group="Pretrained").cells[0]
    assert cell.ours.value == pytest.approx(0.7) and "1 further settings" in cell.note


def test_scores_of_two_cohorts_are_refused():
    with pytest.raises(TablesError, match="of one cohort"):
        fill([make_row(), make_row(cohort_fingerprint="g" * 20)])


def test_the_heading_says_whose_scores_these_are():
    rows = [make_row(simulated=True)]
    tables = fill(rows, simulated=False, preset="smoke", assumptions={"TrainConfig.betas": "(0.9, 0.95)"})
    heading = " ".join(tables["Table 1"].heading)
    for words in ("SIMULATED SIGNALS", "sleep house", "1,000 subjects, 900", "219 held-out", "SMOKE", "1 assumption"):
        assert words in heading
    assert all(table.simulated for table in tables.values())
    for table in tables.values():
        for row in table.rows:
            assert all(cell.smoke == (cell.ours.value is not None) for cell in row.cells) or row.group == "Random"
    assert "SIMULATED" not in " ".join(fill([make_row()])["Table 1"].heading)


def test_guesses_stand_in_the_row_of_guesses(exact):
    table = read_paper().find_table(1)
    assert table.rows[0].evaluation == CHANCE
    assert [cell.ours.value for cell in exact["Table 1"].rows[0].cells] == [0.2, 0.5, 0.5, 0.0]


def test_a_context_with_more_labelled_subjects_than_subjects_is_refused():
    with pytest.raises(ValueError, match="labelled"):
        TableContext(cohort="x", simulated=False, subjects=3, labelled=4)

"""The paper's numbers: whole, consistent among themselves, and named as in result files."""

import subprocess
import sys

import numpy as np
import pytest

from physioray.metrics import AGGREGATE, METRICS, aggregate_score
from physioray.paper.reference import CHANCE, PaperColumn, read_paper
from physioray.score_tables import PAPER_SCORES
from physioray.signals import TASKS, LookupMiss
from physioray.strategies import STRATEGIES

ROWS = [(table, row) for table in read_paper().tables for row in table.rows]


def list_values(table, row):
    return {(c.task, c.metric): cell for c, cell in zip(table.columns, row.cells, strict=True)}


def test_tables_1_to_7_are_there_in_order_with_their_source():
    paper = read_paper()
    assert [table.number for table in paper.tables] == [1, 2, 3, 4, 5, 6, 7]
    assert paper.citation == "Fang et al. 2024, arXiv 2410.16424"
    assert [len(table.rows) for table in paper.tables] == [11, 5, 6, 6, 5, 5, 5]
    assert [len(table.columns) for table in paper.tables] == [4, 7, 4, 4, 3, 3, 3]
    assert [table.training_subjects for table in paper.tables] == [500, 500, 25, 500, 500, 500, 500]


def test_every_printed_aggregate_is_the_mean_gain_over_chance_of_its_row():
    checked = 0
    for table, row in ROWS:
        cells = list_values(table, row)
        if (AGGREGATE, AGGREGATE) in cells:
            scores = {task: cells[task, METRICS[0]].value for task in TASKS}
            assert aggregate_score(scores) == pytest.approx(cells[AGGREGATE, AGGREGATE].value, abs=0.0011), row.title
            checked += 1
    assert checked == 28


def test_table_2_spreads_of_the_aggregate_are_means_of_spread_over_chance_and_table_1s_is_not():
    paper = read_paper()
    for row in paper.find_table(2).rows:
        cells = list_values(paper.find_table(2), row)
        expected = np.mean([cells[task, METRICS[0]].spread / TASKS[task].chance for task in TASKS])
        assert cells[AGGREGATE, AGGREGATE].spread == pytest.approx(expected, abs=0.0015)
    assert (
        dict(paper.find_table(1).list_cells("multimae_drop", "probe"))[
            PaperColumn(task=AGGREGATE, metric=AGGREGATE)
        ].spread
        == 0.09
    )


def test_a_score_printed_in_two_tables_is_the_same_in_both():
    printed = {}
    for table, row in ROWS:
        for (task, metric), cell in list_values(table, row).items():
            if cell.value is not None:
                key = (row.pretraining, row.evaluation, task, metric, table.training_subjects)
                assert printed.setdefault(key, cell.value) == cell.value


def test_rows_and_columns_are_named_as_in_result_files():
    for table, row in ROWS:
        assert row.pretraining in STRATEGIES or row.evaluation == CHANCE
        for column in table.columns:
            assert (column.task in TASKS and column.metric in METRICS) or column.task == column.metric == AGGREGATE


def test_the_row_that_table_5_lacks_says_why():
    row = next(row for row in read_paper().find_table(5).rows if row.pretraining == "multimae")
    assert all(cell.value is None for cell in row.cells) and "Table 2" in row.absent
    assert all(cell.value is not None for table, other in ROWS if other != row for cell in other.cells)


def test_the_asterisks_stand_at_the_best_single_modality_of_each_task():
    table = read_paper().find_table(1)
    for place, column in enumerate(table.columns[:3]):
        alone = [row for row in table.rows if row.pretraining.startswith("mae_")]
        best = max(alone, key=lambda row: row.cells[place].value)
        assert [row.title for row in table.rows if row.cells[place].starred] == [best.title], column


def test_a_table_that_does_not_exist_lists_those_that_do():
    with pytest.raises(LookupMiss, match="1, 2, 3, 4, 5, 6, 7, but got 8"):
        read_paper().find_table(8)


def test_the_reports_line_for_orientation_is_read_from_the_same_file():
    assert PAPER_SCORES == {
        "sleep": (0.744, 0.001),
        "age": (0.719, 0.002),
        "arousal": (0.637, 0.081),
        "aggregate": (1.144, 0.09),
    }


def test_tables_and_claims_load_no_model():
    code = "import sys, physioray.paper.pages; assert not {'torch', 'ray'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

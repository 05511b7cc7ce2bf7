import dataclasses
import html.parser
import re

import numpy as np
import pytest

from physioray.figures import find_runs, plot_hypnogram
from physioray.metrics import METRICS
from physioray.report import describe_results, write_report
from physioray.results import write_results
from physioray.score_tables import (
    group_sizes,
    list_skipped,
    list_tasks,
    tabulate_headline,
    tabulate_metric,
    tabulate_sizes,
)
from physioray.storage import open_location
from tests.written_runs import make_rows, write_run

FILES = (
    "card.json",
    "config.json",
    "results.jsonl",
    "training.jsonl",
    "probe_curve.jsonl",
    "predictions.parquet",
    "reconstructions.npz",
    "verdict.json",
)


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order and gathers the text of headings, cells and the whole page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.rows, self.text, self.ids, self.links = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if any(tag in self.open for tag in ("h1", "h2", "h3")):
            self.headings[-1] += data
        if any(tag in self.open for tag in ("th", "td")):
            self.rows[-1][-1] += data

    def row(self, title, second):
        found = [row for row in self.rows if row and title in row[0] and second in row[0]]
        return [re.sub(r"\s+", " ", cell).strip() for cell in found[0]]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = open_location(tmp_path_factory.mktemp("run"))
    write_run(run)
    place = write_report(run)
    return place.read_text(), Reader(place.read_text())


def test_the_page_stands_alone_and_is_well_formed(page):
    text, reader = page
    assert all(link.startswith("#") for link in reader.links)
    assert "url(http" not in text and "@import" not in text and "<script" not in text
    assert len(reader.ids) == len(set(reader.ids)), "two figures share an identifier"
    assert set(link[1:] for link in reader.links) <= set(reader.ids)
    assert len(text) < 3_000_000


def test_simulated_signals_stand_in_the_heading_and_real_ones_do_not(page, tmp_path):
    assert page[1].headings[0].startswith("SIMULATED SIGNALS")
    run = open_location(tmp_path / "real")
    write_run(run, simulated=False)
    assert "SIMULATED" not in write_report(run).read_text()


def test_the_verdict_comes_before_the_scores_and_a_skipped_task_says_why(page):
    text, _ = page
    verdict, skipped, scores = (
        text.index(part) for part in ("has not overtaken", "Arousal: skipped: no window", "<h2>Scores")
    )
    assert verdict < skipped < scores


def test_the_table_holds_mean_interval_and_spread_over_seeds(page):
    row = page[1].row("Pretrained encoder (mae_drop)", "converged")
    assert row[1] == "0.590 [0.530, 0.640] ±0.010"  # sleep: 0.58, 0.59, 0.60
    assert row[2] == "0.890 [0.830, 0.940] ±0.010"
    assert row[3] == "-"  # arousal
    assert row[4] == "1.010 ±0.010"
    assert page[1].row("Chance", "guess")[1:] == ["0.200", "0.500", "0.500", "0"]


def test_the_paper_stands_apart_as_other_data(page):
    row = page[1].row("For orientation only", "other data")
    assert row[1:] == ["0.744 ±0.001", "0.719 ±0.002", "0.637 ±0.081", "1.144 ±0.090"]


def test_floors_and_both_probes_are_rows_headline_first(page):
    rows = [row.title + ", " + row.subtitle for row in tabulate_headline(make_rows()).rows]
    assert rows == [
        "Pretrained encoder (mae_drop), converged probe",
        "Untrained encoder (none), converged probe".replace(" (none)", ""),
        "Band powers, converged probe",
        "Pretrained encoder (mae_drop), paper's recipe",
        "Untrained encoder, paper's recipe",
        "Band powers, paper's recipe",
    ]
    assert "All metrics" in page[1].headings


def test_a_metric_without_a_value_keeps_its_reason(page):
    cell = tabulate_metric(make_rows(), "sleep").rows[0].cells[METRICS.index("auroc")]
    assert cell.value is None and "N3" in cell.note
    assert 'title="needs every class in the truth' in page[0]


def test_a_score_whose_interval_holds_chance_is_marked():
    rows = [dataclasses.replace(row, low=0.19) if row.task == "sleep" else row for row in make_rows(tasks=("sleep",))]
    assert tabulate_headline(rows).rows[0].cells[0].above_chance is False
    assert tabulate_headline(make_rows()).rows[0].cells[0].above_chance is True
    # Of the aggregate, guessing gives zero.
    for low, above in ((-0.04, False), (0.04, True)):
        marked = [
            dataclasses.replace(row, low=low, high=0.5) if row.task == "aggregate" else row for row in make_rows()
        ]
        assert tabulate_headline(marked).rows[0].cells[-1].above_chance is above


def test_of_one_task_no_aggregate_is_shown():
    assert len(tabulate_headline(make_rows(tasks=("sleep",))).columns) == len(list_tasks(make_rows(tasks=("sleep",))))
    assert tabulate_headline(make_rows()).columns[-1] == "Aggregate"


def test_one_seed_has_no_spread():
    cell = tabulate_headline(make_rows(seeds=(0,))).rows[0].cells[0]
    assert cell.spread is None and cell.describe() == "0.580 [0.520, 0.630]"


def test_several_training_sizes_make_a_table_and_the_headline_keeps_the_largest(tmp_path):
    large = make_rows(split="test")
    small = [
        dataclasses.replace(row, training_subjects=10, value=row.value and row.value - 0.1)
        for row in large
        if row.task != "arousal"
    ]
    table = tabulate_sizes(large + small, "sleep")
    assert table.columns == ("10 subjects", "30 subjects")
    assert [round(cell.value, 3) for cell in table.rows[0].cells] == [0.49, 0.59]
    assert tabulate_headline(large + small).rows[0].cells[0].value == pytest.approx(0.59)
    assert tabulate_sizes(large, "sleep") is None
    run = open_location(tmp_path)
    write_results(run / "results.jsonl", large + small)
    assert "by number of training subjects" in write_report(run).read_text()


def test_folds_of_unequal_size_are_one_cell():
    rows = [dataclasses.replace(row, training_subjects=30 + row.seed) for row in make_rows()]
    assert tabulate_headline(rows).rows[0].cells[0].seeds == 3


def test_every_modality_has_its_curve_and_its_reconstruction_whatever_its_rate(page):
    text = page[0]
    for name in ("eeg", "eog", "emg", "airflow"):
        assert f"loss-{name}-" in text and f"reconstruction-{name}-" in text
    assert "1,500 steps" in text and "410 windows/s" in text and "3 % of the time" in text


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_leaves_a_line_and_no_crash(tmp_path, name):
    run = open_location(tmp_path)
    write_run(run)
    (run / name).delete()
    reader = Reader(write_report(run).read_text())
    assert any(f"{name} is not there" in part for part in reader.text)


def test_an_empty_folder_gives_a_page_of_what_is_missing(tmp_path):
    reader = Reader(write_report(open_location(tmp_path)).read_text())
    assert all(any(f"{name} is not there" in part for part in reader.text) for name in FILES)


def test_a_broken_file_is_named_and_the_rest_is_shown(tmp_path):
    run = open_location(tmp_path)
    write_run(run)
    for name in ("training.jsonl", "predictions.parquet", "reconstructions.npz", "results.jsonl"):
        (run / name).write_text("half a fi")
    text = "".join(Reader(write_report(run).read_text()).text)
    for name in ("training.jsonl", "predictions.parquet", "reconstructions.npz", "results.jsonl"):
        assert f"{name} cannot be read" in text
    assert "has not overtaken" in text


def test_a_hypnogram_is_not_drawn_across_jumps(tmp_path):
    run = open_location(tmp_path)
    write_run(run, jumps={f"tr{number:02d}": list(range(0, 480 * 30, 60)) for number in range(3)})
    text = write_report(run).read_text()
    assert "No hypnogram is drawn across jumps" in text and "Predicted stages" not in text


def test_the_hypnogram_is_that_of_the_pretrained_probe_on_a_typical_night(page):
    assert "median agreement of 3" in page[0] and "windows (pretrained)" in page[0]


def test_runs_break_at_gaps_and_at_jumps():
    start = np.array([0, 30, 60, 300, 330, 360, 390], float)
    assert [(run.start, run.stop) for run in find_runs(start, [360.0])] == [(0, 3), (3, 5), (5, 7)]
    # A jump inside a window that was therefore left out is a gap already.
    assert [(run.start, run.stop) for run in find_runs(start, [100.0])] == [(0, 3), (3, 7)]
    assert [(run.start, run.stop) for run in find_runs(start, [])] == [(0, 3), (3, 7)]


def test_the_hypnogram_has_the_order_of_the_sleep_laboratory():
    stages = np.arange(5)
    text = plot_hypnogram(np.arange(5) * 30.0, stages, stages, [slice(0, 5)])
    labels = re.findall(r">(W|REM|N1|N2|N3)<", text)
    heights = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>(?:W|REM|N1|N2|N3)<", text)]
    heights = heights or [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:W|REM|N1|N2|N3)<', text)]
    assert labels[:5] == ["W", "REM", "N1", "N2", "N3"] and heights[:5] == sorted(heights[:5])


def test_text_from_files_is_escaped(tmp_path):
    run = open_location(tmp_path)
    write_run(run)
    (run / "verdict.json").write_json(["<script>alert(1)</script> & more"])
    text = write_report(run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_same_run_gives_the_same_page(tmp_path):
    run = open_location(tmp_path)
    write_run(run)
    assert write_report(run).read_text() == write_report(run).read_text()


def test_the_terminal_table_says_simulated_and_holds_the_scores(tmp_path):
    run = open_location(tmp_path)
    write_run(run)
    text = describe_results(run)
    assert text.startswith("SIMULATED SIGNALS") and "0.590 [0.530," in text and "chance" in text
    assert "Arousal: skipped: no window has a label." in text
    assert max(len(line) for line in text.splitlines()) <= 118


def test_a_task_that_one_line_scores_is_not_called_skipped():
    assert list_skipped(make_rows()) == ["Arousal: skipped: no window has a label."]


def test_folds_of_nearly_one_size_are_one_training_set_size_and_two_of_one_seed_are_not() -> None:
    one = next(row for row in make_rows(tasks=("sleep",)) if row.metric == METRICS[0] and row.task == "sleep")
    sizes = {2: 0, 3: 0, 5: 0, 11: 0, 20: 0, 21: 1}
    rows = [dataclasses.replace(one, seed=seed, training_subjects=size) for size, seed in sizes.items()]
    assert group_sizes(rows) == ((2,), (3,), (5,), (11,), (20, 21))
    assert group_sizes([*rows, dataclasses.replace(rows[-1], seed=0)])[-2:] == ((20,), (21,))


def test_the_headline_shows_the_largest_training_set_in_cross_validation_too() -> None:
    rows = make_rows(tasks=("sleep",))
    one = next(row for row in rows if row.metric == METRICS[0] and row.task == "sleep")
    one = dataclasses.replace(one, value=0.6, seed=0, training_subjects=21)
    rows = [
        one,
        dataclasses.replace(one, seed=1, training_subjects=20),
        dataclasses.replace(one, value=0.3, training_subjects=5),
    ]
    cell = tabulate_metric(rows, "sleep").rows[0].cells[0]
    assert (cell.value, cell.seeds) == (0.6, 2)
    sizes = tabulate_sizes(rows, "sleep")
    assert sizes is not None
    assert sizes.columns == ("5 subjects", "21 subjects")


def test_confusion_matrices_of_the_headline_probe_stand_on_the_page(page):
    text, reader = page
    assert "What is taken for what" in reader.headings
    assert 'id="confusion-sleep-' in text and "Pretrained encoder, converged probe" in text

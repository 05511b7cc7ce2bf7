"""The filled tables as a reader sees them: terminal, page, Markdown, and the file of every score."""

import csv
import dataclasses
import io
import re

import pytest

from physioray.paper.claims import check_claims
from physioray.paper.pages import (
    describe_cell,
    render_html,
    render_markdown,
    render_terminal,
    write_scores_csv,
    write_tables,
)
from physioray.paper.reference import read_paper
from physioray.paper.statements import MINUS
from physioray.paper.tables import fill_tables
from physioray.results import ScoreRow
from physioray.storage import open_location
from tests.paper_rows import make_context, make_paper_rows, make_row, make_seeds
from tests.test_report import Reader

RENDERERS = (render_terminal, render_html, render_markdown)


def make_pages(rows, **changes):
    context = make_context(**changes)
    return fill_tables(rows, read_paper(), context), check_claims(rows), context


@pytest.fixture(scope="module")
def exact():
    return make_pages(make_paper_rows(), assumptions={"TrainConfig.betas": "(0.9, 0.95) (default: AdamW betas)"})


@pytest.mark.parametrize("render", RENDERERS)
def test_every_output_holds_every_table_every_claim_and_the_heading(exact, render):
    text = re.sub(r"[\s│]+", " ", re.sub(r"<[^>]+>", " ", render(*exact)))
    for number in range(1, 8):
        assert f"Table {number}." in text
    for words in (
        "sleep house",
        "1,000 subjects",
        "219 held-out",
        "TrainConfig.betas",
        "0123456789ab",
        "500 in the paper",
    ):
        assert words in text
    assert "paper 0.744 ±0.001" in text and "±0.0004" in text and "diff. +0.000" in text
    assert "cannot be told" in text and "not held" in text and "2410.16424" in text
    assert "SIMULATED" not in text and "SMOKE" not in text


@pytest.mark.parametrize("render", RENDERERS)
def test_simulated_signals_and_smoke_are_said_wherever_scores_stand(render):
    rows = make_paper_rows(simulated=True)
    text = re.sub(r"<[^>]+>", " ", render(*make_pages(rows, preset="smoke", simulated=True)))
    assert len(re.findall("SIMULATED", text)) >= 1 + 8 + 1
    assert len(re.findall(r"\bsmoke\b", text)) >= 300


def test_the_page_stands_alone_is_well_formed_and_prints_what_it_shows(exact):
    text = render_html(*exact)
    reader = Reader(text)
    assert not reader.links and "<script" not in text and "url(" not in text
    assert "@media print" in text and 'name="viewport"' in text
    row = reader.row("All", "converged probe")
    assert row[1].startswith("0.744 ±0.001") and "diff. +0.000" in row[1]
    fragment = render_html(*exact, fragment=True)
    assert "<html" not in fragment and fragment.strip().startswith("<section") and fragment.strip() in text


def test_names_from_files_are_shown_and_never_run():
    rows = [make_row(pretraining="<script>x</script>|y")]
    pages = make_pages(rows, cohort="<b>|")
    assert "<script>" not in render_html(*pages) and "&lt;script&gt;" in render_html(*pages)
    lines = [line for line in render_markdown(*pages).splitlines() if "script" in line]
    assert lines and all("\\|y" in line for line in lines)


def test_every_line_of_a_markdown_table_has_as_many_cells_as_its_heading(exact):
    counts = []
    for block in re.findall(r"(?:^\|.*\n)+", render_markdown(*exact), flags=re.MULTILINE):
        found = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(found) == 1, block[:200]
        counts.append(found.pop())
    assert counts == [6, 9, 6, 6, 6, 6, 6, 10, 7]


def test_the_reason_of_an_empty_cell_is_a_numbered_note_below_the_table():
    skip = {"value": None, "low": None, "high": None, "training_subjects": 0}
    rows = [*make_seeds(0.7, 0.01), make_row(task="age", **skip, note="skipped: no window has a label")]
    tables, claims, context = make_pages(rows)
    assert "(1) no window has a label" in render_terminal(tables, claims, context)
    assert "no labels<sup>1</sup>" in render_html(tables, claims, context)
    assert "not run: no labels" in render_terminal(tables, claims, context, width=200)


def test_a_cell_shows_score_spread_interval_paper_and_difference():
    rows = make_seeds(0.7, 0.01, low=0.65, high=0.75)
    cell = make_pages(rows, preset="smoke")[0][1].rows[-2].cells[0]
    assert describe_cell(cell, {}) == [
        "0.700 ±0.010",
        "[0.650, 0.750]",
        "paper 0.744 ±0.001",
        f"diff. {MINUS}0.044",
        "smoke",
    ]


def test_the_file_of_scores_holds_every_field_of_every_row(tmp_path):
    rows = [make_row(note='a, "b"'), make_row(value=None, low=None, high=None, simulated=True)]
    place = open_location(tmp_path / "scores.csv")
    write_scores_csv(place, rows, make_context())
    lines = list(csv.DictReader(io.StringIO(place.read_text())))
    assert set(lines[0]) == {"cohort", "preset", "commit", *(item.name for item in dataclasses.fields(ScoreRow))}
    for line, row in zip(lines, rows, strict=True):
        for name, value in dataclasses.asdict(row).items():
            assert line[name] == ("" if value is None else str(value))


def test_one_call_writes_all_files(tmp_path):
    rows = make_paper_rows()
    tables, claims, context = make_pages(rows)
    files = write_tables(open_location(tmp_path), rows, tables, claims, context)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "tables.html", "tables.md"]
    assert files.html.read_text() == render_html(tables, claims, context)
    assert files.terminal == render_terminal(tables, claims, context)
    assert len(files.scores.read_text().splitlines()) == 1 + len(rows)

"""Shows filled tables and checked claims: in the terminal, as HTML, as Markdown, and every score as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from physioray.paper.claims import ClaimResult, check_paper
from physioray.paper.levels import NO_LABELS
from physioray.paper.reference import PaperTables, read_paper
from physioray.paper.statements import CANNOT_TELL, MINUS, NOT_RUN
from physioray.paper.tables import LINE_TITLES, SMOKE, FilledCell, FilledRow, FilledTable, TableContext
from physioray.results import ScoreRow, describe_people
from physioray.storage import Location

HTML_TEMPLATE = "paper_tables.html.jinja"
MARKDOWN_TEMPLATE = "paper_tables.md.jinja"

HTML_FILE, MARKDOWN_FILE, SCORES_FILE = "tables.html", "tables.md", "scores.csv"


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """Where the tables were written, and the same for the terminal."""

    html: Location
    markdown: Location
    scores: Location
    terminal: str


def write_tables(
    folder: Location,
    rows: Sequence[ScoreRow],
    tables: Sequence[FilledTable],
    claims: Sequence[ClaimResult],
    context: TableContext,
) -> TableFiles:
    """Write tables.html, tables.md and scores.csv into a folder, each whole or not at all.

    Args:
        folder: where.
        rows: every score, also those that stand in no table.
        tables: see `tables.fill_tables`.
        claims: see `claims.check_claims`; none leaves that part out.
        context: what the headings say.
    """
    files = TableFiles(
        html=folder / HTML_FILE,
        markdown=folder / MARKDOWN_FILE,
        scores=folder / SCORES_FILE,
        terminal=render_terminal(tables, claims, context),
    )
    files.html.write_text(render_html(tables, claims, context))
    files.markdown.write_text(render_markdown(tables, claims, context))
    write_scores_csv(files.scores, rows, context)
    return files


def write_scores_csv(location: Location, rows: Sequence[ScoreRow], context: TableContext | None = None) -> None:
    """Write every single score as a line of comma-separated values; each says whether it is of simulated signals.

    Args:
        location: the file.
        rows: scores; all their fields become columns.
        context: adds cohort, preset and commit to every line.
    """
    extra = {} if context is None else {name: getattr(context, name) for name in ("cohort", "preset", "commit")}
    sink = io.StringIO()
    names = [*extra, *(item.name for item in dataclasses.fields(ScoreRow))]
    writer = csv.DictWriter(sink, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(extra | dataclasses.asdict(row) for row in rows)
    location.write_text(sink.getvalue())


def render_html(
    tables: Sequence[FilledTable],
    claims: Sequence[ClaimResult],
    context: TableContext,
    *,
    fragment: bool = False,
) -> str:
    """The tables as one self-contained page, or as a fragment for another page (it brings its own style)."""
    return _render(HTML_TEMPLATE, tables, claims, context, fragment=fragment)


def render_markdown(tables: Sequence[FilledTable], claims: Sequence[ClaimResult], context: TableContext) -> str:
    """The tables as Markdown, one line per row."""
    return _render(MARKDOWN_TEMPLATE, tables, claims, context)


def render_terminal(
    tables: Sequence[FilledTable], claims: Sequence[ClaimResult], context: TableContext, *, width: int = 120
) -> str:
    """The tables for a terminal of so many characters."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, highlight=False, color_system=None)
    console.print(Text(f"The tables of {read_paper().citation}, and ours"))
    for sentence in tables[0].heading if tables else ():
        console.print(Text(sentence))
    for filled in tables:
        tag = "SIMULATED SIGNALS. " if filled.simulated else ""
        console.print(Text(f"\n{filled.name}. {tag}{filled.title}"))
        if filled.sizes:
            console.print(Text(filled.sizes))
        notes = number_notes(filled)
        if filled.rows:
            console.print(_draw_table(filled, notes))
        for sentence, number in notes.items():
            console.print(Text(f"({number}) {sentence}"))
        for sentence in filled.notes:
            console.print(Text(sentence))
    if claims:
        tag = "SIMULATED SIGNALS. " if tables and tables[0].simulated else ""
        tag += "SMOKE. " if context.preset == SMOKE else ""
        console.print(Text(f"\nThe paper's claims. {tag}{CLAIMS_NOTE}"))
        table = Table("Claim", "Source", "Converged probe", "Paper's recipe", "Paper's own numbers", show_lines=True)
        for entry in arrange_claims(claims):
            cells = [entry["sentence"], entry["source"], *(entry[key]["text"] for key in ("first", "second", "paper"))]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    for sentence in (*read_paper().notes, *context.notes):
        console.print(Text(f"- {sentence}"))
    if context.assumptions:
        parts = [f"{name} = {value.split(' (default')[0]}" for name, value in sorted(context.assumptions.items())]
        console.print(Text(f"Assumptions in force ({len(parts)}): {'; '.join(parts)}."))
    return sink.getvalue()


CLAIMS_NOTE = (
    "Held and not held: the difference lies beyond its interval, drawn anew by subject where predictions of both sides "
    "are at hand, else beyond the sum of both spreads over seeds. Cannot be told: it does not."
)


def _draw_table(filled: FilledTable, notes: dict[str, int]) -> Table:
    table = Table("", *(f"{column.title}\n{column.subtitle}" for column in filled.columns), show_lines=True)
    for row in filled.rows:
        cells = ["\n".join(describe_cell(cell, notes)) for cell in row.cells]
        own = "" if row.published else " (ours)"
        table.add_row(Text(f"{row.group}: {row.title}{own}\n{row.evaluation}"), *(Text(cell) for cell in cells))
    return table


def describe_cell(cell: FilledCell, notes: dict[str, int]) -> list[str]:
    """A cell as lines: our score with the number of its note, its interval, the paper's, the difference."""
    marker = f" ({notes[cell.note]})" if cell.note in notes else ""
    lines = []
    if cell.ours.value is None:
        lines.append(f"{cell.status}{marker}")
    else:
        spread = f" ±{cell.ours.spread:.3f}" if cell.ours.spread is not None else ""
        lines.append(f"{sign_number(cell.ours.value, False)}{spread}{marker}")
        if cell.ours.low is not None and cell.ours.high is not None:
            lines.append(f"[{cell.ours.low:.3f}, {cell.ours.high:.3f}]")
    if cell.paper.value is not None:
        lines.append(f"paper {describe_printed(cell)}")
    if cell.difference is not None:
        lines.append(f"diff. {sign_number(cell.difference)}")
    if cell.smoke:
        lines.append("smoke")
    return lines


def describe_printed(cell: FilledCell) -> str:
    """The paper's number with its spread and asterisk, in as many digits as printed."""
    if cell.paper.value is None:
        return ""
    spread = f" ±{max(f'{cell.paper.spread:.3f}', f'{cell.paper.spread:g}', key=len)}" if cell.paper.spread else ""
    zero = " ±0.000" if cell.paper.spread == 0 else ""
    return f"{cell.paper.value:.3f}{spread or zero}{'*' if cell.paper.starred else ''}"


def sign_number(value: float, plus: bool = True) -> str:
    """A number of three digits with a minus sign of its width, and a plus sign where wanted."""
    text = f"{value:+.3f}" if plus else f"{value:.3f}"
    return text.replace("-", MINUS)


def number_notes(filled: FilledTable) -> dict[str, int]:
    """The notes of a table's cells, numbered as they occur; that something was not run needs no sentence."""
    found: dict[str, int] = {}
    for row in filled.rows:
        for cell in row.cells:
            if cell.note and cell.status != NOT_RUN:
                found.setdefault(cell.note, len(found) + 1)
    return found


def arrange_claims(claims: Sequence[ClaimResult], paper: PaperTables | None = None) -> list[dict[str, Any]]:
    """One entry per claim: its sentence, and what became of it under either probe and on the paper's own numbers."""
    printed = {result.claim.name: result for result in check_paper(paper)}
    entries: dict[str, dict[str, Any]] = {}
    for result in claims:
        name, claim = result.claim.name, result.claim
        empty = {"text": "", "verdict": "", "details": ()}
        entry = entries.setdefault(
            name,
            {
                "sentence": claim.sentence,
                "source": claim.source,
                "remark": claim.remark,
                "first": _describe_result(result),
                "second": empty,
                "paper": _describe_result(printed[name], "not printed"),
            },
        )
        if entry["first"]["evaluation"] != result.evaluation:
            entry["second"] = _describe_result(result)
    return list(entries.values())


def _describe_result(result: ClaimResult, unknown: str = NOT_RUN) -> dict[str, Any]:
    judgement = result.judgement
    text = unknown if judgement.verdict == NOT_RUN else judgement.verdict
    if judgement.verdict == CANNOT_TELL:
        text += f" (by the means: {judgement.by_means})"
    missing = f"Missing: {'; '.join(judgement.missing)}." if judgement.missing else ""
    if judgement.verdict == NOT_RUN and unknown == NOT_RUN:
        text += f": {_sum_up(judgement.missing)}"
    return {
        "text": text,
        "verdict": judgement.verdict,
        "details": (*judgement.details, *((missing,) if missing else ())),
        "evaluation": result.evaluation,
        "title": LINE_TITLES.get(result.evaluation, "scores"),
    }


def _sum_up(missing: Sequence[str]) -> str:
    """What is missing, short enough for a cell; the details name every piece."""
    if len(missing) == 1:
        return missing[0]
    unlabelled = all(f"({NO_LABELS})" in text for text in missing)
    return "no labels" if unlabelled else f"{len(missing)} scores missing"


def _escape_bar(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _group_rows(rows: Sequence[FilledRow]) -> list[tuple[str, list[FilledRow]]]:
    return [(group, list(members)) for group, members in itertools.groupby(rows, key=lambda row: row.group)]


def _render(
    template: str,
    tables: Sequence[FilledTable],
    claims: Sequence[ClaimResult],
    context: TableContext,
    *,
    fragment: bool = False,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("physioray", "templates"),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"signed": sign_number, "bar": _escape_bar, "groupby_order": _group_rows}
    paper = read_paper()
    simulated = context.simulated or any(table.simulated for table in tables)
    return environment.get_template(template).render(
        tables=tables,
        heading=tables[0].heading if tables else (),
        simulated=simulated,
        people=describe_people(simulated, context.subjects),
        notes=[number_notes(table) for table in tables],
        claims=arrange_claims(claims),
        claims_note=CLAIMS_NOTE,
        context=context,
        assumptions=sorted(context.assumptions.items()),
        paper=paper,
        fragment=fragment,
        describe_cell=describe_cell,
        describe_printed=describe_printed,
    )

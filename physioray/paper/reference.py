"""The numbers that Fang et al. 2024 print, read from one data file of this package."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from physioray.signals import LookupMiss

PAPER_FILE = "fang2024.json"

CHANCE = "chance"
PROBE = "probe"
"""Kinds of evaluation in the paper besides `finetune` and `scratch`: a guess, and a linear probe, which here is any of
`results.PROBES`."""


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """A printed number: mean over seeds and, where printed, its standard deviation; None where nothing is printed."""

    value: float | None
    spread: float | None = None
    starred: bool = False


@dataclass(frozen=True, kw_only=True)
class PaperColumn:
    """What a column scores: names of `signals.TASKS` and `metrics.METRICS`, both `aggregate` for all tasks together."""

    task: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row as printed.

    Attributes:
        group, title: as in the paper.
        pretraining: name of the strategy, as in result files; `chance` for the row of guesses.
        evaluation: `probe`, `finetune`, `scratch` or `chance`.
        cells: one per column of the table.
        absent: why cells have no number.
    """

    group: str
    title: str
    pretraining: str
    evaluation: str
    cells: tuple[PaperCell, ...]
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table as printed.

    Attributes:
        number, title, section: of the table, and of the section that discusses it.
        evaluation: `probe` or `finetune`.
        training_subjects: the paper's training-set size.
        columns, rows: in the paper's order.
        lists: which further strategies belong here: `unimodal`, `multimodal` or `all`.
        notes: what a reader must know.
    """

    number: int
    title: str
    section: str
    evaluation: str
    training_subjects: int
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    lists: str
    notes: tuple[str, ...] = ()

    def list_cells(self, pretraining: str, evaluation: str) -> list[tuple[PaperColumn, PaperCell]]:
        """Columns and printed numbers of a strategy; empty if the table has no such row."""
        for row in self.rows:
            if (row.pretraining, row.evaluation) == (pretraining, evaluation):
                return list(zip(self.columns, row.cells, strict=True))
        return []


@dataclass(frozen=True, kw_only=True)
class PaperTables:
    """All tables of the paper, where they come from, and what follows from no formula.

    Attributes:
        source: authors, title, year, arXiv number, data set, test subjects, seeds.
        notes: on all tables together.
        tables: in the paper's order.
    """

    source: Mapping[str, Any]
    notes: tuple[str, ...]
    tables: tuple[PaperTable, ...]

    @property
    def citation(self) -> str:
        """The paper in one line."""
        return f"{self.source['authors'].split(',')[0]} et al. {self.source['year']}, arXiv {self.source['arxiv']}"

    def find_table(self, number: int) -> PaperTable:
        """A table by its number in the paper.

        Raises:
            LookupMiss: no such table; the message lists those that exist.
        """
        for table in self.tables:
            if table.number == number:
                return table
        known = ", ".join(str(table.number) for table in self.tables)
        raise LookupMiss(f"A table of the paper must be one of {known}, but got {number!r}.")

    def find_cell(
        self, pretraining: str, evaluation: str, training_subjects: int, column: PaperColumn
    ) -> PaperCell | None:
        """The printed number wherever it stands; the first table that has it, None if none has."""
        for table in self.tables:
            if table.training_subjects == training_subjects:
                for found, cell in table.list_cells(pretraining, evaluation):
                    if found == column and cell.value is not None:
                        return cell
        return None


@functools.cache
def read_paper() -> PaperTables:
    """Read the paper's Tables 1 to 7 (Fang et al. 2024, arXiv 2410.16424).

    Raises:
        ValueError: a row of the data file has not one cell per column.
    """
    values = json.loads(resources.files("physioray.paper").joinpath(PAPER_FILE).read_text("utf-8"))
    tables = tuple(_read_table(entry) for entry in values["tables"])
    return PaperTables(source=values["source"], notes=tuple(values["notes"]), tables=tables)


def _read_table(entry: Mapping[str, Any]) -> PaperTable:
    columns = tuple(PaperColumn(**column) for column in entry["columns"])
    rows = []
    for row in entry["rows"]:
        if len(row["cells"]) != len(columns):
            raise ValueError(
                f"Every row of Table {entry['number']} in {PAPER_FILE} must have {len(columns)} cells, but "
                f"{row['title']} has {len(row['cells'])}."
            )
        starred = row.get("starred", ())
        cells = tuple(
            _read_cell(cell, column.task in starred) for cell, column in zip(row["cells"], columns, strict=True)
        )
        rows.append(
            PaperRow(
                group=row["group"],
                title=row["title"],
                pretraining=row["pretraining"],
                evaluation=row["evaluation"],
                cells=cells,
                absent=row.get("absent", ""),
            )
        )
    return PaperTable(
        number=entry["number"],
        title=entry["title"],
        section=entry["section"],
        evaluation=entry["evaluation"],
        training_subjects=entry["training_subjects"],
        columns=columns,
        rows=tuple(rows),
        lists=entry["lists"],
        notes=tuple(entry["notes"]),
    )


def _read_cell(numbers: list[float] | None, starred: bool) -> PaperCell:
    if numbers is None:
        return PaperCell(value=None)
    return PaperCell(value=numbers[0], spread=numbers[1] if len(numbers) > 1 else None, starred=starred)

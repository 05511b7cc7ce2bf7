"""Fills the paper's tables with our scores: its rows and columns in its order, each cell beside the printed number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from physioray.metrics import AGGREGATE, find_metric
from physioray.paper.levels import (
    NO_LABELS,
    NOT_RUN,
    End,
    Pick,
    ScoreBook,
    describe_sizes,
)
from physioray.paper.reference import CHANCE, PROBE, PaperCell, PaperColumn, PaperRow, PaperTable, PaperTables
from physioray.results import CONVERGED, FEATURES, FINETUNE, PROBES, RECIPE, SCRATCH, TEST, ScoreRow
from physioray.score_tables import EVALUATION_TITLES, FEATURE_TITLES, Cell, merge_seeds
from physioray.signals import MODALITIES, PATIENTS, SCOPES, SLEEP_WINDOWS, TASKS, WINDOWS, find_task

SMOKE = "smoke"
FEW_SUBJECTS = "too few subjects"
LINE_TITLES = EVALUATION_TITLES | {CONVERGED: "converged probe (headline)", RECIPE: "probe by the paper's recipe"}
NAMES_ALONE = {f"{start}_{name}": name.upper() for start in ("mae", "scratch") for name in MODALITIES}
LARGE = 100
"""The paper's sizes from here on stand for the largest training set of a cohort, those below for the smallest."""


@dataclass(frozen=True, kw_only=True)
class TableContext:
    """What the heading of every table says: whose scores these are, and under which assumptions.

    Attributes:
        cohort: name of the cohort.
        simulated: True for simulated nights.
        subjects, labelled: people in the cohort, and those with any label.
        sizes: numbers of training subjects that were asked for.
        assumptions: by dotted field, what the paper leaves open and the runs decided.
        preset: name of the preset; under `smoke` every cell is marked, its scores mean nothing.
        commit: of the code.
        notes: further sentences for the reader.
    """

    cohort: str
    simulated: bool
    subjects: int
    labelled: int
    sizes: tuple[int, ...] = ()
    assumptions: Mapping[str, str] = field(default_factory=dict)
    preset: str = ""
    commit: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.labelled <= self.subjects:
            raise ValueError(
                "TableContext.labelled must be a number of the cohort's subjects, "
                f"but got {self.labelled} of {self.subjects}."
            )


@dataclass(frozen=True, kw_only=True)
class FilledCell:
    """Our score beside the printed one.

    Attributes:
        ours: mean, interval by subject and spread over seeds; its value is None where there is no score.
        paper: the printed number.
        difference: ours minus the paper's; None where one is missing or they measure different things.
        status: why there is no score, in two words; empty if there is one.
        note: a sentence on the status or the score.
        smoke: True where the score only shows that the path works.
    """

    ours: Cell
    paper: PaperCell = PaperCell(value=None)
    difference: float | None = None
    status: str = ""
    note: str = ""
    smoke: bool = False


@dataclass(frozen=True, kw_only=True)
class FilledRow:
    """A line: the paper's row under one of our evaluations.

    Attributes:
        group, title: as in the paper.
        evaluation: how it was scored, in words.
        headline: False for the second probe of the same row.
        published: True if the paper has this row.
        cells: one per column.
    """

    group: str
    title: str
    evaluation: str
    headline: bool
    published: bool
    cells: tuple[FilledCell, ...]


@dataclass(frozen=True, kw_only=True)
class FilledColumn:
    """A column: what is scored (`title`) and how (`subtitle`)."""

    title: str
    subtitle: str


@dataclass(frozen=True, kw_only=True)
class FilledTable:
    """A table with our scores.

    Attributes:
        name: `Table 1` ... `Table 7`, or of a further table.
        title: what it compares.
        heading: sentences on the cohort, whether it is simulated, and the protocol; the same for all tables.
        sizes: sentence on the training-set sizes, the paper's and ours.
        columns, rows: the paper's in its order, then ours.
        notes: sentences below the table.
        simulated: True for simulated nights.
    """

    name: str
    title: str
    heading: tuple[str, ...]
    columns: tuple[FilledColumn, ...]
    rows: tuple[FilledRow, ...]
    sizes: str = ""
    notes: tuple[str, ...] = ()
    simulated: bool = False


def fill_tables(rows: Sequence[ScoreRow], paper: PaperTables, context: TableContext) -> list[FilledTable]:
    """Fill the paper's tables with scores, and one more with scores by patient and on sleep windows only.

    A table of 500 training patients shows the largest training set there is, one of 25 the smallest.

    Args:
        rows: scores of any number of strategies, evaluations, seeds and sizes, of one cohort.
        paper: see `reference.read_paper`.
        context: what the headings say.

    Raises:
        TablesError: the scores are of several cohorts.
    """
    book = ScoreBook(rows)
    tables = [_fill_table(book, table, context) for table in paper.tables]
    return [*tables, _fill_scopes(book, paper, context)]


def describe_context(context: TableContext, book: ScoreBook) -> list[str]:
    """The sentences that stand above every table."""
    simulated = context.simulated or book.simulated
    kind = "SIMULATED SIGNALS: these scores say nothing about people." if simulated else "Real recordings."
    people = f"Cohort {context.cohort}: {context.subjects:,} subjects, {context.labelled:,} of them with labels"
    sentences = [kind, f"{people}."]
    if book.tested:
        held_out = f"tested on {book.tested:,} held-out subjects"
        folds = f"cross-validation by subject, {book.tested:,} subjects tested"
        sentences.append(f"Protocol: {held_out if book.split == TEST else folds}.")
    facts = [f"preset {context.preset}"] if context.preset else []
    facts += [f"commit {context.commit[:12]}"] if context.commit else []
    if facts:
        sentences.append(f"{', '.join(facts).capitalize()}.")
    if context.assumptions:
        sentences.append(
            f"In force: {len(context.assumptions)} assumptions where the paper is silent, listed at the end."
        )
    if context.preset == SMOKE:
        sentences.append("SMOKE: tiny models, a few passes; the cells show that each can be filled, and nothing else.")
    return sentences


def _fill_table(book: ScoreBook, table: PaperTable, context: TableContext) -> FilledTable:
    end: End = "largest" if table.training_subjects >= LARGE else "smallest"
    columns = list(table.columns)
    if any(column.metric == "f1_weighted" for column in columns):
        columns.append(PaperColumn(task=columns[-1].task, metric="f1_macro"))
    lines = [(row, True) for row in table.rows] + [(row, False) for row in _list_further(book, table)]
    rows, picks = [], []
    for row, published in lines:
        for number, evaluation in enumerate(_list_evaluations(row)):
            cells = []
            for place, column in enumerate(columns):
                printed = row.cells[place] if place < len(row.cells) else PaperCell(value=None)
                pick = book.find(row.pretraining, evaluation, column.task, column.metric, end=end)
                picks.append((column.task, pick))
                if row.evaluation == CHANCE:
                    cells.append(_guess(column, printed))
                else:
                    absent = row.absent if published and place < len(row.cells) else ""
                    cells.append(_fill_cell(pick, printed, context, absent))
            rows.append(
                FilledRow(
                    group=row.group,
                    title=row.title,
                    evaluation=LINE_TITLES.get(evaluation, "a guess" if row.evaluation == CHANCE else evaluation),
                    headline=number == 0,
                    published=published,
                    cells=tuple(cells),
                )
            )
    return FilledTable(
        name=f"Table {table.number}",
        title=table.title,
        heading=tuple(describe_context(context, book)),
        sizes=_describe_levels(book, table, end, picks),
        columns=tuple(_title_column(column) for column in columns),
        rows=tuple(rows),
        notes=_list_notes(table),
        simulated=context.simulated or book.simulated,
    )


def _list_evaluations(row: PaperRow) -> tuple[str, ...]:
    return PROBES if row.evaluation == PROBE else (row.evaluation,)


def _list_further(book: ScoreBook, table: PaperTable) -> list[PaperRow]:
    """Rows that the paper has not: other modalities, other strategies, and the floors under the same probe."""
    listed = {(row.pretraining, row.evaluation) for row in table.rows}
    kinds = {row.evaluation for row in table.rows} - {CHANCE}
    found: dict[tuple[str, str], PaperRow] = {}
    for name, evaluation in book.lines:
        kind = PROBE if evaluation in PROBES else evaluation
        floor = name in FEATURES
        belongs = floor or table.lists == "all" or (table.lists == "unimodal") == (name in NAMES_ALONE)
        if kind in kinds and belongs and (name, kind) not in listed:
            group = "Floors" if floor else "Scratch" if kind == SCRATCH else "Not in the paper"
            title = FEATURE_TITLES[name] if floor else NAMES_ALONE.get(name, name)
            cells = tuple(PaperCell(value=None) for _ in table.columns)
            found[name, kind] = PaperRow(group=group, title=title, pretraining=name, evaluation=kind, cells=cells)
    return sorted(found.values(), key=lambda row: (row.group == "Floors", row.group != "Scratch"))


def _fill_cell(pick: Pick, printed: PaperCell, context: TableContext, absent: str = "") -> FilledCell:
    if not pick.rows:
        status, note = pick.status, pick.note
        if status == NOT_RUN and context.labelled == 0:
            status, note = NO_LABELS, "no subject of the cohort has labels"
        elif status == NOT_RUN and context.sizes and context.labelled < min(context.sizes):
            status = FEW_SUBJECTS
            note = f"{context.labelled} subjects have labels, fewer than the {min(context.sizes)} asked for in training"
        return FilledCell(ours=Cell(value=None), paper=printed, status=status, note=note)
    ours = merge_seeds(pick.rows)
    note = "; ".join(part for part in (pick.note, absent if printed.value is None else "") if part)
    comparable = ours.value is not None and printed.value is not None and not pick.partial
    difference = ours.value - printed.value if comparable else None  # type: ignore[operator]
    return FilledCell(ours=ours, paper=printed, difference=difference, note=note, smoke=context.preset == SMOKE)


def _guess(column: PaperColumn, printed: PaperCell) -> FilledCell:
    value = 0.0 if column.task == AGGREGATE else find_task(column.task).chance
    return FilledCell(ours=Cell(value=value), paper=printed, difference=None)


def _describe_levels(book: ScoreBook, table: PaperTable, end: End, picks: Sequence[tuple[str, Pick]]) -> str:
    sizes: dict[str, set[int]] = {}
    for task, pick in picks:
        if task in TASKS:
            sizes.setdefault(task, set()).update(pick.sizes)
    parts = [f"{find_task(task).title} {describe_sizes(sorted(found))}" for task, found in sizes.items() if found]
    kinds = [PROBE, SCRATCH] if table.evaluation == PROBE else [FINETUNE]
    counts = [len(book.find_levels(kind, task)) for kind in kinds for task in TASKS]
    if not parts:
        return f"Training subjects: {table.training_subjects} in the paper; no scores here yet."
    which = f"the {end} there is" if max(counts) > 1 else "the only size there is"
    return f"Training subjects: {table.training_subjects} in the paper; here {', '.join(parts)} ({which})."


def _list_notes(table: PaperTable) -> tuple[str, ...]:
    notes = [*table.notes, *(row.absent for row in table.rows if row.absent)]
    if any(column.metric == "f1_weighted" for column in table.columns):
        notes.append("The paper does not name its average of F1: the weighted one stands beside it; macro is ours.")
    return tuple(dict.fromkeys(notes))


def _title_column(column: PaperColumn, scope: str = "") -> FilledColumn:
    if column.task == AGGREGATE:
        return FilledColumn(title="Aggregate", subtitle="over the tasks")
    subtitle = find_metric(column.metric)
    return FilledColumn(title=find_task(column.task).title, subtitle=f"{subtitle}, {scope}" if scope else subtitle)


def _fill_scopes(book: ScoreBook, paper: PaperTables, context: TableContext) -> FilledTable:
    """Scores that count something else than windows; the paper has none of them."""
    metrics = ("balanced_accuracy", "auroc")
    plan = [("age", scope, metric) for scope in (WINDOWS, PATIENTS) for metric in metrics]
    plan += [("arousal", scope, metric) for scope in (WINDOWS, SLEEP_WINDOWS) for metric in metrics]
    templates = [row for number in (1, 2) for row in paper.find_table(number).rows if row.evaluation == PROBE]
    templates += _list_further(book, paper.find_table(1)) + _list_further(book, paper.find_table(2))
    unique = {(row.pretraining, row.evaluation): row for row in reversed(templates)}
    rows = []
    for row in reversed(unique.values()):
        for number, evaluation in enumerate(_list_evaluations(row)):
            picks = [book.find(row.pretraining, evaluation, task, metric, scope=scope) for task, scope, metric in plan]
            if any(pick.rows for pick in picks):
                rows.append(
                    FilledRow(
                        group=row.group,
                        title=row.title,
                        evaluation=LINE_TITLES.get(evaluation, evaluation),
                        headline=number == 0,
                        published=False,
                        cells=tuple(_fill_cell(pick, PaperCell(value=None), context) for pick in picks),
                    )
                )
    notes = [] if rows else ["Not run: there are no scores of age or arousal."]
    return FilledTable(
        name="Further scores",
        title="Age by patient, arousal on sleep windows only (not in the paper)",
        heading=tuple(describe_context(context, book)),
        columns=tuple(
            _title_column(PaperColumn(task=task, metric=metric), SCOPES[scope]) for task, scope, metric in plan
        ),
        rows=tuple(rows),
        notes=tuple(notes),
        simulated=context.simulated or book.simulated,
    )

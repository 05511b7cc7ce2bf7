"""Puts the figures and numbers of explained checkpoints on one page, or hands them to a page of others."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from physioray.analysis_figures import (
    plot_attention_numbers,
    plot_examples,
    plot_layers,
    plot_layers_beside,
    plot_reconstruction_errors,
    plot_rollout,
    plot_source_variance,
    plot_source_variance_beside,
    render_png,
    slug,
    title_modality,
)
from physioray.analysis_results import NUMBERS_FILE, Analysis, write_numbers
from physioray.attention_rollout import ROLLOUT
from physioray.figures import render_svg
from physioray.reconstruction_quality import HIDDEN_WAYS
from physioray.results import describe_people
from physioray.storage import Location
from physioray.subject_sums import Number

PAGE_FILE = "figures.html"

ALT = {
    "rollout": "Map of attention rollout, attending tokens downwards, attended tokens to the right",
    "attention": "Numbers of attention by layer, a line per checkpoint; the rollout's stand in the table above",
    "layers": "Maps of the mean attention of every layer",
    "source_variance": "Relative source variance by layer, a line per modality; the embedding's stands in the table",
    "errors": "Reconstruction error by modality over that of guessing the mean; the tables have the same",
    "examples": "A window with its signals, the seconds that the model saw, and what it filled in",
}
"""What the figures of a section show, for those who do not see them."""

SECTIONS = tuple(ALT)


@dataclass(frozen=True)
class Drawing:
    """One figure: the section of the page it belongs to, its file's name, and what it is of."""

    section: str
    name: str
    title: str
    figure: Figure

    def svg(self) -> str:
        """As an inline SVG element."""
        return render_svg(self.figure, self.name, f"{ALT[self.section]}: {self.title}")

    def png(self) -> bytes:
        """As a PNG."""
        return render_png(self.figure)


@dataclass(frozen=True)
class NumberTable:
    """Numbers of all checkpoints: a row per checkpoint, and one of what an encoder that knows nothing would get.

    Attributes:
        title: what is counted.
        columns: headings.
        rows: name and, per column, the number or None.
        reference: name and values of the last row; None if there is none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Number | None, ...]], ...]
    reference: tuple[str, tuple[float | None, ...]] | None


def draw_all(analyses: Sequence[Analysis]) -> list[Drawing]:
    """Every figure of some checkpoints, in the order of the page; those side by side share their scales."""
    drawings = [Drawing("rollout", f"rollout-{slug(a.name)}", a.name, plot_rollout([a])) for a in analyses]
    drawings.append(Drawing("attention", "attention-numbers", "Attention by layer", plot_attention_numbers(analyses)))
    if len(analyses) > 1:
        names = ", ".join(analysis.name for analysis in analyses)
        drawings.append(Drawing("layers", "layers", names, plot_layers_beside(analyses)))
        drawings.append(Drawing("source_variance", "source-variance", names, plot_source_variance_beside(analyses)))
    else:
        alone, own = analyses[0], slug(analyses[0].name)
        drawings.append(Drawing("layers", f"layers-{own}", alone.name, plot_layers(alone)))
        drawings.append(Drawing("source_variance", f"source-variance-{own}", alone.name, plot_source_variance(alone)))
    errors = plot_reconstruction_errors(analyses)
    if errors is not None:
        drawings.append(Drawing("errors", "reconstruction-errors", "Reconstruction errors", errors))
    for window in sorted({window for analysis in analyses for window in analysis.examples}):
        for analysis in analyses:
            example = plot_examples(analysis, window)
            if example is not None:
                name = f"example-{window}-{slug(analysis.name)}"
                drawings.append(Drawing("examples", name, f"{analysis.name}, window {window}", example))
    return sorted(drawings, key=lambda item: SECTIONS.index(item.section))


def tabulate_rollout(analyses: Sequence[Analysis]) -> NumberTable:
    """The numbers beside the rollout maps."""
    columns = {
        "attention_off_modality": "to other modalities",
        "attention_within_1s": "within 1 s",
        "attention_alignment": "of that to others, within 1 s",
        "attention_entropy": "evenness",
        "attention_specificity": "specificity",
    }
    pairs = [(quantity, ROLLOUT, "all") for quantity in columns]
    return _tabulate("Attention rollout", tuple(columns.values()), analyses, pairs, "uniform attention")


def tabulate_sources(analyses: Sequence[Analysis]) -> NumberTable:
    """Which modality moves the embedding, and how that drifts over the layers."""
    names = _list_modalities(analyses)
    pairs = [("source_variance_share", "embedding", name) for name in names]
    pairs += [("source_variance_imbalance", "embedding", "all"), ("source_variance_drift", "", "all")]
    columns = (*(f"{title_modality(name)}, share" for name in names), "imbalance", "drift over layers")
    return _tabulate("Source variance", columns, analyses, pairs, "all modalities alike")


def tabulate_errors(analyses: Sequence[Analysis], way: str) -> NumberTable:
    """Reconstruction error over that of guessing the mean, per modality."""
    names = [*_list_modalities(analyses), "all"]
    pairs = [("reconstruction_relative", way, name) for name in names]
    able = [item for item in analyses if item.find("reconstruction_relative", way) is not None]
    columns = (*(title_modality(name) for name in names[:-1]), "mean")
    return _tabulate(way, columns, able, pairs, "guessing the mean")


def _list_modalities(analyses: Sequence[Analysis]) -> list[str]:
    return list(dict.fromkeys(name for analysis in analyses for name in analysis.grid.names))


def _tabulate(
    title: str,
    columns: tuple[str, ...],
    analyses: Sequence[Analysis],
    keys: Sequence[tuple[str, str, str]],
    reference: str,
) -> NumberTable:
    rows = []
    for analysis in analyses:
        # The drift's place names the layers, which differ between checkpoints.
        found = [
            analysis.find(quantity, place or f"layer 1 to {analysis.layers}", modality)
            for quantity, place, modality in keys
        ]
        rows.append((analysis.name, tuple(found)))
    marks = [{cell.reference for _, cells in rows if (cell := cells[i]) is not None} for i in range(len(columns))]
    # Encoders with other modalities or layers have other references, and no common row.
    common = tuple(mark.pop() if len(mark) == 1 else None for mark in marks)
    last = (reference, common) if rows and any(value is not None for value in common) else None
    return NumberTable(title=title, columns=columns, rows=tuple(rows), reference=last)


def render_fragment(analyses: Sequence[Analysis], drawings: Sequence[Drawing] | None = None) -> str:
    """The sections with figures and numbers as HTML, to be put into a page of others.

    Classes used: `note`, `scroll`, `panels`, `wide`, `interval`, `value`, `other` (see the templates of this package).

    Args:
        analyses: one or more checkpoints, in the order of their columns.
        drawings: those of `draw_all`; drawn here if None.

    Raises:
        ValueError: no checkpoint was given.
    """
    if not analyses:
        raise ValueError("Figures must be of at least one checkpoint, but none was given.")
    drawn = list(draw_all(analyses) if drawings is None else drawings)
    content = {
        "analyses": analyses,
        "people": describe_people(
            any(analysis.simulated for analysis in analyses), max(analysis.facts["subjects"] for analysis in analyses)
        ),
        "drawings": {section: [item for item in drawn if item.section == section] for section in SECTIONS},
        "rollout": tabulate_rollout(analyses),
        "sources": tabulate_sources(analyses),
        "errors": {way: table for way in HIDDEN_WAYS if (table := tabulate_errors(analyses, way)).rows},
    }
    return _open_template("analysis_fragment.html.jinja").render(content)


def _open_template(name: str) -> jinja2.Template:
    text = resources.files("physioray.templates").joinpath(name).read_text("utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def write_page(analyses: Sequence[Analysis], out: Location) -> Location:
    """Write the page, all numbers as one table, and every figure as SVG and PNG.

    Returns:
        Where the page stands.

    Raises:
        ValueError: no checkpoint was given, or two have the same name.
    """
    names = [slug(analysis.name) for analysis in analyses]
    if len(set(names)) < len(names):
        raise ValueError(f"Every checkpoint must have its own name, but got {', '.join(names)}.")
    drawings = draw_all(analyses)
    fragment = render_fragment(analyses, drawings)
    together = Drawing("rollout", "rollout", "all", plot_rollout(analyses))
    for drawing in [*drawings, together]:
        (out / "pictures" / f"{drawing.name}.svg").write_text(_stand_alone(drawing.svg()))
        (out / "pictures" / f"{drawing.name}.png").write_bytes(drawing.png())
    write_numbers(analyses, out / NUMBERS_FILE)
    content: dict[str, Any] = {
        "analyses": analyses,
        "simulated": any(analysis.simulated for analysis in analyses),
        "fragment": fragment,
        "assumptions": sorted({pair for a in analyses for pair in a.facts.get("assumptions", {}).items()}),
    }
    page = out / PAGE_FILE
    page.write_text(_open_template("analysis.html.jinja").render(content))
    return page


def _stand_alone(svg: str) -> str:
    """An inline SVG element as a file of its own."""
    named = (
        svg if "xmlns=" in svg.split(">", 1)[0] else svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    )
    return '<?xml version="1.0" encoding="utf-8"?>\n' + named


def describe_analyses(analyses: Sequence[Analysis]) -> str:
    """The main numbers as tables for the terminal."""
    sink = io.StringIO()
    console = Console(file=sink, width=118, highlight=False, color_system=None)
    if any(analysis.simulated for analysis in analyses):
        console.print("SIMULATED SIGNALS: these numbers say nothing about people.")
    tables = [tabulate_rollout(analyses), tabulate_sources(analyses)]
    tables += [table for way in HIDDEN_WAYS if (table := tabulate_errors(analyses, way)).rows]
    titles = ["Attention rollout", "Source variance", "Error, hidden at random", "Error, modality hidden whole"]
    for title, found in zip(titles, tables, strict=False):
        shown = Table(title, *found.columns)
        for name, cells in found.rows:
            shown.add_row(name, *[describe_number(cell) for cell in cells])
        if found.reference is not None:
            name, values = found.reference
            shown.add_row(name, *["-" if value is None else f"{value:.3f}" for value in values])
        console.print(shown)
    for analysis in analyses:
        console.print(f"{analysis.name}: {' '.join(analysis.notes)}", markup=False)
    return sink.getvalue()


def describe_number(number: Number | None) -> str:
    """A value with its interval by subject, `-` where there is none."""
    if number is None or number.value is None:
        return "-"
    bounds = "" if number.low is None or number.high is None else f" [{number.low:.3f}, {number.high:.3f}]"
    return f"{number.value:.3f}{bounds}"

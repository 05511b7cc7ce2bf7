"""One self-contained page about a reproduction: where it stands, tables, figures, claims, assumptions, cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from physioray.analysis_page import render_fragment, write_page
from physioray.analysis_results import Analysis
from physioray.environment import describe_environment
from physioray.grid import Grid
from physioray.grid_report import FilledGrid, fill_grid, write_grid
from physioray.grid_scores import collect_scores
from physioray.paper.pages import render_html
from physioray.paper.reference import read_paper
from physioray.paper.statements import VERDICTS
from physioray.reproduction.course import PartRecord
from physioray.reproduction.figure_claims import NOTE, FigureClaim, check_figures
from physioray.reproduction.parts import FigurePart, Part, SweepPart
from physioray.reproduction.plan import FIGURES, ReproductionConfig
from physioray.reproduction.spent import measure_spent
from physioray.results import CONVERGED, describe_people
from physioray.storage import Location
from physioray.sweep_figures import plot_field
from physioray.sweep_journal import SweepResult
from physioray.sweep_report import format_value, summarise_sweep

PAGE_FILE = "reproduction.html"
TEMPLATE = "reproduction.html.jinja"
WAYS = {"probe": "linear probe", "finetune": "full finetuning"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that a reproduction has computed so far.

    Attributes:
        filled: tables and claims; None where nothing was scored.
        analyses: by strategy, what was seen inside.
        sweeps: by part, those that were begun.
        fault: why there are no tables.
    """

    filled: FilledGrid | None
    analyses: Mapping[str, Analysis]
    sweeps: Mapping[str, SweepResult]
    fault: str = ""


def gather(grid: Grid, parts: Sequence[Part], out: Location) -> Found:
    """Read everything that is done, write tables and figures into folders of their own, and keep their steps."""
    store = grid.open_store()
    analyses: dict[str, Analysis] = {}
    sweeps: dict[str, SweepResult] = {}
    for part in parts:
        if isinstance(part, FigurePart):
            analysis = _try(lambda part=part: part.read(store))
            if isinstance(analysis, Analysis):
                analyses[part.strategy] = analysis
        elif isinstance(part, SweepPart):
            sweep = _try(part.read)
            if isinstance(sweep, SweepResult):
                sweeps[part.name] = sweep
    if analyses:
        write_page(list(analyses.values()), out / "figures")
        store.refer(out / "figures")
    filled, fault = None, ""
    try:
        scores = collect_scores(grid)
        if scores.rows:
            filled = fill_grid(grid, scores, reconstruction_errors=_list_errors(analyses))
            write_grid(grid, scores, out / "tables", filled)
    except (OSError, ValueError, LookupError, ArithmeticError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Found(filled=filled, analyses=analyses, sweeps=sweeps, fault=fault)


def _try(read: Any) -> Any:
    """What a part has kept; None where it cannot be read, which its record says when the part is run."""
    try:
        return read()
    except (OSError, ValueError, LookupError):
        return None


def _list_errors(analyses: Mapping[str, Analysis]) -> dict[str, float]:
    """Reconstruction errors by modality of MultiMAE without drop, for the claim on them."""
    if "multimae" not in analyses:
        return {}
    numbers = [
        n for n in analyses["multimae"].numbers if (n.quantity, n.place) == ("reconstruction_error", "scattered")
    ]
    return {n.modality: n.value for n in numbers if n.value is not None and n.modality != "all"}


def write_reproduction(
    out: Location,
    config: ReproductionConfig,
    grid: Grid,
    parts: Sequence[Part],
    records: Mapping[str, PartRecord],
    *,
    command: str = "",
) -> Location:
    """Write the page from what is done; what failed or was not run stands there with its reason.

    Args:
        out: the reproduction's folder.
        config, grid, parts: what was to be computed.
        records: how each part went.
        command: that goes on with what is missing.

    Returns:
        Where the page stands.
    """
    found = gather(grid, parts, out)
    place = out / PAGE_FILE
    place.write_text(render_page(found, out, config, grid, parts, records, command))
    return place


def render_page(
    found: Found,
    out: Location,
    config: ReproductionConfig,
    grid: Grid,
    parts: Sequence[Part],
    records: Mapping[str, PartRecord],
    command: str,
) -> str:
    """The page as HTML."""
    cohort = grid.plan.cohort
    figures = check_figures(found.analyses, _find_ratios(found))
    content = {
        "simulated": cohort.simulated,
        "people": describe_people(cohort.simulated, len(cohort.subjects)),
        "cohort": cohort,
        "protocol": grid.plan.protocol.sentence,
        "paper": read_paper(),
        "config": config,
        "command": command,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "records": [records[part.name] for part in parts],
        "counts": _count_claims(found.filled, figures),
        "tables": _render_tables(found.filled),
        "fault": found.fault,
        "sweeps": [_describe_sweep(part, found, records) for part in parts if isinstance(part, SweepPart)],
        "inside": render_fragment(list(found.analyses.values())) if found.analyses else "",
        "missing_figures": [
            (FIGURES[part.strategy], _say_state(records[part.name]))
            for part in parts
            if isinstance(part, FigurePart) and part.strategy not in found.analyses
        ],
        "figure_claims": figures,
        "figure_note": NOTE,
        "assumptions": _list_assumptions(found),
        "environment": describe_environment(grid.device),
        "commit": grid.commit,
        "bill": measure_spent(grid.open_store(), out),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("physioray", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(content)


def _find_ratios(found: Found) -> SweepResult | None:
    """The sweep of figure 3, by full finetuning as in the paper where there is one."""
    for name in ("mask_ratio-finetune", "mask_ratio-probe"):
        if name in found.sweeps:
            return found.sweeps[name]
    return None


def _render_tables(filled: FilledGrid | None) -> str:
    """The tables' own section; its assumptions stand in that of the page."""
    if filled is None:
        return ""
    context = replace(filled.context, assumptions={})
    return render_html(filled.tables, filled.claims, context, fragment=True)


def _count_claims(filled: FilledGrid | None, figures: Sequence[FigureClaim]) -> list[tuple[str, int, int]]:
    """By verdict: claims on scores (under the converged probe, where probes matter), and sentences on figures."""
    claims = [] if filled is None else [c for c in filled.claims if c.evaluation in ("", CONVERGED)]
    scores = Counter(claim.judgement.verdict for claim in claims)
    drawn = Counter(claim.verdict for claim in figures)
    return [(verdict, scores[verdict], drawn[verdict]) for verdict in VERDICTS]


def _say_state(record: PartRecord) -> str:
    return f"{record.state}: {record.reason}" if record.reason else record.state


def _describe_sweep(part: SweepPart, found: Found, records: Mapping[str, PartRecord]) -> dict[str, Any]:
    """A sweep for the page: its curve, and every finished trial as a row."""
    result = found.sweeps.get(part.name)
    described: dict[str, Any] = {
        "title": part.title,
        "question": part.recipe.question,
        "state": _say_state(records[part.name]),
        "finished": records[part.name].state == "done",
        "figure": None,
        "columns": (),
        "rows": (),
        "summary": "",
        "failed": (),
    }
    if result is None:
        return described
    names = list(result.settings["order"])
    done = [trial for trial in result.trials if trial.state == "finished" and "sleep" in trial.last]
    if not part.recipe.trials:
        done.sort(key=lambda trial: [_order(trial.parameters[name]) for name in names])
    else:
        done.sort(key=lambda trial: -trial.last["sleep"])
    alt = f"{part.title}: balanced accuracy of sleep stages with intervals; the same numbers stand in the table below"
    tasks = [task for task in ("sleep", "age", "arousal") if any(task in trial.last for trial in done)]
    return described | {
        "figure": plot_field(result, result.objectives[0], f"field-{part.name}", alt),
        "columns": (*(_title(name) for name in names), *tasks, "passes"),
        "rows": [
            (
                *(format_value(trial.parameters[name]) for name in names),
                *(_show_score(trial.last, task) for task in tasks),
                f"{trial.last['epoch']:g}",
            )
            for trial in done
        ],
        "summary": summarise_sweep(result),
        "failed": [(trial.number, trial.reason) for trial in result.trials if trial.state == "failed"],
    }


def _order(value: Any) -> tuple[float, str]:
    """Numbers by size, all else by name."""
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _title(name: str) -> str:
    return name.rsplit(".", 1)[-1].replace("_", " ")


def _show_score(line: Mapping[str, float], task: str) -> str:
    if task not in line:
        return "-"
    low, high = line.get(f"{task}_low"), line.get(f"{task}_high")
    bounds = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{line[task]:.3f}{bounds}"


def _list_assumptions(found: Found) -> list[tuple[str, str]]:
    """Whatever the paper leaves open and the runs have decided."""
    known = {} if found.filled is None else dict(found.filled.context.assumptions)
    for analysis in found.analyses.values():
        known |= {name: str(value) for name, value in analysis.facts.get("assumptions", {}).items()}
    return sorted(known.items())

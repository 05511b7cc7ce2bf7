"""Writes one self-contained HTML page about a sweep, and its table for the terminal, from the sweep's folder alone."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from physioray.storage import Location
from physioray.sweep_figures import (
    plot_courses,
    plot_field,
    plot_history,
    plot_parallel,
    plot_slices,
    plot_tradeoff,
)
from physioray.sweep_journal import TRIALS, SweepResult, TrialRecord, read_sweep
from physioray.sweep_plan import EPOCH, SECONDS
from physioray.sweep_trial import RUN

SWEEP_PAGE = "sweep.html"
IMPORTANCE_FILE = "importance.json"
TEMPLATE = "sweep.html.jinja"
SHOWN = 10
"""Trials in the table of the best."""


def write_sweep_report(out: str | os.PathLike[str] | Location) -> Location:
    """Write `sweep.html` into a sweep's folder: best trials, importance, history, slices, parallel coordinates.

    Works while the sweep runs, and after; nothing is computed anew.

    Args:
        out: path or URI of the sweep's folder.

    Returns:
        Where the page stands.

    Raises:
        StorageError: there is no sweep.
    """
    result = read_sweep(out)
    importance = (result.folder / IMPORTANCE_FILE).read_json() if (result.folder / IMPORTANCE_FILE).exists() else {}
    text = resources.files("physioray.templates").joinpath(TEMPLATE).read_text("utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    place = result.folder / SWEEP_PAGE
    place.write_text(page.render(_gather(result, importance)))
    return place


def _gather(result: SweepResult, importance: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    first, *others = result.objectives
    order, ranked = result.settings["order"], result.rank()
    return {
        "simulated": result.simulated,
        "objectives": result.objectives,
        "names": order,
        "summary": summarise_sweep(result),
        "best": ranked[0] if ranked else None,
        "best_settings": _list_settings(result, ranked[0]) if ranked else [],
        "command": fill_command(result),
        "metrics": [objective.metric for objective in result.objectives],
        "rows": [_list_cells(result, trial) for trial in ranked[:SHOWN]],
        "finished": len(ranked),
        "failed": [trial for trial in result.trials if trial.state == "failed"],
        "importance": {metric: sorted(shares.items(), key=lambda i: -i[1]) for metric, shares in importance.items()},
        "field": plot_field(result, first),
        "history": [plot_history(result, objective) for objective in result.objectives],
        "courses": plot_courses(result, first),
        "slices": plot_slices(result, first),
        "parallel": plot_parallel(result, first),
        "tradeoffs": [plot_tradeoff(result, first, other) for other in others],
        "settings": result.settings,
    }


def _list_settings(result: SweepResult, trial: TrialRecord) -> list[tuple[str, str, bool]]:
    """Every setting of a trial: name, value, and whether the sweep varied it."""
    flat = result.settings["base"] | dict(trial.parameters)
    return [(name, format_value(value), name in trial.parameters) for name, value in flat.items()]


def _list_cells(result: SweepResult, trial: TrialRecord) -> dict[str, Any]:
    return {
        "number": trial.number,
        "scores": [_format_score(trial, objective.metric) for objective in result.objectives],
        "values": [format_value(trial.parameters[name]) for name in result.settings["order"]],
        "passes": f"{trial.last.get(EPOCH, 0):g}",
        "seconds": f"{trial.last.get(SECONDS, 0):.0f}",
    }


def _format_score(trial: TrialRecord, metric: str) -> str:
    if metric not in trial.last:
        return "-"
    low, high = trial.last.get(f"{metric}_low"), trial.last.get(f"{metric}_high")
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{trial.last[metric]:.4g}{interval}"


def format_value(value: Any) -> str:
    """A setting as it is shown in tables."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(format_value, value)) if isinstance(value, list | tuple) else str(value)


def fill_command(result: SweepResult) -> str:
    """The command that evaluates the best trial on test subjects; empty if none was given or no trial has finished."""
    command, best = result.settings["evaluate_command"], result.best
    if not command or best is None:
        return ""
    folder = result.folder / TRIALS / best.name / RUN
    return str(command).replace("{number}", str(best.number)).replace("{folder}", str(folder))


def summarise_sweep(result: SweepResult) -> str:
    """The sweep in one sentence: how many trials, and what became of them."""
    passes = sum(trial.last.get(EPOCH, 0.0) for trial in result.trials)
    counts = [f"{result.count(state)} {state}" for state in ("finished", "stopped", "failed") if result.count(state)]
    waiting = result.settings["trials"] - sum(trial.state != "planned" for trial in result.trials)
    if waiting > 0:
        counts.append(f"{waiting} not ended yet")
    return f"{result.settings['trials']} trials ({', '.join(counts)}), {passes:g} passes in all"


def describe_sweep(result: SweepResult) -> str:
    """The best trials as a table for the terminal, and the command that evaluates the best on test subjects."""
    sink = io.StringIO()
    console = Console(file=sink, width=118, highlight=False, color_system=None)
    if result.simulated:
        console.print("SIMULATED SIGNALS: these scores say nothing about people.")
    console.print(summarise_sweep(result), markup=False)
    rows = [_list_cells(result, trial) for trial in result.rank()[:SHOWN]]
    metrics = [f"{objective.metric} ({objective.mode})" for objective in result.objectives]
    table = Table("Trial", *metrics, *result.settings["order"], "passes", "seconds")
    for row in rows:
        table.add_row(str(row["number"]), *row["scores"], *row["values"], row["passes"], row["seconds"])
    console.print(table)
    for trial in result.trials:
        if trial.state == "failed":
            console.print(f"Trial {trial.number} failed: {trial.reason}", markup=False)
    if command := fill_command(result):
        console.print(
            "Scores above are of validation subjects. Evaluate the best on test subjects, once:", markup=False
        )
        console.print(f"  {command}", markup=False, soft_wrap=True)
    return sink.getvalue()

"""Writes one self-contained HTML page about a run, from its result files alone: no model is loaded.

Every file is optional. What is missing leaves a line that says so.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from physioray.figures import (
    find_runs,
    plot_confusion,
    plot_hypnogram,
    plot_losses,
    plot_probe_curve,
    plot_reconstructions,
)
from physioray.metrics import AGGREGATE
from physioray.results import (
    CONVERGED,
    EVALUATIONS,
    FEATURES,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    ScoreRow,
    read_predictions,
    read_results,
)
from physioray.score_tables import (
    EVALUATION_TITLES,
    FEATURE_TITLES,
    PAPER_SCORES,
    PAPER_TITLE,
    find_chance,
    list_skipped,
    list_tasks,
    tabulate_headline,
    tabulate_metric,
    tabulate_scopes,
    tabulate_sizes,
)
from physioray.scoring import count_confusions
from physioray.signals import TASKS, WINDOW_SECONDS, find_task
from physioray.storage import Location

REPORT_FILE = "report.html"
TEMPLATE = "report.html.jinja"

SHORTEST_RUN = 40
"""A hypnogram needs this many windows (20 min) in a row without a jump: below it there is no course to see."""


def write_report(run: Location, reference: Mapping[str, tuple[float, float]] | None = None) -> Location:
    """Write `report.html` into a run's folder.

    Args:
        run: folder with some of card.json, config.json, results.jsonl, training.jsonl, probe_curve.jsonl,
            predictions.parquet, reconstructions.npz, verdict.json, notes.json, environment.json.
        reference: published balanced accuracy and spread by task, shown as other data; the paper's if None.

    Returns:
        Where the page stands.
    """
    missing: list[str] = []
    card = _read(run, "card.json", Location.read_json, missing) or {}
    rows: list[ScoreRow] = _read(run, RESULTS_FILE, read_results, missing) or []
    config = _read(run, "config.json", Location.read_json, missing) or {}
    predictions = _read(run, PREDICTIONS_FILE, read_predictions, missing)
    content = {
        "card": card,
        "facts": _list_facts(card, rows),
        "simulated": bool(card.get("simulated")) or any(row.simulated for row in rows),
        "verdict": _read(run, "verdict.json", Location.read_json, missing) or [],
        "notes": (run / "notes.json").read_json() if (run / "notes.json").exists() else [],
        "scores": _arrange_scores(rows, PAPER_SCORES if reference is None else reference),
        "training": _draw_training(_read(run, "training.jsonl", _read_lines, missing) or []),
        "curves": _draw_curves(_read(run, "probe_curve.jsonl", _read_lines, missing) or []),
        "hypnogram": _draw_hypnogram(predictions, card),
        "confusions": _draw_confusions(predictions),
        "reconstructions": _draw_reconstructions(_read(run, "reconstructions.npz", _read_arrays, missing) or {}),
        "assumptions": _merge_assumptions(card, config),
        "config": json.dumps(config, indent=1, sort_keys=True) if config else "",
        "environment": _read_environment(run, card, config),
        "missing": missing,
        "paper_title": PAPER_TITLE,
    }
    text = resources.files("physioray.templates").joinpath(TEMPLATE).read_text("utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    place = run / REPORT_FILE
    place.write_text(page.render(content))
    return place


def _read(run: Location, name: str, read: Callable[[Location], Any], missing: list[str]) -> Any:
    place = run / name
    if not place.exists():
        missing.append(f"{name} is not there: what it would show is left out.")
        return None
    try:
        return read(place)
    except (OSError, ValueError, pa.ArrowException) as error:
        missing.append(f"{name} cannot be read ({error}): what it would show is left out.")
        return None


def _read_lines(place: Location) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text().splitlines() if line.strip()]


def _read_arrays(place: Location) -> dict[str, np.ndarray]:
    # Pickled objects are refused: a result file never runs code.
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "rates"}


def _list_facts(card: Mapping[str, Any], rows: Sequence[ScoreRow]) -> list[tuple[str, str]]:
    facts = []
    for name, title, form in (
        ("name", "Cohort", "{}"),
        ("subjects", "Subjects", "{:,}"),
        ("recordings", "Recordings", "{:,}"),
        ("hours", "Hours of signal", "{:,.1f}"),
        ("windows", f"Windows of {WINDOW_SECONDS} s", "{:,}"),
    ):
        if card.get(name) is not None:
            facts.append((title, form.format(card[name])))
    counts, priors = card.get("class_counts", {}), card.get("priors", {})
    for task in TASKS.values():
        if sum(counts.get(task.name) or []):
            shares = priors.get(task.name) or [count / sum(counts[task.name]) for count in counts[task.name]]
            parts = [
                f"{label} {count:,} ({share:.1%})"
                for label, count, share in zip(task.classes, counts[task.name], shares, strict=True)
            ]
            facts.append((task.title, ", ".join(parts)))
        elif counts:
            facts.append((task.title, "no labels"))
    protocols = {row.split for row in rows if row.value is not None}
    if protocols:
        phrases = {
            "test": "held-out test subjects",
            "cross_validation": "cross-validation by subject",
            "validation": "validation subjects (settings still being chosen)",
            "validation_cross_validation": "cross-validation without the test subjects (settings still being chosen)",
        }
        facts.append(("Protocol", ", ".join(sorted(phrases.get(name, name) for name in protocols))))
        facts.append(("Cohort fingerprint", rows[0].cohort_fingerprint[:16]))
    return facts


def _arrange_scores(rows: Sequence[ScoreRow], reference: Mapping[str, tuple[float, float]]) -> dict[str, Any] | None:
    if not rows:
        return None
    tasks = list_tasks(rows)
    scored = {row.task for row in rows if row.value is not None}
    aggregates = [row for row in rows if row.task == AGGREGATE]
    columns = [*tasks, AGGREGATE] if aggregates else list(tasks)
    notes = {row.note for row in aggregates if row.note}
    return {
        "headline": tabulate_headline(rows),
        "chance": [f"{find_chance(rows, name)[0]:.3f}" if name in TASKS else "0" for name in columns],
        "chance_notes": [note for name in tasks if (note := find_chance(rows, name)[1])],
        "scopes": tabulate_scopes(rows),
        "paper": [
            f"{reference[name][0]:.3f} ±{reference[name][1]:.3f}" if name in reference else "-" for name in columns
        ],
        "aggregate_note": ", ".join(sorted(notes)),
        "metrics": [(find_task(task).title, tabulate_metric(rows, task)) for task in tasks if task in scored],
        "sizes": [
            (find_task(task).title, table) for task in tasks if (table := tabulate_sizes(rows, task)) is not None
        ],
        "skipped": list_skipped(rows),
    }


def _draw_training(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not history:
        return None
    passes = [int(line["pass"]) for line in history]
    held_out = [_to_float(line.get("validation_loss")) for line in history]
    figures = [plot_losses("all modalities", passes, [float(line["loss"]) for line in history], held_out)]
    for name in history[-1].get("loss_by_modality") or {}:
        train = [float((line.get("loss_by_modality") or {}).get(name, "nan")) for line in history]
        validation = [_to_float((line.get("validation_loss_by_modality") or {}).get(name)) for line in history]
        figures.append(plot_losses(name, passes, train, validation))
    speeds = [line["windows_per_second"] for line in history if line.get("windows_per_second")]
    waits = [line["wait_share"] for line in history if line.get("wait_share") is not None]
    facts = [f"{passes[-1]} passes, {int(history[-1].get('step', 0)):,} steps"]
    if speeds:
        facts.append(f"{np.median(speeds):,.0f} windows/s (median over passes)")
    if waits:
        facts.append(f"{100 * float(np.median(waits)):.0f} % of the time waiting for data")
    return {"figures": figures, "facts": "; ".join(facts)}


def _to_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _draw_curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = [task for task in TASKS if any(line.get("task") == task for line in lines)]
    known = [line for line in lines if line.get("value") is not None]
    return [plot_probe_curve(task, [line for line in known if line["task"] == task]) for task in tasks]


def _draw_hypnogram(table: pa.Table | None, card: Mapping[str, Any]) -> dict[str, str] | None:
    """One night of the test subjects, or a sentence why none is drawn."""
    if table is None:
        return None
    sleep = table.filter(pc.field("task") == "sleep")
    for column, wanted in (("features", "pretrained"), ("evaluation", CONVERGED)):
        if column in sleep.column_names and wanted in pc.unique(sleep.column(column)).to_pylist():
            sleep = sleep.filter(pc.field(column) == wanted)
    if not len(sleep):
        return {"sentence": "No hypnogram: there are no predictions of sleep stages."}
    sleep = sleep.filter(pc.field("seed") == pc.min(sleep.column("seed")))
    jumps = card.get("discontinuities") or {}
    nights = {}
    for name in pc.unique(sleep.column("recording")).to_pylist():
        night = sleep.filter(pc.field("recording") == name).sort_by("start")
        start, true, predicted = (night.column(key).to_numpy() for key in ("start", "true", "predicted"))
        runs = find_runs(start.astype(float), [float(jump) for jump in jumps.get(name, [])])
        if max(run.stop - run.start for run in runs) >= SHORTEST_RUN:
            nights[name] = (float(np.mean(true == predicted)), start.astype(float), true, predicted, runs)
    if not nights:
        return {
            "sentence": "No hypnogram is drawn across jumps: no recording here has "
            f"{SHORTEST_RUN * WINDOW_SECONDS // 60} minutes of scored signal without one."
        }
    # The night of median agreement: neither the best nor the worst is typical.
    ranked = sorted(nights, key=lambda name: (nights[name][0], name))
    chosen = ranked[len(ranked) // 2]
    agreement, start, true, predicted, runs = nights[chosen]
    features = sleep.column("features")[0].as_py() if "features" in sleep.column_names else ""
    return {
        "figure": plot_hypnogram(start, true.astype(np.int64), predicted.astype(np.int64), runs),
        "caption": f"Recording {chosen}, a test night with the median agreement of {len(nights)}: {agreement:.0%} of "
        f"{len(true):,} windows ({features.replace('_', ' ')}). REM in orange; stages from top to bottom "
        f"{', '.join(('W', 'REM', 'N1', 'N2', 'N3'))}. Lines break where the recording does.",
    }


def _draw_confusions(table: pa.Table | None) -> dict[str, Any] | None:
    """Confusion matrices of the headline probe on the best known features, windows of all seeds together."""
    if table is None or not len(table):
        return None
    counts = count_confusions(table)
    ways = {(features, evaluation) for _, features, evaluation, _ in counts}
    # The headline probe of the best known features; names that are not known come last.
    evaluation = min((way[1] for way in ways), key=[*EVALUATIONS, *(way[1] for way in ways)].index)
    features = min((way[0] for way in ways if way[1] == evaluation), key=[*FEATURES, *(way[0] for way in ways)].index)
    figures, most = [], 0
    for task in TASKS:
        mine = [counts[key] for key in counts if key[:3] == (task, features, evaluation)]
        if mine:
            most = max(most, len(mine))
            figures.append(plot_confusion(task, np.sum(mine, axis=0)))
    title = f"{FEATURE_TITLES.get(features, features)}, {EVALUATION_TITLES.get(evaluation, evaluation)}"
    return {"figures": figures, "caption": title, "seeds": most}


def _draw_reconstructions(arrays: Mapping[str, np.ndarray]) -> list[str]:
    figures = []
    for key in arrays:
        name = key.removesuffix("_target")
        parts = [arrays.get(f"{name}_{part}") for part in ("target", "output", "visible")]
        if name == key or any(part is None for part in parts):
            continue
        target, output, visible = parts
        assert target is not None and output is not None and visible is not None
        present = arrays.get(f"{name}_present", np.ones(len(target), bool)).astype(bool)
        if present.any():
            figures.append(
                plot_reconstructions(
                    name, target.astype(np.float32), output.astype(np.float32), visible.astype(bool), present
                )
            )
    return figures


def _merge_assumptions(card: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    merged: dict[str, str] = {}
    for source in (card, config):
        found = source.get("assumptions") or {}
        # A card may hold plain sentences instead of fields and values.
        merged |= found if isinstance(found, dict) else {sentence: "" for sentence in found}
    return sorted(merged.items())


def _read_environment(run: Location, card: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    place = run / "environment.json"
    found = place.read_json() if place.exists() else config.get("environment") or card.get("environment") or {}
    return sorted((str(name), str(value)) for name, value in found.items())


def describe_results(run: Location) -> str:
    """The scores of a run as a table for the terminal, verdict first.

    Raises:
        FileNotFoundError: the run has no results.jsonl.
    """
    rows = read_results(run / RESULTS_FILE)
    sink = io.StringIO()
    console = Console(file=sink, width=118, highlight=False, color_system=None)
    if any(row.simulated for row in rows):
        console.print("SIMULATED SIGNALS: these scores say nothing about people.")
    if (run / "verdict.json").exists():
        for sentence in (run / "verdict.json").read_json():
            console.print(sentence)
    headline = tabulate_headline(rows)
    table = Table("Balanced accuracy", *headline.columns, title_justify="left")
    for row in headline.rows:
        table.add_row(f"{row.title}, {row.subtitle}", *[cell.describe() for cell in row.cells])
    chances = [find_chance(rows, task) for task in list_tasks(rows)]
    table.add_row(*["chance", *[f"{chance:.3f}" for chance, _ in chances]])
    console.print(table)
    scopes = tabulate_scopes(rows)
    if scopes is not None:
        other = Table("Balanced accuracy", *scopes.columns, title_justify="left")
        for row in scopes.rows:
            other.add_row(f"{row.title}, {row.subtitle}", *[cell.describe() for cell in row.cells])
        console.print(other)
    for _, note in chances:
        if note:
            console.print(f"{note}.", markup=False)
    console.print("[ ]: 95 % interval by subject; ±: standard deviation over seeds.", markup=False)
    for sentence in list_skipped(rows):
        console.print(sentence, markup=False)
    return sink.getvalue()

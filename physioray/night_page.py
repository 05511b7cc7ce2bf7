"""Writes one self-contained HTML page about one recording as a model sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from physioray.signals import TASKS, find_modality, find_task

TEMPLATE = "night.html.jinja"


def render_page(summary: Mapping[str, Any], description: Mapping[str, Any], figure: str, files: Sequence[str]) -> str:
    """The page as text.

    Args:
        summary: what `infer.summarise_night` says of the recording.
        description: what is known of the model, see `origins`.
        figure: an SVG element.
        files: what else stands in the folder.
    """
    text = resources.files("physioray.templates").joinpath(TEMPLATE).read_text("utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return page.render(
        summary=summary,
        model=description,
        figure=figure,
        files=files,
        channels=list_channels(summary, description),
        tasks={name: find_task(name) for name in TASKS if name in summary["tasks"]},
        missing=state_missing(summary, description),
        losses=tabulate_losses(description["missing_modalities"]),
    )


def list_channels(summary: Mapping[str, Any], description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per modality of the model: its channel, amplitude beside that of the training cohort, and what is absent."""
    rows = []
    checks = description["cohort"].get("amplitude_checks", {})
    for name, share in summary["modalities"].items():
        modality, facts, check = find_modality(name), summary["channels"].get(name), checks.get(name, {})
        row: dict[str, Any] = {"name": name, "share": share["share"], "present": share["present_windows"]}
        row["expected"] = f"{modality.plausible[0]:g} to {modality.plausible[1]:g} {modality.unit}"
        if check.get("median") is not None:
            row["trained"] = f"{check['median']:.3g} ({check['minimum']:.3g} to {check['maximum']:.3g})"
        if facts:
            row |= {
                "channel": facts["channel"],
                "rate": f"{facts['source_rate']:g} Hz",
                "spread": f"{facts['robust_std']:.3g} {facts['unit']}",
                "plausible": facts["plausible"],
                "causes": ", ".join(f"{cause} {n}" for cause, n in sorted(facts["absent_windows"].items()) if n),
            }
        else:
            row["reason"] = summary["absent"].get(name, "")
        rows.append(row)
    return rows


def state_missing(summary: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """What the absent modalities of this recording cost, as measured on the model's own validation subjects."""
    names = list(summary["modalities"])
    here = [name for name in names if summary["modalities"][name]["present_windows"]]
    gone = [name for name in names if name not in here]
    measured = description["missing_modalities"]
    if not gone:
        partly = [name for name in names if summary["modalities"][name]["share"] < 1]
        if not partly:
            return ["Every modality that the model knows was present throughout."]
        return [f"Every modality that the model knows was present; {', '.join(partly)} not in every window."]
    lines = [f"This recording has no {', '.join(gone)}; the model saw {', '.join(here) or 'nothing'}."]
    rows = [row for row in measured["rows"] if set(row["present"]) == set(here)]
    lines += [_state_change(row) for row in rows]
    if not rows:
        lines.append(
            "What that costs was not measured for this combination; below is what each modality costs or gives alone."
            if measured["rows"]
            else measured["sentence"]
        )
    return lines


def _state_change(row: Mapping[str, Any]) -> str:
    interval = ""
    if row["change_low"] is not None:
        interval = f" [{row['change_low']:+.3f}, {row['change_high']:+.3f}]"
    return (
        f"{find_task(row['task']).title}: with {', '.join(row['present'])} alone, balanced accuracy on the validation "
        f"subjects was {row['value']:.3f} instead of {row['whole']:.3f}: {row['change']:+.3f}{interval} "
        f"(chance {row['chance']:.2f}; {row['subjects']} people)."
    )


def tabulate_losses(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores without modalities as lines of a table: one line a subset, one cell a task."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in measured["rows"]:
        key = tuple(row["present"])
        title = "all modalities" if not row["absent"] else f"only {', '.join(key)}"
        if len(row["absent"]) == 1 and len(key) > 1:
            title = f"without {row['absent'][0]}"
        line = lines.setdefault(key, {"title": title, "cells": {}})
        line["cells"][row["task"]] = row
    return list(lines.values())

"""Prints a cohort's card: whose nights these are, what they are labelled with, and what is doubtful about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from physioray.data.cohort import Cohort
from physioray.data.manifest import LEDGER_FILE
from physioray.signals import SPLITS, TASKS

_NAMED = 20
_WIDTH = 100


def describe_cohort(cohort: Cohort, *, width: int = _WIDTH, color: bool = False) -> str:
    """The card of a cohort as text.

    Args:
        cohort: a finished cohort.
        width: characters of a line.
        color: with the terminal's colours.

    Returns:
        Sizes by split, class counts and priors, channels used with their amplitudes, what was rejected and why.
    """
    manifest = cohort.manifest
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False)
    _print_heading(console, cohort)
    console.print(_tabulate_splits(manifest))
    for note in manifest["splits"]["notes"]:
        _say(console, note)
    sizes = manifest["splits"]["training_subsets"]
    if sizes and not manifest["splits"]["notes"]:
        _say(console, f"Nested training subsets: {', '.join(map(str, sizes))} subjects.")
    for name, task in TASKS.items():
        if sum(manifest["class_counts"][name]):
            console.print(_tabulate_classes(manifest, name))
        else:
            _say(console, f"{task.title}: no labels.")
    _say(console, _describe_arousal_rule(manifest["settings"]["arousal_rule"]))
    if manifest.get("stage_names"):
        _say(console, f"Stages: {', '.join(f'{name} = {stage}' for name, stage in manifest['stage_names'].items())}.")
    choices = manifest["settings"].get("montage", {}).get("choices", [])
    if choices:
        _say(console, f"Channels chosen by the user for {', '.join(dict.fromkeys(choice[0] for choice in choices))}.")
    _say(console, f"Age: older means at least {manifest['settings']['age_threshold']:g} years.")
    console.print(_tabulate_channels(manifest))
    _print_doubts(console, manifest, _read_facts(cohort))
    _print_rejected(console, manifest["rejected"])
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _say(console: Console, text: str) -> None:
    # Reasons and names may hold brackets, which rich would take for its own markup.
    console.print(text, markup=False)


def _print_heading(console: Console, cohort: Cohort) -> None:
    manifest, counts = cohort.manifest, cohort.manifest["counts"]
    if cohort.simulated:
        _say(console, "SIMULATED NIGHTS: nothing here was measured on a person.")
    _say(console, f"Cohort {cohort.location}, from {manifest['source']}")
    _say(
        console,
        f"{counts['subjects']:,} subjects, {counts['recordings']:,} recordings ({counts['rejected']:,} rejected), "
        f"{counts['hours']:,.1f} h, {counts['windows']:,} windows of 30 s",
    )
    _say(console, f"Fingerprint {cohort.fingerprint[:12]}, {manifest['code_version']}")


def _make_table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _tabulate_splits(manifest: Mapping[str, Any]) -> Table:
    table = _make_table("Splits, by subject", "split", ("subjects", "recordings", "hours", "windows"))
    for split in SPLITS:
        size = manifest["splits"]["sizes"][split]
        numbers = (size["subjects"], size["recordings"], f"{size['hours']:,.1f}", f"{size['windows']:,}")
        table.add_row(split, *map(str, numbers))
    return table


def _tabulate_classes(manifest: Mapping[str, Any], name: str) -> Table:
    """Windows per class and split, the sum, and the prior among labelled windows."""
    task = TASKS[name]
    table = _make_table(f"{task.title}: labelled windows", "split", task.classes)
    for split in SPLITS:
        table.add_row(split, *(f"{count:,}" for count in manifest["class_counts_by_split"][split][name]))
    table.add_row("all", *(f"{count:,}" for count in manifest["class_counts"][name]))
    table.add_row("prior", *(f"{prior:.2%}" for prior in manifest["priors"][name]))
    return table


def _describe_arousal_rule(rule: Mapping[str, Any]) -> str:
    if rule["kind"] == "any":
        text = "one sample of target arousal makes a window an arousal"
    else:
        text = f"a window is an arousal if target arousal covers at least {rule['min_fraction']:.0%} of it"
    unscored = "are kept" if rule["unscored"] == "negative" else "have no arousal label"
    return f"Arousal rule: {text}; windows with samples marked not scored {unscored}."


def _tabulate_channels(manifest: Mapping[str, Any]) -> Table:
    columns = ("rate (Hz)", "present", "channels (recordings)", "spread: median (range)", "plausible")
    table = _make_table("Modalities", "modality", columns)
    for name in manifest["settings"]["modalities"]:
        modality, check = manifest["modalities"][name], manifest["amplitude_checks"][name]
        used = ", ".join(f"{channel} ({count})" for channel, count in manifest["channels"][name].items())
        spread = "none"
        if check["median"] is not None:
            spread = f"{check['median']:.3g} ({check['minimum']:.3g} to {check['maximum']:.3g}) {check['unit']}"
        table.add_row(
            name,
            str(modality["rate"]),
            f"{manifest['present_share'][name]:.1%}",
            used or "none",
            spread,
            "{:g} to {:g}".format(*check["plausible"]),
        )
    return table


def _read_facts(cohort: Cohort) -> list[dict[str, Any]]:
    content = (cohort.location / LEDGER_FILE).read_bytes()
    # Without Arrow's threads: when one is still alive as a short program ends, it now and then aborts the process
    # (apache/arrow issue 34314).
    file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
    column = file.read(columns=["facts"], use_threads=False).column("facts")
    return [json.loads(text) for text in column.to_pylist() if text]


def _print_doubts(console: Console, manifest: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> None:
    """Implausible amplitudes, windows in which a modality is absent, and modalities that recordings lack."""
    for name, check in manifest["amplitude_checks"].items():
        if check["implausible"]:
            _say(console, f"Amplitude of {name} doubtful (unit or electrode?): {_name_some(check['implausible'])}")
    for name in manifest["modalities"]:
        causes: Counter[str] = Counter()
        for entry in facts:
            if name in entry["channels"]:
                causes.update(entry["channels"][name]["absent_windows"])
        told = ", ".join(f"{cause} {count:,}" for cause, count in sorted(causes.items()) if count)
        if told:
            holders = [
                entry["recording"]
                for entry in facts
                if name in entry["channels"] and any(entry["channels"][name]["absent_windows"].values())
            ]
            _say(console, f"Windows without {name}: {told}, in {_name_some(holders)}.")
        reasons: dict[str, list[str]] = {}
        for entry in facts:
            if name in entry["absent_modalities"]:
                reasons.setdefault(entry["absent_modalities"][name], []).append(entry["recording"])
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))[:_NAMED]:
            _say(console, f"No {name} in {_name_some(names)}: {reason}")
    _print_warnings(console, facts)
    jumps = sum(len(entry["discontinuities"]) for entry in facts)
    if jumps:
        jumping = sum(bool(entry["discontinuities"]) for entry in facts)
        _say(console, f"Jumps: {jumps:,} in {jumping} recordings; no filter, pair or hypnogram goes across them.")


def _print_warnings(console: Console, facts: Sequence[Mapping[str, Any]]) -> None:
    """What ingest noticed about accepted recordings: bad ages, checksums that do not fit, events without an end."""
    told = [f"  {entry['recording']}: {warning}" for entry in facts for warning in entry["warnings"]]
    if told:
        _say(console, f"Warnings about accepted recordings, {len(told)}:")
        for line in told[:_NAMED]:
            _say(console, line)
        if len(told) > _NAMED:
            _say(console, f"  and {len(told) - _NAMED} more: see {LEDGER_FILE}")


def _print_rejected(console: Console, rejected: Sequence[Mapping[str, str]]) -> None:
    if not rejected:
        _say(console, "No recording was rejected.")
        return
    _say(console, f"Rejected, {len(rejected)}:")
    for row in rejected[:_NAMED]:
        _say(console, f"  {row['path']}: {row['reason']}")
    if len(rejected) > _NAMED:
        _say(console, f"  and {len(rejected) - _NAMED} more: see {LEDGER_FILE}")


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

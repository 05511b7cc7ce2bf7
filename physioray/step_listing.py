"""Lists the steps of a store for people, and removes what nothing refers to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from physioray.progress import format_seconds
from physioray.signals import LookupMiss
from physioray.steps import StepDamaged, StepRecord, StepStore, check_files
from physioray.storage import DONE


def print_steps(store: StepStore, console: Console | None = None) -> None:
    """Print every step with state, size, age, time it took, what it was made from and whether anything refers to it."""
    console = console or Console()
    records = store.list_steps()
    if not records:
        console.print(f"No step has been computed in {store.root} yet.")
        return
    table = Table(title=f"Steps in {store.root}", title_justify="left")
    for title in ("step", "identity", "state", "size", "age", "took", "made from", "of", "referred to"):
        table.add_column(title, justify="right" if title in ("size", "age", "took") else "left")
    names = {record.identity: record.name for record in records}
    for record in records:
        made = ", ".join(
            f"{names.get(identity, role)} {identity[:8]}" for role, identity in sorted(record.inputs.items())
        )
        table.add_row(
            record.name,
            record.identity[:12],
            record.state,
            format_bytes(record.bytes),
            format_seconds(time.time() - record.created) if record.created else "",
            "" if record.seconds is None else format_seconds(record.seconds),
            made if len(made) <= 60 else f"{made[:57]}...",
            describe_settings(record.settings),
            "yes" if record.referred else "no",
        )
    console.print(table)
    spare = [record for record in records if not record.referred and record.state != "running"]
    total = format_bytes(sum(record.bytes for record in records))
    console.print(
        f"{len(records)} steps, {total}. Nothing refers to {len(spare)} of them "
        f"({format_bytes(sum(record.bytes for record in spare))}); --remove-unreferenced deletes those."
    )


def remove_steps(store: StepStore, *, identity: str | None = None) -> list[StepRecord]:
    """Delete one step by (the beginning of) its identity, or every step that nothing refers to if None.

    Returns:
        What was deleted.

    Raises:
        LookupMiss: no step, or more than one, has such an identity.
    """
    records = store.list_steps()
    if identity is None:
        chosen = [record for record in records if not record.referred and record.state != "running"]
    else:
        chosen = [record for record in records if record.identity.startswith(identity)]
        if len(chosen) != 1:
            known = ", ".join(f"{record.name} {record.identity[:12]}" for record in chosen or records[:10])
            raise LookupMiss(
                f"An identity must begin that of one step, but {identity!r} begins {len(chosen)}. There are: {known}."
            )
    store.remove(chosen)
    return chosen


def verify_steps(store: StepStore) -> list[str]:
    """Compare every file of every finished step with its hash; sentences about those that differ."""
    damaged = []
    for record in store.list_steps():
        if record.state in ("done", "damaged"):
            try:
                check_files(record.folder, (record.folder / DONE).read_json())
            except (StepDamaged, ValueError, KeyError) as error:
                damaged.append(f"{record.name} {record.identity[:12]}: {error}")
    return damaged


def format_bytes(count: float) -> str:
    """A size as people say it: `640 B`, `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def describe_settings(settings: dict[str, Any] | Any, names: Sequence[str] = ()) -> str:
    """The few settings by which a reader tells steps of one name apart."""
    shown = []
    for name in names or ("features", "pretraining", "task", "checkpoint"):
        if settings.get(name) not in (None, "none"):
            shown.append(str(settings[name]))
    objective, model = settings.get("objective"), settings.get("model")
    if isinstance(objective, dict):
        shown.append(str(objective.get("method") or objective.get("kind")))
    if isinstance(model, dict):
        shown.append("+".join((model.get("model") or model).get("modalities", [])))
    if isinstance(settings.get("train"), dict):
        shown.append(f"{settings['train']['passes']} passes, seed {settings['train']['seed']}")
    return ", ".join(shown)

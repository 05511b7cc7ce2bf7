"""Saves and loads everything the next step of a training run depends on; one file, whole or absent."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from physioray.storage import Location, StorageError

FORMAT = 1


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        pass_number: the pass under way, from 0.
        step_in_pass: steps of that pass already taken.
        step: steps taken in all.
        best: lowest validation loss so far.
        history: one record per finished pass, as written to training.jsonl.
        partial: sums and counts per part of every step of the pass under way, `(2, parts)` each.
        seconds: time spent training, earlier attempts included.
    """

    pass_number: int = 0
    step_in_pass: int = 0
    step: int = 0
    best: float = float("inf")
    history: list[dict[str, Any]] = field(default_factory=list)
    partial: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


def save_checkpoint(
    place: Location,
    *,
    state: TrainState,
    tensors: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Write a checkpoint that loads without running any code (`weights_only=True`).

    Args:
        place: the file; an older one is replaced in one step.
        state: where the run stands.
        tensors: state dictionaries of model, optimiser and gradient scaler.
        identity: what the run was made of (configs, cohort fingerprint); must match on resuming.
    """
    buffer = io.BytesIO()
    partial = torch.stack([item.cpu() for item in state.partial]) if state.partial else torch.empty(0)
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "partial"}
    torch.save({"format": FORMAT, "state": fields, "partial": partial, "identity": identity, **tensors}, buffer)
    place.write_bytes(buffer.getvalue())


def load_checkpoint(place: Location, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint as a dictionary of tensors and plain values.

    Raises:
        StorageError: there is none, or it is damaged or of another format.
    """
    if not place.exists():
        raise StorageError(f"A checkpoint must stand at {place}, but there is none. Has the run finished a pass?")
    try:
        content = torch.load(io.BytesIO(place.read_bytes()), map_location=device, weights_only=True)
    except Exception as error:
        raise StorageError(f"{place} must be a whole checkpoint, but cannot be read: {error}") from error
    if content.get("format") != FORMAT:
        raise StorageError(f"{place} must have checkpoint format {FORMAT}, but has {content.get('format')}.")
    return content


def restore_state(content: dict[str, Any]) -> TrainState:
    """The TrainState of a loaded checkpoint."""
    state = TrainState(**content["state"])
    state.partial = list(content["partial"]) if content["partial"].numel() else []
    return state


def check_identity(content: dict[str, Any], identity: dict[str, Any], place: Location) -> None:
    """Refuse a checkpoint that was made of something else.

    Raises:
        StorageError: names the first entry that differs, and both values.
    """
    for name, wanted in identity.items():
        found = content["identity"].get(name)
        if found != wanted:
            raise StorageError(
                f"{place} must belong to this run, but its {name} is {_first_difference(found, wanted)}. "
                "Choose another output folder, or the settings the run was started with."
            )


def _first_difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key):
                return f"{key}: {_first_difference(found.get(key), wanted.get(key))}"
    return f"{found!r} and not {wanted!r}"

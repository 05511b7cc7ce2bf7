"""Writes a trained model for others: weights, settings, heads and a model card, in files that run no code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import torch

from physioray.absences import MISSING_FILE
from physioray.night_page import tabulate_losses
from physioray.origins import Say, open_model
from physioray.portable import ONNX_FILE, write_onnx
from physioray.pretrained import CONFIG_FILE, HEADS_FILE, HEADS_NOTE, WEIGHTS_FILE, PretrainedModel, pack_model
from physioray.signals import TASKS, find_modality, find_task
from physioray.storage import DONE, Location, StorageError, commit_folder

CARD_FILE = "README.md"
TEMPLATE = "model_card.md.jinja"
_KNOWN = {WEIGHTS_FILE, CONFIG_FILE, HEADS_FILE, HEADS_NOTE, MISSING_FILE, CARD_FILE, DONE, ONNX_FILE}


def export_model(
    place: Location,
    out: Location,
    *,
    onnx: bool = False,
    device: torch.device | str = "cpu",
    say: Say | None = None,
) -> PretrainedModel:
    """Write the model of a run, or of the checkpoint of a finetuning, into a folder for others.

    Args:
        place: the run's folder, or a checkpoint; see `origins.open_model`.
        out: folder to write; an older export in it is replaced.
        onnx: write the encoder as an ONNX network too.
        device: where heads are fitted, if the run has none yet.
        say: takes lines about what has to be done first.

    Returns:
        The model.

    Raises:
        StorageError: there is no such model, or the folder holds other things.
    """
    strangers = sorted({item.name for item in out.list()} - _KNOWN)
    if strangers:
        raise StorageError(
            f"An export needs an empty folder or an older export, but {out} holds {', '.join(strangers[:3])}. "
            "Name another folder."
        )
    model = open_model(place, device=device, say=say)
    write_model(model, out, onnx=onnx)
    return model


def write_model(model: PretrainedModel, out: Location, *, onnx: bool = False) -> None:
    """Write a model's files and its card; the list of files, which makes the folder whole, last."""
    out.make_folder()
    (out / DONE).delete()
    files = pack_model(model)
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / MISSING_FILE).write_json(model.description["missing_modalities"])
    (out / CARD_FILE).write_text(describe_model(model))
    # A network of an older export would not be this model's.
    (out / ONNX_FILE).delete()
    more = [write_onnx(model, out).name] if onnx else []
    commit_folder(out, [*files, MISSING_FILE, CARD_FILE, *more])


def describe_model(model: PretrainedModel) -> str:
    """The model card as Markdown: data, splits, scores with floors, assumptions, licence, simulated or real."""
    text = resources.files("physioray.templates").joinpath(TEMPLATE).read_text("utf-8")
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)  # Markdown, not HTML
    description = model.description
    return page.render(
        model=description,
        features=model.features,
        parameters=sum(item.numel() for item in model.encoder.parameters()),
        modalities=[_list_modality(model, name) for name in model.modalities],
        heads=[_list_head(model, name) for name in TASKS if name in model.readouts],
        losses=tabulate_losses(description["missing_modalities"]),
        tasks=[find_task(name) for name in TASKS if name in model.readouts],
        preprocessing=model.preprocessing,
    )


def _list_modality(model: PretrainedModel, name: str) -> dict[str, Any]:
    modality, cohort = find_modality(name), model.description["cohort"]
    return {
        "name": name,
        "unit": modality.unit,
        "rate": modality.rate,
        "band": f"{modality.band[0]:g}-{modality.band[1]:g} Hz"
        if modality.band[0]
        else f"below {modality.band[1]:g} Hz",
        "channels": _join(cohort.get("channels", {}).get(name, {})),
        "present": cohort.get("present_share", {}).get(name),
        "spread": cohort.get("amplitude_checks", {}).get(name, {}).get("median"),
    }


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "not known"


def _list_head(model: PretrainedModel, name: str) -> dict[str, Any]:
    readout, task = model.readouts[name], find_task(name)
    counts = model.description["cohort"].get("class_counts", {}).get(name, [])
    return {
        "title": task.title,
        "classes": ", ".join(task.classes),
        "counts": ", ".join(f"{label} {count:,}" for label, count in zip(task.classes, counts, strict=False)),
        "readout": readout,
        "penalty": readout.head.penalty,
    }

"""Opens whatever holds a trained model: a run's folder, an exported folder, or the checkpoint of a finetuning.

A run keeps, beside its checkpoints, what its model needs to be used elsewhere: the heads, how it was preprocessed,
what it was trained on, and how its scores fall without a modality. `complete_run` writes that; runs that lack it get
it from their cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from physioray import __version__
from physioray.absences import MISSING_FILE, measure_absences
from physioray.checkpoint import load_checkpoint
from physioray.config import ProbeConfig, TrainConfig, from_dict, hash_config
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.embeddings import Embeddings, embed_windows
from physioray.metrics import AGGREGATE
from physioray.models.heads import Classifier
from physioray.pretrain import choose_checkpoint, find_pretraining_windows, load_encoder, make_encode
from physioray.pretrained import PretrainedModel, is_export, load_model
from physioray.probe import LinearHead
from physioray.readouts import HEADS_NOTE, Readout, fit_readouts, load_readouts, save_readouts
from physioray.results import RESULTS_FILE, read_results
from physioray.score_tables import tabulate_headline
from physioray.signals import SPLITS, TASKS, UNKNOWN, find_task
from physioray.storage import Location, StorageError, hash_bytes, hash_value
from physioray.strategies import Encoder, build_model, name_strategy, restore_settings

ORIGIN_FILE = "origin.json"
_BATCH = 64
_LEVELS = 5
"""How far above a finetuning's checkpoint its config.json may stand: OUT/TASK/PART/checkpoints/last.pt."""

Say = Callable[[str], None]


def describe_origin(cohort: Cohort) -> dict[str, Any]:
    """What of a cohort goes with a model: sizes, labels, channels, amplitudes and preprocessing, never a path."""
    return {
        "cohort": _describe_cohort(cohort),
        "preprocessing": cohort.manifest.get("settings", {}),
        "modalities": {
            name: {"rate": item.rate, "samples": item.samples, "step": item.step}
            for name, item in cohort.modalities.items()
        },
    }


def _describe_cohort(cohort: Cohort) -> dict[str, Any]:
    manifest = cohort.manifest
    kept = ("class_counts", "channels", "present_share", "amplitude_checks", "assumptions", "code_version")
    facts = {name: manifest.get(name, {}) for name in kept}
    sizes = manifest.get("splits", {}).get("sizes", {})
    return {
        **facts,
        "name": cohort.location.name,
        "fingerprint": cohort.fingerprint,
        "simulated": cohort.simulated,
        "subjects": len(cohort.subjects),
        "recordings": len(cohort.recordings),
        "hours": manifest.get("counts", {}).get("hours"),
        "windows": cohort.windows,
        "licence": manifest.get("licence") or "not stated",
        "splits": {name: int(sizes[name]["subjects"]) for name in SPLITS if name in sizes},
    }


def complete_run(
    run: Location,
    *,
    cohort: Cohort | None = None,
    probe: ProbeConfig | None = None,
    device: torch.device | str = "cpu",
    say: Say | None = None,
) -> None:
    """Write what makes a run's model usable elsewhere: heads, origin, and scores without a modality.

    Heads are fitted on the run's `embeddings.arrow` if that is of these weights, else on embeddings made anew.

    Args:
        run: folder with config.json and checkpoints.
        cohort: the run's cohort; found by the path in config.json if None.
        probe: tasks and penalties; the defaults if None.
        device: where to embed.
        say: takes lines about what is done.

    Raises:
        StorageError: the run or its cohort is not there, or the cohort is not the one of the run.
    """
    tell = say or (lambda _: None)
    config = (run / "config.json").read_json()
    cohort = cohort or _open_cohort(run, config)
    place = _find_weights(run, config)
    encoder = load_encoder(place, device)
    _check_cohort(cohort, load_checkpoint(place)["identity"].get("cohort"), run)
    tell("Fitting the heads that the model keeps, and measuring its scores without each modality ...")
    cross_validated = "test" in config.get("splits", ())
    embeddings = _find_embeddings(run, cohort, encoder, device)
    readouts: dict[str, Readout] = {}
    missing = {name: "no window has a label" for name in TASKS}
    if embeddings is not None:
        readouts, missing = fit_readouts(embeddings, cohort, probe or ProbeConfig(), cross_validated=cross_validated)
    decided = "the heads' penalty was chosen" if place.name == "last.pt" else "checkpoint and penalty were chosen"
    absences = measure_absences(encoder, readouts, cohort, device=device, chosen=decided)
    (run / ORIGIN_FILE).write_json(describe_origin(cohort))
    (run / MISSING_FILE).write_json(absences)
    facts = {"weights_sha256": hash_bytes(place.read_bytes()), "without": missing, "cross_validated": cross_validated}
    save_readouts(run, readouts, facts | {"probe": hash_config(probe or ProbeConfig())})


def is_complete(run: Location, probe: ProbeConfig | None = None) -> bool:
    """True if `complete_run` has been through with the run's present weights (and these probes, if any are named)."""
    if any(not (run / name).exists() for name in (HEADS_NOTE, ORIGIN_FILE, MISSING_FILE)):
        return False
    facts = load_readouts(run)[1]
    place = _find_weights(run, (run / "config.json").read_json())
    if probe is not None and facts.get("probe") != hash_config(probe):
        return False
    return bool(facts.get("weights_sha256") == hash_bytes(place.read_bytes()))


def _open_cohort(run: Location, config: dict[str, Any]) -> Cohort:
    try:
        return Cohort.open(config["cohort"])
    except (StorageError, KeyError) as error:
        raise StorageError(
            f"{run} has no fitted heads yet, and to fit them its cohort must be there: {error}"
        ) from error


def _check_cohort(cohort: Cohort, fingerprint: str | None, run: Location) -> None:
    if fingerprint != cohort.fingerprint:
        raise StorageError(
            f"{run} must be used with its own cohort, {str(fingerprint)[:12]}, but {cohort.location} is "
            f"{cohort.fingerprint[:12]}. Ingest with the former settings, or train anew."
        )


def _find_weights(run: Location, config: dict[str, Any]) -> Location:
    return choose_checkpoint(run / "checkpoints", from_dict(TrainConfig, config["train"]))


def _find_embeddings(run: Location, cohort: Cohort, encoder: Encoder, device: torch.device | str) -> Embeddings | None:
    """Embeddings of all windows with a label; those of the run if they are of these weights."""
    names = tuple(encoder.tokens)
    windows = find_pretraining_windows(cohort, SPLITS, names)
    known = np.stack([cohort.read_labels(task)[windows] != UNKNOWN for task in TASKS]).any(0)
    windows = windows[known]
    if not len(windows):
        return None
    place = run / "embeddings.arrow"

    def embed(chosen: np.ndarray) -> Embeddings:
        source = GatherSource(cohort, chosen, batch_size=_BATCH, modalities=names)
        return embed_windows(make_encode(encoder, source.modalities, device), source.iterate_all())

    if place.exists():
        kept = Embeddings.load(place)
        sample = kept.window_id[:: max(1, len(kept) // 8)]
        same = len(sample) and np.isin(sample, windows).all() and kept.vectors.shape[1] == encoder.features
        if same and np.allclose(embed(np.sort(sample)).vectors, kept.vectors[:: max(1, len(kept) // 8)], atol=1e-3):
            return kept
    return embed(windows)


def open_model(place: Location, *, device: torch.device | str = "cpu", say: Say | None = None) -> PretrainedModel:
    """Open an exported folder, a run's folder, or the checkpoint of a finetuning.

    Args:
        place: which one.
        device: where the model is put.
        say: takes lines about what has to be done first.

    Raises:
        StorageError: nothing of that kind stands there; the message says what was looked for.
    """
    if is_export(place):
        return load_model(place).to(device)
    if (place / "checkpoints").exists() and (place / "config.json").exists():
        return _open_run(place, device, say).to(device)
    if place.name.endswith(".pt") and place.exists():
        return _open_checkpoint(place, device, say).to(device)
    raise StorageError(
        f"A model must be a run's folder (config.json and checkpoints/), an exported folder (weights.safetensors) or a "
        f"checkpoint (.pt), but {place} is none of them."
    )


def _open_run(run: Location, device: torch.device | str, say: Say | None) -> PretrainedModel:
    config = (run / "config.json").read_json()
    place = _find_weights(run, config)
    content = load_checkpoint(place)
    digest = hash_bytes(place.read_bytes())
    if not is_complete(run):
        complete_run(run, device=device, say=say)
    readouts, facts = load_readouts(run)
    encoder = load_encoder(place, device)
    description = _describe(content["identity"], digest, (run / ORIGIN_FILE).read_json())
    description |= {
        "assumptions": {**description["cohort"].pop("assumptions", {}), **config.get("assumptions", {})},
        "cross_validated": facts["cross_validated"],
        "without_head": facts["without"],
        "checkpoint": place.name,
        "passes": content["state"]["pass_number"],
        "evaluation": "probe_converged",
        "missing_modalities": (run / MISSING_FILE).read_json(),
        **_read_scores(run),
    }
    return PretrainedModel(encoder, readouts, description)


def _read_scores(run: Location) -> dict[str, Any]:
    """Headline scores beside their floors, how they were measured, and the verdict, as far as the run has them."""
    rows = read_results(run / RESULTS_FILE) if (run / RESULTS_FILE).exists() else []
    skipped = {row.task for row in rows} - {row.task for row in rows if row.value is not None}
    # An aggregate over fewer tasks compares with no other.
    kept = [row for row in rows if row.task not in skipped and not (skipped and row.task == AGGREGATE)]
    table = tabulate_headline(kept)
    lines = [
        {
            "title": row.title,
            "evaluation": row.subtitle,
            "features": row.features,
            "scores": {
                title: {"value": cell.value, "low": cell.low, "high": cell.high, "spread": cell.spread}
                for title, cell in zip(table.columns, row.cells, strict=True)
            },
        }
        for row in table.rows
    ]
    card = (run / "card.json").read_json() if (run / "card.json").exists() else {}
    verdict = (run / "verdict.json").read_json() if (run / "verdict.json").exists() else []
    return {"scores": lines, "protocol": card.get("note", ""), "verdict": verdict}


def _open_checkpoint(place: Location, device: torch.device | str, say: Say | None) -> PretrainedModel:
    """A checkpoint: that of a pretraining stands for its run; that of a finetuning brings its own head."""
    content = load_checkpoint(place)
    identity = content["identity"]
    if "trunk" not in identity:
        run = place.folder.folder
        if (run / "config.json").exists() and _find_weights(run, (run / "config.json").read_json()).name == place.name:
            return _open_run(run, device, say)
        raise StorageError(
            f"{place} must be the checkpoint that its run is judged by, or that of a finetuning, but is neither. "
            "Name the run's folder."
        )
    cohort = _find_cohort(place, identity)
    settings = restore_settings(identity["trunk"]["model"])
    task = find_task(identity["task"])
    model = Classifier(build_model(settings, 0).encoder, len(task.classes))  # type: ignore[arg-type]
    model.load_state_dict(content["model"])
    encoder: Any = model.encoder
    width = encoder.features
    head = LinearHead(
        mean=np.zeros(width),
        scale=np.ones(width),
        weight=model.head.weight.detach().double().numpy(),
        bias=model.head.bias.detach().double().numpy(),
    )
    readouts = {task.name: Readout(head=head, task=task.name, note="Trained together with the encoder.")}
    trunk = {"model": identity["trunk"]["model"], "objective": None, "train": identity.get("train", {}), "splits": []}
    description = _describe(
        trunk, hash_bytes(place.read_bytes()), describe_origin(cohort), identity["trunk"]["strategy"]
    )
    description |= {
        "assumptions": description["cohort"].pop("assumptions", {}),
        "cross_validated": None,
        "without_head": {name: "the encoder was trained on another task" for name in TASKS if name != task.name},
        "checkpoint": place.name,
        "passes": content["state"]["pass_number"],
        "evaluation": identity["evaluation"],
        "missing_modalities": _measure_finetuned(encoder, readouts, cohort, identity, device),
    }
    return PretrainedModel(encoder, readouts, description)


def _measure_finetuned(
    encoder: Encoder,
    readouts: dict[str, Readout],
    cohort: Cohort,
    identity: dict[str, Any],
    device: torch.device | str,
) -> dict[str, Any]:
    """Scores without a modality, if the training's own validation subjects are the cohort's."""
    windows = find_pretraining_windows(cohort, ["validation"], tuple(encoder.tokens))
    windows = windows[cohort.read_labels(identity["task"])[windows] != UNKNOWN]
    if hash_value(windows.tolist()) == identity["windows"]["validation"]:
        return measure_absences(encoder, readouts, cohort, device=device, chosen="the weights were chosen")
    sentence = (
        "Not measured: this is one fold of a cross-validation, and its checkpoint does not name the subjects that it "
        "was validated on."
    )
    return {"modalities": list(encoder.tokens), "simulated": cohort.simulated, "sentence": sentence, "rows": []}


def _find_cohort(place: Location, identity: dict[str, Any]) -> Cohort:
    """The cohort of a finetuning: named by a config.json in one of the folders above its checkpoint."""
    folder = place
    for _ in range(_LEVELS):
        folder = folder.folder
        config = folder / "config.json"
        if config.exists() and "cohort" in config.read_json():
            cohort = Cohort.open(config.read_json()["cohort"])
            _check_cohort(cohort, identity.get("cohort"), place)
            return cohort
    raise StorageError(f"A folder above {place} must hold the config.json of its training, but none does.")


def _describe(
    identity: dict[str, Any], digest: str, origin: dict[str, Any], strategy: str | None = None
) -> dict[str, Any]:
    """The plain values that go with a model; the content of an exported config.json."""
    if strategy is None:
        settings = [restore_settings(identity[part]) for part in ("model", "objective")]
        strategy = name_strategy(settings[0], settings[1])  # type: ignore[arg-type]
    train = {name: list(value) if isinstance(value, tuple) else value for name, value in identity["train"].items()}
    return {
        "physioray": __version__,
        "strategy": strategy,
        "model": identity["model"],
        "objective": identity["objective"],
        "train": train,
        "splits": list(identity["splits"]),
        "weights_sha256": digest,
        "cohort": dict(origin["cohort"]),
        "preprocessing": origin["preprocessing"],
        "modalities": origin["modalities"],
    }

"""Explains a checkpoint on a cohort: attention, source variance, reconstructions; in one process or many."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from physioray.analysis_config import AnalysisConfig
from physioray.analysis_results import Analysis, load_analysis, save_analysis
from physioray.attention_rollout import AttentionSums
from physioray.checkpoint import load_checkpoint
from physioray.config import list_assumptions, to_dict
from physioray.data.batches import order_windows
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource, WindowReader
from physioray.models.fused import FusedEncoder, MaskedAutoencoder
from physioray.observation import TokenGrid, observe
from physioray.pretrain import find_pretraining_windows, load_model
from physioray.reconstruction_quality import ReconstructionSums
from physioray.signals import Split, present_column
from physioray.source_variance import SourceDraws, SourceVarianceSums, measure_source_variance
from physioray.storage import Location, StorageError, dump_json, hash_bytes, hash_value, is_committed, open_location
from physioray.strategies import (
    Encoder,
    ModelSettings,
    ObjectiveSettings,
    build_model,
    name_strategy,
    restore_settings,
)
from physioray.tensors import WindowTensors
from physioray.train import to_tensors

VERSION = 1
"""Of the definitions: raised when the same checkpoint would get other numbers."""

_DRAWS, _CONTEXTS = 1, 2
"""Passes of the order that draws and contexts are taken from, so that they are different windows."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class AnalysisJob:
    """What is looked into, and on what.

    Attributes:
        name: what the figures call it.
        checkpoint: path or URI of a checkpoint (of a pretraining or a finetuning), or of a run's folder.
        cohort: path or URI of the cohort.
        config: how much, and with which choices.
    """

    name: str
    checkpoint: str
    cohort: str
    config: AnalysisConfig = AnalysisConfig()


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint's encoder, in evaluation mode, and the whole masked autoencoder if it is one.

    Attributes:
        strategy: how it was trained, `untrained` before the first step.
        settings: of the model.
        cohort_fingerprint, splits: what it was pretrained on, as far as the checkpoint says.
    """

    encoder: Encoder
    autoencoder: MaskedAutoencoder | None
    strategy: str
    settings: ModelSettings
    cohort_fingerprint: str
    splits: tuple[str, ...]

    @property
    def grid(self) -> TokenGrid:
        """The tokens of a window."""
        return TokenGrid.of(self.encoder.tokens)

    @property
    def layers(self) -> int:
        """Layers of the encoder, or of each where every modality has its own."""
        return self.settings.layers


class AnalysisSums:
    """All that is summed over windows; sums of other windows can be merged in."""

    def __init__(self, opened: OpenedCheckpoint, config: AnalysisConfig, examples: Int64[np.ndarray, " n"]) -> None:
        grid, layers = opened.grid, opened.layers
        self.attention = AttentionSums(grid, layers)
        self.variance = SourceVarianceSums(grid, layers)
        self.reconstruction = (
            None if opened.autoencoder is None else ReconstructionSums(grid, config.hidden_ratio, config.seed, examples)
        )

    def merge(self, other: AnalysisSums) -> None:
        """Add what another reader has summed over other windows of the same job."""
        self.attention.merge(other.attention)
        self.variance.merge(other.variance)
        if self.reconstruction is not None and other.reconstruction is not None:
            self.reconstruction.merge(other.reconstruction)


def find_checkpoint(path: str) -> Location:
    """The checkpoint file of a path: itself, or the one that a run's folder is judged by (section 3.5).

    Raises:
        StorageError: a folder holds none.
    """
    place = open_location(path)
    folder = place if place.name == "checkpoints" else place / "checkpoints"
    if not folder.exists():
        return place
    last, best = folder / "last.pt", folder / "best.pt"
    if not last.exists():
        raise StorageError(f"{folder} must hold last.pt, but does not. Has the run finished a pass?")
    if not best.exists():
        return last
    config = open_location(folder.uri.rsplit("/", 1)[0]) / "config.json"
    # A run of experiments says it beside its checkpoints; others say it within, which takes longer to read.
    settings = config.read_json() if config.exists() else load_checkpoint(last)["identity"]
    return best if settings.get("train", {}).get("select") == "best" else last


def open_checkpoint(place: Location, device: torch.device | str = "cpu") -> OpenedCheckpoint:
    """The model of a checkpoint of a pretraining, or the encoder of one of a finetuning or training from scratch.

    Raises:
        StorageError: there is no checkpoint, or none of these.
    """
    content = load_checkpoint(place)
    identity = content["identity"]
    fingerprint = str(identity.get("cohort", ""))
    if "trunk" in identity:
        settings = restore_settings(identity["trunk"]["model"])
        assert not isinstance(settings, ObjectiveSettings)
        encoder: Any = build_model(settings, 0).encoder
        prefix = "encoder."
        own = {key.removeprefix(prefix): value for key, value in content["model"].items() if key.startswith(prefix)}
        encoder.load_state_dict(own)
        title = f"{identity['trunk']['strategy']}, {identity['evaluation']} on {identity['task']}"
        return OpenedCheckpoint(encoder.to(device).eval(), None, title, settings, fingerprint, ())
    model = load_model(place, device)
    settings = restore_settings(identity["model"])
    objective = restore_settings(identity["objective"])
    assert not isinstance(settings, ObjectiveSettings) and isinstance(objective, ObjectiveSettings)
    whole = model if isinstance(model, MaskedAutoencoder) else None
    untrained = content["state"]["step"] == 0
    title = "untrained" if untrained else name_strategy(settings, objective)
    return OpenedCheckpoint(model.encoder, whole, title, settings, fingerprint, tuple(identity.get("splits", ())))


def choose_windows(
    cohort: Cohort, modalities: tuple[str, ...], config: AnalysisConfig
) -> tuple[Int64[np.ndarray, " n"], dict[str, int]]:
    """Windows `(N,)` that hold any of the modalities, spread over all recordings of a split, and how many of each.

    Raises:
        StorageError: there is none.
    """
    parts: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for split in dict.fromkeys(config.splits):
        missing = config.windows - sum(counts.values())
        try:
            found = find_pretraining_windows(cohort, [_as_split(split)], modalities)
        except StorageError:
            continue
        if missing > 0:
            parts.append(order_windows(cohort, found, config.seed, 0)[:missing])
            counts[split] = len(parts[-1])
    if not parts:
        raise StorageError(
            f"An analysis needs windows with {', '.join(modalities)} in the splits {', '.join(config.splits)}, "
            f"but {cohort.location} has none."
        )
    return np.concatenate(parts), counts


def _as_split(name: str) -> Split:
    return name  # type: ignore[return-value]  # AnalysisConfig has checked it


def measure(
    job: AnalysisJob,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> AnalysisSums:
    """One reader's share of an analysis; the sums of all readers, merged, are those of one (to rounding).

    Args:
        job: what, on what.
        rank, world_size: this reader's number and the number of readers.
        device: where the model runs.
        progress: told (windows done, in all, what is being measured).
    """
    cohort = Cohort.open(job.cohort)
    opened = open_checkpoint(find_checkpoint(job.checkpoint), device)
    config, names = job.config, opened.grid.names
    chosen, _ = choose_windows(cohort, names, config)
    reader = WindowReader(cohort, names)
    examples = np.sort(chosen[: config.examples])
    sums = AnalysisSums(opened, config, examples)
    contexts, draws = _choose_exchanges(cohort, reader, chosen, config)
    # One exchange is one window encoded; it counts as such beside the windows of the other parts.
    mine, each = contexts[rank::world_size], config.draws * len(names)
    source = GatherSource(
        cohort, chosen, batch_size=config.batch_size * world_size, rank=rank, world_size=world_size, reader=reader
    )
    total = sum(len(share) for share in source.plan.share_all()) + len(mine) * each
    done = 0
    for batch in source.iterate_all():
        windows = to_tensors(batch, cohort.modalities, device)
        sums.attention.add(observe(opened.encoder, windows), batch.subject)
        if opened.autoencoder is not None and sums.reconstruction is not None:
            sums.reconstruction.add(opened.autoencoder, windows, batch.subject)
        done += len(batch)
        if progress is not None:
            progress(done, total, "attention and reconstruction")
    lent = SourceDraws({name: _read(reader, cohort, ids, device).signals[name] for name, ids in draws.items()})
    for number in mine:
        context = _read(reader, cohort, np.array([number]), device)
        subject = cohort.recordings[int(cohort.locate(np.array([number]))[0][0])].subject_index
        for variance in measure_source_variance(opened.encoder, lent, context, batch_size=config.batch_size):
            sums.variance.add(subject, variance)
        done += each
        if progress is not None:
            progress(done, total, "source variance")
    return sums


def merge_sums(parts: Sequence[AnalysisSums]) -> AnalysisSums:
    """The sums of all readers as one; the first reader's are added to."""
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0]


def _read(
    reader: WindowReader, cohort: Cohort, ids: Int64[np.ndarray, " n"], device: torch.device | str
) -> WindowTensors:
    return to_tensors(reader.read(ids), cohort.modalities, device)


def _choose_exchanges(
    cohort: Cohort, reader: WindowReader, chosen: Int64[np.ndarray, " n"], config: AnalysisConfig
) -> tuple[Int64[np.ndarray, " contexts"], dict[str, Int64[np.ndarray, " draws"]]]:
    """Contexts of the source variance, those with the most modalities first, and the draws of each modality."""
    order = order_windows(cohort, chosen, config.seed, _CONTEXTS)
    present = sum(reader.present[name][order].astype(int) for name in reader.names)
    contexts = order[np.argsort(-np.asarray(present), kind="stable")][: config.contexts]
    lenders = order_windows(cohort, chosen, config.seed, _DRAWS)
    draws = {name: lenders[reader.present[name][lenders]][: config.draws] for name in reader.names}
    return contexts, {name: ids for name, ids in draws.items() if len(ids)}


def summarise(job: AnalysisJob, sums: AnalysisSums) -> Analysis:
    """Numbers with intervals and everything needed to draw, from the sums of all readers."""
    cohort, place = Cohort.open(job.cohort), find_checkpoint(job.checkpoint)
    opened, config = open_checkpoint(place), job.config
    _, counts = choose_windows(cohort, opened.grid.names, config)
    bootstrap = {"draws": config.bootstrap_draws, "seed": config.seed}
    numbers = [*sums.attention.list_numbers(**bootstrap), *sums.variance.list_numbers(**bootstrap)]
    if sums.reconstruction is not None:
        numbers += sums.reconstruction.list_numbers(**bootstrap)
    facts = {
        "checkpoint": place.uri,
        "strategy": opened.strategy,
        "cohort": cohort.location.name,
        "cohort_fingerprint": cohort.fingerprint,
        "simulated": cohort.simulated,
        "windows": counts,
        "subjects": len(sums.attention.numbers),
        "parameters": count_parameters(opened.encoder),
        "fused": isinstance(opened.encoder, FusedEncoder),
        "config": to_dict(config),
        "assumptions": list_assumptions(config),
    }
    return Analysis(
        name=job.name,
        identity=identify(job),
        facts=json.loads(dump_json(facts)),  # the same whether measured now or read from a folder
        notes=_list_notes(cohort, opened, config, counts, sums),
        grid=opened.grid,
        layers=opened.layers,
        maps=sums.attention.average().astype(np.float32).astype(np.float64),
        numbers=numbers,
        examples={} if sums.reconstruction is None else dict(sorted(sums.reconstruction.examples.items())),
    )


def count_parameters(module: nn.Module) -> int:
    """Learnable numbers of a model."""
    return sum(parameter.numel() for parameter in module.parameters())


def _list_notes(
    cohort: Cohort,
    opened: OpenedCheckpoint,
    config: AnalysisConfig,
    counts: dict[str, int],
    sums: AnalysisSums,
) -> list[str]:
    notes = []
    used = ", ".join(f"{count:,} of {split}" for split, count in counts.items())
    notes.append(f"{sum(counts.values()):,} windows ({used} subjects) of {len(sums.attention.numbers)} people.")
    if sum(counts.values()) < config.windows:
        notes.append(f"Fewer windows than the {config.windows:,} asked for: the splits hold no more.")
    if opened.cohort_fingerprint and opened.cohort_fingerprint != cohort.fingerprint:
        notes.append("The checkpoint was trained on another cohort.")
    seen = [split for split in counts if split in opened.splits]
    if seen and opened.strategy != "untrained":
        notes.append(f"Pretraining saw the signals of the {' and '.join(seen)} subjects (without labels).")
    if not isinstance(opened.encoder, FusedEncoder):
        notes.append(
            "One encoder per modality: attention never leaves a modality's block and every unit has one source, by "
            "construction; their shares do not compare with those of a fused encoder."
        )
    lacking = [name for name in opened.grid.names if not cohort.read_column(present_column(name)).any()]
    if lacking:
        notes.append(f"No window has {', '.join(lacking)}: those parts of the maps are empty.")
    return notes


def identify(job: AnalysisJob) -> str:
    """Hash of all that an analysis depends on: definitions, weights, cohort, settings."""
    weights = hash_bytes(find_checkpoint(job.checkpoint).read_bytes())
    return hash_value([VERSION, weights, Cohort.open(job.cohort).fingerprint, to_dict(job.config)])[:16]


def analyse(
    job: AnalysisJob,
    folder: Location | None = None,
    *,
    run_measure: Callable[[AnalysisJob], AnalysisSums] = measure,
) -> Analysis:
    """Look into a checkpoint, or read what an earlier run with the same weights, cohort and settings has found.

    Args:
        job: what, on what.
        folder: where the result is kept; nowhere if None.
        run_measure: measures the whole job, in this process or on a cluster (`distribute.measure_on_cluster`).
    """
    if folder is not None and is_committed(folder):
        found = load_analysis(folder)
        if found.identity == identify(job) and found.name == job.name:
            return found
    result = summarise(job, run_measure(job))
    if folder is not None:
        save_analysis(result, folder)
    return result

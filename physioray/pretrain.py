"""From settings to a pretrained checkpoint: builds model, objective and batches, and runs the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physioray.checkpoint import check_identity, load_checkpoint
from physioray.config import (
    ContrastiveConfig,
    LateFusionConfig,
    ModelConfig,
    ReconstructionConfig,
    TrainConfig,
    list_assumptions,
    to_dict,
)
from physioray.data.batches import Batch, BatchSource
from physioray.data.cohort import Cohort, StoredModality
from physioray.data.gather import GatherSource
from physioray.data.held import HeldSource
from physioray.journal import AfterPass, Journal, Screen
from physioray.models.fused import MaskedAutoencoder
from physioray.models.transformer import compile_blocks
from physioray.presets import Preset
from physioray.signals import PRETRAINING_SPLITS, LookupMiss, Split, find_modality, present_column
from physioray.storage import Location, StorageError, open_location
from physioray.strategies import (
    Encoder,
    Model,
    ModelSettings,
    ObjectiveSettings,
    Strategy,
    build_model,
    build_objective,
    describe_settings,
    name_strategy,
    restore_settings,
)
from physioray.train import Reporter, TrainResult, WorkerGroup, to_tensors, train

MakeSource = Callable[..., BatchSource]
"""Makes this worker's batches: `GatherSource` or `StreamSource`, called with the same arguments."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """One pretraining: what is trained, on which windows of which cohort, and where it is kept.

    Attributes:
        cohort: path or URI of the cohort.
        out: path or URI of the run's folder; checkpoints go to `checkpoints/` in it.
        model, objective, train: settings; their kinds decide what is built.
        splits: whose windows are pretrained on, without their labels.
        keep_passes: after which passes the weights are kept, for the curve of scores against passes.
        threads: CPU threads of a worker; PyTorch's own choice if None.
        keep_on_device: copy all training windows to the device first, for cohorts that fit; the losses are the same.
        compile_blocks: let torch.compile fuse what stands between the products; the losses are the same to rounding.
    """

    cohort: str
    out: str
    model: ModelSettings
    objective: ObjectiveSettings = ReconstructionConfig()
    train: TrainConfig
    splits: tuple[Split, ...] = PRETRAINING_SPLITS
    keep_passes: tuple[int, ...] = ()
    threads: int | None = None
    keep_on_device: bool = False
    compile_blocks: bool = False

    @classmethod
    def from_preset(cls, preset: Preset, *, cohort: str, out: str, **changes: Any) -> PretrainJob:
        """A job of a preset's sizes."""
        values: dict[str, Any] = {"model": preset.model, "objective": preset.objective, "train": preset.train}
        return cls(cohort=cohort, out=out, **(values | changes))

    @classmethod
    def from_strategy(cls, strategy: Strategy, preset: Preset, *, cohort: str, out: str, **changes: Any) -> PretrainJob:
        """A job of a strategy in a preset's sizes, for the modalities that the cohort holds.

        Raises:
            ValueError: the strategy does not pretrain.
            LookupMiss: the cohort lacks a modality that the strategy needs.
        """
        if strategy.objective is None:
            raise ValueError(f"A strategy must pretrain, but {strategy.name} starts from scratch. Use finetune.")
        sizes = fit_modalities(preset.model, Cohort.open(cohort))
        values: dict[str, Any] = {
            "model": strategy.fit_model(sizes),
            "objective": strategy.objective,
            "train": strategy.fit_train(preset.train),
        }
        return cls(cohort=cohort, out=out, **(values | changes))

    @property
    def name(self) -> str:
        """The strategy's name in result files."""
        return name_strategy(self.model, self.objective)

    def describe(self) -> dict[str, Any]:
        """The job as plain JSON values, with the assumptions in force."""
        return to_dict(self) | {
            "strategy": self.name,
            "model": describe_settings(self.model),
            "objective": describe_settings(self.objective),
            "assumptions": list_assumptions(self.model, self.objective, self.train),
        }


def choose_passes(passes: int) -> tuple[int, ...]:
    """At which passes a curve is measured: the start, the end, and 1, 2, 5, 10, 20, 50 ... between."""
    marks = {0, passes} | {step * 10**power for power in range(5) for step in (1, 2, 5)}
    return tuple(sorted(mark for mark in marks if mark <= passes))


def find_pretraining_windows(cohort: Cohort, splits: Sequence[Split], modalities: Sequence[str]) -> NDArray[np.int64]:
    """Windows `(N,)` of some splits in which at least one of the modalities is present.

    Raises:
        StorageError: there is none.
    """
    windows = cohort.find_windows(splits=splits)
    anything = np.zeros(cohort.windows, bool)
    for name in modalities:
        anything |= cohort.read_column(present_column(name)).astype(bool)
    found = windows[anything[windows]]
    if len(found) == 0:
        raise StorageError(
            f"Pretraining must have windows with {', '.join(modalities)} in the splits {', '.join(splits)}, "
            f"but {cohort.location} has none."
        )
    return found


def pretrain(
    job: PretrainJob,
    *,
    make_source: MakeSource = GatherSource,
    group: WorkerGroup | None = None,
    device: torch.device | str = "cpu",
    screen: Screen | None = None,
    after_pass: AfterPass | None = None,
    watcher: Reporter | None = None,
) -> TrainResult:
    """Run a job in this process, as one of the workers of `group`, or take it up where it stopped.

    Args:
        job: what to train.
        make_source: makes this worker's batches.
        group: the workers; found from torch.distributed if None.
        device: where the model lives.
        screen: where progress is shown.
        after_pass: called by the first worker with the number of finished passes and the run's folder, whose
            `checkpoints/last.pt` is that of the pass; what it raises ends the run, which can be taken up again.
        watcher: another reporter, which is told the same.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    group = group or WorkerGroup()
    # A pretraining that does not need the test subjects cannot see them.
    cohort, out = Cohort.open(job.cohort, test_locked="test" not in job.splits), open_location(job.out)
    names = job.model.modalities
    check_modalities(names, cohort, "The model to be pretrained")
    shared: dict[str, Any] = {"batch_size": job.train.batch_size, "seed": job.train.seed, "modalities": names}
    shared |= {"rank": group.rank, "world_size": group.world_size}
    objective = build_objective(job.objective)
    shared |= {"pairs": True} if getattr(objective, "pairs", False) else {}
    make_own = partial(HeldSource, device=device) if job.keep_on_device else make_source
    source = make_own(cohort, find_pretraining_windows(cohort, job.splits, names), **shared)
    validation = None if "validation" in job.splits else _make_validation(cohort, names, make_source, shared)
    if validation is None and screen is not None and group.rank == 0:
        screen.say("No validation loss: the validation subjects have no window (or pair) for every worker.")
    journal = Journal(out, job.train.passes, _flatten(to_dict(job)), screen, after_pass, watcher)
    if group.rank == 0:
        _record_settings(job, out, cohort, source)
    return train(
        model=_make_model(job),
        objective=objective,
        source=source,
        validation=validation,
        # Contrastive losses compare the windows of a batch, so validation must mix recordings as training does.
        validate_mixed=isinstance(job.objective, ContrastiveConfig),
        config=job.train,
        folder=out / "checkpoints",
        keep_passes=frozenset(job.keep_passes),
        identity=_describe_identity(job),
        reporter=journal,
        group=group,
        device=device,
    )


def _make_model(job: PretrainJob) -> Model:
    """The untrained model, its layers to be compiled when they first run if the job says so."""
    model = build_model(job.model, job.train.seed)
    if job.compile_blocks:
        compile_blocks(model)
    return model


def _record_settings(job: PretrainJob, out: Location, cohort: Cohort, source: BatchSource) -> None:
    # The settings of a finished or begun run are not overwritten by a run that will be refused.
    if (out / "checkpoints" / "last.pt").exists():
        return
    facts: dict[str, Any] = {"cohort_fingerprint": cohort.fingerprint}
    if getattr(source, "pairs_per_recording", None) is not None:
        facts["pairs_per_recording"] = source.pairs_per_recording  # type: ignore[attr-defined]
    (out / "config.json").write_json(job.describe() | facts)


def _make_validation(
    cohort: Cohort, names: Sequence[str], make_source: MakeSource, shared: dict[str, Any]
) -> BatchSource | None:
    """The validation subjects' batches; None where they have too little, which must not stop a pretraining."""
    try:
        return make_source(cohort, find_pretraining_windows(cohort, ["validation"], names), **shared)
    except (StorageError, ValueError):
        return None


def build_autoencoder(config: ModelConfig, seed: int) -> MaskedAutoencoder:
    """An untrained masked autoencoder; the same seed gives the same weights."""
    model = build_model(config, seed)
    assert isinstance(model, MaskedAutoencoder)
    return model


def choose_checkpoint(folder: Location, train: TrainConfig) -> Location:
    """The checkpoint that a finished run is judged by: the best one if that was asked for and there is one."""
    best = folder / "best.pt"
    return best if train.select == "best" and best.exists() else folder / "last.pt"


def is_finished(job: PretrainJob, cohort: Cohort) -> bool:
    """True if the run's folder holds this very pretraining, all its passes done.

    Raises:
        StorageError: another pretraining, or a damaged checkpoint, stands there.
    """
    place = open_location(job.out) / "checkpoints" / "last.pt"
    if not place.exists():
        return False
    content = load_checkpoint(place)
    known = {"train": to_dict(job.train), "cohort": cohort.fingerprint, **_describe_identity(job)}
    check_identity(content, known, place)
    return bool(content["state"]["pass_number"] >= job.train.passes)


def _describe_identity(job: PretrainJob) -> dict[str, Any]:
    """What a checkpoint is made of beside the settings of the loop and the cohort."""
    return {
        "model": describe_settings(job.model),
        "objective": describe_settings(job.objective),
        "splits": list(job.splits),
    }


def check_modalities(names: Sequence[str], cohort: Cohort, what: str) -> None:
    """Refuse a model of modalities that a cohort does not hold, or holds at another rate.

    Raises:
        StorageError: names the model, what it needs and what the cohort holds.
    """
    missing = [name for name in names if name not in cohort.modalities]
    if missing:
        raise StorageError(
            f"{what} is made for {', '.join(names)}, but {cohort.location} holds {', '.join(cohort.modalities)}: "
            f"{', '.join(missing)} is missing. Ingest with --modalities, or take the checkpoint of another strategy."
        )
    for name in names:
        if cohort.modalities[name].samples != find_modality(name).samples:
            raise StorageError(
                f"{what} must have {find_modality(name).samples} samples of {name} a window, but {cohort.location} "
                f"holds {cohort.modalities[name].samples}. Ingest again with this version."
            )


def open_encoder(place: Location, cohort: Cohort, device: torch.device | str = "cpu") -> Encoder:
    """The pretrained encoder of a checkpoint, once it is sure that this cohort's windows can be put through it.

    Raises:
        StorageError: there is no whole checkpoint of a pretraining, or its modalities are not the cohort's.
    """
    encoder = load_encoder(place, device)
    check_modalities(tuple(encoder.tokens), cohort, f"The checkpoint {place}")
    return encoder


def load_model(place: Location, device: torch.device | str = "cpu") -> Model:
    """The pretrained model of a checkpoint, in evaluation mode, with what only pretraining needs.

    Raises:
        StorageError: there is no checkpoint, or it is not that of a pretraining.
    """
    content = load_checkpoint(place, device)
    try:
        settings = restore_settings(content["identity"].get("model", {}))
    except LookupMiss as error:
        raise StorageError(f"{place} must be the checkpoint of a pretraining, but: {error}") from error
    assert isinstance(settings, ModelConfig | LateFusionConfig)
    model = build_model(settings, 0)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise StorageError(f"{place} must hold the weights of its own config, but: {error}") from error
    return model.to(device).eval()


def load_encoder(place: Location, device: torch.device | str = "cpu") -> Encoder:
    """The pretrained encoder of a checkpoint of any strategy, in evaluation mode; decoders and projections are left.

    Raises:
        StorageError: there is no checkpoint, or it is not that of a pretraining.
    """
    return load_model(place, device).encoder


def load_autoencoder(place: Location, device: torch.device | str = "cpu") -> MaskedAutoencoder:
    """The masked autoencoder of a checkpoint, in evaluation mode.

    Raises:
        StorageError: there is no checkpoint, or it is not that of a masked autoencoder.
    """
    model = load_model(place, device)
    if not isinstance(model, MaskedAutoencoder):
        raise StorageError(f"{place} must hold a masked autoencoder, but holds {type(model).__name__}.")
    return model


def make_encode(
    encoder: Encoder, modalities: dict[str, StoredModality], device: torch.device | str = "cpu"
) -> Callable[[Batch], NDArray[np.float32]]:
    """A function from a batch to its embeddings `(B, features)`, encoder frozen."""
    encoder = encoder.to(device).eval()

    @torch.inference_mode()
    def encode(batch: Batch) -> NDArray[np.float32]:
        windows = to_tensors(batch, modalities, device)
        return encoder.embed(windows.signals, windows.present).float().cpu().numpy()

    return encode


def fit_modalities(model: ModelConfig, cohort: Cohort) -> ModelConfig:
    """The same model for the modalities that a cohort holds."""
    return replace(model, modalities=tuple(cohort.modalities))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

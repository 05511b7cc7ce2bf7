"""A trained model as others use it: signals in physical units in, embeddings and classes out; and its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int16
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from physioray.config import IngestConfig, LateFusionConfig, ModelConfig, from_dict
from physioray.data.arrays import PreparedNight, prepare_signals
from physioray.readouts import HEADS_FILE, HEADS_NOTE, Readout, pack_readouts, unpack_readouts
from physioray.signals import LookupMiss, find_modality
from physioray.storage import Location, StorageError, dump_json, open_location
from physioray.strategies import Encoder, build_model, restore_settings
from physioray.tensors import move_array

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
KIND = "physioray-model"
FORMAT = 1

_BATCH = 64


class PretrainedModel(nn.Module):
    """An encoder with its preprocessing, its heads, and what is known of where it comes from.

    Args:
        encoder: fused, or one per modality.
        readouts: heads by task; may be empty.
        description: what `origins.describe_origin` says: plain values, the content of config.json.

    Attributes:
        encoder: maps windows in scales of the recording to vectors; train it further as you like.
        preprocessing: how recordings become windows, for the modalities of the encoder.
    """

    def __init__(self, encoder: Encoder, readouts: Mapping[str, Readout], description: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.readouts = dict(readouts)
        self.description = dict(description)
        settings = {**description["preprocessing"], "modalities": tuple(encoder.tokens)}
        self.preprocessing = from_dict(IngestConfig, settings)
        self.steps = {name: float(description["modalities"][name]["step"]) for name in encoder.tokens}
        self.eval()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that it can use; any non-empty subset will do."""
        return tuple(self.encoder.tokens)

    @property
    def features(self) -> int:
        """Size of an embedding."""
        return self.encoder.features

    @property
    def simulated(self) -> bool:
        """True if it was trained on simulated nights."""
        return bool(self.description["cohort"]["simulated"])

    def forward(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Float[Tensor, "b features"]:
        """One vector per window, of windows that are already filtered, resampled and scaled; see `prepare`."""
        return self.encoder.embed(signals, present)

    def prepare(self, signals: Mapping[str, tuple[Any, float]], *, jumps: Sequence[float] = ()) -> PreparedNight:
        """Filter, resample, scale and cut signals as the training cohort was; arguments as for `embed`."""
        return prepare_signals(signals, self.preprocessing, jumps=jumps)

    def embed(
        self, signals: Mapping[str, tuple[Any, float]], *, jumps: Sequence[float] = ()
    ) -> Float32[Tensor, "windows features"]:
        """Describe every 30 s of a recording by a vector.

        Args:
            signals: by modality, samples `(samples,)` in physical units (uV; mV for the ECG) and their rate in Hz,
                for example `{"eeg": (array, 256.0)}`. Any non-empty subset of `modalities`, all from the same start.
                Give the whole recording at once: scales are per recording.
            jumps: seconds at which the recording jumps.

        Returns:
            `(windows, features)`; NaN where no modality is usable (flat, clipped, not measured).

        Raises:
            LookupMiss: a modality that this model does not know.
            ValueError: see `data.arrays.prepare_signals`.
        """
        night = self.prepare(signals, jumps=jumps)
        return torch.from_numpy(self.embed_windows(night.signals, night.present))

    def classify(
        self, signals: Mapping[str, tuple[Any, float]], *, jumps: Sequence[float] = ()
    ) -> dict[str, Float[np.ndarray, "windows classes"]]:
        """Probabilities of the classes of every task that has a head; NaN where no modality is usable.

        Arguments as for `embed`; the order of classes is that of `signals.TASKS`.
        """
        return self.predict(self.embed(signals, jumps=jumps).numpy())

    @torch.no_grad()
    def embed_windows(
        self, signals: Mapping[str, Int16[np.ndarray, "n _"]], present: Mapping[str, Bool[np.ndarray, "n"]]
    ) -> Float32[np.ndarray, "n features"]:
        """Embeddings of windows as they lie in a cohort; NaN where nothing is present.

        Args:
            signals: `(n, samples)` int16 per modality, in steps of the cohort.
            present: `(n,)` per modality.
        """
        device = next(self.encoder.parameters()).device
        usable = np.flatnonzero(np.stack([present[name] for name in self.modalities]).any(0))
        vectors = np.full((len(present[self.modalities[0]]), self.features), np.nan, np.float32)
        for first in range(0, len(usable), _BATCH):
            rows = usable[first : first + _BATCH]
            scaled = {
                name: move_array(signals[name][rows], device).float().mul_(self.steps[name]) for name in self.modalities
            }
            here = {name: torch.from_numpy(present[name][rows]) for name in self.modalities}
            vectors[rows] = self.encoder.embed(scaled, here).float().cpu().numpy()
        return vectors

    def predict(self, vectors: Float32[np.ndarray, "n features"]) -> dict[str, Float[np.ndarray, "n classes"]]:
        """Probabilities by task of embeddings; NaN where the embedding is."""
        usable = np.isfinite(vectors).all(1)
        found = {}
        for name, readout in self.readouts.items():
            values = np.full((len(vectors), len(readout.head.bias)), np.nan)
            if usable.any():
                values[usable] = readout.predict(vectors[usable])
            found[name] = values
        return found


def pack_model(model: PretrainedModel) -> dict[str, bytes]:
    """A model as the content of its files, by name: safetensors and JSON, nothing that runs code."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.encoder.state_dict().items()}
    note = {"format": FORMAT, "kind": KIND, "features": model.features}
    weights = save_tensors(tensors, metadata={"format": "pt", "kind": KIND})
    config = dump_json({**model.description, **note}).encode()
    return {WEIGHTS_FILE: weights, CONFIG_FILE: config, **pack_readouts(model.readouts, {})}


def unpack_model(files: Mapping[str, bytes], where: object) -> PretrainedModel:
    """The model that `pack_model` has packed.

    Raises:
        StorageError: a file is missing or damaged, or made by a version that this one does not understand.
    """
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE, HEADS_FILE, HEADS_NOTE) if name not in files]
    if missing:
        raise StorageError(f"{where} must hold an exported model, but lacks {', '.join(missing)}. Export it again.")
    try:
        description = json.loads(files[CONFIG_FILE])
        if (description.get("kind"), description.get("format")) != (KIND, FORMAT):
            raise ValueError(f"its kind and format must be {KIND} {FORMAT}")
        settings = restore_settings(description["model"])
        if not isinstance(settings, ModelConfig | LateFusionConfig):
            raise ValueError("its model must be an encoder")
        encoder = build_model(settings, 0).encoder
        _check_modalities(description, encoder)
        encoder.load_state_dict(load_tensors(files[WEIGHTS_FILE]))
    except (KeyError, TypeError, ValueError, RuntimeError, LookupMiss, SafetensorError) as error:
        raise StorageError(f"{where} must hold an exported model, but: {error}. Export the run again.") from error
    return PretrainedModel(encoder, unpack_readouts(files, where)[0], description)


def _check_modalities(description: Mapping[str, Any], encoder: Encoder) -> None:
    for name in encoder.tokens:
        stored, known = description["modalities"][name]["rate"], find_modality(name).rate
        if stored != known:
            raise ValueError(f"{name} must be at {known} Hz in this version, but is at {stored} Hz")


def is_export(folder: Location) -> bool:
    """True if a folder holds an exported model."""
    return (folder / WEIGHTS_FILE).exists()


def load_model(folder: Location | str | os.PathLike[str]) -> PretrainedModel:
    """Open a folder that `physioray export` has written.

    Raises:
        StorageError: there is no exported model, or it is damaged.
    """
    place = folder if isinstance(folder, Location) else open_location(folder)
    if not is_export(place):
        raise StorageError(
            f"An exported model must hold {WEIGHTS_FILE}, but {place} has none. Run: physioray export RUN {place}"
        )
    names = (WEIGHTS_FILE, CONFIG_FILE, HEADS_FILE, HEADS_NOTE)
    return unpack_model({name: (place / name).read_bytes() for name in names if (place / name).exists()}, place)

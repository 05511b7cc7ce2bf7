"""Where a probe's features come from: computed once and kept, or computed from signals every time they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from physioray.data.batches import Batch
from physioray.data.gather import WindowReader


@runtime_checkable
class FeatureSource(Protocol):
    """Where the features of windows come from: a matrix in memory, or signals that go through an encoder every time."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def measure(
        self, rows: Int64[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
        """Mean and standard deviation of some windows' features."""
        ...

    def take(self, rows: Int64[Tensor, " k"]) -> Float[Tensor, "k features"]:
        """Features `(k, features)` of some windows in single precision, less `shift` and over `stretch`."""
        ...

    def rescale(self, shift: Float[np.ndarray, " features"], stretch: Float[np.ndarray, " features"]) -> None:
        """Set what `take` takes off and divides by: standardised features are safe in single precision."""
        ...


class CachedFeatures:
    """Features that were computed once, as rows of a matrix."""

    def __init__(self, features: Float[np.ndarray, "n features"]) -> None:
        self.features = features
        self.scaled = torch.empty(0)

    def __len__(self) -> int:
        return len(self.features)

    def measure(
        self, rows: Int64[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
        """See FeatureSource."""
        chosen = self.features[rows]
        return chosen.mean(0, dtype=np.float64), chosen.std(0, dtype=np.float64)

    def rescale(self, shift: Float[np.ndarray, " features"], stretch: Float[np.ndarray, " features"]) -> None:
        """See FeatureSource."""
        self.scaled = torch.from_numpy(np.ascontiguousarray((self.features - shift) / stretch, np.float32))

    def take(self, rows: Int64[Tensor, " k"]) -> Float[Tensor, "k features"]:
        """See FeatureSource."""
        return self.scaled.index_select(0, rows)


ENCODE_BATCH = 64
"""Windows that go through the encoder at once."""


class OnlineFeatures:
    """Features that are computed from the signals whenever they are asked for: nothing is kept.

    This is how a linear probe is usually trained, through the frozen encoder at every step. It gives what cached
    embeddings give, at many times the cost, and is kept to show both.

    Args:
        encode: from a batch to its embeddings `(B, features)`, for example `pretrain.make_encode(encoder, ...)`.
        reader: reads windows of the cohort.
        window_ids: `(n,)` the windows, in the order of the labels.
    """

    def __init__(
        self,
        encode: Callable[[Batch], Float[np.ndarray, "b features"]],
        reader: WindowReader,
        window_ids: Int64[np.ndarray, " n"],
    ) -> None:
        self.encode, self.reader, self.window_ids = encode, reader, window_ids
        self.shift, self.stretch = np.zeros(1), np.ones(1)
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.window_ids)

    def embed(self, rows: Int64[np.ndarray, " k"]) -> Float[np.ndarray, "k features"]:
        """Features `(k, features)` of some windows, through the encoder."""
        self.encoded += len(rows)
        parts = [
            self.encode(self.reader.read(self.window_ids[rows[first : first + ENCODE_BATCH]]))
            for first in range(0, len(rows), ENCODE_BATCH)
        ]
        return np.concatenate(parts)

    def measure(
        self, rows: Int64[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
        """See FeatureSource; in one go over the windows, none of which is kept."""
        count, mean, squares = 0, np.zeros(1), np.zeros(1)
        for first in range(0, len(rows), ENCODE_BATCH):
            part = self.embed(rows[first : first + ENCODE_BATCH]).astype(np.float64)
            # Means and squared deviations of two sets combine (Chan, Golub and LeVeque 1983).
            ours, theirs = part.mean(0), count + len(part)
            squares = squares + ((part - ours) ** 2).sum(0) + (ours - mean) ** 2 * (count * len(part) / theirs)
            mean, count = mean + (ours - mean) * (len(part) / theirs), theirs
        return mean, np.sqrt(squares / count)

    def rescale(self, shift: Float[np.ndarray, " features"], stretch: Float[np.ndarray, " features"]) -> None:
        """See FeatureSource."""
        self.shift, self.stretch = shift, stretch

    def take(self, rows: Int64[Tensor, " k"]) -> Float[Tensor, "k features"]:
        """See FeatureSource."""
        return torch.from_numpy(((self.embed(rows.numpy()) - self.shift) / self.stretch).astype(np.float32))

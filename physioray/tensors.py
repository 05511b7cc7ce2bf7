"""Windows as a model sees them: float tensors on a device, keyed by modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class WindowTensors:
    """Some windows on a device.

    Attributes:
        signals: `(B, samples)` per modality, in scales of the recording (about unit variance).
        present: `(B,)` per modality, on the CPU; where False the signal means nothing.
        labels: `(B,)` per task, -1 where unknown.
        window_id: `(B,)` on the CPU; keys every random choice that is made per window.
    """

    signals: Mapping[str, Float[Tensor, "b _"]]
    present: Mapping[str, Bool[Tensor, "b"]]
    labels: Mapping[str, Int64[Tensor, "b"]]
    window_id: Int64[np.ndarray, "b"]

    def __len__(self) -> int:
        return len(self.window_id)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What keys the random choices of one step, so that they do not depend on the number of workers."""

    seed: int
    pass_number: int
    step: int
    rank: int = 0


VALIDATION_PASS = 2**31 - 1
"""The pass number that validation draws its masks with, so that they are the same in every pass."""


def move_array(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, copied through pinned memory where that is faster."""
    # Arrow's memory is read-only, which PyTorch does not know; what follows copies in any case, so copy here.
    tensor = torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())
    return move_tensor(tensor, device)


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU copies it from pinned memory when its turn comes, and nobody waits for that."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

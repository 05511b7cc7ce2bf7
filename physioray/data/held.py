"""Batches from a copy of the cohort's windows that is kept on the device: no reading and no copying while training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int16, Int64
from numpy.typing import NDArray
from torch import Tensor

from physioray.data.batches import Batch, BatchPlan, PlannedSource
from physioray.data.cohort import Cohort, StoredModality
from physioray.data.gather import WindowReader
from physioray.tensors import move_tensor

READ_WINDOWS = 4096
"""Windows that are read at once when the copy is made."""

SHARE = 0.7
"""Of the device's free memory, what the windows may take; the rest is the model's."""


class HeldSignals(Mapping[str, Int16[np.ndarray, "b samples"]]):
    """Signals `(B, samples)` int16 per modality that lie on a device: `tensors` there, arrays when asked for."""

    def __init__(self, tensors: Mapping[str, Int16[Tensor, "b samples"]]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Int16[np.ndarray, "b samples"]:
        return self.tensors[name].cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class HeldSource(PlannedSource):
    """Batches of some windows, all of which are copied to a device first; arguments as for `GatherSource`.

    The batches and their order are those of `GatherSource`, so losses are equal bit for bit. Every worker keeps all
    windows, since every pass deals them out anew: 24 KB a window with the paper's four modalities.

    Args:
        device: where the windows are kept.
        most_bytes: what they may take; a share of the device's free memory if None.

    Raises:
        ValueError: the windows do not fit.
    """

    def __init__(
        self,
        cohort: Cohort,
        window_ids: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int = 0,
        modalities: Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        pairs: bool = False,
        device: torch.device | str = "cpu",
        most_bytes: int | None = None,
    ) -> None:
        self.plan = BatchPlan(
            cohort, window_ids, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, pairs=pairs
        )
        self.device = torch.device(device)
        self.reader = WindowReader(cohort, modalities)
        self.fingerprint = cohort.fingerprint
        self.modalities: dict[str, StoredModality] = {name: cohort.modalities[name] for name in self.reader.names}
        self._check_room(most_bytes)
        self.signals = self._copy_windows()

    def _deliver(self, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        for share in shares:
            yield self._pick(share)

    def _check_room(self, most_bytes: int | None) -> None:
        windows = len(self.plan.window_ids)
        needed = windows * sum(2 * item.samples for item in self.modalities.values())
        room = int(SHARE * count_free_bytes(self.device)) if most_bytes is None else most_bytes
        if needed > room:
            raise ValueError(
                f"The windows kept on {self.device} must take at most {room / 1e9:.3g} GB, but {windows} windows of "
                f"{', '.join(self.modalities)} take {needed / 1e9:.3g} GB. Train without keep_on_device, with fewer "
                "modalities or windows, or on a device with more memory."
            )

    def _copy_windows(self) -> dict[str, Int16[Tensor, "windows samples"]]:
        ids = self.plan.window_ids
        held = {
            name: torch.empty(len(ids), item.samples, dtype=torch.int16, device=self.device)
            for name, item in self.modalities.items()
        }
        for first in range(0, len(ids), READ_WINDOWS):
            batch = self.reader.read(ids[first : first + READ_WINDOWS])
            for name, signal in batch.signals.items():
                held[name][first : first + len(batch)] = torch.from_numpy(signal)
        return held

    def _pick(self, window_ids: Int64[np.ndarray, "b"]) -> Batch:
        places = torch.from_numpy(np.searchsorted(self.plan.window_ids, window_ids))
        index = move_tensor(places, self.device)
        signals = {name: held.index_select(0, index) for name, held in self.signals.items()}
        return self.reader.describe(window_ids, HeldSignals(signals))


def count_free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; of a CPU, half of what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

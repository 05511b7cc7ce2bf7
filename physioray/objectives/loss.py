"""The typed loss every objective returns: sums and counts per part, so that any number of workers agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """A loss before it is averaged.

    Attributes:
        sums: per part (a modality, a task, a pair), the sum of the errors of this worker's windows.
        counts: per part, how many errors were summed, or the sum of their weights.
        weighting: `part` averages each part over its errors and then over the parts that have any;
            `item` averages over all errors alike.
        watched: figures worth a line in the log that are no loss and never enter one: sum and count of each, the
            same names on every worker and at every step.
    """

    sums: Mapping[str, Float[Tensor, ""]]
    counts: Mapping[str, Float[Tensor, ""]]
    weighting: Literal["part", "item"] = "part"
    watched: Mapping[str, Float[Tensor, "2"]] = field(default_factory=dict)

    def stack(self) -> Float[Tensor, "2 parts"]:
        """Sums and counts as one tensor without gradient, to be added up over workers."""
        return torch.stack([torch.stack(list(self.sums.values())).detach(), torch.stack(list(self.counts.values()))])

    def combine(self, totals: Float[Tensor, "parts"]) -> Float[Tensor, ""]:
        """This worker's share of the loss: added up over workers it is the loss of the global batch.

        Args:
            totals: per part, the count over all workers. A part without any error adds nothing.
        """
        return combine_sums(torch.stack(list(self.sums.values())), totals, self.weighting)


def combine_sums(
    sums: Float[Tensor, "*steps parts"], totals: Float[Tensor, "*steps parts"], weighting: Literal["part", "item"]
) -> Float[Tensor, "*steps"]:
    """One number from sums and counts per part; see LossParts.weighting. Nothing counted gives 0."""
    if weighting == "item":
        whole = totals.sum(-1)
        return sums.sum(-1) / torch.where(whole > 0, whole, 1)
    means = average(sums, totals)
    return means.sum(-1) / (totals > 0).sum(-1).clamp(min=1)


def average(
    sums: Float[Tensor, "*steps parts"], totals: Float[Tensor, "*steps parts"]
) -> Float[Tensor, "*steps parts"]:
    """Mean error of every part; 0 for a part that nothing was counted for. Counts may be weights below 1."""
    return sums / torch.where(totals > 0, totals, 1)

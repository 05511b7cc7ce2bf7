"""Contrastive learning: what belongs together must be found among what does not.

Three objectives over projections per modality (Fang et al. 2024, appendix F): adjacent windows of a recording
(SimCLR), every two modalities of a window, and each modality with the mean of the others (SleepFM). Similarities are
cosines; logits are similarities divided by the temperature, inside the exponent.

The candidates are the windows of the global batch: projections are gathered from all workers, with their
gradients, so that 1 and N workers take the same step. What is absent is never anchor, positive or negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from physioray.config import ContrastiveConfig
from physioray.objectives.augment import augment
from physioray.objectives.loss import LossParts
from physioray.tensors import Draw, WindowTensors

_EXCLUDED = -1e9
"""The logit of what is no candidate. Finite, so that rows without any candidate leave no NaN in a gradient."""


@runtime_checkable
class Projector(Protocol):
    """A model that projects each modality of a window to a vector of its own."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        ...

    def project(
        self, signals: Mapping[str, Float[Tensor, "b _"]], present: Mapping[str, Bool[Tensor, "b"]]
    ) -> Mapping[str, Float[Tensor, "b _"]]:
        """Vectors `(B, d)` per modality; rows of windows that lack it mean nothing."""
        ...

    def find_scale(self) -> Float[Tensor, ""] | None:
        """A learned factor on similarities, or None."""
        ...


@dataclass(frozen=True)
class Candidates:
    """The projections of the global batch.

    Attributes:
        rows: `(N, modalities, d)`; workers with fewer windows are padded.
        here: `(N, modalities)`, False where absent or padding.
        first: the place of this worker's first window.
    """

    rows: Float[Tensor, "n modalities d"]
    here: Bool[Tensor, "n modalities"]
    first: int


class NeighbourContrast:
    """SimCLR over time: which window comes right before or after this one? (Fang et al. 2024, appendix F.2.)

    Rows 2i and 2i + 1 of a batch are adjacent windows of one recording. Both are disturbed (see
    `objectives/augment`) and projected; the vector of a window is the concatenation of its modalities' projections.

    l(i, j) = -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ) over the 2N windows of the batch (NT-Xent, Chen
    et al. 2020), the mean of both directions of all pairs. s_ij is the cosine over the modalities that both windows
    have: with all present that of the concatenations, and what only one of them has does not tell them apart. A
    pair without a common modality is left out altogether.
    """

    pairs = True

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    def __call__(self, model: Projector | Callable[..., object], windows: WindowTensors, draw: Draw) -> LossParts:
        """Disturb, project and compare the windows of a batch of pairs.

        Raises:
            ValueError: the number of windows is odd.
        """
        if len(windows) % 2:
            raise ValueError(
                f"Rows 2i and 2i + 1 of a batch must be a pair, but it has {len(windows)} rows. "
                "Make the source with pairs=True and an even batch size."
            )
        signals = augment(windows.signals, windows.present, windows.window_id, draw, self.config.augment)
        vectors, here, scale = _project(model, signals, windows.present, self.config)
        with _full_precision(vectors):
            return measure_neighbours(vectors, here, scale)


class PairwiseContrast:
    """CLIP for every two modalities: which ECG belongs to this EEG? (SleepFM, Thapa et al. 2024; appendix F.2.)

    For modalities a and b over the windows that have both, z normalised:
    l_ab = -mean_i log( exp(z_ai . z_bi / tau) / sum_k exp(z_ai . z_bk / tau) ), both directions, the mean over pairs
    of modalities.
    """

    pairs = False

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    def __call__(self, model: Projector | Callable[..., object], windows: WindowTensors, draw: Draw) -> LossParts:  # noqa: ARG002
        """Project and compare the windows of a batch; nothing is drawn.

        Raises:
            ValueError: the model has fewer than two modalities.
        """
        names = _require_several(model)
        vectors, here, scale = _project(model, windows.signals, windows.present, self.config)
        with _full_precision(vectors):
            return measure_pairwise(vectors, here, scale, names)


class LeaveOneOutContrast:
    """Each modality against the mean of the others (SleepFM, Thapa et al. 2024; Fang et al. 2024, appendix F.2).

    The target of modality m is the mean of the normalised projections of the window's other present modalities, not
    normalised again. l_m = -mean_i log( exp(z_mi . t_mi / tau) / sum_k exp(z_mi . t_mk / tau) ), both directions,
    the mean over modalities; over the windows that have m and at least one other.
    """

    pairs = False

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    def __call__(self, model: Projector | Callable[..., object], windows: WindowTensors, draw: Draw) -> LossParts:  # noqa: ARG002
        """Project and compare the windows of a batch; nothing is drawn.

        Raises:
            ValueError: the model has fewer than two modalities.
        """
        names = _require_several(model)
        vectors, here, scale = _project(model, windows.signals, windows.present, self.config)
        with _full_precision(vectors):
            return measure_leave_one_out(vectors, here, scale, names)


ContrastiveObjective = NeighbourContrast | PairwiseContrast | LeaveOneOutContrast

CONTRASTS: Mapping[str, type[NeighbourContrast] | type[PairwiseContrast] | type[LeaveOneOutContrast]] = {
    "simclr": NeighbourContrast,
    "pairwise": PairwiseContrast,
    "leave_one_out": LeaveOneOutContrast,
}


def build_contrast(config: ContrastiveConfig) -> ContrastiveObjective:
    """The objective that a config names."""
    return CONTRASTS[config.method](config)


def measure_neighbours(
    vectors: Float[Tensor, "b modalities d"], here: Bool[Tensor, "b modalities"], scale: Float[Tensor, ""]
) -> LossParts:
    """The loss of NeighbourContrast from projections; part `neighbours`, one error per window of a usable pair."""
    vectors = _silence(vectors, here)
    found = gather_candidates(vectors, here)
    own = torch.arange(len(vectors), device=vectors.device)
    place = found.first + own
    weight, everybody = here.to(vectors.dtype), found.here.to(vectors.dtype)
    # Sums over common modalities: absent vectors are zero, and lengths are taken over what the other has too.
    product = vectors.flatten(1) @ found.rows.flatten(1).T
    length = ((vectors.square().sum(-1) * weight) @ everybody.T).clamp(min=1e-12).sqrt()
    other = (weight @ (found.rows.square().sum(-1) * everybody).T).clamp(min=1e-12).sqrt()
    common = weight @ everybody.T > 0
    usable = (found.here & _swap(found.here)).any(1)
    allowed = common & usable[None]
    allowed[own, place] = False
    return _collect({"neighbours": [_contrast(scale * product / (length * other), allowed, place ^ 1, usable[place])]})


def measure_pairwise(
    vectors: Float[Tensor, "b modalities d"],
    here: Bool[Tensor, "b modalities"],
    scale: Float[Tensor, ""],
    names: Sequence[str],
) -> LossParts:
    """The loss of PairwiseContrast from projections; a part `a-b` per two modalities, two errors per window."""
    unit = functional.normalize(_silence(vectors, here), dim=-1)
    found = gather_candidates(unit, here)
    place = found.first + torch.arange(len(vectors), device=vectors.device)
    errors = {}
    for one, other in combinations(range(len(names)), 2):
        both = found.here[:, one] & found.here[:, other]
        errors[f"{names[one]}-{names[other]}"] = [
            _contrast(scale * unit[:, a] @ found.rows[:, b].T, both[None], place, both[place])
            for a, b in ((one, other), (other, one))
        ]
    return _collect(errors)


def measure_leave_one_out(
    vectors: Float[Tensor, "b modalities d"],
    here: Bool[Tensor, "b modalities"],
    scale: Float[Tensor, ""],
    names: Sequence[str],
) -> LossParts:
    """The loss of LeaveOneOutContrast from projections; a part per modality, two errors per window."""
    unit = functional.normalize(_silence(vectors, here), dim=-1)
    found = gather_candidates(unit, here)
    place = found.first + torch.arange(len(vectors), device=vectors.device)
    errors = {}
    for number, name in enumerate(names):
        others = found.here.clone()
        others[:, number] = False
        usable = found.here[:, number] & others.any(1)
        weight = others.to(vectors.dtype)[..., None]
        target = (found.rows * weight).sum(1) / weight.sum(1).clamp(min=1)
        errors[name] = [
            _contrast(scale * unit[:, number] @ target.T, usable[None], place, usable[place]),
            _contrast(scale * target[place] @ found.rows[:, number].T, usable[None], place, usable[place]),
        ]
    return _collect(errors)


@dataclass(frozen=True)
class _Errors:
    """Cross entropies of some anchors: their sum, how many there are, and how many negatives they had in all."""

    sum: Float[Tensor, ""]
    count: Float[Tensor, ""]
    negatives: Float[Tensor, ""]


def _contrast(
    logits: Float[Tensor, "b n"],
    allowed: Bool[Tensor, "#b n"],
    positive: Int64[Tensor, "b"],
    usable: Bool[Tensor, "b"],
) -> _Errors:
    """Cross entropy of every usable anchor's positive among its allowed candidates, the positive included.

    Args:
        logits: similarity of each anchor to each candidate, times the scale.
        allowed: which candidates an anchor is compared with.
        positive: the candidate that belongs to each anchor.
        usable: anchors that take part.
    """
    errors = functional.cross_entropy(logits.masked_fill(~allowed, _EXCLUDED), positive, reduction="none")
    # Every anchor stays in the graph, so that no worker misses the exchange of gradients for want of a usable one.
    negatives = (allowed.expand_as(logits).sum(1) - 1) * usable
    return _Errors(
        sum=torch.where(usable, errors, 0.0).sum(),
        count=usable.sum().to(errors.dtype),
        negatives=negatives.sum().to(errors.dtype),
    )


def _collect(errors: Mapping[str, Sequence[_Errors]]) -> LossParts:
    """Parts of a loss, and as `negatives` how many each anchor was compared with."""
    sums = {name: torch.stack([item.sum for item in items]).sum() for name, items in errors.items()}
    counts = {name: torch.stack([item.count for item in items]).sum() for name, items in errors.items()}
    # What the batch really offers: with absent modalities or small batches there are fewer negatives than rows.
    negatives = torch.stack([item.negatives for items in errors.values() for item in items]).sum()
    anchors = torch.stack(list(counts.values())).sum()
    return LossParts(sums=sums, counts=counts, watched={"negatives": torch.stack([negatives, anchors])})


def gather_candidates(rows: Float[Tensor, "b modalities d"], here: Bool[Tensor, "b modalities"]) -> Candidates:
    """The same rows of all workers, in the order of the workers; gradients flow back to where a row came from.

    Workers may have different numbers of windows. Every worker must call this for every batch, and backward
    wherever one does.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Candidates(rows=rows, here=here, first=0)
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(sizes).max())
    flat = torch.cat([rows.flatten(1), here.to(rows.dtype)], 1)
    flat = functional.pad(flat, (0, 0, 0, longest - len(rows)))
    together = _Gather.apply(flat)
    values, presence = together.split([rows.shape[1] * rows.shape[2], rows.shape[1]], dim=1)
    return Candidates(
        rows=values.unflatten(1, rows.shape[1:]), here=presence.detach() > 0.5, first=dist.get_rank() * longest
    )


class _Gather(torch.autograd.Function):
    """all_gather whose backward adds up the gradients that all workers have for a row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ARG004
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _project(
    model: Projector | Callable[..., object],
    signals: Mapping[str, Float[Tensor, "b _"]],
    present: Mapping[str, Bool[Tensor, "b"]],
    config: ContrastiveConfig,
) -> tuple[Float[Tensor, "b modalities d"], Bool[Tensor, "b modalities"], Float[Tensor, ""]]:
    """Projections in single precision, which windows have them, and the factor on similarities."""
    assert isinstance(model, Projector)
    projected = model.project(signals, present)
    vectors = torch.stack([projected[name].float() for name in model.modalities], 1)
    here = torch.stack([present[name] for name in model.modalities], 1).to(vectors.device)
    scale = model.find_scale()
    return vectors, here, vectors.new_tensor(1 / config.temperature) if scale is None else scale


def _full_precision(vectors: Tensor) -> torch.autocast:
    """Similarities in single precision: a bf16 cosine near 1, divided by 0.1, is off by several hundredths."""
    return torch.autocast(vectors.device.type, enabled=False)


def _require_several(model: Projector | Callable[..., object]) -> tuple[str, ...]:
    assert isinstance(model, Projector)
    if len(model.modalities) < 2:
        raise ValueError(
            f"A model whose modalities are compared must have two or more, but it has {', '.join(model.modalities)}. "
            "Use the method simclr, or add a modality."
        )
    return model.modalities


def _silence(
    vectors: Float[Tensor, "n modalities d"], here: Bool[Tensor, "n modalities"]
) -> Float[Tensor, "n modalities d"]:
    """Zeros, without a gradient, where a modality is absent: whatever stands there must not reach a sum."""
    return torch.where(here[..., None], vectors, 0.0)


def _swap(rows: Bool[Tensor, "n modalities"]) -> Bool[Tensor, "n modalities"]:
    """Rows 2i and 2i + 1 in each other's place."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

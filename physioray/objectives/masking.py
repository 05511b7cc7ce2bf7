"""Which tokens a model sees: a pure function of (seed, pass, window), the same for any batch or worker.

The words: a token is `present` if its modality was recorded in that window; of the present tokens some are
`visible` to the encoder and the rest are `hidden`. An absent token is neither.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt64
from scipy.special import gammaincinv
from torch import Tensor

from physioray.config import MaskConfig
from physioray.tensors import Draw

# Streams of the key, so that no two kinds of choice share their random numbers.
_TOKENS, _MODALITIES, _SHARES, _SUBSETS = 1, 2, 3, 4

_COUNT = -1
"""The key of what is drawn beside the modalities: whether to drop, how many to keep."""

_LAST = np.uint64(2**63)
"""The place in the queue of what may not be visible: behind everything else."""


@dataclass(frozen=True, kw_only=True)
class SamplerCase:
    """What a sampler chooses from.

    Attributes:
        available: `(B, modalities)`, True where a modality is present and was not dropped.
        keys: `(modalities,)` a number for each modality's name, so that choices do not depend on their order.
        counts: `(modalities,)` tokens of each modality.
        visible_count: `(B,)` how many tokens will be visible.
        noise: `(B, tokens)` random numbers below 2^63, one per token, the modalities one after the other.
        window_id, draw, config: key further choices.
    """

    available: Bool[np.ndarray, "b modalities"]
    keys: Int64[np.ndarray, "modalities"]
    counts: Int64[np.ndarray, "modalities"]
    visible_count: Int64[np.ndarray, "b"]
    noise: UInt64[np.ndarray, "b tokens"]
    window_id: Int64[np.ndarray, "b"]
    draw: Draw
    config: MaskConfig


MaskSampler = Callable[[SamplerCase], UInt64[np.ndarray, "b tokens"]]
"""Puts the tokens of every window in a queue `(B, tokens)`: those with the smallest numbers become visible.

Whatever a sampler prefers, the count is exact: it is `draw_visible` that lets the first `visible_count` in.
"""


def draw_visible(
    present: Mapping[str, Bool[Tensor, "b"]],
    tokens: Mapping[str, int],
    window_id: Int64[np.ndarray, "b"],
    draw: Draw,
    config: MaskConfig,
) -> dict[str, Bool[Tensor, "b _"]]:
    """Choose the visible tokens of every window (Fang et al. 2024, section 3.3 and appendix C).

    The number of visible tokens is `(1 - hidden_ratio)` times the tokens of the window's present modalities,
    rounded, at least 1: with four modalities of 30 tokens and 0.7 it is 36 with and without drop. They are
    drawn as `config.sampler` says, uniformly without regard to modality in the paper. With `drop`, one present
    modality is hidden whole first, and the visible tokens are drawn among the others.

    Args:
        present: `(B,)` per modality.
        tokens: number of tokens of a window per modality.
        window_id: `(B,)` keys each window's own choice.
        draw: seed, pass, step and rank.
        config: ratio, sampler and drop.

    Returns:
        `(B, tokens)` per modality, True where visible.
    """
    names = list(tokens)
    here = np.stack([present[name].numpy() for name in names], 1)  # (B, modalities)
    counts = np.array([tokens[name] for name in names], np.int64)
    visible_count = count_visible((here * counts).sum(1), config.hidden_ratio)
    keys = _key_names(names)
    kept = here & ~_draw_dropped(here, keys, window_id, draw, config) if config.drop else here
    chunks = [
        hash_keys(draw.seed, _TOKENS, draw.pass_number, window_id[:, None], key, np.arange(count)[None])
        for key, count in zip(keys[:, None], counts, strict=True)
    ]
    case = SamplerCase(
        available=kept,
        keys=keys,
        counts=counts,
        visible_count=visible_count,
        noise=np.concatenate(chunks, 1) >> np.uint64(1),
        window_id=window_id,
        draw=draw,
        config=config,
    )
    available = np.repeat(kept, counts, axis=1)  # (B, all tokens)
    queue = np.where(available, SAMPLERS[config.sampler](case), _LAST)
    visible = torch.from_numpy(_let_in(queue, visible_count) & available)
    return dict(zip(names, visible.split(counts.tolist(), dim=1), strict=True))


def _let_in(queue: UInt64[np.ndarray, "b tokens"], count: Int64[np.ndarray, "b"]) -> Bool[np.ndarray, "b tokens"]:
    """True for the `count` smallest numbers of every row."""
    if not queue.size:
        return np.zeros(queue.shape, bool)
    # Sorting values is several times faster than sorting places, but lets equal numbers in together.
    last = np.take_along_axis(np.sort(queue, axis=1), np.maximum(count, 1)[:, None] - 1, axis=1)
    inside = (queue <= last) & (count > 0)[:, None]
    tied = np.flatnonzero(inside.sum(1) != count)
    order = np.argsort(queue[tied], axis=1, kind="stable")
    inside[tied] = np.argsort(order, axis=1, kind="stable") < count[tied, None]
    return inside


def _queue_uniformly(case: SamplerCase) -> UInt64[np.ndarray, "b tokens"]:
    """Every available token alike, whatever its modality (Fang et al. 2024, section 3.3)."""
    return case.noise


def _queue_by_dirichlet(case: SamplerCase) -> UInt64[np.ndarray, "b tokens"]:
    """Modalities by shares from a Dirichlet distribution, tokens of a modality alike (Bachmann et al. 2022, MultiMAE).

    The k-th token of a modality with share p stands at (k + 1/2) / p: taking the first n of the queue is
    Sainte-Lague's apportionment of n seats, so the total is exact and no modality gives more than it has.
    """
    level = _to_unit(
        hash_keys(case.draw.seed, _SHARES, case.draw.pass_number, case.window_id[:, None], case.keys[None])
    )
    # Gamma variates, divided by their sum, are Dirichlet's; the queue needs them only up to a factor.
    share = np.maximum(gammaincinv(case.config.concentration, level), 1e-290)
    parts, first = [], 0
    for number, count in enumerate(case.counts.tolist()):
        noise = case.noise[:, first : first + count]
        rank = np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1, kind="stable")
        parts.append((rank + 0.5) / share[:, number : number + 1])
        first += count
    # The bits of positive floating-point numbers are ordered as the numbers are.
    return np.ascontiguousarray(np.concatenate(parts, 1), np.float64).view(np.uint64)


def _queue_subset(case: SamplerCase) -> UInt64[np.ndarray, "b tokens"]:
    """Uniformly within a random part of the modalities: its size is drawn first, then its members.

    A part with fewer tokens than are to be visible is enlarged by the next modality drawn until it has enough.
    """
    rows, modalities = case.available.shape
    keys = np.append(case.keys, _COUNT)[None]
    random = hash_keys(case.draw.seed, _SUBSETS, case.draw.pass_number, case.window_id[:, None], keys)
    order = np.argsort(np.where(case.available, random[:, :-1] >> np.uint64(1), _LAST), axis=1, kind="stable")
    wanted = 1 + np.floor(_to_unit(random[:, -1]) * case.available.sum(1)).astype(np.int64)
    sizes = np.take_along_axis(case.available * case.counts, order, axis=1)
    before = np.cumsum(sizes, axis=1) - sizes  # tokens of the modalities drawn earlier
    taken = (np.arange(modalities)[None] < wanted[:, None]) | (before < case.visible_count[:, None])
    chosen = np.zeros((rows, modalities), bool)
    np.put_along_axis(chosen, order, taken, axis=1)
    return np.where(np.repeat(chosen, case.counts, axis=1), case.noise, _LAST)


SAMPLERS: Mapping[str, MaskSampler] = {
    "uniform": _queue_uniformly,
    "dirichlet": _queue_by_dirichlet,
    "subset": _queue_subset,
}
"""The samplers by the names that MaskConfig.sampler takes."""


def check_visible(
    visible: Mapping[str, Bool[Tensor, "..."]], present: Mapping[str, Bool[Tensor, "b"]], tokens: Mapping[str, int]
) -> None:
    """Refuse visible tokens that a caller chose and that do not fit the windows.

    Raises:
        ValueError: a modality is missing, a shape is wrong, an absent token is said to be visible, or a window has
            no visible token.
    """
    if set(visible) != set(tokens):
        raise ValueError(f"Visible tokens must be given for {', '.join(tokens)}, but were for {', '.join(visible)}.")
    for name, count in tokens.items():
        wanted, got = (len(present[name]), count), tuple(visible[name].shape)
        if got != wanted:
            raise ValueError(f"Visible tokens of {name} must have the shape {wanted}, but have {got}.")
        absent = int((visible[name] & ~present[name][:, None]).sum())
        if absent:
            raise ValueError(f"Visible tokens must be present, but {absent} of {name} are absent. Leave them False.")
    empty = int((~torch.cat(list(visible.values()), 1).any(1)).sum())
    if empty:
        raise ValueError(f"Every window must have a visible token, but {empty} have none.")


def count_visible(present_tokens: Int64[np.ndarray, "b"], hidden_ratio: float) -> Int64[np.ndarray, "b"]:
    """How many tokens stay visible: the rounded share of the present ones, at least 1 where there is any."""
    rounded = np.floor((1.0 - hidden_ratio) * present_tokens + 0.5).astype(np.int64)
    return np.minimum(np.maximum(rounded, 1), present_tokens)


def show_all(present: Mapping[str, Bool[Tensor, "b"]], tokens: Mapping[str, int]) -> dict[str, Bool[Tensor, "b _"]]:
    """Every token of every present modality is visible: how a trained encoder is used."""
    return {name: present[name][:, None].expand(-1, tokens[name]) for name in tokens}


def find_hidden(
    present: Mapping[str, Bool[Tensor, "b"]], visible: Mapping[str, Bool[Tensor, "b _"]]
) -> dict[str, Bool[Tensor, "b _"]]:
    """The hidden tokens `(B, tokens)` per modality: present and not visible."""
    return {name: present[name][:, None] & ~visible[name] for name in visible}


def _draw_dropped(
    here: Bool[np.ndarray, "b modalities"],
    keys: Int64[np.ndarray, "modalities"],
    window_id: Int64[np.ndarray, "b"],
    draw: Draw,
    config: MaskConfig,
) -> Bool[np.ndarray, "b modalities"]:
    """The modality hidden whole in each window: the first present one in an order drawn per step.

    So windows that have all modalities lose the same one, and a window that lacks it loses another of its own.
    """
    rows = len(here)
    if config.drop_scope == "sample":
        place, key = draw.pass_number, window_id
    else:
        place, key = draw.step, np.full(rows, draw.rank if config.drop_scope == "rank" else 0)
    order = hash_keys(draw.seed, _MODALITIES, place, key[:, None], np.append(keys, _COUNT)[None])
    # The last column decides whether anything is dropped at all.
    happens = _to_unit(order[:, -1]) < config.drop_probability
    first = np.argmin(np.where(here, order[:, :-1] >> np.uint64(1), _LAST), axis=1)
    dropped = np.zeros_like(here)
    dropped[np.arange(rows), first] = True
    return dropped & here & ((here.sum(1) > 1) & happens)[:, None]


def _key_names(names: Sequence[str]) -> Int64[np.ndarray, "modalities"]:
    """A number for each name that is the same in every process (Python's own hash is not)."""
    return np.array([zlib.crc32(name.encode()) for name in names], np.int64)


def _to_unit(bits: UInt64[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Random 64-bit numbers as numbers in [0, 1), 53 bits of each."""
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def hash_keys(seed: int, stream: int, place: int, *keys: Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Random 64-bit numbers from integer keys: the finaliser of SplitMix64 (Steele et al. 2014), chained."""
    state: np.ndarray = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in (np.array([seed]), np.array([stream]), np.array([place]), *keys):
            state = state + key.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state

"""Which tokens a model sees: a pure function of (seed, pass, window), the same for any batch or worker.

The words: a token is `present` if its modality was recorded in that window; of the present tokens some are
`visible` to the encoder and the rest are `hidden`. An absent token is neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt64
from torch import Tensor

from physioray.config import MaskConfig
from physioray.tensors import Draw

# Streams of the key, so that no two kinds of choice share their random numbers.
_TOKENS, _MODALITIES = 1, 2


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
    drawn uniformly, without regard to modality. With `drop`, one present modality is hidden whole first (never
    the only one present), and the visible tokens are drawn among the others.

    Args:
        present: `(B,)` per modality.
        tokens: number of tokens of a window per modality.
        window_id: `(B,)` keys each window's own choice.
        draw: seed, pass, step and rank.
        config: ratio and drop.

    Returns:
        `(B, tokens)` per modality, True where visible.
    """
    names = list(tokens)
    here = np.stack([present[name].numpy() for name in names], 1)  # (B, modalities)
    counts = np.array([tokens[name] for name in names])
    available = np.repeat(here, counts, axis=1)  # (B, all tokens)
    visible_count = count_visible(available.sum(1), config.hidden_ratio)
    if config.drop:
        dropped = _draw_dropped(here, window_id, draw, config)
        available = np.repeat(here & ~dropped, counts, axis=1)
    noise = _hash(draw.seed, _TOKENS, draw.pass_number, window_id[:, None], np.arange(counts.sum())[None])
    # The smallest numbers win; tokens that are not available come last.
    noise = np.where(available, noise >> np.uint64(1), np.uint64(2**63))
    rank = np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1, kind="stable")
    visible = torch.from_numpy((rank < visible_count[:, None]) & available)
    return dict(zip(names, visible.split(counts.tolist(), dim=1), strict=True))


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
    here: Bool[np.ndarray, "b modalities"], window_id: Int64[np.ndarray, "b"], draw: Draw, config: MaskConfig
) -> Bool[np.ndarray, "b modalities"]:
    """The modality hidden whole in each window: the first present one in an order drawn per step.

    So windows that have all modalities lose the same one, and a window that lacks it loses another of its own.
    """
    rows, modalities = here.shape
    if config.drop_scope == "sample":
        place, key = draw.pass_number, window_id
    else:
        place, key = draw.step, np.full(rows, draw.rank if config.drop_scope == "rank" else 0)
    order = _hash(draw.seed, _MODALITIES, place, key[:, None], np.arange(modalities + 1)[None])
    # The last column decides whether anything is dropped at all: 53 bits as a number in [0, 1).
    happens = (order[:, -1] >> np.uint64(11)).astype(np.float64) / 2.0**53 < config.drop_probability
    first = np.argmin(np.where(here, order[:, :-1] >> np.uint64(1), np.uint64(2**63)), axis=1)
    dropped = np.zeros_like(here)
    dropped[np.arange(rows), first] = True
    return dropped & here & ((here.sum(1) > 1) & happens)[:, None]


def _hash(seed: int, stream: int, place: int, *keys: Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Random 64-bit numbers from integer keys: the finaliser of SplitMix64 (Steele et al. 2014), chained."""
    state: np.ndarray = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in (np.array([seed]), np.array([stream]), np.array([place]), *keys):
            state = state + key.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state

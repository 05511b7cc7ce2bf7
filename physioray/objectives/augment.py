"""Disturbs windows so that two views of a night differ in what should not matter: noise, and a stretch of silence.

Pure functions of (seed, pass, window, modality), the same for any batch, worker or order of modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from physioray.config import AugmentConfig
from physioray.objectives.masking import hash_keys
from physioray.signals import MODALITIES
from physioray.tensors import Draw

# Streams of the key; the lower numbers are those of masking.
_NOISE, _BLOCK = 101, 102


def augment(
    signals: Mapping[str, Float[Tensor, "b _"]],
    present: Mapping[str, Bool[Tensor, "b"]],
    window_id: Int64[np.ndarray, "b"],
    draw: Draw,
    config: AugmentConfig,
) -> dict[str, Float[Tensor, "b _"]]:
    """Disturbed copies of windows: noise is added, then one stretch is set to zero, each modality on its own.

    x' = (x + noise * std(x) * e) * outside(block), e ~ N(0, 1) per sample (methods of Raghu et al. 2022 as others
    re-implemented them; the strengths are assumptions, see AugmentConfig).

    Args:
        signals: `(B, samples)` per modality.
        present: `(B,)` per modality, on the CPU; an absent modality is handed back as it is.
        window_id: `(B,)` keys each window's own noise and stretch.
        draw: seed and pass; step and rank do not matter.
        config: strengths.
    """
    disturbed = {}
    for name, signal in signals.items():
        changed = silence_block(
            add_noise(signal, name, window_id, draw, config.noise), name, window_id, draw, config.block
        )
        disturbed[name] = torch.where(present[name].to(signal.device)[:, None], changed, signal)
    return disturbed


def add_noise(
    signal: Float[Tensor, "b samples"], name: str, window_id: Int64[np.ndarray, "b"], draw: Draw, strength: float
) -> Float[Tensor, "b samples"]:
    """Add Gaussian noise whose standard deviation is `strength` times that of the window itself."""
    if strength == 0:
        return signal
    key = _key(_NOISE, name, window_id, draw).view(np.int64)
    noise = draw_normal(torch.from_numpy(key).to(signal.device), signal.shape[1])
    spread = signal.std(1, correction=0, keepdim=True)
    return signal + strength * spread * noise.to(signal.dtype)


def silence_block(
    signal: Float[Tensor, "b samples"], name: str, window_id: Int64[np.ndarray, "b"], draw: Draw, share: float
) -> Float[Tensor, "b samples"]:
    """Set one stretch of `share` of the window to zero; where it lies is drawn per window and modality."""
    samples = signal.shape[1]
    length = round(share * samples)
    if length == 0:
        return signal
    places = (_key(_BLOCK, name, window_id, draw) % np.uint64(samples - length + 1)).astype(np.int64)
    first = torch.from_numpy(places).to(signal.device)[:, None]
    position = torch.arange(samples, device=signal.device)[None]
    return signal.masked_fill((position >= first) & (position < first + length), 0.0)


def draw_normal(key: Int64[Tensor, "b"], samples: int) -> Float[Tensor, "b samples"]:
    """Standard normal numbers, row i a function of key i alone, on the key's device.

    One 64-bit number of SplitMix64 (Steele et al. 2014) gives two normal numbers by Box and Muller (1958): with
    u, v uniform, sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v). A generator per row would need a call per
    row, which a GPU waits for.
    """
    pairs = (samples + 1) // 2
    state = key[:, None] + torch.arange(1, pairs + 1, device=key.device)[None] * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift(state, 31)
    # 24 bits are what a float32 holds exactly; u is in (0, 1], so that its logarithm is finite.
    radius = (-2.0 * ((_shift(state, 40) + 1).float() / 2.0**24).log()).sqrt()
    angle = (state & (2**24 - 1)).float() * (2.0 * math.pi / 2.0**24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :samples]


def _key(stream: int, name: str, window_id: Int64[np.ndarray, "b"], draw: Draw) -> np.ndarray:
    """A 64-bit number per window; the modality's place in the registry, not in the batch, is part of it."""
    modality = np.array([list(MODALITIES).index(name)])
    return hash_keys(draw.seed, stream, draw.pass_number, modality, window_id)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number: PyTorch has no arithmetic on unsigned ones."""
    return value - 2**64 if value >= 2**63 else value


def _shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Shift right and fill with zeros, as for an unsigned number."""
    return (state >> bits) & (2 ** (64 - bits) - 1)

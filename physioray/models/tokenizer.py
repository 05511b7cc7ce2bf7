"""Cuts a window into chunks of a second and makes each a vector, without looking at its neighbours."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class ChunkTokenizer(nn.Module):
    """Tokens of one modality (Fang et al. 2024, section 3.2): convolution, max pool, linear layer, LayerNorm.

    Chunks are independent of each other, so a hidden chunk never has to be computed. The activation stands after
    the pool: the paper names none, and there it is applied to a quarter of the values.

    Args:
        samples: samples of one chunk.
        width: size of a token.
        channels, kernel: of the convolution; stride 1, padded to keep the length.
        pool: samples per maximum; chunks shorter than that are pooled whole.
    """

    def __init__(self, samples: int, width: int, *, channels: int, kernel: int, pool: int) -> None:
        super().__init__()
        self.pool = min(pool, samples)
        self.convolution = nn.Conv1d(1, channels, kernel, padding=kernel // 2)
        self.projection = nn.Linear(channels * (samples // self.pool), width)
        self.norm = nn.LayerNorm(width)

    def forward(self, chunks: Float[Tensor, "k samples"]) -> Float[Tensor, "k width"]:
        """One token per chunk."""
        # A one-channel convolution as a matrix product over sliding views: on a CPU it takes about a third of
        # the convolution's time forward, and with the pool about half forward and backward.
        half = self.convolution.padding[0]
        assert isinstance(half, int)
        views = functional.pad(chunks, (half, half)).unfold(1, 2 * half + 1, 1)
        features = functional.linear(views, self.convolution.weight[:, 0], self.convolution.bias)
        whole = features.shape[1] // self.pool * self.pool
        grouped = features[:, :whole].unflatten(1, (-1, self.pool))
        # Of PyTorch's two maxima one is fast forward and the other fast backward, on a CPU.
        pooled = grouped.max(2).values if torch.is_grad_enabled() else grouped.amax(2)
        return self.norm(self.projection(functional.gelu(pooled).flatten(1)))


def make_positions(seconds: Float[Tensor, "tokens"], width: int) -> Float[Tensor, "tokens width"]:
    """Sine and cosine position vectors of the times at which tokens start, in seconds.

    PE(t, 2i) = sin(t / 10000^(2i/width)), PE(t, 2i+1) = cos(the same) (Vaswani et al. 2017, section 3.5). The
    time, not the token's number, is the position, so that modalities with longer tokens stay aligned.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = seconds[:, None] * frequency[None]
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

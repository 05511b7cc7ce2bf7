"""Cuts a window into chunks of a second and makes each a vector, without looking at its neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
        half = self.convolution.padding[0]
        assert isinstance(half, int)
        padded = functional.pad(chunks, (half, half))
        weight, bias = self.convolution.weight[:, 0], self.convolution.bias
        assert bias is not None
        learning = self.training and torch.is_grad_enabled() and not chunks.requires_grad
        if learning and chunks.device.type == "cpu":
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
            # The largest of some numbers, plus a number, is the largest of the sums.
            pooled = _ConvolvedMaxima.apply(padded.to(dtype), weight.to(dtype), self.pool) + bias.to(dtype)
        else:
            # A one-channel convolution as a matrix product over sliding views: on a CPU it takes about a third of
            # the convolution's time.
            features = functional.linear(padded.unfold(1, 2 * half + 1, 1), weight, bias)
            whole = features.shape[1] // self.pool * self.pool
            grouped = features[:, :whole].unflatten(1, (-1, self.pool))
            # Of numbers that are equal the way back takes one, here as there.
            pooled = grouped.max(2).values if torch.is_grad_enabled() else grouped.amax(2)
        return self.norm(self.projection(functional.gelu(pooled).flatten(1)))


class _ConvolvedMaxima(torch.autograd.Function):
    """The convolution and its maxima for training on a CPU, some chunks at a time so that the cache holds them.

    The convolution's output is a hundred times the signal and is never written out as a whole; what is kept for the
    way back is which of the pooled moments was the largest. Signals get no gradient.
    """

    CHUNKS = 64

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, pool: int) -> Tensor:
        channels, kernel = weight.shape
        groups = (padded.shape[1] - kernel + 1) // pool
        maxima = weight.new_empty(len(padded), groups, channels)
        # won[i - 1]: moment i is larger than all before it.
        won = torch.empty(pool - 1, *maxima.shape, dtype=torch.bool)
        for first in range(0, len(padded), _ConvolvedMaxima.CHUNKS):
            part = slice(first, first + _ConvolvedMaxima.CHUNKS)
            views = padded[part].unfold(1, kernel, 1)[:, : groups * pool]
            features = functional.linear(views, weight).unflatten(1, (groups, pool))
            best = features[:, :, 0]
            for moment in range(1, pool):
                torch.gt(features[:, :, moment], best, out=won[moment - 1, part])
                best = torch.maximum(best, features[:, :, moment])
            maxima[part] = best
        ctx.save_for_backward(padded, won)
        ctx.kernel, ctx.pool = kernel, pool
        return maxima

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        padded, won = ctx.saved_tensors
        groups, channels = gradient.shape[1:]
        total = torch.zeros(ctx.kernel, channels)
        spread = gradient.new_empty(_ConvolvedMaxima.CHUNKS, groups, ctx.pool, channels)
        for first in range(0, len(padded), _ConvolvedMaxima.CHUNKS):
            part = slice(first, first + _ConvolvedMaxima.CHUNKS)
            rest = gradient[part]
            features = spread[: len(rest)]
            for moment in range(ctx.pool - 1, 0, -1):
                torch.mul(rest, won[moment - 1, part], out=features[:, :, moment])
                rest = rest - features[:, :, moment]
            features[:, :, 0] = rest
            views = padded[part].unfold(1, ctx.kernel, 1)[:, : groups * ctx.pool]
            total += views.reshape(-1, ctx.kernel).t() @ features.view(-1, channels)
        return None, total.t().to(gradient.dtype), None


def make_positions(seconds: Float[Tensor, "tokens"], width: int) -> Float[Tensor, "tokens width"]:
    """Sine and cosine position vectors of the times at which tokens start, in seconds.

    PE(t, 2i) = sin(t / 10000^(2i/width)), PE(t, 2i+1) = cos(the same) (Vaswani et al. 2017, section 3.5). The
    time, not the token's number, is the position, so that modalities with longer tokens stay aligned.
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = seconds[:, None] * frequency[None]
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

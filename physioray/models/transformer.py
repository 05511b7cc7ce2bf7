"""Attention and pre-norm blocks. Attention hands back its weights when asked, from the same parameters."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional


@runtime_checkable
class Sink(Protocol):
    """Takes tensors one by one, as a list does; what looks on may keep less than all of each."""

    def append(self, value: Tensor, /) -> None:
        """Take one tensor."""
        ...


class Attention(nn.Module):
    """Multi-head attention of queries to a context (Vaswani et al. 2017, section 3.2).

    Args:
        width, heads: size of a token and number of heads.
        dropout: on the attention weights and on the output projection (Fang et al. 2024, section 3.2).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.drop_output = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "b q width"],
        context: Float[Tensor, "b k width"],
        real: Bool[Tensor, "b k"] | None = None,
        weights: Sink | None = None,
    ) -> Float[Tensor, "b q width"]:
        """Attend.

        Args:
            queries, context: tokens; the same tensor for self-attention.
            real: False where the context is padding; None if nothing is.
            weights: a list or other sink that receives the attention weights `(B, heads, Q, K)`; None keeps the
                fused, faster path.
        """
        query = self._split(self.query(queries))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        allowed = None if real is None else real[:, None, None]
        drop = self.dropout if self.training else 0.0
        # On a CPU the fused kernel for 16 bits takes nine times as long as three products (PyTorch 2.13).
        if weights is None and (query.dtype == torch.float32 or query.device.type != "cpu"):
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=drop)
        else:
            score = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            if allowed is not None:
                score = score.masked_fill(~allowed, -math.inf)
            weight = score.softmax(-1)
            if weights is not None:
                weights.append(weight.detach())
            mixed = functional.dropout(weight, drop) @ value
        return self.drop_output(self.output(mixed.transpose(1, 2).flatten(2)))

    def _split(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b heads n size"]:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """The two-layer network behind every attention, GELU between."""

    def __init__(self, width: int, ratio: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width), nn.Dropout(dropout)
        )


class Block(nn.Module):
    """A pre-norm transformer layer: x + Attention(Norm(x)), then x + FeedForward(Norm(x))."""

    def __init__(self, width: int, heads: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = FeedForward(width, ratio, dropout)

    def forward(
        self,
        tokens: Float[Tensor, "b n width"],
        real: Bool[Tensor, "b n"] | None = None,
        weights: Sink | None = None,
    ) -> Float[Tensor, "b n width"]:
        """One layer; `real` and `weights` as in Attention."""
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed, real, weights)
        return tokens + self.feed(self.feed_norm(tokens))


class CrossBlock(nn.Module):
    """A layer whose queries attend to another set of tokens, as in MultiMAE's decoders.

    Args:
        residual: keep a residual path around the attention (MultiMAE has none; an assumption here).
    """

    def __init__(self, width: int, heads: int, ratio: int, dropout: float, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.query_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = FeedForward(width, ratio, dropout)

    def forward(
        self,
        queries: Float[Tensor, "b q width"],
        context: Float[Tensor, "b k width"],
        real: Bool[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b q width"]:
        """One layer; `real` is False where the context is padding."""
        mixed = self.attention(self.query_norm(queries), self.context_norm(context), real)
        queries = queries + mixed if self.residual else mixed
        return queries + self.feed(self.feed_norm(queries))


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch.compile make one kernel of what stands between the products of every layer, when it first runs.

    Layer by layer: what is compiled is small, all layers of a kind share it, and the number of visible tokens of a
    modality, which changes from step to step, stays outside. Weights keep their names.
    """
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.compile(dynamic=False, backend=backend)


def initialise(module: nn.Module) -> None:
    """Xavier weights and zero biases for linear layers, as MAE and MultiMAE have; norms start as identity."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_vector(width: int) -> nn.Parameter:
    """A learnable vector drawn from N(0, 0.02) truncated at +-2 (Fang et al. 2024, section 3.3)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-2.0, b=2.0))

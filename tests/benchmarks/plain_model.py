"""The peer of the training benchmarks: the same masked autoencoder as one would write it from PyTorch's own layers.

All tokens of a window are made, then the visible ones are picked; layers are nn.TransformerEncoderLayer and
nn.MultiheadAttention. Windows have all modalities, and the same number of visible tokens each. Given the weights of
the project's model it gives the same reconstructions (`tests/benchmarks/test_plain_model.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from physioray.config import ModelConfig
from physioray.models.fused import MaskedAutoencoder
from physioray.models.transformer import Attention, Block
from physioray.signals import find_modality


class PlainTokenizer(nn.Sequential):
    def __init__(self, samples: int, config: ModelConfig) -> None:
        channels, kernel, pool = config.tokenizer_channels, config.tokenizer_kernel, config.tokenizer_pool
        super().__init__(
            nn.Conv1d(1, channels, kernel, padding=kernel // 2),
            nn.MaxPool1d(pool),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(channels * (samples // pool), config.width),
            nn.LayerNorm(config.width),
        )


def make_layer(config: ModelConfig) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.mlp_ratio * config.width,
        config.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    layer.dropout = nn.Dropout(0.0)  # the paper's feed-forward drops its output only
    return layer


class PlainDecoder(nn.Module):
    def __init__(self, samples: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.modality_vectors = nn.ParameterDict({name: torch.zeros(width) for name in config.modalities})
        self.query_norm, self.context_norm, self.feed_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.drop = nn.Dropout(config.dropout)
        self.feed = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(),
            nn.Linear(config.mlp_ratio * width, width),
            nn.Dropout(config.dropout),
        )
        self.layers = nn.Sequential(*(make_layer(config) for _ in range(config.decoder_layers)))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, samples)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        context = self.context_norm(context)
        mixed, _ = self.attention(self.query_norm(queries), context, context, need_weights=False)
        tokens = queries + self.drop(mixed)
        tokens = tokens + self.feed(self.feed_norm(tokens))
        return self.projection(self.norm(self.layers(tokens)))


class PlainAutoencoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.names = config.modalities
        items = {name: find_modality(name) for name in self.names}
        self.counts = {name: item.tokens for name, item in items.items()}
        chunk = {name: item.samples // item.tokens for name, item in items.items()}
        self.tokenizers = nn.ModuleDict({name: PlainTokenizer(chunk[name], config) for name in self.names})
        self.modality_vectors = nn.ParameterDict({name: torch.zeros(config.width) for name in self.names})
        self.layers = nn.ModuleList(make_layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.decoders = nn.ModuleDict({name: PlainDecoder(chunk[name], config) for name in self.names})
        seconds = torch.cat([torch.arange(item.tokens) * float(item.token_seconds) for item in items.values()])
        angle = seconds[:, None] * torch.exp(torch.arange(0, config.width, 2) * (-math.log(10000.0) / config.width))
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

    def list_vectors(self, vectors: nn.ParameterDict) -> Tensor:
        return torch.cat([vectors[name].expand(count, -1) for name, count in self.counts.items()])

    def forward(self, signals: Mapping[str, Tensor], visible: Tensor) -> dict[str, Tensor]:
        """Reconstructed chunks `(B, tokens, samples)`; `visible` is `(B, all tokens)`, as many in every row."""
        rows = len(visible)
        parts = []
        for name, count in self.counts.items():
            chunks = signals[name].reshape(rows * count, 1, -1)
            parts.append(self.tokenizers[name](chunks).view(rows, count, -1))
        tokens = torch.cat(parts, 1) + self.positions + self.list_vectors(self.modality_vectors)
        tokens = tokens[visible].view(rows, -1, tokens.shape[-1])
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        outputs, first = {}, 0
        for name, count in self.counts.items():
            decoder = self.decoders[name]
            origin = self.positions + self.list_vectors(decoder.modality_vectors)
            filled = decoder.mask_token.to(tokens.dtype).repeat(rows, visible.shape[1], 1)
            filled[visible] = tokens.flatten(0, 1)
            queries = (filled + origin)[:, first : first + count]
            context = tokens + origin.expand(rows, -1, -1)[visible].view_as(tokens)
            outputs[name] = decoder(queries, context)
            first += count
        return outputs


def measure_plain_loss(
    outputs: Mapping[str, Tensor], signals: Mapping[str, Tensor], visible: Mapping[str, Tensor]
) -> Tensor:
    """Squared error on hidden tokens, the mean of each modality, then the mean of modalities."""
    losses = []
    for name, output in outputs.items():
        hidden = ~visible[name]
        error = functional.mse_loss(output[hidden].float(), signals[name].view_as(output)[hidden])
        losses.append(error)
    return torch.stack(losses).mean()


def copy_weights(model: MaskedAutoencoder) -> PlainAutoencoder:
    """A plain version with the weights of the project's model."""
    plain = PlainAutoencoder(model.config).to(next(model.parameters()).device)
    with torch.no_grad():
        _copy(plain.modality_vectors, model.encoder.modality_vectors)
        _copy(plain.norm, model.encoder.norm)
        for layer, block in zip(plain.layers, model.encoder.blocks, strict=True):
            _copy_block(layer, block)
        for name in model.tokens:
            tokenizer, own = plain.tokenizers[name], model.encoder.tokenizers[name]
            for number, part in ((0, own.convolution), (4, own.projection), (5, own.norm)):
                _copy(tokenizer[number], part)
            # A convolution's output is flattened channel by channel here, and moment by moment there.
            channels = own.convolution.out_channels
            tokenizer[4].weight.copy_(own.projection.weight.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1))
            decoder, theirs = plain.decoders[name], model.find_decoder(name)
            decoder.mask_token.copy_(theirs.mask_token)
            _copy(decoder.modality_vectors, theirs.modality_vectors)
            _copy_attention(decoder.attention, theirs.cross.attention)
            for part in ("query_norm", "context_norm", "feed_norm", "feed"):
                _copy(getattr(decoder, part), getattr(theirs.cross, part))
            for layer, block in zip(decoder.layers, theirs.blocks, strict=True):
                _copy_block(layer, block)
            _copy(decoder.norm, theirs.norm)
            _copy(decoder.projection, theirs.projection)
    return plain


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def _copy_attention(target: nn.MultiheadAttention, source: Attention) -> None:
    target.in_proj_weight.copy_(torch.cat([source.query.weight, source.key_value.weight]))
    target.in_proj_bias.copy_(torch.cat([source.query.bias, source.key_value.bias]))
    _copy(target.out_proj, source.output)


def _copy_block(target: nn.TransformerEncoderLayer, source: Block) -> None:
    _copy_attention(target.self_attn, source.attention)
    _copy(target.norm1, source.attention_norm)
    _copy(target.norm2, source.feed_norm)
    _copy(target.linear1, source.feed[0])
    _copy(target.linear2, source.feed[2])

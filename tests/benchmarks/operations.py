"""Floating-point operations of a pretraining step, counted from the sizes of its products."""

from __future__ import annotations

from physioray.config import ModelConfig
from physioray.signals import find_modality


def count_step_operations(config: ModelConfig, visible: int) -> int:
    """Operations of one window's pretraining step, forward and backward; a multiplication and an addition are two.

    Matrix products and the convolution are counted, nothing else: about 0.55e9 in the preset `small` and 10.4e9 in
    `paper`. Backward, a product costs twice what it costs forward, and the convolution once: signals get no gradient.

    Args:
        config: of the model; its modalities have all been recorded, and all have tokens of the same length.
        visible: tokens of the window that the encoder sees.
    """
    modalities = [find_modality(name) for name in config.modalities]
    (samples,) = {item.samples // item.tokens for item in modalities}
    width, pool = config.width, min(config.tokenizer_pool, samples)
    block = (4 + 2 * config.mlp_ratio) * width * width  # weights of query, key, value, output and feed-forward
    convolution = 2 * visible * samples * config.tokenizer_kernel * config.tokenizer_channels
    products = 2 * visible * config.tokenizer_channels * (samples // pool) * width
    products += config.layers * (2 * visible * block + 4 * visible * visible * width)
    for item in modalities:
        own = item.tokens
        products += 2 * own * (block - 2 * width * width) + 2 * visible * 2 * width * width + 4 * own * visible * width
        products += config.decoder_layers * (2 * own * block + 4 * own * own * width)
        products += 2 * own * width * samples
    return 3 * products + 2 * convolution

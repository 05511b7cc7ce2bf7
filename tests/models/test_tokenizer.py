"""The tokenizer's own way through convolution and maxima for training on a CPU, against PyTorch's layers."""

import pytest
import torch
from torch.nn import functional

from physioray.models.tokenizer import ChunkTokenizer


@pytest.mark.parametrize(("rows", "samples", "pool"), [(130, 100, 4), (5, 10, 4), (7, 3, 4), (6, 8, 1), (0, 100, 4)])
def test_tokens_and_gradients_are_those_of_a_convolution_and_a_max_pool(rows: int, samples: int, pool: int) -> None:
    torch.manual_seed(0)
    tokenizer = ChunkTokenizer(samples, 16, channels=8, kernel=5, pool=pool)
    chunks = torch.randn(rows, samples)
    chunks[:2] = 0.0  # a flat signal: the largest of equal numbers
    chunks[2:4] = chunks[2:4].round()
    tokens = tokenizer(chunks)
    weight = torch.randn_like(tokens)
    (tokens * weight).sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in tokenizer.named_parameters()}
    tokenizer.zero_grad()
    maxima = functional.max_pool1d(tokenizer.convolution(chunks[:, None]), min(pool, samples)).transpose(1, 2)
    theirs = tokenizer.norm(tokenizer.projection(functional.gelu(maxima).flatten(1)))
    (theirs * weight).sum().backward()
    torch.testing.assert_close(tokens, theirs, rtol=1e-4, atol=1e-5)
    for name, parameter in tokenizer.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer(chunks), tokens, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_signal_are_there_when_asked_for() -> None:
    tokenizer = ChunkTokenizer(100, 16, channels=8, kernel=5, pool=4)
    chunks = torch.randn(3, 100, requires_grad=True)
    tokenizer(chunks).square().sum().backward()
    assert chunks.grad is not None and bool((chunks.grad != 0).any(1).all())

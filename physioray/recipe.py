"""Fits linear probes by the paper's recipe: a fixed number of AdamW steps, many heads at once.

Fang et al. 2024, section 3.5: AdamW at 1e-4, 10 passes of linear warm-up, then a cosine to 0 over 200 passes,
weighted cross-entropy, the weights with the lowest validation error. Stretched to at least
`ProbeConfig.recipe_min_steps` steps, because on 2,000 windows 200 passes are 800 steps and leave even good features
half fitted. The seed sets the initial weights and the order of windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from physioray.config import ProbeConfig
from physioray.probe import LinearHead, ProbeError, check_training, standardise, weigh_classes

WARMUP_SHARE = 10 / 200
"""Share of the steps that warm up: the paper's 10 of 200 passes, kept when the passes are stretched."""

BETAS = (0.9, 0.95)
EPSILON = 1e-8
EVALUATIONS = 100
"""How many times, evenly spaced, the validation error is measured."""

CHUNK = 50
"""Steps whose rows are drawn at once."""


SMALL_STEP = 8_000_000
"""Gathered features of a step (heads x batch x features) below which one thread does the work."""


@dataclass(frozen=True, kw_only=True)
class RecipeProblem:
    """One head to fit: which windows it trains on, which it is chosen by, and its seed.

    Attributes:
        labels: `(n,)` class numbers over all windows of the feature matrix; those of the rows below are known.
        classes: number of classes.
        train, validation: row numbers in the feature matrix.
        seed: sets initial weights and order.
    """

    labels: Int[np.ndarray, " n"]
    classes: int
    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    seed: int


@dataclass(frozen=True)
class _Stack:
    """Problems side by side: heads x classes x features, padded to the largest number of classes.

    Windows stand last in logits, (heads, classes, batch): with five classes that is six times faster than last classes.
    """

    features: Tensor  # (n, features), standardised over all windows for the sake of single precision
    labels: Tensor  # (heads, n), 0 where unknown: such rows are never drawn
    weights: Tensor  # (heads, classes) class weights
    hidden: Tensor  # (heads, classes, 1) minus infinity for classes that a head does not have, else 0
    mean: Tensor  # (heads, 1, features)
    scale: Tensor  # (heads, 1, features)


@dataclass(frozen=True)
class _Judge:
    """Validation windows that some heads share."""

    heads: list[int]
    features: Tensor  # (validation, features)
    labels: Tensor  # (heads, validation)
    weights: Tensor  # (heads, validation), summing to 1 for each head


def count_recipe_steps(windows: int, config: ProbeConfig) -> int:
    """Steps of the recipe for a training set: its passes, but at least `recipe_min_steps`."""
    return max(config.recipe_passes * math.ceil(windows / config.recipe_batch_size), config.recipe_min_steps)


def schedule_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: linear warm-up to the peak, then a cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit_recipe(
    features: Float[np.ndarray, "n features"], problems: Sequence[RecipeProblem], config: ProbeConfig
) -> list[LinearHead]:
    """Fit all heads at once, as one batched matrix product per step.

    All heads take the same number of steps and the same batch size, those of the largest training set (folds
    differ by a few windows only). Features are standardised by each head's own training windows.

    Args:
        features: `(n, features)` all windows that any head trains on or is chosen by.
        problems: the heads.
        config: rate, decay, batch size, passes.

    Returns:
        One head per problem, in order, with the weights of the lowest weighted validation cross-entropy, or the
        last ones where a problem has no validation window.

    Raises:
        ProbeError: a problem has no training windows or a single class.
    """
    if not problems:
        return []
    for problem in problems:
        check_training(problem.labels[problem.train], problem.classes)
    if len({len(problem.labels) for problem in problems} | {len(features)}) > 1:
        raise ProbeError("Every problem must label all windows of the feature matrix, unknown ones with -1.")
    # A common standardisation first: then each head's own is a small correction, safe in single precision.
    shift, stretch = standardise(features)
    stack = _stack_problems(((features - shift) / stretch).astype(np.float32), problems, config)
    with _limit_threads(len(problems) * config.recipe_batch_size * features.shape[1]):
        weight, bias = _descend(stack, problems, config)
    return [
        _unstack(stack, number, weight, bias, (shift, stretch), problem.classes)
        for number, problem in enumerate(problems)
    ]


def _stack_problems(
    features: Float[np.ndarray, "n features"], problems: Sequence[RecipeProblem], config: ProbeConfig
) -> _Stack:
    width = max(problem.classes for problem in problems)
    weights = np.zeros((len(problems), width), np.float32)
    standards: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for number, problem in enumerate(problems):
        weighed = weigh_classes(problem.labels[problem.train], problem.classes)
        weights[number, : problem.classes] = weighed if config.class_weights else weighed > 0
        key = problem.train.tobytes()
        if key not in standards:
            standards[key] = standardise(features[problem.train])
    chosen = [standards[problem.train.tobytes()] for problem in problems]
    hidden = np.where(weights > 0, 0.0, -np.inf).astype(np.float32)
    return _Stack(
        features=torch.from_numpy(np.ascontiguousarray(features)),
        labels=torch.from_numpy(np.stack([problem.labels for problem in problems]).astype(np.int64)).clamp(min=0),
        weights=torch.from_numpy(weights),
        hidden=torch.from_numpy(hidden)[:, :, None],
        mean=torch.from_numpy(np.stack([mean for mean, _ in chosen]).astype(np.float32))[:, None, :],
        scale=torch.from_numpy(np.stack([scale for _, scale in chosen]).astype(np.float32))[:, None, :],
    )


@contextmanager
def _limit_threads(cells: int) -> Iterator[None]:
    """One thread where a step's gathered features `cells` are few: two gain little, and on a busy machine lose all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if cells < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _descend(stack: _Stack, problems: Sequence[RecipeProblem], config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """Weights `(heads, classes, features)` and biases `(heads, classes, 1)` of the lowest validation error."""
    largest = max(len(problem.train) for problem in problems)
    steps, batch = count_recipe_steps(largest, config), min(config.recipe_batch_size, largest)
    weight, bias = _initialise(stack, problems)
    parameters = [weight, bias]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in parameters]
    streams = [_stream_rows(problem, CHUNK * batch) for problem in problems]
    judges = _gather_judges(stack, problems)
    best = [value.clone() for value in parameters]
    lowest = torch.full((len(problems),), math.inf)
    every = max(1, steps // EVALUATIONS)
    rows = torch.empty(0)
    for step in range(steps):
        if step % CHUNK == 0:
            drawn = np.stack([next(stream) for stream in streams]).reshape(len(problems), CHUNK, batch)
            rows = torch.from_numpy(drawn)
        gradients = _differentiate(stack, weight, bias, rows[:, step % CHUNK])
        rate = schedule_rate(step, steps, config.recipe_learning_rate)
        # Weight decay is for weights, not for biases.
        for value, moment, gradient, decay in zip(
            parameters, moments, gradients, (config.recipe_weight_decay, 0.0), strict=True
        ):
            _step_adamw(value, moment, gradient, rate, decay, step)
        if (step + 1) % every == 0 or step + 1 == steps:
            error = _measure_error(stack, judges, weight, bias)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            # A head without validation windows has no error and keeps its last weights.
            better |= torch.isnan(error)
            for kept, value in zip(best, parameters, strict=True):
                kept[better] = value[better]
    return best[0], best[1]


def _initialise(stack: _Stack, problems: Sequence[RecipeProblem]) -> tuple[Tensor, Tensor]:
    """Weights and biases uniform in +-1 / sqrt(features), from each head's seed."""
    features, classes = stack.features.shape[1], stack.weights.shape[1]
    bound = 1.0 / math.sqrt(features)
    weights, biases = [], []
    for problem in problems:
        generator = torch.Generator().manual_seed(problem.seed)
        drawn = torch.zeros((features + 1, classes))
        # Drawn without the padding, so that a head does not depend on those beside it.
        drawn[:, : problem.classes] = torch.rand((features + 1, problem.classes), generator=generator)
        drawn = drawn * (2.0 * bound) - bound
        weights.append(drawn[:-1].T)
        biases.append(drawn[-1:].T)
    return torch.stack(weights), torch.stack(biases)


def _stream_rows(problem: RecipeProblem, size: int) -> Iterator[Int64[np.ndarray, " size"]]:
    """Training rows in blocks of `size`: one random order after another, each holding every row once."""
    generator = np.random.default_rng(problem.seed)
    waiting = np.empty(0, np.int64)
    while True:
        parts, have = [waiting], len(waiting)
        while have < size:
            parts.append(generator.permutation(problem.train).astype(np.int64))
            have += len(problem.train)
        joined = np.concatenate(parts)
        waiting = joined[size:]
        yield joined[:size]


def _differentiate(stack: _Stack, weight: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted cross-entropy of a batch, in closed form.

    With x standardised per head as (x - mean) / scale, the product with `weight` is x @ (weight / scale) less a
    constant, so that no standardised copy of the features is made per head.
    """
    heads, batch = rows.shape
    taken = stack.features.index_select(0, rows.reshape(-1)).view(heads, batch, -1)
    scaled = weight / stack.scale
    error = torch.softmax(torch.bmm(scaled, taken.transpose(1, 2)) + _offset(stack, scaled, bias), 1)
    labels = stack.labels.gather(1, rows)
    share = stack.weights.gather(1, labels)
    share = share / share.sum(1, keepdim=True)
    error.scatter_add_(1, labels[:, None, :], torch.full((heads, 1, batch), -1.0))
    error *= share[:, None, :]
    total = error.sum(2, keepdim=True)
    return (torch.bmm(error, taken) - total * stack.mean) / stack.scale, total


def _offset(stack: _Stack, scaled: Tensor, bias: Tensor) -> Tensor:
    return bias - (stack.mean * scaled).sum(2, keepdim=True) + stack.hidden


def _step_adamw(
    value: Tensor, moment: tuple[Tensor, Tensor], gradient: Tensor, rate: float, decay: float, step: int
) -> None:
    first, second = moment
    first.lerp_(gradient, 1.0 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
    value.mul_(1.0 - rate * decay)
    root = (second / (1.0 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
    value.addcdiv_(first, root, value=-rate / (1.0 - BETAS[0] ** (step + 1)))


def _gather_judges(stack: _Stack, problems: Sequence[RecipeProblem]) -> list[_Judge]:
    groups: dict[bytes, list[int]] = {}
    for number, problem in enumerate(problems):
        if len(problem.validation):
            groups.setdefault(problem.validation.tobytes(), []).append(number)
    judges = []
    for heads in groups.values():
        rows = torch.from_numpy(problems[heads[0]].validation.astype(np.int64))
        labels = stack.labels[heads][:, rows]
        # A class that the training windows lack weighs 0: no head can learn it.
        weights = stack.weights[heads].gather(1, labels)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        judges.append(_Judge(heads, stack.features.index_select(0, rows), labels, weights))
    return judges


def _measure_error(stack: _Stack, judges: Sequence[_Judge], weight: Tensor, bias: Tensor) -> Tensor:
    """Weighted validation cross-entropy `(heads,)`; NaN for a head without validation windows."""
    errors = torch.full((len(weight),), math.nan)
    scaled = weight / stack.scale
    offset = _offset(stack, scaled, bias)
    for judge in judges:
        logits = scaled[judge.heads] @ judge.features.T + offset[judge.heads]
        logs = torch.log_softmax(logits, 1).gather(1, judge.labels[:, None, :])[:, 0]
        errors[judge.heads] = -(torch.where(judge.weights > 0, logs, 0.0) * judge.weights).sum(1)
    return errors


def _unstack(
    stack: _Stack,
    number: int,
    weight: Tensor,
    bias: Tensor,
    common: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
    classes: int,
) -> LinearHead:
    """One head in terms of the features as they came: both standardisations folded into one."""
    shift, stretch = common
    mean = stack.mean[number, 0].double().numpy()
    scale = stack.scale[number, 0].double().numpy()
    return LinearHead(
        mean=shift + stretch * mean,
        scale=stretch * scale,
        weight=weight[number, :classes].double().numpy().copy(),
        bias=(bias + stack.hidden)[number, :classes, 0].double().numpy().copy(),
    )

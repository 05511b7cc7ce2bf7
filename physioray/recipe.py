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
from physioray.feature_source import CachedFeatures, FeatureSource
from physioray.probe import LinearHead, ProbeError, check_training, keep_constant, weigh_classes

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
    """Bundles side by side. A bundle is the heads that train on the same windows in the same order, one a task.

    Their classes stand below each other, so that a bundle reads its windows once: bundles x columns x features.
    Windows stand last in logits, (bundles, columns, batch): with five classes that is six times faster than last
    classes.
    """

    source: FeatureSource
    slices: list[slice]  # the columns of each task
    labels: Tensor  # (bundles, tasks, n), 0 where unknown: such rows are never drawn
    weights: Tensor  # (bundles, columns) class weights
    hidden: Tensor  # (bundles, columns, 1) minus infinity for classes that no training window has, else 0
    mean: Tensor  # (bundles, 1, features)
    scale: Tensor  # (bundles, 1, features)


@dataclass(frozen=True)
class _Judge:
    """Validation windows that some heads of one task share."""

    task: int
    bundles: list[int]
    rows: Tensor  # (validation,)
    labels: Tensor  # (bundles, validation)
    weights: Tensor  # (bundles, validation), summing to 1 for each head


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
    features: Float[np.ndarray, "n features"] | FeatureSource, problems: Sequence[RecipeProblem], config: ProbeConfig
) -> list[LinearHead]:
    """Fit all heads at once, as one batched matrix product per step.

    All heads take the same number of steps and the same batch size, those of the largest training set (folds
    differ by a few windows only). Heads of several tasks that train on the same windows with the same seed draw the
    same batches, which are then read once for all of them. Features are standardised by each head's own training
    windows.

    Args:
        features: `(n, features)` all windows that any head trains on or is chosen by; or a source of them.
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
    source = CachedFeatures(features) if isinstance(features, np.ndarray) else features
    for problem in problems:
        check_training(problem.labels[problem.train], problem.classes)
    if len({len(problem.labels) for problem in problems} | {len(source)}) > 1:
        raise ProbeError("Every problem must label all windows of the feature matrix, unknown ones with -1.")
    # A common standardisation first: then each head's own is a small correction, safe in single precision.
    everything = np.arange(len(source))
    shift, stretch = source.measure(everything)
    stretch = keep_constant(shift, stretch)
    source.rescale(shift, stretch)
    largest = max(len(problem.train) for problem in problems)
    steps, batch = count_recipe_steps(largest, config), min(config.recipe_batch_size, largest)
    heads: dict[int, LinearHead] = {}
    for bundles in _bundle_problems(problems):
        members = [[problems[number] for number in bundle] for bundle in bundles]
        stack = _stack_problems(source, members, (shift, stretch), config)
        with _limit_threads(len(bundles) * batch * len(shift)):
            weight, bias = _descend(stack, members, steps, batch, config)
        for place, bundle in enumerate(bundles):
            for columns, number in zip(stack.slices, bundle, strict=True):
                heads[number] = _unstack(stack, place, columns, weight, bias, (shift, stretch))
    return [heads[number] for number in range(len(problems))]


def _bundle_problems(problems: Sequence[RecipeProblem]) -> list[list[list[int]]]:
    """Numbers of problems that draw the same batches, bundle by bundle; bundles of the same tasks side by side."""
    bundles: dict[tuple[bytes, int], list[int]] = {}
    for number, problem in enumerate(problems):
        bundles.setdefault((problem.train.tobytes(), problem.seed), []).append(number)
    alike: dict[tuple[int, ...], list[list[int]]] = {}
    for bundle in bundles.values():
        ordered = sorted(bundle, key=lambda number: problems[number].classes)
        alike.setdefault(tuple(problems[number].classes for number in ordered), []).append(ordered)
    return list(alike.values())


def _stack_problems(
    source: FeatureSource,
    bundles: Sequence[Sequence[RecipeProblem]],
    common: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
    config: ProbeConfig,
) -> _Stack:
    ends = np.cumsum([problem.classes for problem in bundles[0]])
    slices = [slice(int(end) - problem.classes, int(end)) for end, problem in zip(ends, bundles[0], strict=True)]
    weights = np.zeros((len(bundles), int(ends[-1])), np.float32)
    standards: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for place, bundle in enumerate(bundles):
        for columns, problem in zip(slices, bundle, strict=True):
            weighed = weigh_classes(problem.labels[problem.train], problem.classes)
            weights[place, columns] = weighed if config.class_weights else weighed > 0
        key = bundle[0].train.tobytes()
        if key not in standards:
            standards[key] = source.measure(bundle[0].train)
    shift, stretch = common
    means = np.stack([standards[bundle[0].train.tobytes()][0] for bundle in bundles])
    spreads = np.stack([standards[bundle[0].train.tobytes()][1] for bundle in bundles])
    means, spreads = (means - shift) / stretch, spreads / stretch
    labels = np.stack([np.stack([problem.labels for problem in bundle]) for bundle in bundles])
    return _Stack(
        source=source,
        slices=slices,
        labels=torch.from_numpy(labels.astype(np.int64)).clamp(min=0),
        weights=torch.from_numpy(weights),
        hidden=torch.from_numpy(np.where(weights > 0, 0.0, -np.inf).astype(np.float32))[:, :, None],
        mean=torch.from_numpy(means.astype(np.float32))[:, None, :],
        scale=torch.from_numpy(keep_constant(means, spreads).astype(np.float32))[:, None, :],
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


def _descend(
    stack: _Stack, bundles: Sequence[Sequence[RecipeProblem]], steps: int, batch: int, config: ProbeConfig
) -> tuple[Tensor, Tensor]:
    """Weights `(bundles, columns, features)`, biases `(bundles, columns, 1)` of each head's lowest validation error."""
    weight, bias = _initialise(stack, bundles)
    parameters = [weight, bias]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in parameters]
    streams = [_stream_rows(bundle[0], CHUNK * batch) for bundle in bundles]
    judges = _gather_judges(stack, bundles)
    best = [value.clone() for value in parameters]
    lowest = torch.full((len(bundles), len(stack.slices)), math.inf)
    every = max(1, steps // EVALUATIONS)
    rows = torch.empty(0)
    for step in range(steps):
        if step % CHUNK == 0:
            drawn = np.stack([next(stream) for stream in streams]).reshape(len(bundles), CHUNK, batch)
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
            for task, columns in enumerate(stack.slices):
                chosen = better[:, task, None, None]
                for kept, value in zip(best, parameters, strict=True):
                    kept[:, columns] = torch.where(chosen, value[:, columns], kept[:, columns])
    return best[0], best[1]


def _initialise(stack: _Stack, bundles: Sequence[Sequence[RecipeProblem]]) -> tuple[Tensor, Tensor]:
    """Weights and biases uniform in +-1 / sqrt(features), from each head's seed."""
    features = stack.mean.shape[2]
    bound = 1.0 / math.sqrt(features)
    stacked = []
    for bundle in bundles:
        columns = []
        for problem in bundle:
            generator = torch.Generator().manual_seed(problem.seed)
            # Drawn by itself, so that a head does not depend on those beside it.
            drawn = torch.rand((features + 1, problem.classes), generator=generator)
            columns.append((drawn * (2.0 * bound) - bound).T)
        stacked.append(torch.cat(columns))
    whole = torch.stack(stacked)
    return whole[:, :, :-1].contiguous(), whole[:, :, -1:].contiguous()


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

    With x standardised per bundle as (x - mean) / scale, the product with `weight` is x @ (weight / scale) less a
    constant, so that no standardised copy of the features is made per bundle.
    """
    bundles, batch = rows.shape
    taken = stack.source.take(rows.reshape(-1)).view(bundles, batch, -1)
    scaled = weight / stack.scale
    error = torch.bmm(scaled, taken.transpose(1, 2)) + _offset(stack, scaled, bias)
    for task, columns in enumerate(stack.slices):
        mine = torch.softmax(error[:, columns], 1)
        labels = stack.labels[:, task].gather(1, rows)
        share = stack.weights[:, columns].gather(1, labels)
        share = share / share.sum(1, keepdim=True)
        mine.scatter_add_(1, labels[:, None, :], torch.full((bundles, 1, batch), -1.0))
        error[:, columns] = mine * share[:, None, :]
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


def _gather_judges(stack: _Stack, bundles: Sequence[Sequence[RecipeProblem]]) -> list[_Judge]:
    groups: dict[tuple[int, bytes], list[int]] = {}
    for place, bundle in enumerate(bundles):
        for task, problem in enumerate(bundle):
            if len(problem.validation):
                groups.setdefault((task, problem.validation.tobytes()), []).append(place)
    judges = []
    for (task, _), places in groups.items():
        rows = torch.from_numpy(bundles[places[0]][task].validation.astype(np.int64))
        labels = stack.labels[places, task][:, rows]
        # A class that the training windows lack weighs 0: no head can learn it.
        weights = stack.weights[places, stack.slices[task]].gather(1, labels)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        judges.append(_Judge(task, places, rows, labels, weights))
    return judges


def _measure_error(stack: _Stack, judges: Sequence[_Judge], weight: Tensor, bias: Tensor) -> Tensor:
    """Weighted validation cross-entropy `(bundles, tasks)`; NaN for a head without validation windows."""
    errors = torch.full((len(weight), len(stack.slices)), math.nan)
    scaled = weight / stack.scale
    offset = _offset(stack, scaled, bias)
    for judge in judges:
        columns = stack.slices[judge.task]
        features = stack.source.take(judge.rows)
        logits = scaled[judge.bundles, columns] @ features.T + offset[judge.bundles, columns]
        logs = torch.log_softmax(logits, 1).gather(1, judge.labels[:, None, :])[:, 0]
        errors[judge.bundles, judge.task] = -(torch.where(judge.weights > 0, logs, 0.0) * judge.weights).sum(1)
    return errors


def _unstack(
    stack: _Stack,
    place: int,
    columns: slice,
    weight: Tensor,
    bias: Tensor,
    common: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
) -> LinearHead:
    """One head in terms of the features as they came: both standardisations folded into one."""
    shift, stretch = common
    mean = stack.mean[place, 0].double().numpy()
    scale = stack.scale[place, 0].double().numpy()
    return LinearHead(
        mean=shift + stretch * mean,
        scale=stretch * scale,
        weight=weight[place, columns].double().numpy().copy(),
        bias=(bias + stack.hidden)[place, columns, 0].double().numpy().copy(),
    )

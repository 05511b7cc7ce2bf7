"""Fits linear probes on embeddings: the converged solver behind every headline number and every floor.

The paper's own recipe (a fixed number of gradient steps) is in `physioray.recipe`.

Both see standardised features: mean and standard deviation of the training windows alone. Class weights are
n / (classes x count) of the actual training windows, so that every class has the same say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import ThreadpoolController

from physioray.solver import minimise_together

_BLAS = ThreadpoolController()

REFERENCE_WINDOWS = 10_000
"""Number of windows at which a penalty C means what it means in scikit-learn (see `fit_path`)."""

ITERATIONS = 500
TOLERANCE = 1e-5
"""Largest gradient at which the solver stops: probabilities are then within 1e-4 of the limit."""

VALUE_TOLERANCE = 1e-11
"""The solver also stops where a step lowers the loss by less than this."""

ROUGH_TOLERANCE = 1e-8
"""The same for the part of the way that is gone in single precision."""

SINGLE_PRECISION_CELLS = 100_000
"""Training matrices with more numbers than this are descended in single precision first, which takes half the time,
and only the last steps in double precision."""

FULL_PRECISION_CELLS = 20_000_000
"""Training matrices with more numbers than this are kept in single precision, to halve memory and time."""


class ProbeError(ValueError):
    """A probe cannot be fitted on these windows; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A fitted linear classifier: logits are `(x - mean) / scale @ weight.T + bias`.

    Attributes:
        mean, scale: `(features,)` standardisation, from the training windows.
        weight: `(classes, features)`.
        bias: `(classes,)`; minus infinity for a class that no training window has.
        penalty: the C it was fitted with; None for the paper's recipe.
    """

    mean: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]
    weight: Float[np.ndarray, "classes features"]
    bias: Float[np.ndarray, " classes"]
    penalty: float | None = None

    def compute_logits(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        """Logits `(n, classes)` of embeddings `(n, features)`."""
        weight = self.weight / self.scale
        return np.asarray(features @ weight.T.astype(features.dtype), np.float64) + (self.bias - weight @ self.mean)

    def predict(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        """Probabilities `(n, classes)` of embeddings `(n, features)`."""
        return np.exp(normalise_logits(self.compute_logits(features)))


def normalise_logits(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Logarithms of the probabilities (log-softmax)."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def weigh_classes(labels: Int[np.ndarray, " n"], classes: int) -> Float[np.ndarray, " classes"]:
    """Class weights n / (K n_c) with K the classes that occur in the training windows; 0 for those that do not.

    Methods: the paper says "weighted cross-entropy" (Fang et al. 2024, section 3.4) and leaves the formula open.
    """
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    occurring = counts > 0
    return np.where(occurring, len(labels) / (occurring.sum() * np.maximum(counts, 1.0)), 0.0)


def standardise(
    features: Float[np.ndarray, "n features"],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Mean and standard deviation `(features,)` over windows; a constant feature gets the deviation 1."""
    mean = features.mean(0, dtype=np.float64)
    return mean, keep_constant(mean, features.std(0, dtype=np.float64))


def keep_constant(
    mean: Float[np.ndarray, "*sets features"], deviation: Float[np.ndarray, "*sets features"]
) -> Float[np.ndarray, "*sets features"]:
    """The standard deviations to divide by: 1 for a feature that does not vary."""
    return np.where(deviation > 1e-7 * np.maximum(1.0, np.abs(mean)), deviation, 1.0)


def check_training(labels: Int[np.ndarray, " n"], classes: int) -> None:
    """Refuse training windows that no classifier can be fitted on.

    Raises:
        ProbeError: no window, fewer than two classes, or a label out of range.
    """
    if len(labels) == 0:
        raise ProbeError("A probe needs training windows with a label, but got none.")
    found = np.unique(labels)
    if found[0] < 0 or found[-1] >= classes:
        raise ProbeError(f"Training labels must lie in 0..{classes - 1}, but got {found.tolist()}.")
    if len(found) < 2:
        raise ProbeError(f"A probe needs training windows of at least two classes, but all are of class {found[0]}.")


@dataclass(frozen=True)
class Target:
    """What one task asks of some training windows.

    Attributes:
        labels: `(n,)` class numbers, all known.
        classes: number of classes of the task.
    """

    labels: Int[np.ndarray, " n"]
    classes: int


def fit_path(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalties: Sequence[float],
    *,
    class_weights: bool = True,
) -> list[LinearHead]:
    """Fit multinomial logistic regression to convergence, once per penalty: `fit_paths` for a single task.

    Args:
        features: `(n, features)` training windows, not standardised.
        labels: `(n,)` class numbers, all known.
        classes: number of classes of the task; those absent here get probability 0.
        penalties: values of C.
        class_weights: weigh classes as `weigh_classes` says; False weighs all windows alike.

    Returns:
        One head per penalty, in the order given.

    Raises:
        ProbeError: see `check_training`.
    """
    return fit_paths(features, [Target(labels, classes)], penalties, class_weights=class_weights)[0]


def fit_paths(
    features: Float[np.ndarray, "n features"],
    targets: Sequence[Target],
    penalties: Sequence[float],
    *,
    class_weights: bool = True,
) -> list[list[LinearHead]]:
    """Fit multinomial logistic regressions to convergence: every task and penalty side by side on the same windows.

    The loss is C * REFERENCE_WINDOWS * mean_i(s_i * cross_entropy_i) + |W|^2 / 2 with class weights s_i, biases
    free. It is scikit-learn's (C * sum) for a training set of REFERENCE_WINDOWS windows; taking the mean makes one
    C mean the same balance of data and penalty for 25 subjects as for 500. The solver is L-BFGS in the principal
    axes of the features, each axis scaled by the curvature to expect along it, which takes some ten times fewer
    iterations than in the features themselves; all heads take a step in the same two matrix products
    (`solver.minimise_together`). Nothing is drawn at random.

    Args:
        features: `(n, features)` training windows, not standardised.
        targets: the tasks' labels of these windows.
        penalties, class_weights: as for `fit_path`.

    Returns:
        For every target one head per penalty, in the order given.

    Raises:
        ProbeError: see `check_training`.
    """
    for target in targets:
        check_training(target.labels, target.classes)
    # Beside products this small, waking BLAS's other threads costs twelve times what they save (measured).
    with _BLAS.limit(limits=1 if features.size <= FULL_PRECISION_CELLS else None, user_api="blas"):
        return _fit_paths(features, targets, penalties, class_weights)


def _fit_paths(
    features: Float[np.ndarray, "n features"],
    targets: Sequence[Target],
    penalties: Sequence[float],
    class_weights: bool,
) -> list[list[LinearHead]]:
    mean, scale = standardise(features)
    precision = np.float64 if features.size <= FULL_PRECISION_CELLS else np.float32
    scaled = ((features - mean.astype(features.dtype)) / scale.astype(features.dtype)).astype(precision)
    covariance = np.asarray(scaled.T @ scaled, np.float64) / len(scaled)
    spread, axes = np.linalg.eigh(covariance)
    # Windows stand last, (features, n): softmax over a handful of classes is then several times faster.
    rotated = np.ascontiguousarray((scaled @ axes.astype(precision)).T)
    blocks = []
    for target in targets:
        found, compact = np.unique(target.labels, return_inverse=True)
        weights = weigh_classes(target.labels, target.classes)[target.labels] if class_weights else np.ones(len(scaled))
        share = weights / weights.sum()
        blocks += [_Block(found, compact, share, penalty * REFERENCE_WINDOWS) for penalty in penalties]
    solutions = iter(_solve(rotated, blocks, spread))
    blocked = iter(blocks)
    paths = []
    for target in targets:
        heads = []
        for penalty in penalties:
            solution, block = next(solutions), next(blocked)
            weight, bias = np.zeros((target.classes, features.shape[1])), np.full(target.classes, -np.inf)
            weight[block.found] = solution[:, :-1] @ axes.T
            bias[block.found] = solution[:, -1]
            heads.append(LinearHead(mean=mean, scale=scale, weight=weight, bias=bias, penalty=penalty))
        paths.append(heads)
    return paths


@dataclass(frozen=True)
class _Block:
    """One regression: the classes that occur, each window's among them and its share; penalty |W|^2 / (2 strength)."""

    found: Int[np.ndarray, " classes"]
    labels: Int[np.ndarray, " n"]
    share: Float[np.ndarray, " n"]
    strength: float


def _solve(
    rotated: Float[np.ndarray, "features n"], blocks: Sequence[_Block], spread: Float[np.ndarray, " features"]
) -> list[Float[np.ndarray, "classes columns"]]:
    """Minimise sum_i share_i * cross_entropy_i + |W|^2 / (2 strength) of every block; the last column is the bias."""
    sizes = np.array([len(block.found) for block in blocks])
    owner = np.repeat(np.arange(len(blocks)), sizes)
    strength = np.array([block.strength for block in blocks])
    # Curvature of the softmax at the uniform guess is spread * (1 - 1/K) / K; that of the penalty 1 / strength.
    curvature = ((1.0 - 1.0 / sizes) / sizes)[:, None]
    steps = np.sqrt(np.append(np.maximum(spread, 0.0), 1.0) * curvature + 1.0 / strength[:, None])
    windows = np.arange(rotated.shape[1])

    def measure(scaled: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.repeat(kept, sizes[kept])
        solution = scaled / steps[rows]
        weight = solution[:, :-1]
        logits = np.asarray(weight.astype(rotated.dtype) @ rotated, np.float64) + solution[:, -1:]
        values, first = np.empty(len(kept)), 0
        for number, index in enumerate(kept):
            block, size = blocks[index], sizes[index]
            mine = logits[first : first + size]
            values[number] = _differentiate(mine, block.labels, block.share, windows)
            values[number] += float((weight[first : first + size] ** 2).sum()) / (2.0 * block.strength)
            first += size
        gradient = np.empty_like(solution)
        gradient[:, :-1] = logits.astype(rotated.dtype) @ rotated.T + weight / strength[rows, None]
        gradient[:, -1] = logits.sum(1)
        return values, gradient / steps[rows]

    found = np.zeros((len(owner), rotated.shape[0] + 1))

    def descend(tolerance: float) -> Float[np.ndarray, "rows columns"]:
        return minimise_together(
            measure,
            found,
            owner,
            iterations=ITERATIONS,
            gradient_tolerance=TOLERANCE,
            value_tolerance=tolerance,
        )

    exact = rotated
    if exact.dtype == np.float64 and exact.size > SINGLE_PRECISION_CELLS:
        rotated = exact.astype(np.float32)
        found = descend(ROUGH_TOLERANCE)
        rotated = exact
    found = descend(VALUE_TOLERANCE)
    return [found[owner == number] / steps[number] for number in range(len(blocks))]


def _differentiate(
    logits: Float[np.ndarray, "classes n"],
    labels: Int[np.ndarray, " n"],
    share: Float[np.ndarray, " n"],
    windows: Int[np.ndarray, " n"],
) -> float:
    """The weighted cross-entropy of logits, which are overwritten by its gradient."""
    logits -= logits.max(0)
    right = logits[labels, windows]
    np.exp(logits, out=logits)
    total = logits.sum(0)
    value = float(share @ (np.log(total) - right))
    logits *= share / total
    logits[labels, windows] -= share
    return value


def balance_accuracy(true: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    """Mean recall over the classes that occur in `true`."""
    return float(np.mean([np.mean(predicted[true == label] == label) for label in np.unique(true)]))


def choose_head(
    heads: Sequence[LinearHead],
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
) -> LinearHead:
    """The head with the highest balanced accuracy on validation windows; of equals, the most penalised.

    Args:
        heads: candidates of `fit_path`.
        features: `(n, features)` validation windows.
        labels: `(n,)` class numbers, all known.

    Raises:
        ProbeError: there is no validation window to choose by.
    """
    if len(labels) == 0:
        raise ProbeError("Choosing the penalty needs validation windows with a label, but got none.")
    ranked = sorted(heads, key=lambda head: head.penalty or 0.0)
    scores = [balance_accuracy(labels, head.compute_logits(features).argmax(1)) for head in ranked]
    return ranked[int(np.argmax(scores))]

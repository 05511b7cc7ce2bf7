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
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

_BLAS = ThreadpoolController()

REFERENCE_WINDOWS = 10_000
"""Number of windows at which a penalty C means what it means in scikit-learn (see `fit_path`)."""

ITERATIONS = 500
TOLERANCE = 1e-5
"""Largest gradient at which the solver stops: probabilities are then within 1e-4 of the limit."""

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
    scale = features.std(0, dtype=np.float64)
    return mean, np.where(scale > 1e-7 * np.maximum(1.0, np.abs(mean)), scale, 1.0)


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


def fit_path(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalties: Sequence[float],
    *,
    class_weights: bool = True,
) -> list[LinearHead]:
    """Fit multinomial logistic regression to convergence, once per penalty.

    The loss is C * REFERENCE_WINDOWS * mean_i(s_i * cross_entropy_i) + |W|^2 / 2 with class weights s_i, biases
    free. It is scikit-learn's (C * sum) for a training set of REFERENCE_WINDOWS windows; taking the mean makes one
    C mean the same balance of data and penalty for 25 subjects as for 500. The solver is L-BFGS in the principal
    axes of the features, each axis scaled by the curvature to expect along it, which takes some ten times fewer
    iterations than in the features themselves; it starts every penalty from the last one's solution and draws
    nothing at random.

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
    check_training(labels, classes)
    # Beside products this small, waking BLAS's other threads costs twelve times what they save (measured).
    with _BLAS.limit(limits=1 if features.size <= FULL_PRECISION_CELLS else None, user_api="blas"):
        return _fit_path(features, labels, classes, penalties, class_weights)


def _fit_path(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalties: Sequence[float],
    class_weights: bool,
) -> list[LinearHead]:
    found, compact = np.unique(labels, return_inverse=True)
    weights = weigh_classes(labels, classes)[labels] if class_weights else np.ones(len(labels))
    mean, scale = standardise(features)
    precision = np.float64 if features.size <= FULL_PRECISION_CELLS else np.float32
    scaled = ((features - mean.astype(features.dtype)) / scale.astype(features.dtype)).astype(precision)
    covariance = np.asarray(scaled.T @ scaled, np.float64) / len(scaled)
    spread, axes = np.linalg.eigh(covariance)
    rotated = scaled @ axes.astype(precision)
    share = weights / weights.sum()
    heads: dict[float, LinearHead] = {}
    solution = np.zeros((len(found), features.shape[1] + 1))
    for penalty in sorted(penalties):
        solution = _solve(rotated, compact, share, spread, penalty * REFERENCE_WINDOWS, solution)
        weight = np.zeros((classes, features.shape[1]))
        bias = np.full(classes, -np.inf)
        weight[found] = solution[:, :-1] @ axes.T
        bias[found] = solution[:, -1]
        heads[penalty] = LinearHead(mean=mean, scale=scale, weight=weight, bias=bias, penalty=penalty)
    return [heads[penalty] for penalty in penalties]


def _solve(
    rotated: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    share: Float[np.ndarray, " n"],
    spread: Float[np.ndarray, " features"],
    strength: float,
    start: Float[np.ndarray, "classes columns"],
) -> Float[np.ndarray, "classes columns"]:
    """Minimise sum_i share_i * cross_entropy_i + |W|^2 / (2 strength); the last column is the bias."""
    classes = start.shape[0]
    # Curvature of the softmax at the uniform guess is spread * (1 - 1/K) / K; that of the penalty 1 / strength.
    curvature = (1.0 - 1.0 / classes) / classes
    steps = np.sqrt(np.append(np.maximum(spread, 0.0), 1.0) * curvature + 1.0 / strength)
    rows = np.arange(len(labels))

    def measure(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = flat.reshape(start.shape) / steps
        weight = solution[:, :-1]
        logits = np.asarray(rotated @ weight.T.astype(rotated.dtype), np.float64) + solution[:, -1]
        logs = normalise_logits(logits)
        value = -float(share @ logs[rows, labels]) + float((weight**2).sum()) / (2.0 * strength)
        error = np.exp(logs)
        error[rows, labels] -= 1.0
        error *= share[:, None]
        gradient = np.empty_like(solution)
        gradient[:, :-1] = error.T.astype(rotated.dtype) @ rotated + weight / strength
        gradient[:, -1] = error.sum(0)
        return value, (gradient / steps).ravel()

    options = {"maxiter": ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-11, "maxcor": 20}
    found = minimize(measure, (start * steps).ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(start.shape) / steps


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

"""Minimises many smooth convex functions side by side: L-BFGS in lockstep, one evaluation for all of them.

Fitted one by one, small logistic regressions spend their time reading the same windows again for every head. Here
the parameters of all heads are rows of one matrix, so that a step of all heads is two matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Measure = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From the rows `(rows, columns)` of some functions, and their numbers, to their values and the rows' gradients."""

MEMORY = 12
"""Steps that the model of the curvature remembers (Nocedal and Wright 2006, section 7.2)."""

SUFFICIENT = 1e-4
"""Share of the decrease promised by the slope that a step must deliver (Armijo)."""

SHORTEST = 1e-6
"""A step below this share of the proposed one is rounding: the function has arrived."""


def minimise_together(
    measure: Measure,
    start: Float[np.ndarray, "rows columns"],
    owner: Int[np.ndarray, " rows"],
    *,
    iterations: int,
    gradient_tolerance: float,
    value_tolerance: float,
) -> Float[np.ndarray, "rows columns"]:
    """Minimise independent convex functions of the rows of one matrix.

    Every function owns some consecutive rows. All take their steps together, each with its own curvature and step
    length; one that has arrived is left out of the evaluations that follow.

    Args:
        measure: is given the rows of the functions still under way, and their numbers, ascending.
        start: where they begin.
        owner: `(rows,)` number of the function that a row belongs to, ascending from 0.
        iterations: steps at most.
        gradient_tolerance: a function has arrived when no entry of its gradient is larger.
        value_tolerance: or when a step lowers it by less than this share of its value (of 1, if that is more).

    Returns:
        The rows of every function where it arrived.
    """
    found = start.copy()
    state = _State(found, owner, measure)
    for _ in range(iterations):
        state.leave(state.find_flat(gradient_tolerance))
        if not len(state.kept):
            break
        state.leave(state.advance(measure, value_tolerance))
    state.leave(np.ones(len(state.kept), bool))
    return found


class _State:
    """The functions still under way: their rows, values, gradients and what is remembered of the curvature."""

    def __init__(self, found: np.ndarray, owner: np.ndarray, measure: Measure) -> None:
        self.found, self.rows = found, np.arange(len(found))
        self.owner, self.kept = owner, np.unique(owner)
        self.place = found.copy()
        self.value, self.gradient = measure(self.place, self.kept)
        self.memory: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def find_flat(self, tolerance: float) -> Bool[np.ndarray, " kept"]:
        """Which functions have no slope left."""
        return np.maximum.reduceat(np.abs(self.gradient).max(1), self._starts()) <= tolerance

    def leave(self, arrived: Bool[np.ndarray, " kept"]) -> None:
        """Write down where the arrived functions are, and go on without them."""
        if not arrived.any():
            return
        gone = arrived[self.owner]
        self.found[self.rows[gone]] = self.place[gone]
        stay, alive = ~gone, ~arrived
        self.kept, self.value = self.kept[alive], self.value[alive]
        self.rows, self.place, self.gradient = self.rows[stay], self.place[stay], self.gradient[stay]
        self.owner = (np.cumsum(alive) - 1)[self.owner[stay]]
        self.memory = [(step[stay], bend[stay], inverse[alive]) for step, bend, inverse in self.memory]

    def advance(self, measure: Measure, tolerance: float) -> Bool[np.ndarray, " kept"]:
        """One step of every function; which of them thereby arrived."""
        direction = -self._precondition(self.gradient)
        slope = self._dot(direction, self.gradient)
        uphill = slope >= 0  # rounding only: the remembered curvature is positive
        direction[uphill[self.owner]] = -self.gradient[uphill[self.owner]]
        slope[uphill] = -self._dot(self.gradient, self.gradient)[uphill]
        length = np.ones(len(self.kept))
        while True:
            place = self.place + length[self.owner, None] * direction
            value, gradient = measure(place, self.kept)
            fallen = self.value - value
            far = ~(fallen >= -SUFFICIENT * length * slope) & (length > SHORTEST)
            if not far.any():
                break
            # The lowest point of the parabola through value, slope and the value found, within a tenth and a half.
            parabola = -slope * length**2 / np.maximum(2.0 * (-fallen - slope * length), 1e-300)
            length[far] = np.clip(np.nan_to_num(parabola, nan=0.0), 0.1 * length, 0.5 * length)[far]
        # A step that rounding alone decides must not make things worse.
        worse = ~(fallen >= 0)
        place[worse[self.owner]] = self.place[worse[self.owner]]
        self._remember(place - self.place, gradient - self.gradient, worse)
        larger = np.maximum(np.maximum(np.abs(self.value), np.abs(value)), 1.0)
        done = worse | (fallen <= tolerance * larger)
        self.place, self.value, self.gradient = place, np.where(worse, self.value, value), gradient
        return done

    def _precondition(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient times the remembered inverse curvature: the two loops of L-BFGS."""
        result, shares = gradient.copy(), []
        for step, bend, inverse in reversed(self.memory):
            share = inverse * self._dot(step, result)
            result -= share[self.owner, None] * bend
            shares.append(share)
        if self.memory:
            step, bend, inverse = self.memory[-1]
            size = self._dot(bend, bend)
            scale = np.where((inverse > 0) & (size > 0), 1.0 / np.maximum(inverse * size, 1e-300), 1.0)
            result *= scale[self.owner, None]
        for (step, bend, inverse), share in zip(self.memory, reversed(shares), strict=True):
            result += (share - inverse * self._dot(bend, result))[self.owner, None] * step
        return result

    def _remember(self, step: np.ndarray, bend: np.ndarray, worse: np.ndarray) -> None:
        curvature = self._dot(step, bend)
        usable = ~worse & (curvature > 1e-12 * self._dot(bend, bend))
        inverse = np.where(usable, 1.0 / np.where(usable, curvature, 1.0), 0.0)
        self.memory = [*self.memory, (step, bend, inverse)][-MEMORY:]

    def _dot(self, one: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " kept"]:
        return np.add.reduceat(np.einsum("ij,ij->i", one, other), self._starts())

    def _starts(self) -> Int[np.ndarray, " kept"]:
        return np.searchsorted(self.owner, np.arange(len(self.kept)))

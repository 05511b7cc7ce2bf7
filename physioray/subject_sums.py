"""Sums by subject that can be added up in any order and on any machine, and intervals by subject from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from physioray.metrics import bound_draws, draw_subjects

CHUNK = 25
"""Draws of a bootstrap that are computed at once: what bounds its memory."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number about a checkpoint, with its interval: a row of `numbers.parquet`.

    Attributes:
        quantity: what is measured, for example `attention_off_modality`.
        place: where: `layer 1` ... `rollout`, `embedding`, or the way in which tokens were hidden.
        modality: of the attending tokens, the source, or the reconstructed signal; `all` for all of them together.
        value, low, high: the number and its 95 % interval by subject; None where undefined.
        unit_low, unit_high: 95 % interval of the mean over units, for source variance alone.
        reference: what an encoder that does nothing special would get: uniform attention, equal variances, the mean.
        windows, subjects: what it rests on.
    """

    quantity: str
    place: str
    modality: str
    value: float | None
    low: float | None
    high: float | None
    unit_low: float | None = None
    unit_high: float | None = None
    reference: float | None = None
    windows: int
    subjects: int


@dataclass(frozen=True)
class Estimate:
    """Values of any shape with their interval by subject, NaN where undefined."""

    value: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]


class SubjectSums:
    """Named arrays summed by subject in double precision; the memory does not grow with the windows.

    `merge` adds another's sums, so that any number of readers, each with its share of the windows, together give
    what one would have (up to rounding of the order of 1e-16 per window).
    """

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.sums)

    def add(self, subject: Int[np.ndarray, " n"], **values: np.ndarray) -> None:
        """Add some windows.

        Args:
            subject: `(n,)` number of each window's subject.
            values: `(n, ...)` per name, the same shapes in every call.
        """
        for number in np.unique(subject):
            rows = subject == number
            own = self.sums.setdefault(int(number), {})
            for name, array in values.items():
                total = np.asarray(array[rows], np.float64).sum(0)
                own[name] = own[name] + total if name in own else total

    def merge(self, other: SubjectSums) -> None:
        """Add what another reader has summed over other windows."""
        for number, values in other.sums.items():
            own = self.sums.setdefault(number, {})
            for name, total in values.items():
                own[name] = own[name] + total if name in own else total.copy()

    def stack(self) -> dict[str, Float[np.ndarray, "subjects ..."]]:
        """The sums of every subject, subjects in ascending order.

        Raises:
            ValueError: nothing has been added.
        """
        if not self.sums:
            raise ValueError("Sums must hold at least one window, but nothing has been added.")
        order = sorted(self.sums)
        return {name: np.stack([self.sums[number][name] for number in order]) for name in self.sums[order[0]]}

    def estimate(
        self, compute: Callable[[Mapping[str, Any]], Float[np.ndarray, "draws ..."]], *, draws: int, seed: int
    ) -> Estimate:
        """A function of the sums over all subjects, and its interval when people are drawn anew.

        Args:
            compute: from totals `(draws, ...)` per name to values `(draws, ...)`, NaN where undefined.
            draws, seed: of the bootstrap by subject; with one subject or no draws there is no interval.
        """
        stacked = self.stack()
        people = len(self.sums)

        def weigh(weights: Float[np.ndarray, "draws subjects"]) -> np.ndarray:
            return compute({name: np.tensordot(weights, array, 1) for name, array in stacked.items()})

        value = weigh(np.ones((1, people)))[0]
        empty = np.full_like(value, np.nan)
        if people < 2 or draws < 1:
            return Estimate(value, empty, empty.copy())
        weights = draw_subjects(people, draws, seed)
        # Only what was computed is kept, so wide totals (a variance per unit) never stand side by side for all draws.
        drawn = np.concatenate([weigh(weights[first : first + CHUNK]) for first in range(0, draws, CHUNK)])
        bounds = [bound_draws(column) or (np.nan, np.nan) for column in drawn.reshape(len(drawn), -1).T]
        low, high = np.array(bounds).T.reshape(2, *value.shape)
        return Estimate(value, low, high)


def to_number(value: float) -> float | None:
    """A float, or None where it is undefined."""
    return float(value) if np.isfinite(value) else None

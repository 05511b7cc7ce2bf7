"""Pieces of work that a grid consists of, and doing them one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["pretrain", "probe", "train"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of the grid.

    Attributes:
        kind: what is done.
        strategy: a name of `strategies.STRATEGIES`, or of a floor.
        task, seed, fold, size: where they matter; `size` is the number of training subjects asked for.
        passes: over how many windows in all, for judging time.
        windows: see `passes`.
    """

    kind: Kind
    strategy: str
    task: str = ""
    seed: int = 0
    fold: int = 0
    size: int = 0
    passes: int = 0
    windows: int = 0

    @property
    def title(self) -> str:
        """The piece in words, for a line of progress."""
        parts = [self.kind, self.strategy, self.task]
        parts += [f"seed {self.seed}"] if self.kind == "train" else []
        parts += [f"{self.size} subjects"] if self.size else []
        return " ".join(part for part in parts if part)


def run_work(
    do: Callable[[Work], object],
    work: Sequence[Work],
    *,
    begin: Callable[[Work], None] = lambda _: None,
    end: Callable[[Work], None] = lambda _: None,
    deadline: float | None = None,
) -> dict[Work, str]:
    """Do pieces of work one after the other; one that fails stops none that does not rest on it.

    Args:
        do: does one piece.
        work: in an order in which what others rest on comes first, see `Grid.list_work`.
        begin, end: are told.
        deadline: in `time.monotonic`; no piece is begun after it.

    Returns:
        What failed, and why. What was not begun is in neither.
    """
    failures: dict[Work, str] = {}
    for item in work:
        if deadline is not None and time.monotonic() > deadline:
            break
        begin(item)
        reason = explain_block(item, failures)
        if not reason:
            try:
                do(item)
            except (OSError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason:
            failures[item] = reason
        end(item)
    return failures


def explain_block(item: Work, failures: Mapping[Work, str]) -> str:
    """Why a piece cannot be done after what failed; empty if it can."""
    for failed in failures:
        if failed.kind == "pretrain" and failed.strategy == item.strategy:
            return f"its pretraining failed: {failures[failed]}"
    return ""

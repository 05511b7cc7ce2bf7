"""Judges one comparison of scores: held, not held, cannot be told from the spread, or not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from physioray.compare import PairedDifference
from physioray.metrics import AGGREGATE, METRICS
from physioray.paper.levels import NOT_RUN, End
from physioray.paper.reference import PROBE
from physioray.score_tables import CLOSE
from physioray.signals import TASKS

HELD, NOT_HELD, CANNOT_TELL = "held", "not held", "cannot be told"
VERDICTS = (HELD, NOT_HELD, CANNOT_TELL, NOT_RUN)

MINUS = "\N{MINUS SIGN}"

RECONSTRUCTION = "reconstruction_error"
"""Kind of evaluation of a reference that is no score but an error by modality; the modality stands as its task."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Which score is meant.

    Attributes:
        pretraining: name of a strategy.
        task: a task, or `aggregate`; a modality for reconstruction errors.
        evaluation: `probe`, `finetune`, `scratch` or `reconstruction_error`.
        end: at the largest training-set size or at the smallest.
    """

    pretraining: str
    task: str
    evaluation: str = PROBE
    end: End = "largest"

    @property
    def metric(self) -> str:
        """All claims are about balanced accuracy, or the aggregate made of it."""
        return AGGREGATE if self.task == AGGREGATE else METRICS[0]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number and how far it can be trusted.

    Attributes:
        value: mean over seeds.
        margin: the spread over seeds or, without one, half the interval by subject; None if there is neither.
        size: training subjects; None where it does not matter.
    """

    value: float
    margin: float | None
    size: int | None = None


Side = tuple[Reference, ...]
"""The best of several scores; usually one."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The sum of some scores lies above the sum of others, or close to it.

    Attributes:
        above, below: sides that are added and subtracted.
        tolerance: None if the difference must be positive; else it must lie within this of 0.
    """

    above: tuple[Side, ...]
    below: tuple[Side, ...]
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of a statement or a claim.

    Attributes:
        verdict: a name of `VERDICTS`.
        by_means: the same by the means alone, as if nothing had a spread.
        details: what was compared, in words and numbers.
        missing: what has not been run.
    """

    verdict: str
    by_means: str
    details: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


Finder = Callable[[Reference], Measured | str]
"""Finds the number of a reference, or says why there is none."""

Comparer = Callable[[Reference, Reference], PairedDifference | None]
"""Compares two scores on the same windows; None where their predictions are not at hand."""


def judge_statement(statement: Statement, find: Finder, compare: Comparer) -> Judgement:
    """Judge one comparison.

    With predictions of both sides the difference is drawn anew by subject (`compare.compare_paired`). Otherwise two
    scores count as different when they lie further apart than the sum of their spreads over the seeds.
    """
    chosen: list[tuple[int, Reference, Measured]] = []
    missing: list[str] = []
    for sign, sides in ((1, statement.above), (-1, statement.below)):
        for side in sides:
            found = [(reference, find(reference)) for reference in side]
            missing += [reason for _, reason in found if isinstance(reason, str)]
            known = [(reference, item) for reference, item in found if isinstance(item, Measured)]
            if known:
                reference, best = max(known, key=lambda pair: pair[1].value)
                chosen.append((sign, reference, best))
    if not missing:
        missing = _find_unequal_sizes([(reference, item) for _, reference, item in chosen])
    if missing:
        return Judgement(verdict=NOT_RUN, by_means=NOT_RUN, missing=tuple(dict.fromkeys(missing)))
    difference = sum(sign * item.value for sign, _, item in chosen)
    paired = compare(chosen[0][1], chosen[1][1]) if len(chosen) == 2 else None
    if paired is not None and paired.low is not None and paired.high is not None:
        bounds: tuple[float, float] | None = (paired.low, paired.high)
        basis = "paired by subject"
    else:
        margins = [item.margin for _, _, item in chosen]
        margin = sum(item for item in margins if item is not None)
        bounds = None if None in margins else (difference - margin, difference + margin)
        basis = "by the spread"
    verdict = _decide(bounds, statement.tolerance) if bounds else CANNOT_TELL
    words = _describe(chosen, difference)
    words += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}] {basis}" if bounds else ", one seed and no interval"
    if statement.tolerance is not None:
        words += f", close means within {statement.tolerance:g}"
    by_means = _decide((difference, difference), statement.tolerance)
    return Judgement(verdict=verdict, by_means=by_means, details=(f"{words}: {verdict}",))


def judge_all(judgements: Sequence[Judgement]) -> Judgement:
    """Everything must hold: one that does not settles it, also where others are missing."""
    return _join(judgements, (NOT_HELD, NOT_RUN, CANNOT_TELL, HELD))


def judge_any(judgements: Sequence[Judgement]) -> Judgement:
    """One must hold: one that does settles it, also where others are missing or do not hold."""
    holding = [item for item in judgements if item.verdict == HELD]
    return holding[0] if holding else _join(judgements, (HELD, NOT_RUN, CANNOT_TELL, NOT_HELD))


def _join(judgements: Sequence[Judgement], order: Sequence[str]) -> Judgement:
    return Judgement(
        verdict=min((item.verdict for item in judgements), key=order.index),
        by_means=min((item.by_means for item in judgements), key=order.index),
        details=tuple(dict.fromkeys(text for item in judgements for text in item.details)),
        missing=tuple(dict.fromkeys(text for item in judgements for text in item.missing)),
    )


def _decide(bounds: tuple[float, float], tolerance: float | None) -> str:
    low, high = bounds
    if tolerance is None:
        return HELD if low > 0 else NOT_HELD if high < 0 or low == high else CANNOT_TELL
    if max(abs(low), abs(high)) <= tolerance:
        return HELD
    return NOT_HELD if low > tolerance or high < -tolerance else CANNOT_TELL


def _find_unequal_sizes(chosen: Sequence[tuple[Reference, Measured]]) -> list[str]:
    """Scores at one end of the training sizes compare only if they were trained on equally many subjects."""
    reasons = []
    for end in dict.fromkeys(reference.end for reference, _ in chosen):
        sizes = sorted(item.size for reference, item in chosen if reference.end == end and item.size is not None)
        if sizes and sizes[-1] > sizes[0] * CLOSE + 1:
            reasons.append(f"the same number of training subjects on both sides (here {sizes[0]} and {sizes[-1]})")
    return reasons


def _describe(chosen: Sequence[tuple[int, Reference, Measured]], difference: float) -> str:
    parts = []
    for sign, reference, item in chosen:
        spread = f" ±{item.margin:.3f}" if item.margin is not None else ""
        extra = {"finetune": ", finetuned", "scratch": "", RECONSTRUCTION: ""}.get(reference.evaluation, "")
        extra += ", smallest size" if reference.end == "smallest" else ""
        parts.append(f"{'+' if sign > 0 else MINUS} {reference.pretraining}{extra} {item.value:.3f}{spread}")
    task = chosen[0][1].task
    title = TASKS[task].title if task in TASKS else task.capitalize()
    return f"{title}: {' '.join(parts).removeprefix('+ ')} = {difference:+.3f}"

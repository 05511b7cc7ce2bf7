"""What the paper says of its Figures 2 and 3, checked on our numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from physioray.analysis_results import Analysis
from physioray.attention_rollout import ROLLOUT
from physioray.paper.levels import NOT_RUN
from physioray.paper.statements import CANNOT_TELL, HELD, NOT_HELD
from physioray.reproduction.plan import FIGURES
from physioray.subject_sums import Number
from physioray.sweep_journal import SweepResult, TrialRecord

NOTE = (
    "Held and not held: the 95 % intervals by subject do not overlap, or do not reach 0 (drift). Cannot be told: they "
    "do. The intervals are not paired, so a difference must be large to be told."
)
RATIO, SIZE, DROP = "objective.mask.hidden_ratio", "training_subjects", "objective.mask.drop"
BEST_RATIO = 0.7


@dataclass(frozen=True, kw_only=True)
class FigureClaim:
    """A sentence on a figure and what became of it.

    Attributes:
        sentence, source: in plain words, and where the paper says it.
        verdict: a name of `statements.VERDICTS`.
        details: the numbers that were compared, or what is missing.
    """

    sentence: str
    source: str
    verdict: str
    details: tuple[str, ...]


def check_figures(analyses: Mapping[str, Analysis], ratios: SweepResult | None) -> list[FigureClaim]:
    """Check the paper's sentences on its figures.

    Args:
        analyses: by strategy (`plan.FIGURES`), those that have been looked into.
        ratios: the sweep of figure 3; None if it was not run.
    """
    masked = ("multimae", "multimae_drop")
    rises = {
        "attention_specificity": "From scratch attention has vertical bands; after masked pretraining it depends more "
        "on the attending token.",
        "attention_off_modality": "After masked pretraining more attention goes to other modalities than from scratch.",
        "attention_within_1s": "After masked pretraining attention is more aligned in time than from scratch.",
    }
    found = [
        _judge(sentence, "4.4, Figure 2 A to C", [_above(analyses, quantity, name, "scratch") for name in masked])
        for quantity, sentence in rises.items()
    ]
    drifts = {"scratch": ("eeg", "From scratch", "D"), "multimae": ("emg", "MultiMAE without drop:", "E")}
    for name, (modality, who, panel) in drifts.items():
        sentence = f"{who} units become more tuned to {modality.upper()} in later layers."
        found.append(_judge(sentence, f"4.4, Figure 2 {panel}", [_drifts(analyses, name, modality)]))
    even = [_above(analyses, "source_variance_imbalance", name, "multimae_drop") for name in ("scratch", "multimae")]
    found.append(_judge("With modality drop units are most equally tuned to all modalities.", "4.4, Figure 2 F", even))
    return [*found, *_check_ratios(ratios)]


Comparison = tuple[str, str]
"""A verdict, and the numbers in words."""


def _judge(sentence: str, source: str, parts: Sequence[Comparison]) -> FigureClaim:
    order = (NOT_HELD, NOT_RUN, CANNOT_TELL, HELD)
    return FigureClaim(
        sentence=sentence,
        source=source,
        verdict=min((verdict for verdict, _ in parts), key=order.index),
        details=tuple(words for _, words in parts),
    )


def _above(analyses: Mapping[str, Analysis], quantity: str, first: str, second: str) -> Comparison:
    """Whether one number of the first strategy lies above that of the second."""
    place = "embedding" if quantity == "source_variance_imbalance" else ROLLOUT
    numbers = []
    for name in (first, second):
        number = analyses[name].find(quantity, place) if name in analyses else None
        if number is None or number.value is None:
            return NOT_RUN, f"{FIGURES[name]} was not looked into"
        numbers.append(number)
    one, other = numbers
    words = f"{FIGURES[first]} {_describe(one)}, {FIGURES[second]} {_describe(other)}"
    if None in (one.low, one.high, other.low, other.high):
        return CANNOT_TELL, f"{words}: no intervals"
    if one.low > other.high:  # type: ignore[operator]
        return HELD, words
    return (NOT_HELD if one.high < other.low else CANNOT_TELL), words  # type: ignore[operator]


def _drifts(analyses: Mapping[str, Analysis], name: str, modality: str) -> Comparison:
    """Whether the share of a modality's source variance rises over the layers."""
    known = [n for n in analyses[name].numbers if n.quantity == "source_variance_drift"] if name in analyses else []
    number = next((n for n in known if n.modality == modality), None)
    if number is None or number.value is None:
        return NOT_RUN, f"{FIGURES[name]} was not looked into, or has no {modality}"
    words = f"drift of the share of {modality.upper()} {_describe(number, signed=True)}"
    if number.low is None or number.high is None:
        return CANNOT_TELL, words
    return (HELD if number.low > 0 else NOT_HELD if number.high < 0 else CANNOT_TELL), words


def _describe(number: Number, signed: bool = False) -> str:
    form = "{:+.4f}" if signed else "{:.4f}"
    bounds = "" if number.low is None or number.high is None else f" [{form}, {form}]".format(number.low, number.high)
    return form.format(number.value) + bounds


def _check_ratios(result: SweepResult | None) -> list[FigureClaim]:
    """Figure 3: 0.7 is best with few training subjects, and the share hardly matters with many."""
    few = "With few training subjects hiding 0.7 in all is best, with modality drop."
    many = "With many training subjects the share of hidden tokens hardly matters."
    source = "appendix C, Figure 3"
    trials = [] if result is None else [t for t in result.trials if t.state == "finished" and "sleep" in t.last]
    sizes = sorted({trial.parameters[SIZE] for trial in trials if SIZE in trial.parameters})
    if len(sizes) < 2:
        return [_judge(sentence, source, [(NOT_RUN, "the sweep was not run at two sizes")]) for sentence in (few, many)]
    chosen = {size: [t for t in trials if t.parameters[SIZE] == size and t.parameters[DROP]] for size in sizes}
    return [
        _judge(few, source, [_lead(chosen[sizes[0]])]),
        _judge(many, source, [_agree(chosen[sizes[-1]])]),
    ]


def _bounds(trial: TrialRecord) -> tuple[float, float]:
    score = trial.last["sleep"]
    return trial.last.get("sleep_low", score), trial.last.get("sleep_high", score)


def _name(trial: TrialRecord) -> str:
    low, high = _bounds(trial)
    return f"{trial.parameters[RATIO]:g}: {trial.last['sleep']:.3f} [{low:.3f}, {high:.3f}]"


def _lead(trials: Sequence[TrialRecord]) -> Comparison:
    """Whether the paper's ratio scores above all others."""
    ours = next((trial for trial in trials if abs(trial.parameters[RATIO] - BEST_RATIO) < 1e-9), None)
    others = [trial for trial in trials if trial is not ours]
    words = ", ".join(_name(trial) for trial in trials)
    if ours is None or not others:
        return NOT_RUN, f"{BEST_RATIO:g} and another ratio are needed; there are {words or 'none'}"
    low, high = _bounds(ours)
    if all(low > _bounds(other)[1] for other in others):
        return HELD, words
    return (NOT_HELD if any(_bounds(other)[0] > high for other in others) else CANNOT_TELL), words


def _agree(trials: Sequence[TrialRecord]) -> Comparison:
    """Whether the intervals of all ratios meet; that they do is no proof that ratios are alike."""
    words = ", ".join(_name(trial) for trial in trials)
    if len(trials) < 2:
        return NOT_RUN, f"two ratios are needed; there are {words or 'none'}"
    apart = max(_bounds(trial)[0] for trial in trials) > min(_bounds(trial)[1] for trial in trials)
    return (NOT_HELD if apart else CANNOT_TELL), words

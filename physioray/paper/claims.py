"""The sentences of Fang et al. 2024 that scores can bear out, checked on ours and on the paper's own numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from physioray.compare import ComparisonError, PairedDifference, compare_paired
from physioray.metrics import AGGREGATE
from physioray.paper.levels import ScoreBook, find_kind
from physioray.paper.reference import PROBE, PaperColumn, PaperTables, read_paper
from physioray.paper.statements import (
    RECONSTRUCTION,
    Comparer,
    Finder,
    Judgement,
    Measured,
    Reference,
    Side,
    Statement,
    judge_all,
    judge_any,
    judge_statement,
)
from physioray.results import FINETUNE, PROBES, SCRATCH, ScoreRow
from physioray.score_tables import EVALUATION_TITLES, merge_seeds
from physioray.signals import PAPER_MODALITIES, TASKS

ALL = "multimae_drop"
"""What the paper's tables call All: the multimodal model, pretrained with modality drop."""

CLIPS = ("clip_leave_one_out", "clip_pairwise")
ALONE = tuple(f"mae_{name}" for name in PAPER_MODALITIES)
SMALL_SIZE, LARGE_SIZE = 25, 500

SIMILAR = 0.02
"""Balanced accuracies this close are "very similar"; the paper calls 0.744 and 0.745 so, and gives no bound."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper and the comparisons that it stands for.

    Attributes:
        name: short, for tables and tests.
        sentence: in plain words.
        source: section and table.
        groups: every group must have a statement that holds.
        remark: what the paper's own numbers say otherwise, or what is ours in the check.
    """

    name: str
    sentence: str
    source: str
    groups: tuple[tuple[Statement, ...], ...]
    remark: str = ""

    @property
    def evaluations(self) -> set[str]:
        """Kinds of evaluation that are compared."""
        sides = [side for group in self.groups for item in group for side in (*item.above, *item.below)]
        return {reference.evaluation for side in sides for reference in side}


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """What became of a claim.

    Attributes:
        claim: which.
        evaluation: the probe it was checked with (a name of `results.PROBES`); empty where none matters; `paper` on
            the paper's own numbers.
        judgement: see there.
    """

    claim: Claim
    evaluation: str
    judgement: Judgement


def _one(name: str, task: str, evaluation: str = PROBE, small: bool = False) -> Side:
    end = "smallest" if small else "largest"
    return (Reference(pretraining=name, task=task, evaluation=evaluation, end=end),)  # type: ignore[arg-type]


def _best(names: Iterable[str], task: str, evaluation: str = PROBE, small: bool = False) -> Side:
    return tuple(reference for name in names for reference in _one(name, task, evaluation, small))


def _above(first: Side, second: Side) -> Statement:
    return Statement(above=(first,), below=(second,))


def _every(statements: Iterable[Statement]) -> tuple[tuple[Statement, ...], ...]:
    return tuple((statement,) for statement in statements)


def _lead(evaluation: str = PROBE, small: bool = False) -> tuple[Side, Side]:
    """All, and the best single modality, by aggregate."""
    return _one(ALL, AGGREGATE, evaluation, small), _best(ALONE, AGGREGATE, evaluation, small)


def _others(name: str) -> tuple[str, ...]:
    return tuple(other for other in ALONE if other != name)


@functools.cache
def list_claims() -> tuple[Claim, ...]:
    """The paper's claims in its order (Fang et al. 2024, sections 4.1 to 4.3, appendices C to E)."""
    return (*_list_scratch_claims(), *_list_modality_claims(), *_list_strategy_claims(), *_list_appendix_claims())


def _list_scratch_claims() -> list[Claim]:
    scratches = [f"scratch_{name}" for name in PAPER_MODALITIES]
    pairs = [(f"mae_{name}", f"scratch_{name}") for name in PAPER_MODALITIES] + [(ALL, "scratch")]
    return [
        Claim(
            name="scratch_all_best",
            sentence="From scratch, the multimodal model is better overall than any single modality.",
            source="4.1, Table 1",
            groups=_every([_above(_one("scratch", AGGREGATE, SCRATCH), _best(scratches, AGGREGATE, SCRATCH))]),
        ),
        Claim(
            name="scratch_all_behind_eeg",
            sentence="From scratch, the multimodal model lags slightly behind EEG in sleep staging.",
            source="4.1, Table 1",
            groups=_every([_above(_one("scratch_eeg", "sleep", SCRATCH), _one("scratch", "sleep", SCRATCH))]),
            remark="The paper's Table 1 says otherwise: from scratch All has 0.737, EEG 0.717.",
        ),
        Claim(
            name="pretraining_helps",
            sentence="Pretraining benefits every model, of one modality or of all.",
            source="4.1, Table 1",
            groups=_every([_above(_one(a, AGGREGATE), _one(b, AGGREGATE, SCRATCH)) for a, b in pairs]),
            remark="Checked on the aggregate; on single tasks the paper has two exceptions, both EMG.",
        ),
    ]


def _list_modality_claims() -> list[Claim]:
    def leads(task: str, name: str) -> Claim:
        return Claim(
            name=f"{name}_leads_{task}",
            sentence=f"Of the single modalities, {name.upper()} is the most informative for {task}.",
            source="4.1, Table 1",
            groups=_every([_above(_one(f"mae_{name}", task), _best(_others(f"mae_{name}"), task))]),
        )

    return [
        leads("sleep", "eeg"),
        leads("age", "ecg"),
        leads("arousal", "eog"),
        Claim(
            name="no_single_best",
            sentence="No single modality is the best for all tasks.",
            source="4.1, Table 1",
            groups=tuple(
                tuple(_above(_best(_others(name), task), _one(name, task)) for task in TASKS) for name in ALONE
            ),
        ),
        Claim(
            name="all_above_alone",
            sentence="The multimodal model outperforms every single modality in age and arousal.",
            source="4.1, Table 1",
            groups=_every([_above(_one(ALL, task), _best(ALONE, task)) for task in ("age", "arousal")]),
        ),
        Claim(
            name="all_like_eeg",
            sentence="In sleep staging the multimodal model performs very similarly to EEG.",
            source="4.1, Table 1",
            groups=_every(
                [Statement(above=(_one(ALL, "sleep"),), below=(_one("mae_eeg", "sleep"),), tolerance=SIMILAR)]
            ),
            remark=f"Similar means within {SIMILAR:g} here; the paper gives no bound.",
        ),
        Claim(
            name="all_best_aggregate",
            sentence="Over all tasks the multimodal model is better than any single modality.",
            source="4.1, Table 1",
            groups=_every([_above(*_lead())]),
        ),
    ]


def _list_strategy_claims() -> list[Claim]:
    others = ("multimae", "simclr", *CLIPS)
    return [
        Claim(
            name="drop_helps",
            sentence="Without modality drop the scores of every task fall.",
            source="4.2, Table 2",
            groups=_every([_above(_one(ALL, task), _one("multimae", task)) for task in (*TASKS, AGGREGATE)]),
        ),
        Claim(
            name="multimae_below_alone",
            sentence="Without modality drop MultiMAE is below the most informative single modality on every task.",
            source="4.2, Tables 1 and 2",
            groups=_every([_above(_best(ALONE, task), _one("multimae", task)) for task in TASKS]),
        ),
        Claim(
            name="simclr_below_multimae",
            sentence="SimCLR is below MultiMAE (without drop) on every task.",
            source="4.3, Table 2",
            groups=_every([_above(_one("multimae", task), _one("simclr", task)) for task in TASKS]),
        ),
        Claim(
            name="clip_below_multimae",
            sentence="Both CLIP models are below MultiMAE (without drop) in sleep and age.",
            source="4.3, Table 2",
            groups=_every(
                [_above(_one("multimae", task), _one(clip, task)) for task in ("sleep", "age") for clip in CLIPS]
            ),
        ),
        Claim(
            name="clip_wins_arousal",
            sentence="Both CLIP models are above every other strategy in arousal.",
            source="4.3, Table 2",
            groups=_every(
                [_above(_one(clip, "arousal"), _best((ALL, "multimae", "simclr"), "arousal")) for clip in CLIPS]
            ),
        ),
        Claim(
            name="drop_best_strategy",
            sentence="Over all tasks MultiMAE with modality drop is the best of the five strategies.",
            source="4.3, Table 2",
            groups=_every([_above(_one(ALL, AGGREGATE), _best(others, AGGREGATE))]),
        ),
    ]


def _list_appendix_claims() -> list[Claim]:
    rest = tuple(name for name in PAPER_MODALITIES if name != "emg")
    small, large = _lead(small=True), _lead()
    tuned, probed = _lead(FINETUNE), _lead()
    return [
        Claim(
            name="emg_reconstructs_worst",
            sentence="MultiMAE struggles most with reconstructing EMG.",
            source="C, Figure 4",
            groups=_every(
                [
                    _above(_one("multimae", "emg", RECONSTRUCTION), _best(["multimae"], name, RECONSTRUCTION))
                    for name in rest
                ]
            ),
            remark="The paper shows it in a figure and prints no error.",
        ),
        Claim(
            name="all_best_small",
            sentence="With 25 training patients the multimodal model still has the best aggregate.",
            source="D, Table 3",
            groups=_every([_above(*small)]),
        ),
        Claim(
            name="lead_larger_small",
            sentence="The multimodal model's lead in the aggregate is larger when training data is limited.",
            source="4.1, Tables 1 and 3",
            groups=_every([Statement(above=(small[0], large[1]), below=(small[1], large[0]))]),
        ),
        Claim(
            name="all_best_finetuned",
            sentence="With full finetuning the multimodal model still has the best aggregate.",
            source="E, Table 4",
            groups=_every([_above(*tuned)]),
        ),
        Claim(
            name="lead_smaller_finetuned",
            sentence="With full finetuning the differences between models are smaller.",
            source="4.1, Tables 1 and 4",
            groups=_every([Statement(above=(probed[0], tuned[1]), below=(probed[1], tuned[0]))]),
            remark="Checked on the lead of the multimodal model in the aggregate.",
        ),
        Claim(
            name="finetuning_below_probe",
            sentence="Full finetuning of the multimodal model is below its linear probe for age and the aggregate.",
            source="Tables 1 and 4",
            groups=_every([_above(_one(ALL, task), _one(ALL, task, FINETUNE)) for task in ("age", AGGREGATE)]),
            remark="The paper's tables say so, its text does not.",
        ),
    ]


def check_claims(
    rows: Sequence[ScoreRow],
    *,
    predictions: Mapping[tuple[str, str], pa.Table] | None = None,
    reconstruction_errors: Mapping[str, float] | None = None,
    draws: int = 500,
) -> list[ClaimResult]:
    """Check every claim on our scores, with the converged probe and with the paper's recipe.

    Args:
        rows: scores of one cohort.
        predictions: by (strategy, evaluation), test predictions at the largest training size; with those of both sides
            a difference is judged paired by subject, otherwise by the spread over seeds.
        reconstruction_errors: of MultiMAE without drop, mean squared error by modality.
        draws: of the paired bootstrap.

    Returns:
        Two results per claim about probes, one for each of the others, in the paper's order.

    Raises:
        TablesError: the scores are of several cohorts.
    """
    book = ScoreBook(rows)
    results = []
    for claim in list_claims():
        for evaluation in PROBES if PROBE in claim.evaluations else ("",):
            find = functools.partial(_find_ours, book, evaluation, reconstruction_errors or {})
            compare = functools.partial(_compare_ours, predictions or {}, evaluation, draws)
            results.append(ClaimResult(claim=claim, evaluation=evaluation, judgement=_judge(claim, find, compare)))
    return results


def check_paper(paper: PaperTables | None = None) -> list[ClaimResult]:
    """Check every claim on the paper's own numbers, one result per claim.

    By their means all hold but the one whose remark says so; by their spread some cannot be told.
    """
    find = functools.partial(_find_printed, read_paper() if paper is None else paper)
    return [
        ClaimResult(claim=claim, evaluation="paper", judgement=_judge(claim, find, _compare_nothing))
        for claim in list_claims()
    ]


def _judge(claim: Claim, find: Finder, compare: Comparer) -> Judgement:
    return judge_all([judge_any([judge_statement(item, find, compare) for item in group]) for group in claim.groups])


def _compare_nothing(*_: Reference) -> None:
    """The paper publishes no predictions."""
    return None


def _find_ours(book: ScoreBook, probe: str, errors: Mapping[str, float], reference: Reference) -> Measured | str:
    if reference.evaluation == RECONSTRUCTION:
        if reference.task not in errors:
            return f"the reconstruction error of {reference.task}"
        return Measured(value=float(errors[reference.task]), margin=0.0)
    evaluation = probe if reference.evaluation == PROBE else reference.evaluation
    what = f"{reference.pretraining}, {EVALUATION_TITLES[evaluation]}, {reference.task}"
    if reference.end == "smallest" and len(book.find_levels(find_kind(evaluation), reference.task)) == 1:
        return "a second training-set size"
    pick = book.find(reference.pretraining, evaluation, reference.task, reference.metric, end=reference.end)
    if not pick.rows or pick.partial:
        return f"{what} ({pick.status or pick.note})"
    cell = merge_seeds(pick.rows)
    assert cell.value is not None
    # A converged probe on held-out subjects is the same under every seed: its spread of 0 says nothing.
    margin = cell.spread if cell.spread else None
    if margin is None and cell.low is not None and cell.high is not None:
        margin = max(cell.value - cell.low, cell.high - cell.value)
    return Measured(value=cell.value, margin=margin, size=pick.sizes[-1])


def _find_printed(paper: PaperTables, reference: Reference) -> Measured | str:
    size = SMALL_SIZE if reference.end == "smallest" else LARGE_SIZE
    column = PaperColumn(task=reference.task, metric=reference.metric)
    cell = paper.find_cell(reference.pretraining, reference.evaluation, size, column)
    if cell is None or cell.value is None:
        return f"{reference.pretraining}, {reference.task}: not printed"
    return Measured(value=cell.value, margin=cell.spread or 0.0)


def _compare_ours(
    predictions: Mapping[tuple[str, str], pa.Table], probe: str, draws: int, first: Reference, second: Reference
) -> PairedDifference | None:
    """Paired test of two scores of one task under one evaluation, where the predictions of both are at hand."""
    same = first.task == second.task and first.evaluation == second.evaluation
    if (
        not same
        or first.task not in TASKS
        or first.evaluation == RECONSTRUCTION
        or "smallest" in (first.end, second.end)
    ):
        return None
    evaluation = probe if first.evaluation == PROBE else first.evaluation
    tables = [predictions.get((reference.pretraining, evaluation)) for reference in (first, second)]
    if tables[0] is None or tables[1] is None:
        return None
    features = "untrained" if evaluation == SCRATCH else "pretrained"
    one, other = (table.filter(pc.field("features") == features) for table in tables if table is not None)
    try:
        return compare_paired(one, other, first.task, evaluation=evaluation, draws=draws)
    except ComparisonError:
        # Other windows or folds on the two sides, for example where a modality is absent: the spread decides.
        return None

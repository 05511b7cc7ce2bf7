"""The paper's claims: what the checks say of the paper's own numbers, and of scores that say otherwise."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from physioray.paper.claims import check_claims, check_paper, list_claims
from physioray.paper.levels import NOT_RUN
from physioray.paper.statements import (
    CANNOT_TELL,
    HELD,
    NOT_HELD,
    Judgement,
    Measured,
    Reference,
    Statement,
    judge_all,
    judge_any,
    judge_statement,
)
from physioray.results import CONVERGED, RECIPE
from tests.paper_rows import make_paper_rows, make_row, make_seeds

UNPRINTED, CONTRADICTED = "emg_reconstructs_worst", "scratch_all_behind_eeg"


def index(results, evaluation=CONVERGED):
    return {r.claim.name: r.judgement for r in results if r.evaluation in (evaluation, "", "paper")}


def test_the_papers_numbers_bear_out_every_claim_but_the_one_that_its_table_contradicts():
    found = index(check_paper())
    assert found.pop(UNPRINTED).verdict == NOT_RUN
    assert found.pop(CONTRADICTED).by_means == NOT_HELD
    assert {judgement.by_means for judgement in found.values()} == {HELD}
    # By the printed spreads many cannot be told, but none is refuted.
    assert {judgement.verdict for judgement in found.values()} == {HELD, CANNOT_TELL}
    assert found["clip_below_multimae"].verdict == HELD and found["all_best_aggregate"].verdict == CANNOT_TELL


def test_score_rows_with_the_papers_numbers_get_the_papers_verdicts_under_both_probes():
    results = check_claims(make_paper_rows())
    printed = index(check_paper())
    for evaluation in (CONVERGED, RECIPE):
        for name, judgement in index(results, evaluation).items():
            assert (judgement.by_means, judgement.verdict) == (printed[name].by_means, printed[name].verdict), name
    assert [r.claim for r in results if r.evaluation != RECIPE] == list(list_claims())


@pytest.mark.parametrize(
    ("claim", "pretraining", "evaluation", "task", "value"),
    [
        ("eeg_leads_sleep", "mae_eog", CONVERGED, "sleep", 0.9),
        ("ecg_leads_age", "mae_emg", CONVERGED, "age", 0.9),
        ("all_like_eeg", "mae_eeg", CONVERGED, "sleep", 0.9),
        ("all_above_alone", "mae_ecg", CONVERGED, "age", 0.9),
        ("drop_helps", "multimae", CONVERGED, "age", 0.9),
        ("multimae_below_alone", "multimae", CONVERGED, "sleep", 0.9),
        ("simclr_below_multimae", "simclr", CONVERGED, "age", 0.9),
        ("clip_below_multimae", "clip_pairwise", CONVERGED, "sleep", 0.9),
        ("clip_wins_arousal", "simclr", CONVERGED, "arousal", 0.9),
        ("drop_best_strategy", "simclr", CONVERGED, "aggregate", 3.0),
        ("all_best_aggregate", "mae_emg", CONVERGED, "aggregate", 3.0),
        ("pretraining_helps", "scratch_ecg", "scratch", "aggregate", 3.0),
        ("scratch_all_best", "scratch_ecg", "scratch", "aggregate", 3.0),
        ("all_best_finetuned", "mae_ecg", "finetune", "aggregate", 3.0),
        ("finetuning_below_probe", "multimae_drop", "finetune", "age", 0.9),
    ],
)
def test_one_score_that_says_otherwise_refutes_a_claim(claim, pretraining, evaluation, task, value):
    def change(row):
        same = (row.pretraining, row.evaluation, row.task) == (pretraining, evaluation, task)
        return dataclasses.replace(row, value=value + 0.001 * row.seed) if same else row

    assert index(check_claims([change(row) for row in make_paper_rows()]))[claim].verdict == NOT_HELD


def test_one_modality_that_is_best_on_every_task_refutes_that_none_is():
    def change(row):
        return dataclasses.replace(row, value=0.95 + 0.001 * row.seed) if row.pretraining == "mae_emg" else row

    assert index(check_claims([change(row) for row in make_paper_rows()]))["no_single_best"].verdict == NOT_HELD


def test_what_was_not_run_is_named():
    rows = [row for row in make_paper_rows() if row.pretraining != "simclr" and row.training_subjects == 500]
    found = index(check_claims(rows))
    assert found["simclr_below_multimae"].verdict == NOT_RUN
    assert all("simclr" in text for text in found["simclr_below_multimae"].missing)
    assert found["all_best_small"].missing == ("a second training-set size",)
    assert found["clip_below_multimae"].verdict == HELD


def test_a_counterexample_refutes_a_claim_even_where_other_tasks_have_no_labels():
    rows = make_seeds(0.9, 0.001, pretraining="simclr") + make_seeds(0.7, 0.001, pretraining="multimae")
    judgement = index(check_claims(rows))["simclr_below_multimae"]
    assert judgement.verdict == NOT_HELD and any("age" in text for text in judgement.missing)


def test_trainings_on_unequally_many_subjects_are_not_compared():
    rows = make_seeds(0.9, 0.001, task="age", training_subjects=100)
    rows += make_seeds(0.7, 0.001, task="age", training_subjects=50, evaluation="finetune")
    judgement = index(check_claims(rows))["finetuning_below_probe"]
    assert judgement.verdict == NOT_RUN and any("50 and 100" in text for text in judgement.missing)


def test_without_a_spread_the_interval_by_subject_decides_and_without_both_nothing_can_be_told():
    def judge(**fields):
        rows = [make_row(pretraining=name, value=value, **fields) for name, value in (("mae_eeg", 0.7),)]
        rows += [make_row(pretraining=f"mae_{name}", value=0.6, **fields) for name in ("eog", "emg", "ecg")]
        return index(check_claims(rows))["eeg_leads_sleep"]

    assert judge(low=None, high=None).verdict == CANNOT_TELL
    assert judge(low=None, high=None).by_means == HELD
    wide = [make_row(pretraining="mae_eeg", value=0.7, low=0.6, high=0.8)]
    wide += [make_row(pretraining=f"mae_{name}", value=0.6, low=0.5, high=0.7) for name in ("eog", "emg", "ecg")]
    assert index(check_claims(wide))["eeg_leads_sleep"].verdict == CANNOT_TELL
    narrow = [dataclasses.replace(row, low=row.value - 0.01, high=row.value + 0.01) for row in wide]
    assert index(check_claims(narrow))["eeg_leads_sleep"].verdict == HELD


def make_predictions(right, subjects=12, windows=40):
    """Sleep predictions of one seed; in every subject the same share of each stage is right."""
    generator = np.random.default_rng(0)
    true = np.tile(np.arange(5), subjects * windows // 5)
    chosen = generator.random(len(true)) < right
    predicted = np.where(chosen, true, (true + 1) % 5)
    columns = {
        "task": ["sleep"] * len(true),
        "evaluation": [CONVERGED] * len(true),
        "features": ["pretrained"] * len(true),
        "seed": np.zeros(len(true), np.int64),
        "window_id": np.arange(len(true)),
        "subject": np.repeat([f"s{number}" for number in range(subjects)], windows),
        "true": true.astype(np.int8),
        "predicted": predicted.astype(np.int8),
    }
    return pa.table(columns)


def test_with_predictions_of_both_sides_a_difference_is_judged_paired_by_subject():
    # Over the seeds the two cannot be told apart; on the same windows they can.
    rows = make_seeds(0.80, 0.2) + make_seeds(0.50, 0.2, pretraining="mae_eeg")
    tables = {("multimae_drop", CONVERGED): make_predictions(0.8), ("mae_eeg", CONVERGED): make_predictions(0.5)}
    apart = index(check_claims(rows))["all_like_eeg"]
    paired = index(check_claims(rows, predictions=tables, draws=100))["all_like_eeg"]
    assert apart.verdict == CANNOT_TELL and "by the spread" in apart.details[0]
    assert paired.verdict == NOT_HELD and "paired by subject" in paired.details[0]


def test_reconstruction_errors_by_modality_settle_the_claim_on_emg():
    errors = {"eeg": 0.3, "eog": 0.2, "ecg": 0.4, "emg": 0.9}
    worst = index(check_claims([make_row()], reconstruction_errors=errors))[UNPRINTED]
    best = index(check_claims([make_row()], reconstruction_errors=errors | {"emg": 0.1}))[UNPRINTED]
    part = index(check_claims([make_row()], reconstruction_errors={"emg": 0.9, "eeg": 0.3}))[UNPRINTED]
    assert (worst.verdict, best.verdict, part.verdict) == (HELD, NOT_HELD, NOT_RUN)


@pytest.mark.parametrize(
    ("values", "tolerance", "verdict", "by_means"),
    [
        ((0.7, 0.6, 0.02), None, HELD, HELD),
        ((0.6, 0.7, 0.02), None, NOT_HELD, NOT_HELD),
        ((0.7, 0.69, 0.02), None, CANNOT_TELL, HELD),
        ((0.69, 0.7, 0.02), None, CANNOT_TELL, NOT_HELD),
        ((0.7, 0.7, 0.0), None, NOT_HELD, NOT_HELD),
        ((0.7, 0.69, 0.002), 0.02, HELD, HELD),
        ((0.7, 0.6, 0.002), 0.02, NOT_HELD, NOT_HELD),
        ((0.7, 0.685, 0.01), 0.02, CANNOT_TELL, HELD),
    ],
)
def test_a_statement_is_judged_by_how_far_its_difference_clears_the_spread(values, tolerance, verdict, by_means):
    first, second = Reference(pretraining="a", task="sleep"), Reference(pretraining="b", task="sleep")
    numbers = {"a": Measured(value=values[0], margin=values[2]), "b": Measured(value=values[1], margin=values[2])}
    statement = Statement(above=((first,),), below=((second,),), tolerance=tolerance)
    judgement = judge_statement(statement, lambda ref: numbers[ref.pretraining], lambda *_: None)
    assert (judgement.verdict, judgement.by_means) == (verdict, by_means)


def test_all_need_all_and_any_needs_one():
    def make(verdict):
        return Judgement(verdict=verdict, by_means=verdict)

    def judge(rule, *verdicts):
        return rule([make(verdict) for verdict in verdicts]).verdict

    assert judge(judge_all, HELD, HELD) == HELD
    assert judge(judge_all, HELD, CANNOT_TELL) == CANNOT_TELL
    assert judge(judge_all, HELD, CANNOT_TELL, NOT_RUN) == NOT_RUN
    assert judge(judge_all, HELD, NOT_RUN, NOT_HELD) == NOT_HELD
    assert judge(judge_any, NOT_HELD, NOT_RUN, HELD) == HELD
    assert judge(judge_any, NOT_HELD, CANNOT_TELL) == CANNOT_TELL
    assert judge(judge_any, NOT_HELD, NOT_HELD) == NOT_HELD

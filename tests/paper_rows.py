"""Score rows that say exactly what the paper prints, and variants of them, for tests of the paper's tables."""

from __future__ import annotations

import numpy as np

from physioray.paper.reference import CHANCE, PROBE, read_paper
from physioray.paper.tables import TableContext
from physioray.results import PROBES, ScoreRow

SEEDS = 5
# Five numbers of mean 0 and standard deviation 1.
STEPS = (np.arange(SEEDS) - 2) / np.std(np.arange(SEEDS), ddof=1)


def make_row(**changes) -> ScoreRow:
    """One score of a probe on the multimodal encoder, with some fields changed."""
    values = {
        "pretraining": "multimae_drop",
        "evaluation": PROBES[0],
        "features": "pretrained",
        "task": "sleep",
        "split": "test",
        "metric": "balanced_accuracy",
        "value": 0.7,
        "low": 0.65,
        "high": 0.75,
        "seed": 0,
        "training_subjects": 500,
        "windows": 200000,
        "subjects": 219,
        "cohort_fingerprint": "f" * 20,
        "simulated": False,
        "config_hash": "abc",
        "note": "",
    }
    scope = changes.pop("scope", None)
    row = ScoreRow(**(values | changes))
    if scope is not None:
        object.__setattr__(row, "scope", scope)
    return row


def make_seeds(value, spread, **changes) -> list[ScoreRow]:
    """The same score under five seeds, of this mean and standard deviation, without intervals."""
    fields = {"low": None, "high": None} | changes
    return [make_row(**fields, seed=seed, value=value + spread * STEPS[seed]) for seed in range(SEEDS)]


def make_paper_rows(**changes) -> list[ScoreRow]:
    """Everything that the paper prints, each number once, with its spread over five seeds."""
    rows, seen = [], set()
    for table in read_paper().tables:
        for line in table.rows:
            for column, cell in zip(table.columns, line.cells, strict=True):
                key = (line.pretraining, line.evaluation, column, table.training_subjects)
                if line.evaluation == CHANCE or cell.value is None or key in seen:
                    continue
                seen.add(key)
                for evaluation in PROBES if line.evaluation == PROBE else (line.evaluation,):
                    rows += make_seeds(
                        cell.value,
                        cell.spread,
                        pretraining=line.pretraining,
                        evaluation=evaluation,
                        features="untrained" if line.evaluation == "scratch" else "pretrained",
                        task=column.task,
                        metric=column.metric,
                        training_subjects=table.training_subjects,
                        **changes,
                    )
    return rows


def make_context(**changes) -> TableContext:
    """A real cohort of 1,000 subjects."""
    values = {
        "cohort": "sleep house",
        "simulated": False,
        "subjects": 1000,
        "labelled": 900,
        "commit": "0123456789abcdef",
    }
    return TableContext(**(values | changes))

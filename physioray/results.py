"""The files between evaluation and report: one JSON line per score, one table of predictions."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from physioray.metrics import METRICS
from physioray.signals import TASKS, WINDOWS
from physioray.storage import Location, StorageError

RESULTS_FILE = "results.jsonl"
PREDICTIONS_FILE = "predictions.parquet"
SUBJECT_SCORES_FILE = "subject_scores.parquet"

CONVERGED = "probe_converged"
RECIPE = "probe_recipe"
FINETUNE = "finetune"
FROZEN = "frozen"
SCRATCH = "scratch"
PROBES = (CONVERGED, RECIPE)
"""Probes on embeddings: the converged solver (headline) and the paper's recipe."""

EVALUATIONS = (*PROBES, FINETUNE, FROZEN, SCRATCH)
"""Ways to evaluate: the probes, and training on the task end to end, from a pretrained trunk that is trained on or
frozen, or from scratch."""

FEATURES = ("pretrained", "untrained", "band_powers")
"""What a probe may stand on, best known name first: the pretrained encoder and the two floors."""

TEST = "test"
VALIDATION = "validation"
CROSS_VALIDATION = "cross_validation"
VALIDATION_CROSS_VALIDATION = "validation_cross_validation"
CROSS_VALIDATIONS = (CROSS_VALIDATION, VALIDATION_CROSS_VALIDATION)
SELECTING = (VALIDATION, VALIDATION_CROSS_VALIDATION)
"""What a score may stand on while settings are still chosen: nobody of the test split."""

SCORED_SPLITS = (TEST, CROSS_VALIDATION, *SELECTING)

MOST_CLASSES = max(len(task.classes) for task in TASKS.values())


def describe_people(simulated: bool, people: int) -> str:
    """Whose signals a heading is about: `SIMULATED signals, 40 people`, or `real recordings, 21 people`."""
    return (
        f"{'SIMULATED signals' if simulated else 'real recordings'}, {people:,} {'person' if people == 1 else 'people'}"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score, with everything needed to know what it is a score of.

    Attributes:
        pretraining: how the encoder was pretrained, for example `multimae_drop`; `none` for floors.
        evaluation: a name of `EVALUATIONS`.
        features: a name of `FEATURES`.
        task, metric: names of `signals.TASKS` and `metrics.METRICS`; both `aggregate` for the score over all tasks.
        split: `test`, or `cross_validation` where every subject was in test once; while settings are still chosen
            `validation`, or `validation_cross_validation` over everybody but the test subjects.
        value: the score; None if undefined or the task was skipped, `note` then says why.
        low, high: 95 % interval by subject; None if there is none.
        seed: of the folds (cross-validation) or of the head (held-out test).
        training_subjects: people the probe was trained on; the mean over folds, rounded.
        windows, subjects: scored.
        cohort_fingerprint, config_hash: identity of data and settings.
        simulated: True for simulated nights.
        note: what a reader must know of this score.
        scope: what is counted, a name of `signals.SCOPES`.
        classes: how many classes occur in what was scored, so that guessing scores one over it; 0 in files from
            before this was kept (and in aggregates): then all classes of the task.
    """

    pretraining: str
    evaluation: str
    features: str
    task: str
    split: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    seed: int
    training_subjects: int
    windows: int
    subjects: int
    cohort_fingerprint: str
    simulated: bool
    config_hash: str
    note: str = ""
    scope: str = WINDOWS
    classes: int = 0

    @property
    def chance(self) -> float | None:
        """Balanced accuracy of a guess among the classes that occur; None for an aggregate or a single class."""
        if self.task not in TASKS or self.classes == 1:
            return None
        return 1.0 / (self.classes or len(TASKS[self.task].classes))


def write_results(location: Location, rows: Iterable[ScoreRow]) -> None:
    """Write one JSON line per score, the whole file or nothing; an older file is replaced."""
    lines = [json.dumps(dataclasses.asdict(row), sort_keys=True, allow_nan=False) for row in rows]
    location.write_text("".join(f"{line}\n" for line in lines))


def read_results(location: Location) -> list[ScoreRow]:
    """Read what `write_results` has written.

    Raises:
        FileNotFoundError: no file stands there.
        StorageError: a line is not a score; the message names it.
    """
    rows = []
    for number, line in enumerate(location.read_text().splitlines(), start=1):
        try:
            rows.append(ScoreRow(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise StorageError(f"Line {number} of {location} must be a score, but: {error}. Evaluate again.") from error
    return rows


def prediction_schema() -> pa.Schema:
    """Columns of a table of predictions: one row is one window under one task, features, evaluation and seed."""
    fields = [
        pa.field("recording", pa.string()),
        pa.field("subject", pa.string()),
        pa.field("window_id", pa.int64()),
        pa.field("window", pa.int32()),
        pa.field("start", pa.float64()),
        pa.field("task", pa.string()),
        pa.field("true", pa.int8()),
        pa.field("predicted", pa.int8()),
    ]
    fields += [pa.field(f"p{number}", pa.float32()) for number in range(MOST_CLASSES)]
    fields += [pa.field(name, pa.string()) for name in ("features", "evaluation", "split")]
    return pa.schema([*fields, pa.field("seed", pa.int64())])


def subject_score_schema() -> pa.Schema:
    """Columns of a table of scores per subject: one row is one person under one task, features, evaluation and seed.

    `windows` are the scored ones, `classes` how many classes occur among them (balanced accuracy is the mean over
    these), `training_subjects` as in ScoreRow; a metric without a value for this person is null.
    """
    names = ("subject", "task", "features", "pretraining", "evaluation", "split", "scope")
    fields = [pa.field(name, pa.string()) for name in names]
    fields += [pa.field(name, pa.int64()) for name in ("seed", "training_subjects", "windows", "classes")]
    return pa.schema([*fields, *(pa.field(name, pa.float64()) for name in METRICS)])


def write_subject_scores(location: Location, tables: Sequence[pa.Table]) -> None:
    """Write scores per subject as one Parquet file, whole or not at all."""
    _write_table(location, pa.concat_tables(tables) if tables else subject_score_schema().empty_table())


def read_subject_scores(location: Location) -> pa.Table:
    """Read what `write_subject_scores` has written."""
    return _read_table(location)


def write_predictions(location: Location, tables: Sequence[pa.Table]) -> None:
    """Write predictions as one Parquet file, whole or not at all."""
    _write_table(location, pa.concat_tables(tables) if tables else prediction_schema().empty_table())


def read_predictions(location: Location) -> pa.Table:
    """Read what `write_predictions` has written."""
    return _read_table(location)


def _write_table(location: Location, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    location.write_bytes(sink.getvalue())


def _read_table(location: Location) -> pa.Table:
    # Without threads: Arrow's may abort a short process as it ends (apache/arrow issue 34314).
    source = pa.BufferReader(location.read_bytes())
    return pq.ParquetFile(source, pre_buffer=False).read(use_threads=False)

"""Who is pretrained on, who is scored, and how a cohort and that choice are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.data.splits import Fold, SplitError, fold_subjects
from physioray.pretrain import find_pretraining_windows
from physioray.results import TEST, VALIDATION
from physioray.signals import TASKS, UNKNOWN, Split


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Who is pretrained on, who is scored, and how that is said.

    Attributes:
        splits: whose windows are pretrained on, without labels.
        folds: by seed, the folds of a cross-validation; None for held-out test subjects.
        labelled: subjects with any label.
        sentence: the protocol in words, for the report.
        scored: `test`, or `validation` while settings are still chosen (for `evaluate_probe`).
    """

    splits: tuple[Split, ...]
    folds: Mapping[int, Sequence[Fold]] | None
    labelled: tuple[str, ...]
    sentence: str
    scored: str = TEST


def choose_protocol(cohort: Cohort, config: ProbeConfig) -> Protocol:
    """Held-out test subjects where there are enough people, else cross-validation by subject over all of them.

    Small cohorts are pretrained on everybody but the validation subjects, without labels. On a cohort whose test
    split is locked it is the protocol for choosing settings: the validation subjects are scored, or, with too few
    people for that, everybody but the test subjects by cross-validation; pretraining sees no test subject either.
    """
    labels = np.stack([cohort.read_labels(task) for task in TASKS])
    owner = np.repeat([item.subject_index for item in cohort.recordings], [item.rows for item in cohort.recordings])
    # The pretraining split's people have an age but no scored night; they are nobody's test subjects.
    eligible = np.array([item.split != "pretrain" for item in cohort.recordings])[
        np.repeat(np.arange(len(cohort.recordings)), [item.rows for item in cohort.recordings])
    ]
    known = np.unique(owner[(labels != UNKNOWN).any(0) & eligible])
    labelled = tuple(cohort.subjects[number] for number in known)
    choosing = cohort.test_locked
    # Only labelled subjects are in a cohort's test split, so a locked one can be counted without its labels.
    people = len(labelled) + (len(cohort.list_subjects("test")) if choosing else 0)
    if choosing and people >= config.cross_validate_below:
        sentence = "For choosing settings: the validation subjects are scored, and no test subject is read."
        return Protocol(
            splits=("pretrain", "train"), folds=None, labelled=labelled, sentence=sentence, scored=VALIDATION
        )
    if people >= config.cross_validate_below:
        sentence = "Held-out test subjects: they are in neither pretraining, training nor validation."
        return Protocol(splits=("pretrain", "train"), folds=None, labelled=labelled, sentence=sentence)
    splits = tuple(split for split in cohort.readable_splits if split != "validation")
    scored = VALIDATION if choosing else TEST
    age = cohort.read_labels("age")
    strata = {cohort.subjects[number]: str(age[owner == number].max()) for number in known}
    try:
        folds = {seed: fold_subjects(labelled, config.folds, seed, 0.15, strata) for seed in config.seeds}
    except SplitError as error:
        sentence = f"No probe was fitted: {error}"
        return Protocol(splits=splits, folds={}, labelled=labelled, sentence=sentence, scored=scored)
    whom = "labelled subjects who are not in the test split" if choosing else "labelled subjects"
    sentence = (
        f"Cross-validation by subject over all {len(labelled)} {whom} ({config.folds} folds, drawn anew "
        f"for each of {len(config.seeds)} seeds), because there are fewer than {config.cross_validate_below}. "
        f"Pretraining saw the signals of everybody but the {'validation and test' if choosing else 'validation'} "
        "subjects, without any label, so the signals of most scored subjects were among them."
    )
    return Protocol(splits=splits, folds=folds, labelled=labelled, sentence=sentence, scored=scored)


def find_labelled_windows(cohort: Cohort, protocol: Protocol, modalities: Sequence[str]) -> NDArray[np.int64]:
    """Windows `(N,)` of labelled subjects that hold at least one of the modalities."""
    theirs = cohort.find_windows(subjects=protocol.labelled)
    if not len(theirs):
        return theirs
    return np.intersect1d(theirs, find_pretraining_windows(cohort, cohort.readable_splits, modalities))


def describe_card(cohort: Cohort, protocol: Protocol) -> dict[str, Any]:
    """The cohort's facts that stand in a report."""
    manifest = cohort.manifest
    settings = manifest.get("settings", {})
    return {
        "name": cohort.location.name,
        "simulated": cohort.simulated,
        "fingerprint": cohort.fingerprint,
        "subjects": len(cohort.subjects),
        "recordings": len(cohort.recordings),
        "hours": manifest.get("counts", {}).get("hours"),
        "windows": cohort.windows,
        "class_counts": manifest["class_counts"],
        "priors": manifest.get("priors", {}),
        "arousal_rule": settings.get("arousal_rule", {}),
        "channels": manifest.get("channels", {}),
        "present": manifest.get("present_share", {}),
        "note": protocol.sentence,
        "assumptions": manifest.get("assumptions", {}),
        "discontinuities": {row["recording"]: row["discontinuities"] for row in manifest["recordings"]},
    }

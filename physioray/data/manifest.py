"""Sums a finished ledger up: splits, tables of subjects and recordings, and the manifest, written last.

The same recordings and settings always give the same bytes: no time, machine or order of arrival enters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from physioray import __version__
from physioray.config import IngestConfig, list_assumptions, to_dict
from physioray.data.cohort import FORMAT, MANIFEST
from physioray.data.ledger import CONVERSION_VERSION, LedgerRow
from physioray.data.preprocess import quantisation_step
from physioray.data.splits import (
    SPLITS_FILE,
    Division,
    SubjectSummary,
    check_division,
    check_recordings,
    classify_age,
    divide_subjects,
)
from physioray.signals import SPLITS, TASKS, Split, find_modality
from physioray.storage import Location, dump_json, hash_value

SUBJECTS_FILE = "subjects.parquet"
LEDGER_FILE = "ledger.parquet"

Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """What ingest has made.

    Attributes:
        cohort: its URI.
        manifest: the content of its `manifest.json`.
        rejected: reason by path of the recording in the source.
        converted: recordings that this run converted; 0 if the cohort was finished before.
        seconds: that this run took.
    """

    cohort: str
    manifest: Mapping[str, Any]
    rejected: Mapping[str, str]
    converted: int
    seconds: float

    def describe(self) -> str:
        """Several lines for people: sizes, class counts with priors, and what was rejected."""
        counts = self.manifest["counts"]
        heading = "SIMULATED nights: " if self.manifest["simulated"] else ""
        lines = [
            f"{heading}{counts['recordings']} recordings of {counts['subjects']} subjects, {counts['hours']:.1f} h, "
            f"{counts['windows']:,} windows in {self.cohort} ({self.converted} converted in {self.seconds:.1f} s)."
        ]
        for name, task in TASKS.items():
            windows, priors = self.manifest["class_counts"][name], self.manifest["priors"][name]
            parts = [
                f"{label} {count:,} ({prior:.1%})"
                for label, count, prior in zip(task.classes, windows, priors, strict=True)
            ]
            lines.append(f"{task.title}: {', '.join(parts) if sum(windows) else 'no labels'}")
        lines += [f"Rejected {path}: {reason}" for path, reason in self.rejected.items()]
        return "\n".join(lines)


def publish_cohort(
    cohort: Location,
    rows: Sequence[LedgerRow],
    settings: IngestConfig,
    *,
    identity: Mapping[str, Any],
    simulated: bool,
) -> dict[str, Any]:
    """Write `splits.json`, `subjects.parquet`, `ledger.parquet` and, last, `manifest.json`.

    Nothing is written if the manifest that stands there already says the same.

    Args:
        cohort: where to.
        rows: the ledger, at least one of them accepted.
        settings: of the ingest.
        identity: the content of `settings.json`.
        simulated: whether the source says that its nights are simulated.

    Returns:
        The manifest.

    Raises:
        SplitError: a subject would stand in two splits.
    """
    rows = sorted(rows, key=lambda row: (row.recording, row.key))
    facts = [row.facts for row in rows if row.accepted]
    subjects = _gather_subjects(facts)
    summaries = {
        name: SubjectSummary(labelled=entry["labelled"], age_class=classify_age(entry["age"], settings.age_threshold))
        for name, entry in subjects.items()
    }
    division = divide_subjects(summaries, settings.splits)
    check_division(division, subjects)
    manifest = _build_manifest(
        rows, division, settings, identity=identity, simulated=simulated or _any_simulated(facts)
    )
    check_recordings(manifest["recordings"])
    text = dump_json(manifest)
    names = (SPLITS_FILE, SUBJECTS_FILE, LEDGER_FILE, MANIFEST)
    there = all((cohort / name).exists() for name in names)
    if there and (cohort / MANIFEST).read_text() == text:
        return manifest
    (cohort / SPLITS_FILE).write_json(division.to_dict())
    (cohort / SUBJECTS_FILE).write_bytes(_to_parquet(_tabulate_subjects(subjects, division)))
    (cohort / LEDGER_FILE).write_bytes(_to_parquet(_tabulate_ledger(rows)))
    (cohort / MANIFEST).write_text(text)
    return manifest


def _any_simulated(facts: Sequence[Facts]) -> bool:
    return any(entry.get("simulated") for entry in facts)


def _gather_subjects(facts: Sequence[Facts]) -> dict[str, dict[str, Any]]:
    """Age, sex and whether there are labels, by subject; the first night that knows a fact decides it."""
    found: dict[str, dict[str, Any]] = {}
    for entry in facts:
        subject = found.setdefault(
            entry["subject"], {"age": None, "sex": None, "site": None, "labelled": False, "recordings": 0}
        )
        for name in ("age", "sex", "site"):
            if subject[name] is None:
                subject[name] = entry.get(name)
        subject["labelled"] |= _has_labels(entry)
        subject["recordings"] += 1
    return dict(sorted(found.items()))


def _has_labels(facts: Facts) -> bool:
    """True for stages or arousals; an age alone, which unlabelled nights have too, is no annotation."""
    counts = facts["class_counts"]
    return facts["label_source"] != "none" and any(sum(counts[task]) > 0 for task in counts if task != "age")


def _build_manifest(
    rows: Sequence[LedgerRow],
    division: Division,
    settings: IngestConfig,
    *,
    identity: Mapping[str, Any],
    simulated: bool,
) -> dict[str, Any]:
    facts = [row.facts for row in rows if row.accepted]
    splits = division.map_subjects()
    recordings = [_describe_recording(row, splits[row.facts["subject"]]) for row in rows if row.accepted]
    rejected = [row for row in rows if not row.accepted]
    counts = _sum_counts(facts)
    return {
        "amplitude_checks": {name: _check_amplitudes(name, facts) for name in settings.modalities},
        "assumptions": list_assumptions(settings),
        "channels": {name: _count_channels(name, facts) for name in settings.modalities},
        "class_counts": counts,
        "class_counts_by_split": {
            split: _sum_counts([entry for entry in facts if splits[entry["subject"]] == split]) for split in SPLITS
        },
        "code_version": f"physioray {__version__}, conversion {CONVERSION_VERSION}",
        "counts": {
            "hours": _round(sum(entry["hours"] for entry in facts)),
            "recordings": len(facts),
            "rejected": len(rejected),
            "subjects": len({entry["subject"] for entry in facts}),
            "windows": sum(row["rows"] for row in recordings),
        },
        "fingerprint": _take_fingerprint(recordings, division, identity),
        "format": FORMAT,
        "modalities": {name: _describe_modality(name, settings) for name in settings.modalities},
        "present_share": {name: _share_present(name, facts) for name in settings.modalities},
        "priors": {task: _to_priors(values) for task, values in counts.items()},
        "recordings": recordings,
        "rejected": [{"path": row.path, "reason": row.reason, "recording": row.recording} for row in rejected],
        "settings": to_dict(settings),
        "settings_hash": identity["settings_hash"],
        "simulated": simulated,
        "source": identity["source"],
        "stage_names": _gather_stage_names(facts),
        "splits": _summarise_splits(recordings, division),
    }


def _gather_stage_names(facts: Sequence[Facts]) -> dict[str, str]:
    """What each name of a stage in the files was taken for; the same for all recordings of a cohort."""
    found: dict[str, str] = {}
    for entry in facts:
        found |= entry.get("stage_names", {})
    return dict(sorted(found.items()))


def _take_fingerprint(recordings: Sequence[Mapping[str, Any]], division: Division, identity: Mapping[str, Any]) -> str:
    shards = [[row["recording"], row["sha256"]] for row in recordings]
    return hash_value({"settings": identity["settings_hash"], "shards": shards, "splits": division.to_dict()})


def _describe_recording(row: LedgerRow, split: Split) -> dict[str, Any]:
    assert row.shard is not None
    return {
        "bytes": row.shard.bytes,
        "discontinuities": row.facts["discontinuities"],
        "file": row.shard.file,
        "hours": _round(row.facts["hours"]),
        "label_source": row.facts["label_source"],
        "recording": row.recording,
        "rows": row.shard.rows,
        "sha256": row.shard.sha256,
        "split": split,
        "subject": row.facts["subject"],
    }


def _describe_modality(name: str, settings: IngestConfig) -> dict[str, Any]:
    modality = find_modality(name)
    return {
        "rate": modality.rate,
        "samples": modality.samples,
        "step": quantisation_step(settings),
        "token_seconds": modality.token_seconds,
        "unit": modality.unit,
    }


def _sum_counts(facts: Sequence[Facts]) -> dict[str, list[int]]:
    """Windows per class of every task over some recordings."""
    return {
        name: [sum(entry["class_counts"][name][i] for entry in facts) for i in range(len(task.classes))]
        for name, task in TASKS.items()
    }


def _to_priors(counts: Sequence[int]) -> list[float]:
    """Share of every class among the labelled windows; zeros if there are none."""
    total = sum(counts)
    return [_round(count / total) if total else 0.0 for count in counts]


def _check_amplitudes(modality: str, facts: Sequence[Facts]) -> dict[str, Any]:
    """Spread (robust standard deviation, in the modality's unit) over recordings, and those that seem wrong."""
    found = [(entry["recording"], entry["channels"][modality]) for entry in facts if modality in entry["channels"]]
    spreads = [channel["robust_std"] for _, channel in found if channel["robust_std"] is not None]
    return {
        "implausible": sorted(name for name, channel in found if not channel["plausible"]),
        "maximum": _round(max(spreads)) if spreads else None,
        "median": _round(float(np.median(spreads))) if spreads else None,
        "minimum": _round(min(spreads)) if spreads else None,
        "plausible": list(find_modality(modality).plausible),
        "unit": find_modality(modality).unit,
    }


def _count_channels(modality: str, facts: Sequence[Facts]) -> dict[str, int]:
    """How many recordings took which channel for a modality."""
    used = Counter(entry["channels"][modality]["channel"] for entry in facts if modality in entry["channels"])
    return dict(sorted(used.items()))


def _share_present(modality: str, facts: Sequence[Facts]) -> float:
    windows = sum(entry["windows"] for entry in facts)
    present = sum(entry["channels"][modality]["present_windows"] for entry in facts if modality in entry["channels"])
    return _round(present / windows) if windows else 0.0


def _summarise_splits(recordings: Sequence[Mapping[str, Any]], division: Division) -> dict[str, Any]:
    sizes = {}
    for split in SPLITS:
        rows = [row for row in recordings if row["split"] == split]
        sizes[split] = {
            "hours": _round(sum(row["hours"] for row in rows)),
            "recordings": len(rows),
            "subjects": len(division.splits[split]),
            "windows": sum(row["rows"] for row in rows),
        }
    return {
        "file": SPLITS_FILE,
        "labelled_subjects": division.labelled,
        "notes": list(division.notes),
        "seed": division.seed,
        "sizes": sizes,
        "stratified": division.stratified,
        "training_subsets": sorted(division.training_subsets),
    }


def _round(value: float) -> float:
    return round(float(value), 6)


def _tabulate_subjects(subjects: Mapping[str, Mapping[str, Any]], division: Division) -> pa.Table:
    names, splits = list(subjects), division.map_subjects()
    columns = {
        "subject": pa.array(names, pa.string()),
        "age": pa.array([subjects[name]["age"] for name in names], pa.float64()),
        "sex": pa.array([subjects[name]["sex"] for name in names], pa.string()),
        "site": pa.array([subjects[name]["site"] for name in names], pa.string()),
        "split": pa.array([splits[name] for name in names], pa.string()),
        "labelled": pa.array([subjects[name]["labelled"] for name in names], pa.bool_()),
        "recordings": pa.array([subjects[name]["recordings"] for name in names], pa.int32()),
    }
    return pa.table(columns)


def _tabulate_ledger(rows: Sequence[LedgerRow]) -> pa.Table:
    """One row per recording of the source; `facts` is JSON, for whoever wants the way back to microvolts."""
    shards = [row.shard for row in rows]
    columns = {
        "recording": pa.array([row.recording for row in rows], pa.string()),
        "path": pa.array([row.path for row in rows], pa.string()),
        "accepted": pa.array([row.accepted for row in rows], pa.bool_()),
        "kind": pa.array([row.kind for row in rows], pa.string()),
        "reason": pa.array([row.reason or None for row in rows], pa.string()),
        "subject": pa.array([row.facts.get("subject") for row in rows], pa.string()),
        "hours": pa.array([row.facts.get("hours") for row in rows], pa.float64()),
        "windows": pa.array([shard.rows if shard else None for shard in shards], pa.int32()),
        "label_source": pa.array([row.facts.get("label_source") for row in rows], pa.string()),
        "file": pa.array([shard.file if shard else None for shard in shards], pa.string()),
        "sha256": pa.array([shard.sha256 if shard else None for shard in shards], pa.string()),
        "bytes": pa.array([shard.bytes if shard else None for shard in shards], pa.int64()),
        "warnings": pa.array([list(row.facts.get("warnings", [])) for row in rows], pa.list_(pa.string())),
        "facts": pa.array([json.dumps(row.facts, sort_keys=True) if row.facts else None for row in rows], pa.string()),
    }
    return pa.table(columns)


def _to_parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()

"""The main job: pretrain, embed, probe beside two floors, and report; every part can be taken up again."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from physioray import __version__
from physioray.baselines import band_powers
from physioray.compare import ComparisonError, compare_paired, state_chance, state_difference
from physioray.config import ProbeConfig, ReconstructionConfig, hash_config
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource, WindowReader
from physioray.data.splits import Fold, SplitError, fold_subjects
from physioray.embeddings import Embeddings, embed_windows
from physioray.evaluate import Evaluation, evaluate_probe
from physioray.journal import Screen
from physioray.models.fused import MaskedAutoencoder
from physioray.objectives.masking import draw_visible
from physioray.origins import complete_run
from physioray.pretrain import (
    PretrainJob,
    choose_checkpoint,
    find_pretraining_windows,
    load_model,
    make_encode,
    open_encoder,
)
from physioray.results import (
    CONVERGED,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    SUBJECT_SCORES_FILE,
    TEST,
    VALIDATION,
    ScoreRow,
    write_predictions,
    write_results,
    write_subject_scores,
)
from physioray.signals import SPLITS, TASKS, UNKNOWN, WINDOWS, Split, find_task
from physioray.storage import Location, open_location
from physioray.tensors import VALIDATION_PASS, Draw
from physioray.train import to_tensors

EMBED_BATCH = 64
EXAMPLES = 4
"""Windows whose reconstruction is shown in the report."""


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


def run_study(
    job: PretrainJob,
    *,
    run_pretraining: Callable[[PretrainJob], object],
    probe: ProbeConfig | None = None,
    screen: Screen | None = None,
    device: torch.device | str = "cpu",
) -> Location:
    """Run the whole main job and write what the report needs into the run's folder.

    Args:
        job: what to pretrain; its splits are replaced by those of the protocol.
        run_pretraining: runs the job, in this process or on a cluster.
        probe: tasks, seeds and solvers; the defaults if None.
        screen: where progress is shown.

    Returns:
        The run's folder, with results.jsonl, predictions.parquet, subject_scores.parquet, probe_curve.jsonl,
        reconstructions.npz, verdict.json, card.json, config.json, training.jsonl, and what its model needs elsewhere
        (see `origins`).
    """

    probe = probe or ProbeConfig()
    cohort, out = Cohort.open(job.cohort), open_location(job.out)
    protocol = choose_protocol(cohort, probe)
    job = replace(job, splits=protocol.splits)
    work = _Work(job=job, cohort=cohort, out=out, protocol=protocol, probe=probe, screen=screen, device=device)
    work.say(protocol.sentence)
    # Nothing is written before the pretraining has agreed that `out` is its own run's folder.
    run_pretraining(job)
    (out / "card.json").write_json(describe_card(cohort, protocol))
    (out / "environment.json").write_json(describe_environment(job))
    windows = find_labelled_windows(cohort, protocol, job.model.modalities)
    evaluations: dict[str, Evaluation] = {}
    curve: list[dict[str, Any]] = []
    if len(windows) and protocol.folds != {}:
        source = GatherSource(cohort, windows, batch_size=EMBED_BATCH, modalities=job.model.modalities)
        evaluations = _probe_features(work, source)
        curve = _measure_curve(work, source, evaluations)
    _write_results(out, evaluations, curve)
    complete_run(out, cohort=cohort, probe=probe, device=device, say=work.say)
    notes = list(dict.fromkeys(note for item in evaluations.values() for note in item.notes))
    (out / "notes.json").write_json(notes)
    (out / "verdict.json").write_json(_draw_verdict(evaluations, protocol, job, curve))
    _write_reconstructions(out, cohort, job, out / "checkpoints" / "last.pt", device)
    return out


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the parts of a study share."""

    job: PretrainJob
    cohort: Cohort
    out: Location
    protocol: Protocol
    probe: ProbeConfig
    screen: Screen | None
    device: torch.device | str

    def say(self, text: str) -> None:
        if self.screen is not None:
            self.screen.say(text)

    def embed(self, source: GatherSource, checkpoint: str) -> Embeddings:
        encoder = open_encoder(self.out / "checkpoints" / checkpoint, self.cohort, self.device)
        return embed_windows(make_encode(encoder, source.modalities, self.device), source.iterate_all())


def _probe_features(work: _Work, source: GatherSource) -> dict[str, Evaluation]:
    """Probe the pretrained encoder and the two floors, with the same solver on the same folds."""
    job, out = work.job, work.out
    chosen = choose_checkpoint(out / "checkpoints", job.train).name
    work.say(f"Embedding {len(source.plan.window_ids):,} labelled windows, and describing them by band powers ...")
    features = {
        "pretrained": work.embed(source, chosen),
        "untrained": work.embed(source, "pass-0000.pt"),
        "band_powers": embed_windows(lambda batch: band_powers(batch, source.modalities), source.iterate_all()),
    }
    features["pretrained"].save(out / "embeddings.arrow")
    evaluations = {}
    for number, (name, embeddings) in enumerate(features.items(), 1):
        work.say(f"Probing {name.replace('_', ' ')} ({number} of {len(features)}) ...")
        pretrained = name == "pretrained"
        evaluations[name] = evaluate_probe(
            embeddings,
            work.cohort,
            work.probe,
            features=name,
            pretraining=job.name if pretrained else "none",
            config_hash=hash_config(job.model, job.objective, job.train) if pretrained else "",
            folds=work.protocol.folds,
        )
    return evaluations


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


def describe_environment(job: PretrainJob) -> dict[str, Any]:
    """What the run was made with, for the report's reader who wants to repeat it."""
    return {
        "physioray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {job.threads} threads a worker",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _measure_curve(work: _Work, source: GatherSource, evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Probe score on sleep against passes, on the same folds as the headline; the floors as lines without a pass."""
    train = work.job.train
    task = next((name for name in work.probe.tasks if work.cohort.has_task(name)), None)
    if task is None:
        return []
    rows: list[dict[str, Any]] = [
        {"features": name, "task": task, **_average(evaluations[name].scores, task)}
        for name in ("untrained", "band_powers")
    ]
    ends = {0: "untrained", train.passes: "pretrained"} if train.select == "last" else {0: "untrained"}
    light = replace(work.probe, tasks=(task,), bootstrap_draws=200)
    for number in work.job.keep_passes:
        name = f"pass-{number:04d}.pt"
        if number in ends:
            rows.append({"pass": number, "task": task, **_average(evaluations[ends[number]].scores, task)})
        elif (work.out / "checkpoints" / name).exists():
            found = evaluate_probe(
                work.embed(source, name),
                work.cohort,
                light,
                features="pretrained",
                folds=work.protocol.folds,
                evaluations=(CONVERGED,),
            )
            rows.append({"pass": number, "task": task, **_average(found.scores, task)})
            if rows[-1]["value"] is not None:
                work.say(f"after {number} passes: {task} {rows[-1]['value']:.3f} balanced accuracy")
    return rows


def _average(scores: Sequence[ScoreRow], task: str, evaluation: str = CONVERGED) -> dict[str, float | None]:
    """Balanced accuracy of a task with its interval, mean over the seeds."""
    chosen = [
        row
        for row in scores
        if (row.task, row.evaluation, row.metric, row.scope) == (task, evaluation, "balanced_accuracy", WINDOWS)
        and row.value is not None
    ]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return {name: mean([getattr(row, name) for row in chosen]) for name in ("value", "low", "high")}


def _write_results(out: Location, evaluations: Mapping[str, Evaluation], curve: list[dict[str, Any]]) -> None:
    write_results(out / RESULTS_FILE, [row for item in evaluations.values() for row in item.scores])
    tables: list[pa.Table] = [item.predictions for item in evaluations.values()]
    write_predictions(out / PREDICTIONS_FILE, tables)
    write_subject_scores(out / SUBJECT_SCORES_FILE, [item.subject_scores for item in evaluations.values()])
    (out / "probe_curve.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in curve))


def _draw_verdict(
    evaluations: Mapping[str, Evaluation], protocol: Protocol, job: PretrainJob, curve: list[dict[str, Any]]
) -> list[str]:
    """What a reader should take home, in sentences made from the numbers."""
    if not evaluations:
        return [protocol.sentence if protocol.labelled else "No recording has labels: the model was pretrained only."]
    best = evaluations["pretrained"]
    sentences = []
    for task in TASKS:
        score = _average(best.scores, task)
        if score["value"] is not None:
            true = best.predictions.filter(pc.field("task") == task).column("true")
            sentences.append(state_chance(task, score["value"], score["low"], len(pc.unique(true))))
    tables = {name: item.predictions for name, item in evaluations.items()}
    for task in TASKS:
        for floor in ("untrained", "band_powers"):
            try:
                sentences.append(state_difference(compare_paired(tables["pretrained"], tables[floor], task)))
            except ComparisonError:
                continue  # the task was skipped; the notes say why
    sentences.append(_state_curve(curve, job.train.passes))
    return [sentence for sentence in sentences if sentence]


def _state_curve(curve: list[dict[str, Any]], passes: int) -> str:
    floor = next((row["value"] for row in curve if row.get("features") == "untrained"), None)
    marks = [row for row in curve if row.get("pass") and row["value"] is not None]
    if floor is None or not marks:
        return ""
    title = find_task(marks[0]["task"]).title
    above = [row["pass"] for row in marks if row["value"] > floor]
    if not above:
        return f"{title}: at no measured pass up to {passes} does pretraining score above the untrained encoder."
    return (
        f"{title}: the point estimate first lies above the untrained encoder's after {above[0]} of {passes} passes "
        "(of the passes measured; whether the difference can be told from 0 at the end is said above)."
    )


@torch.inference_mode()
def _write_reconstructions(
    out: Location, cohort: Cohort, job: PretrainJob, checkpoint: Location, device: torch.device | str
) -> None:
    """Some windows, what was visible of them and what the model made of the rest, with validation's masks."""
    model = load_model(checkpoint, device)
    if not isinstance(model, MaskedAutoencoder) or not isinstance(job.objective, ReconstructionConfig):
        return  # only masked autoencoders reconstruct
    candidates: tuple[Split, ...] = ("validation", "test", "train")
    held_out = [split for split in candidates if len(cohort.find_windows(splits=[split]))]
    splits = held_out[:1] or list(SPLITS)
    windows = find_pretraining_windows(cohort, splits, job.model.modalities)
    chosen = windows[np.linspace(0, len(windows) - 1, min(EXAMPLES, len(windows))).astype(int)]
    batch = WindowReader(cohort, job.model.modalities).read(chosen)
    tensors = to_tensors(batch, cohort.modalities, device)
    draw = Draw(seed=job.train.seed, pass_number=VALIDATION_PASS, step=0)
    mask = replace(job.objective.mask, drop_scope="sample")
    visible = draw_visible(tensors.present, model.tokens, batch.window_id, draw, mask)
    outputs = model(tensors.signals, visible, tensors.present)
    arrays: dict[str, Any] = {}
    for name in model.tokens:
        target = tensors.signals[name]
        output = outputs[name].flatten(1) if name in outputs else torch.zeros_like(target)
        arrays[f"{name}_target"] = target.float().cpu().numpy()
        arrays[f"{name}_output"] = output.float().cpu().numpy()
        arrays[f"{name}_visible"] = visible[name].numpy()
        arrays[f"{name}_present"] = tensors.present[name].numpy()
    arrays["modalities"] = np.array(list(model.tokens))
    arrays["rates"] = np.array([cohort.modalities[name].rate for name in model.tokens])
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    (out / "reconstructions.npz").write_bytes(sink.getvalue())

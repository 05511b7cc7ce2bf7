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
from physioray.compare import ComparisonError, compare_paired, state_chance, state_difference
from physioray.config import ProbeConfig, ReconstructionConfig
from physioray.data.cohort import Cohort
from physioray.data.gather import WindowReader
from physioray.evaluate import Evaluation
from physioray.journal import Screen
from physioray.models.fused import MaskedAutoencoder
from physioray.objectives.masking import draw_visible
from physioray.origins import complete_run, is_complete
from physioray.pretrain import PretrainJob, find_pretraining_windows, is_finished, load_model
from physioray.pretrainings import open_pretraining
from physioray.protocol import Protocol, choose_protocol, describe_card, find_labelled_windows
from physioray.results import (
    CONVERGED,
    PREDICTIONS_FILE,
    PROBES,
    RESULTS_FILE,
    SUBJECT_SCORES_FILE,
    ScoreRow,
    write_predictions,
    write_results,
    write_subject_scores,
)
from physioray.signals import SPLITS, TASKS, WINDOWS, Split, find_task
from physioray.stages import Description, describe_bands, embed_pretrained, embed_untrained, probe_once
from physioray.steps import StepStore, find_commit
from physioray.storage import Location, open_location
from physioray.tensors import VALIDATION_PASS, Draw
from physioray.train import to_tensors

EXAMPLES = 4
"""Windows whose reconstruction is shown in the report."""


def run_study(
    job: PretrainJob,
    *,
    run_pretraining: Callable[[PretrainJob], object],
    probe: ProbeConfig | None = None,
    store: StepStore | None = None,
    screen: Screen | None = None,
    device: torch.device | str = "cpu",
) -> Location:
    """Run the whole main job and write what the report needs into the run's folder.

    Asked again, it finds the finished pretraining in the run's folder, and embeddings and probes among the steps.

    Args:
        job: what to pretrain; its splits are replaced by those of the protocol.
        run_pretraining: runs the job, in this process or on a cluster.
        probe: tasks, seeds and solvers; the defaults if None.
        store: where embeddings and probes are kept; the folder `steps` beside the run's if None.
        screen: where progress is shown.
        device: where the encoder runs.

    Returns:
        The run's folder, with results.jsonl, predictions.parquet, subject_scores.parquet, probe_curve.jsonl,
        reconstructions.npz, verdict.json, card.json, config.json, training.jsonl, and what its model needs elsewhere
        (see `origins`).
    """

    probe = probe or ProbeConfig()
    cohort, out = Cohort.open(job.cohort), open_location(job.out)
    protocol = choose_protocol(cohort, probe)
    job = replace(job, splits=protocol.splits)
    store = store or StepStore(out.folder / "steps", commit=find_commit())
    work = _Work(
        job=job, cohort=cohort, out=out, protocol=protocol, probe=probe, store=store, screen=screen, device=device
    )
    work.say(protocol.sentence)
    # Nothing is written before the pretraining has agreed that `out` is its own run's folder.
    trained = not is_finished(job, cohort)
    if trained:
        run_pretraining(job)
    else:
        work.say(f"The pretraining in {out} is finished.")
    if trained or not (out / "environment.json").exists():
        (out / "environment.json").write_json(describe_environment(job))
    (out / "card.json").write_json(describe_card(cohort, protocol))
    windows = find_labelled_windows(cohort, protocol, job.model.modalities)
    evaluations: dict[str, Evaluation] = {}
    curve: list[dict[str, Any]] = []
    if len(windows) and protocol.folds != {}:
        evaluations = _probe_features(work, windows)
        curve = _measure_curve(work, windows, evaluations)
    _write_results(out, evaluations, curve)
    if not is_complete(out, probe):
        complete_run(out, cohort=cohort, probe=probe, device=device, say=work.say)
    notes = list(dict.fromkeys(note for item in evaluations.values() for note in item.notes))
    (out / "notes.json").write_json(notes)
    (out / "verdict.json").write_json(_draw_verdict(evaluations, protocol, job, curve))
    _write_reconstructions(out, cohort, job, out / "checkpoints" / "last.pt", device)
    store.refer(out)
    return out


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the parts of a study share."""

    job: PretrainJob
    cohort: Cohort
    out: Location
    protocol: Protocol
    probe: ProbeConfig
    store: StepStore
    screen: Screen | None
    device: torch.device | str

    def say(self, text: str) -> None:
        if self.screen is not None:
            self.screen.say(text)

    def embed(self, windows: NDArray[np.int64], place: Location) -> Description:
        pretraining, _ = open_pretraining(place)
        return embed_pretrained(self.store, self.cohort, windows, pretraining, device=self.device, screen=self.screen)

    def score(self, description: Description, probe: ProbeConfig, evaluations: Sequence[str] = PROBES) -> Evaluation:
        folds = self.protocol.folds
        return probe_once(
            self.store, description, self.cohort, probe, folds=folds, evaluations=evaluations, screen=self.screen
        )


def _probe_features(work: _Work, windows: NDArray[np.int64]) -> dict[str, Evaluation]:
    """Probe the pretrained encoder and the two floors, with the same solver on the same folds."""
    job, shared = work.job, {"screen": work.screen}
    work.say(f"Embedding {len(windows):,} labelled windows, and describing them by band powers ...")
    pretrained = work.embed(windows, work.out)
    features = {
        "pretrained": pretrained,
        "untrained": embed_untrained(
            work.store, work.cohort, windows, job.model, job.train.seed, device=work.device, **shared
        ),
        "band_powers": describe_bands(work.store, work.cohort, windows, job.model.modalities, **shared),
    }
    if not is_complete(work.out, work.probe):
        pretrained.read().save(work.out / "embeddings.arrow")
    evaluations = {}
    for number, (name, description) in enumerate(features.items(), 1):
        work.say(f"Probing {name.replace('_', ' ')} ({number} of {len(features)}) ...")
        evaluations[name] = work.score(description, work.probe)
    return evaluations


def describe_environment(job: PretrainJob) -> dict[str, Any]:
    """What the run was made with, for the report's reader who wants to repeat it."""
    return {
        "physioray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {job.threads} threads a worker",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _measure_curve(
    work: _Work, windows: NDArray[np.int64], evaluations: Mapping[str, Evaluation]
) -> list[dict[str, Any]]:
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
        place = work.out / "checkpoints" / f"pass-{number:04d}.pt"
        if number in ends:
            rows.append({"pass": number, "task": task, **_average(evaluations[ends[number]].scores, task)})
        elif place.exists():
            found = work.score(work.embed(windows, place), light, (CONVERGED,))
            rows.append({"pass": number, "task": task, **_average(found.scores, task)})
            if rows[-1]["value"] is not None:
                passes = "1 pass" if number == 1 else f"{number} passes"
                work.say(f"after {passes}: {task} {rows[-1]['value']:.3f} balanced accuracy")
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

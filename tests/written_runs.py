"""Writes the result files of a run that never took place, for tests of the page that shows them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa

from physioray.metrics import METRICS
from physioray.results import FEATURES, PROBES, ScoreRow, prediction_schema, write_predictions, write_results
from physioray.signals import STAGES, find_task
from physioray.storage import Location

MEANS = {"pretrained": 0.58, "untrained": 0.55, "band_powers": 0.56}


def make_rows(*, tasks=("sleep", "age"), simulated=True, split="cross_validation", seeds=(0, 1, 2)) -> list[ScoreRow]:
    """Scores of all features and evaluations; arousal is skipped, AUROC of sleep undefined."""
    common = {"cohort_fingerprint": "f" * 20, "simulated": simulated, "config_hash": "abc", "split": split}
    rows = []
    for features in FEATURES:
        for evaluation in PROBES:
            line = common | {
                "features": features,
                "evaluation": evaluation,
                "pretraining": "mae_drop" if features == "pretrained" else "none",
            }
            for task in tasks:
                for seed in seeds:
                    for number, metric in enumerate(METRICS):
                        value = MEANS[features] + find_task(task).chance - 0.2 + 0.01 * seed - 0.02 * number
                        missing = task == "sleep" and metric == "auroc"
                        rows.append(
                            ScoreRow(
                                **line,
                                task=task,
                                metric=metric,
                                seed=seed,
                                value=None if missing else value,
                                low=None if missing else value - 0.06,
                                high=None if missing else value + 0.05,
                                training_subjects=30,
                                windows=4000,
                                subjects=40,
                                note="needs every class in the truth, but has no window of N3" if missing else "",
                            )
                        )
            empty = {"value": None, "low": None, "high": None, "training_subjects": 0, "windows": 0, "subjects": 0}
            skipped = "skipped: no window has a label"
            rows.append(ScoreRow(**line, **empty, task="arousal", metric=METRICS[0], seed=0, note=skipped))
            for seed in seeds:
                rows.append(
                    ScoreRow(
                        **line,
                        **(empty | {"value": 1.0 + 0.01 * seed}),
                        task="aggregate",
                        metric="aggregate",
                        seed=seed,
                        note=f"over {', '.join(tasks)} only",
                    )
                )
    return rows


def make_night(windows=480, seed=0):
    """Stages in runs, and a prediction that is right four times of five."""
    generator = np.random.default_rng(seed)
    true = np.repeat(generator.choice(5, windows, p=[0.2, 0.15, 0.4, 0.12, 0.13]), 12)[:windows]
    wrong = generator.random(windows) < 0.2
    return true, np.where(wrong, generator.integers(0, 5, windows), true)


def write_run(run: Location, *, simulated=True, jumps=None, windows=480) -> None:
    """All result files of a run."""
    run.make_folder()
    (run / "card.json").write_json(
        {
            "name": "simulated cohort of 40",
            "subjects": 40,
            "recordings": 40,
            "hours": 80.0,
            "windows": 9600,
            "class_counts": {
                "sleep": [1900, 1400, 4000, 1100, 1200],
                "age": [4800, 4800],
                "arousal": [0, 0],
            },
            "priors": {"sleep": [0.198, 0.146, 0.417, 0.115, 0.125], "age": [0.5, 0.5], "arousal": [0.0, 0.0]},
            "simulated": simulated,
            "note": "Below 100 subjects: sizes scale down, scores are cross-validated.",
            "assumptions": {"IngestConfig.clip": "8.0 (default: scaled signals are clipped at +-8)"},
            "discontinuities": jumps or {},
        }
    )
    assumption = {"TrainConfig.clip_norm": "1.0 (default: gradients are clipped at norm 1)"}
    (run / "config.json").write_json({"train": {"passes": 25}, "assumptions": assumption})
    (run / "environment.json").write_json({"python": "3.11", "torch": "2.13.0"})
    (run / "verdict.json").write_json(
        ["Sleep stage: pretraining has not overtaken the untrained encoder: the difference cannot be told from 0."]
    )
    (run / "notes.json").write_json(["Pretraining saw all recordings without their labels."])
    write_results(run / "results.jsonl", make_rows(simulated=simulated))
    names = ("eeg", "eog", "emg", "airflow")
    history = [
        {
            "pass": number,
            "step": number * 60,
            "loss": 1.0 / number**0.2,
            "loss_by_modality": {name: (0.8 + 0.1 * i) / number**0.2 for i, name in enumerate(names)},
            "validation_loss": 1.02 / number**0.2 if number % 2 else None,
            "validation_loss_by_modality": {name: 0.9 / number**0.2 for name in names} if number % 2 else {},
            "learning_rate": 1e-3,
            "windows_per_second": 410.0,
            "wait_share": 0.03,
            "seconds": 4.0,
        }
        for number in range(1, 26)
    ]
    write_lines(run / "training.jsonl", history)
    curve = [
        {"pass": number, "task": task, "value": base + 0.01 * i, "low": base - 0.05, "high": base + 0.06}
        for task, base in (("sleep", 0.5), ("age", 0.6))
        for i, number in enumerate((0, 1, 2, 5, 10, 20, 25))
    ]
    curve += [
        {"pass": 0, "task": task, "features": features, "value": base, "low": base - 0.05, "high": base + 0.05}
        for task in ("sleep", "age")
        for features, base in (("untrained", 0.55), ("band_powers", 0.57))
    ]
    write_lines(run / "probe_curve.jsonl", curve)
    write_predictions(run / "predictions.parquet", [make_predictions(windows)])
    write_arrays(run / "reconstructions.npz", names)


def write_lines(place: Location, lines) -> None:
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_predictions(windows=480) -> pa.Table:
    """Three nights; the second has a pause of ten minutes."""
    columns: dict[str, list] = {name: [] for name in prediction_schema().names}
    for number in range(3):
        true, predicted = make_night(windows, number)
        start = np.arange(windows) * 30.0 + (600.0 * (np.arange(windows) >= windows // 2) if number == 1 else 0.0)
        for features in ("pretrained", "untrained"):
            columns["recording"] += [f"tr{number:02d}"] * windows
            columns["subject"] += [f"tr{number:02d}"] * windows
            columns["window_id"] += [number * windows + i for i in range(windows)]
            columns["window"] += list(range(windows))
            columns["start"] += start.tolist()
            columns["true"] += true.tolist()
            columns["predicted"] += (predicted if features == "pretrained" else predicted * 0).tolist()
            for k in range(len(STAGES)):
                columns[f"p{k}"] += [0.2] * windows
            texts = {"task": "sleep", "features": features, "evaluation": "probe_converged", "split": "test"}
            for name, text in texts.items():
                columns[name] += [text] * windows
            columns["seed"] += [0] * windows
    return pa.table(columns, schema=prediction_schema())


def write_arrays(place: Location, names) -> None:
    """Two windows per modality, each at its own rate; emg is absent from the second."""
    generator, arrays = np.random.default_rng(0), {}
    for name in names:
        samples = 750 if name == "airflow" else 3000
        time = np.arange(samples) * 30 / samples
        target = np.sin(2 * np.pi * 0.3 * time) + 0.3 * generator.standard_normal((2, samples))
        arrays[f"{name}_target"] = target.astype(np.float32)
        arrays[f"{name}_output"] = np.tile(np.sin(2 * np.pi * 0.3 * time), (2, 1)).astype(np.float32)
        arrays[f"{name}_visible"] = generator.random((2, 30)) < 0.3
        arrays[f"{name}_present"] = np.array([True, name != "emg"])
    arrays["rates"] = np.array([100, 100, 100, 25])
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    place.write_bytes(sink.getvalue())

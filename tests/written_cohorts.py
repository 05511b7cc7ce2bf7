"""Writes small cohorts straight in the shard format, for tests of what comes after ingest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from physioray.data.cohort import Cohort
from physioray.signals import (
    BATCH_ROWS,
    TASKS,
    WINDOW_SECONDS,
    Split,
    find_modality,
    label_column,
    present_column,
    shard_schema,
)
from physioray.storage import hash_value, open_location

STEP = 8.0 / 32767


def write_cohort(
    folder: Path,
    rows: Sequence[int],
    *,
    modalities: tuple[str, ...] = ("eeg", "eog", "emg", "ecg"),
    splits: Sequence[Split] | None = None,
    absent: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Cohort:
    """A cohort of noise whose eeg amplitude follows the stage; `absent` gives the share of windows a modality lacks."""
    generator = np.random.default_rng(seed)
    splits = splits or [("train", "train", "validation", "test", "pretrain")[i % 5] for i in range(len(rows))]
    entries = []
    for index, (count, split) in enumerate(zip(rows, splits, strict=True)):
        name = f"rec{index:03d}"
        stage = generator.integers(0, 5, count).astype(np.int8)
        here = {m: generator.random(count) >= (absent or {}).get(m, 0.0) for m in modalities}
        if absent:
            here[modalities[0]] |= ~np.any(list(here.values()), axis=0)
        columns: dict[str, pa.Array] = {
            "window": pa.array(np.arange(count, dtype=np.int32)),
            "start": pa.array(np.arange(count) * float(WINDOW_SECONDS)),
        }
        labels = {"sleep": stage, "age": np.full(count, index % 2, np.int8), "arousal": (stage == 1).astype(np.int8)}
        columns |= {present_column(m): pa.array(here[m]) for m in modalities}
        columns |= {label_column(task): pa.array(labels[task]) for task in TASKS}
        schema = shard_schema(modalities)
        for m in modalities:
            samples = find_modality(m).samples
            scale = 0.5 + stage[:, None] / 2 if m == modalities[0] else 1.0
            signal = generator.standard_normal((count, samples)) * scale * here[m][:, None]
            stored = np.clip(np.rint(signal / STEP), -32767, 32767).astype(np.int16)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), samples)
            columns[m] = pa.ExtensionArray.from_storage(schema.field(m).type, flat)
        table = pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)
        path = folder / "shards" / f"{name}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in table.to_batches(max_chunksize=BATCH_ROWS):
                writer.write_batch(batch)
        entries.append({"recording": name, "subject": name, "split": split, "file": f"shards/{name}.arrow"})
        entries[-1] |= {"rows": count, "discontinuities": [], "hours": count / 120, "label_source": "arousal.mat"}
    manifest = {
        "format": 1,
        "fingerprint": hash_value([entries, seed])[:16],
        "simulated": True,
        "modalities": {
            m: {"rate": find_modality(m).rate, "samples": find_modality(m).samples, "step": STEP} for m in modalities
        },
        "class_counts": {"sleep": [1] * 5, "age": [1, 1], "arousal": [1, 1]},
        "recordings": entries,
    }
    open_location(str(folder / "manifest.json")).write_json(manifest)
    return Cohort.open(str(folder))

"""Simulated nights of full length for the benchmarks of ingest and reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from physioray.config import IngestConfig
from physioray.data.cohort import Cohort
from physioray.data.convert import convert_recording
from physioray.data.preprocess import quantisation_step
from physioray.data.records import RecordEntry
from physioray.data.shards import write_shard
from physioray.data.simulate import list_records, simulate_record
from physioray.signals import Split, find_modality
from physioray.storage import hash_value, open_location

HOURS = 7.7
RATE = 200


def simulate_nights(folder: Path, count: int, hours: float = HOURS) -> list[RecordEntry]:
    """Write simulated nights in the challenge's layout; paths are relative to the folder."""
    records = list_records(subjects=count, hours=hours, seed=0, unlabelled_share=0.0)
    for record in records:
        simulate_record(str(folder), record)
    return [RecordEntry(name=item.name, path=f"{item.half}/{item.name}/{item.name}") for item in records]


def repeat_night(
    source: Path, entry: RecordEntry, folder: Path, recordings: int, files: int, splits: Sequence[Split] = ("train",)
) -> Cohort:
    """A cohort whose recordings are all the same night: what counts is their number and size.

    Args:
        source, entry: the night.
        folder: of the cohort.
        recordings: how many.
        files: how many lie on the disk; the others are links to them, so that a long pass needs no more memory.
        splits: of the recordings in turn.
    """
    settings = IngestConfig()
    location = open_location(folder)
    table = convert_recording(open_location(source), entry, settings, subject=None).table
    rows = []
    for number in range(recordings):
        name = f"night{number:03d}"
        if number < files:
            shard = write_shard(location, f"shards/{name}.arrow", table)
        else:
            os.link(folder / f"shards/night{number % files:03d}.arrow", folder / f"shards/{name}.arrow")
        rows.append({"recording": name, "subject": name, "split": splits[number % len(splits)]})
        rows[-1] |= {"file": f"shards/{name}.arrow", "rows": shard.rows, "discontinuities": [], "sha256": shard.sha256}
    stored = {
        name: {
            "rate": find_modality(name).rate,
            "samples": find_modality(name).samples,
            "step": quantisation_step(settings),
        }
        for name in settings.modalities
    }
    manifest = {
        "format": 1,
        "fingerprint": hash_value([rows, os.fspath(folder)])[:16],
        "simulated": True,
        "modalities": stored,
        "class_counts": {"sleep": [1] * 5, "age": [1, 1], "arousal": [1, 1]},
        "recordings": rows,
    }
    (location / "manifest.json").write_json(manifest)
    return Cohort.open(folder)

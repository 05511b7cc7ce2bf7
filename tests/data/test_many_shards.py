"""Cost per window and memory of the driver stay flat from 20 to 2,000 recordings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.written_cohorts import write_cohort

# Measured in a process of its own, as a driver or reader is: memory of tests before it does not count.
MEASURE = """
import json, resource, sys, time
import numpy as np
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
if sys.argv[2] == "stream":
    import ray
    from physioray.data.stream import StreamSource as Source
    from physioray.distribute import join_cluster
    context = join_cluster(cpus=2)
else:
    from contextlib import nullcontext
    Source, context = GatherSource, nullcontext()

def own_memory():
    # Memory of the process itself: pages of mapped shards belong to the system's cache.
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) / 1024

with context:
    began = time.monotonic()
    cohort = Cohort.open(sys.argv[1])
    opened = time.monotonic() - began
    # The same number of windows however many recordings there are, from all of them.
    windows = np.sort(np.random.default_rng(0).permutation(cohort.find_windows())[:int(sys.argv[3])])
    source = Source(cohort, windows, batch_size=64, seed=1)
    for _ in source.iterate_pass(0): pass
    before = own_memory()
    began = time.monotonic()
    seen, recordings = 0, []
    for number in (1, 2):
        for batch in source.iterate_pass(number):
            seen += len(batch)
            recordings.append(len(np.unique(batch.recording)))
    elapsed = time.monotonic() - began
    print(json.dumps({"micros": 1e6 * elapsed / seen, "memory": own_memory(), "grown": own_memory() - before,
        "opened": opened, "mixed": min(recordings), "seen": seen}))
"""


def make_large(folder: Path, count: int) -> Path:
    """Twenty recordings, written out under `count` names: shards are files of their own all the same."""
    small = write_cohort(folder / "seed", [64] * 20, modalities=("spo2",))
    manifest = small.manifest
    rows = manifest["recordings"]
    large = folder / f"of{count}"
    (large / "shards").mkdir(parents=True)
    manifest["recordings"] = []
    for number in range(count):
        row = rows[number % len(rows)]
        file = f"shards/night{number:04d}.arrow"
        shutil.copyfile(folder / "seed" / row["file"], large / file)
        name = f"night{number:04d}"
        manifest["recordings"].append(row | {"recording": name, "subject": name, "file": file})
    (large / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": f"of{count}"}))
    shutil.rmtree(folder / "seed")
    return large


def measure(cohort: Path, way: str, windows: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(cohort), way, str(windows)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gather", pytest.param("stream", marks=pytest.mark.ray)])
def test_cost_per_window_and_memory_are_flat_from_20_to_2000_shards(tmp_path: Path, way: str) -> None:
    few, many = (measure(make_large(tmp_path, count), way, 1280) for count in (20, 2000))
    print(way, {"20": few, "2000": many})
    assert few["seen"] == many["seen"]
    assert many["mixed"] >= 16
    # With 2,000 files every window is in another file: opening them is done once, and a row costs little more.
    assert many["micros"] < 4 * few["micros"] + 100
    # A handful of kilobytes a recording: names, labels, a map.
    assert many["memory"] - few["memory"] < 60
    assert many["grown"] < 30

"""Memory of a training worker and of the driver over passes, through the real loop: it must stay flat.

Measured is what belongs to a process alone and lies in memory (`Private_Dirty` in `/proc/PID/smaps_rollup`): not the
pages of mapped shards, which are the system's cache, nor Ray's shared store. Read after every pass; the
first is warm-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook
from tests.written_cohorts import write_cohort

PASSES, STRETCHES = 20, 5
ALLOWED = 0.02

# In a process of its own, as a training run is: what tests used before does not count.
MEASURE = """
import json, os, sys, threading, time
from dataclasses import replace
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain

def read_memory():
    with open("/proc/self/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line and "kB" in line)
    return int(fields["Private_Dirty"].split()[0]) / 1024

def note(number, out):
    with open(f"{out.path}/memory.txt", "a") as file:
        file.write(f"{time.time()} {read_memory()}\\n")

cohort, out, way, passes = sys.argv[1:5]
preset = find_preset("tiny")
settings = replace(preset.train, passes=int(passes))
job = PretrainJob.from_preset(preset, cohort=cohort, out=out, train=settings, threads=1)
driver = []
if way == "gather":
    pretrain(job, after_pass=note)
else:
    from physioray.distribute import Resources, pretrain_on_cluster
    def watch():
        while True:
            driver.append((time.time(), read_memory()))
            time.sleep(0.1)
    threading.Thread(target=watch, daemon=True).start()
    pretrain_on_cluster(job, Resources(workers=1), after_pass=note)
worker = [tuple(map(float, line.split())) for line in open(f"{out}/memory.txt")]
beside = [min(driver, key=lambda item: abs(item[0] - moment))[1] for moment, _ in worker] if driver else []
print(json.dumps({"worker": [memory for _, memory in worker], "driver": beside}))
"""


def _train(folder: Path, way: str) -> dict[str, list[float]]:
    cohort = write_cohort(folder / "cohort", [64] * 10)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, cohort.location.uri, str(folder / way), way, str(PASSES + STRETCHES)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark_run
@pytest.mark.parametrize("way", ["gather", pytest.param("stream", marks=pytest.mark.ray)])
def test_memory_is_flat_over_twenty_passes(tmp_path: Path, notebook: Notebook, way: str) -> None:
    measured = _train(tmp_path, way)
    title = {"worker": "training worker", "driver": "driver"}
    for who, memory in measured.items():
        if not memory:
            continue
        notebook.keep(
            Comparison(
                title=f"Memory of the {title[who]}, {'Ray Data' if way == 'stream' else 'gather'}, {PASSES} passes on",
                unit="MB",
                better="less",
                figures={OURS: memory[PASSES:], "after passes 1 to 5": memory[:STRETCHES]},
                goals=[Goal(against="after passes 1 to 5", ratio=1 / (1 + ALLOWED))],
                note="private memory, preset tiny, noise",
            )
        )

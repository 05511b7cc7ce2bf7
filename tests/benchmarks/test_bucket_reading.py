"""Windows a second from a bucket beside those from a folder: by range, filling the mirror, and out of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from socket import create_connection, socket

import boto3
import pytest
from pyarrow import fs as pafs

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.mirror import FOLDER_VARIABLE, SIZE_VARIABLE
from physioray.storage import open_location
from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook
from tests.written_cohorts import write_cohort

RECORDINGS, WINDOWS, TURNS = 8, 320, 5
LIMIT = 1.5
"""Passes out of the mirror may cost so many times those from the folder: both are maps of local files."""


pytestmark = pytest.mark.benchmark_run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, served by another process on this machine (it shares the cores with the reader)."""
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for _ in range(600):
        with suppress(OSError):
            create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.1)
    boto3.client("s3").create_bucket(Bucket="nights")
    yield "s3://nights"
    server.kill()
    server.wait()


def read_pass(cohort: Cohort, number: int) -> float:
    """Windows a second over one shuffled pass."""
    source = GatherSource(cohort, cohort.find_windows(), batch_size=64, seed=1)
    began, seen = time.perf_counter(), 0
    for batch in source.iterate_pass(number):
        seen += len(batch)
    return seen / (time.perf_counter() - began)


def test_passes_out_of_the_mirror_cost_what_passes_from_a_folder_cost(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: Notebook
) -> None:
    written = write_cohort(tmp_path / "cohort", [WINDOWS] * RECORDINGS).location
    there = open_location(f"{bucket}/cohort")
    pafs.copy_files(written.path, there.path, source_filesystem=written.filesystem,
                    destination_filesystem=there.filesystem)  # fmt: skip
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))
    monkeypatch.setenv(SIZE_VARIABLE, "0")
    by_range = read_pass(Cohort.open(there.uri), 0)
    assert not list((tmp_path / "none").rglob("*.arrow"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "mirror"))
    monkeypatch.setenv(SIZE_VARIABLE, "1")
    folder, mirrored = Cohort.open(written.path), Cohort.open(there.uri)
    filling = read_pass(mirrored, 0)
    assert len(list((tmp_path / "mirror").rglob("*.arrow"))) == RECORDINGS
    read_pass(folder, 0)
    turns = [(read_pass(folder, number), read_pass(mirrored, number)) for number in range(1, TURNS + 1)]
    local, copies = (statistics.median(column) for column in zip(*turns, strict=True))
    size = sum(os.path.getsize(path) for path in Path(written.path).rglob("*.arrow")) / 1e6
    print(
        f"\n{RECORDINGS * WINDOWS} windows (SIMULATED noise), {size:.0f} MB, one process, windows/s: "
        f"folder {local:,.0f}; bucket by range {by_range:,.0f}, first pass, which fills the mirror, {filling:,.0f}, "
        f"later passes {copies:,.0f}"
    )
    notebook.keep(
        Comparison(
            title="Shuffled batches by gather, shards on S3, mirrored",
            unit="windows/s",
            better="more",
            figures={OURS: [copies for _, copies in turns], "shards in a folder": [local for local, _ in turns]},
            goals=[Goal(against="shards in a folder", ratio=1 / LIMIT)],
            note=f"SIMULATED noise, {size:.0f} MB; S3 by moto on this machine; by range {by_range:,.0f}",
        )
    )

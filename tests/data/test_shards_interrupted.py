"""Ingest that is killed, stopped or loses a worker ends up with the same bytes as ingest left in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from physioray.data.shards import ingest_cohort
from physioray.local_cluster import start_local_cluster

from .recordings_written import write_source

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_local_cluster(2)
    yield
    ray.shutdown()


def _read_all(cohort: Path) -> dict[str, bytes]:
    """Every file of a cohort, by its place in it."""
    return {str(path.relative_to(cohort)): path.read_bytes() for path in sorted(cohort.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def long_source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("long"), labelled=14, unlabelled=2, windows=120)


@pytest.fixture(scope="module")
def long_finished(long_source: Path, tmp_path_factory) -> Path:
    cohort = tmp_path_factory.mktemp("long-finished") / "cohort"
    ingest_cohort(str(long_source), str(cohort))
    return cohort


def _start_ingest(source: Path, cohort: Path) -> subprocess.Popen:
    """Ingest in a session of its own, with its own cluster, as `physioray ingest` would."""
    command = [sys.executable, "-m", "physioray.cli", "ingest", str(source), str(cohort)]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, SIGINT is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for_rows(cohort: Path, count: int, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while len(list(cohort.glob("ledger/*.json"))) < count:
        assert time.monotonic() < until, "no ledger rows appeared"
        time.sleep(0.005)


def test_sigkill_anywhere_and_the_same_command_gives_the_same_bytes(
    long_finished: Path, long_source: Path, tmp_path: Path
) -> None:
    cohort = tmp_path / "cohort"
    process = _start_ingest(long_source, cohort)
    _wait_for_rows(cohort, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cohort / "manifest.json").exists()
    assert len(list(cohort.glob("ledger/*.json"))) < 16
    summary = ingest_cohort(str(long_source), str(cohort))
    assert 0 < summary.converted < 16
    # Workers of the killed run may have lived on for a moment; what they wrote is the same or swept next time.
    ingest_cohort(str(long_source), str(cohort))
    assert _read_all(cohort) == _read_all(long_finished)


def test_ctrl_c_ends_with_one_line_and_leaves_no_task_behind(long_source: Path, tmp_path: Path) -> None:
    for attempt in range(3):
        cohort = tmp_path / f"cohort-{attempt}"
        process = _start_ingest(long_source, cohort)
        _wait_for_rows(cohort, 2)
        # As a terminal does it: to the whole foreground process group.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        # Ray 2.60 now and then aborts by itself when its workers die of the same signal (task_manager.cc).
        if "unexpected system state" not in errors:
            break
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("physioray: stopped")
    rows = len(list(cohort.glob("ledger/*.json")))
    assert rows < 16 and not (cohort / "manifest.json").exists()
    time.sleep(1.0)
    assert len(list(cohort.glob("ledger/*.json"))) == rows


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(
    long_finished: Path, long_source: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        until = time.monotonic() + 30
        while not killed and time.monotonic() < until:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    running = b"ray::_convert_and_store" in (process / "cmdline").read_bytes()
                    if running and _is_descendant(int(process.name)):
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        return
                except (OSError, ValueError):
                    continue
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = ingest_cohort(str(long_source), str(tmp_path / "cohort"))
    killer.join()
    assert killed and not summary.rejected
    assert _read_all(tmp_path / "cohort") == _read_all(long_finished)


def _is_descendant(process: int) -> bool:
    """True if a process was started by this one, directly or not: other clusters' workers are left alone."""
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        if process == os.getpid():
            return True
    return False

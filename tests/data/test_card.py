"""The card says in plain text whose nights a cohort holds and what is doubtful about them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from physioray.data.card import describe_cohort
from physioray.data.cohort import Cohort
from physioray.data.shards import ingest_cohort
from physioray.local_cluster import start_local_cluster

from .recordings_written import WINDOW, list_in_records, write_recording, write_source

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_local_cluster(2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Seven nights of which one lacks its signal, one has two flat windows of EEG and one a jump."""
    place = write_source(tmp_path_factory.mktemp("source"), labelled=6, unlabelled=1)
    (place / "training/tr00-0005/tr00-0005.mat").unlink()
    signal = place / "training/tr00-0001/tr00-0001.mat"
    counts = np.frombuffer(signal.read_bytes()[24:], "<i2").reshape(-1, 4).copy()
    counts[2 * WINDOW : 4 * WINDOW, 0] = 0
    signal.write_bytes(signal.read_bytes()[:24] + counts.tobytes())
    (place / "discontinuities.csv").write_text(f"record,sample\ntr00-0002,{3 * WINDOW}\n")
    return place


@pytest.fixture(scope="module")
def cohort(source: Path, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("card") / "cohort"
    ingest_cohort(str(source), str(place))
    return place


@pytest.fixture(scope="module")
def card(cohort: Path) -> str:
    return describe_cohort(Cohort.open(cohort))


def _numbers(card: str, title: str, row: str) -> list[str]:
    """The cells of one row of the table under a title."""
    after = card.split(title)[1].splitlines()
    return next(line.split()[1:] for line in after if line.split()[:1] == [row])


def test_it_counts_subjects_hours_and_windows_per_split(card: str) -> None:
    assert "6 subjects, 6 recordings (1 rejected), 0.4 h, 48 windows of 30 s" in card
    assert _numbers(card, "Splits, by subject", "pretrain") == ["1", "1", "0.1", "8"]
    assert _numbers(card, "Splits, by subject", "test") == ["2", "2", "0.1", "16"]
    assert _numbers(card, "Splits, by subject", "train") == ["2", "2", "0.1", "16"]


def test_it_gives_classes_per_split_and_priors(card: str) -> None:
    assert _numbers(card, "Sleep stage", "all") == ["10", "10", "5", "5", "5"]
    assert _numbers(card, "Sleep stage", "train") == ["4", "4", "2", "2", "2"]
    assert _numbers(card, "Sleep stage", "prior") == ["28.57%", "28.57%", "14.29%", "14.29%", "14.29%"]
    assert _numbers(card, "Age", "all") == ["24", "24"]
    assert "target arousal covers at least 75% of it" in card and "at least 55 years" in card


def test_it_names_channels_rejections_and_doubts(card: str) -> None:
    assert "F3-M2 (6)" in card and "Chin1-Chin2 (6)" in card
    assert "training/tr00-0005/tr00-0005" in card.split("Rejected, 1:")[1]
    assert "Windows without eeg: flat 2, in " in card
    assert _numbers(card, "Modalities", "eeg")[1] == "95.8%"
    assert "Jumps: 1 in 1 recordings" in card


def test_a_small_cohort_says_that_sizes_are_scaled_and_cross_validation_is_reported(card: str) -> None:
    assert "small cohort of 5 labelled subjects" in card
    assert "cross-validation by subject" in " ".join(card.split())
    assert "stand in for 25, 50, 100, 250, 500" in " ".join(card.split())


def test_only_simulated_nights_carry_the_heading(card: str, tmp_path: Path) -> None:
    assert "SIMULATED" not in card
    write_recording(tmp_path / "source", "tr00-0000", stages=None)
    list_in_records(tmp_path / "source")
    (tmp_path / "source/SIMULATED.json").write_text(json.dumps({"seed": 0}))
    summary = ingest_cohort(str(tmp_path / "source"), str(tmp_path / "cohort"))
    text = describe_cohort(Cohort.open(tmp_path / "cohort"))
    assert text.startswith("SIMULATED NIGHTS")
    assert summary.describe().startswith("SIMULATED")
    assert "Sleep stage: no labels." in text and "No subject has labels" in text


def test_lines_fit_the_width_and_hold_no_control_codes(card: str) -> None:
    assert max(map(len, card.splitlines())) <= 100
    assert "\x1b" not in card


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_it_leaves_no_thread_behind_that_could_abort_the_command_as_it_ends(cohort: Path) -> None:
    code = f"""
import os
from physioray.data.card import describe_cohort
from physioray.data.cohort import Cohort
before = len(os.listdir("/proc/self/task"))
describe_cohort(Cohort.open({str(cohort)!r}))
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0"

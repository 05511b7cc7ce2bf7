"""Steps on a folder and in a bucket: computed once, found again, never half finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from physioray.steps import Step, StepDamaged, StepStore
from physioray.storage import Location, StorageError, open_location
from tests.buckets import serve_bucket

STEP = Step(name="square", version=1, settings={"of": 7}, inputs={"cohort": "abc"})

PROGRAM = """
import sys, time
from physioray.steps import Step, StepStore
from physioray.storage import open_location

root, seconds, mark = sys.argv[1], float(sys.argv[2]), sys.argv[3]
store = StepStore(open_location(root), lease_seconds=3, heartbeat_seconds=0.2)
step = Step(name="square", version=1, settings={"of": 7}, inputs={"cohort": "abc"})

def compute(folder):
    with open(mark, "a") as log:
        log.write("computed\\n")
    done = len(folder.list())
    for number in range(done, 10):
        (folder / f"{number:02d}").write_text(mark)
        time.sleep(seconds / 10)

folder = store.run(step, compute, resumable="resume" in sys.argv)
print(len(folder.list()), flush=True)
"""


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """Where steps are kept: on disk, and in a bucket behind a real S3 API."""
    if request.param == "folder":
        yield open_location(tmp_path / "steps")
        return
    bucket = f"steps-{abs(hash(tmp_path))}"  # the server keeps its buckets from test to test
    with serve_bucket(bucket) as variables, pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        yield open_location(f"s3://{bucket}/of/mine")


class Counter:
    """A computation that counts how often it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Location) -> None:
        self.calls += 1
        (folder / "deep" / "value.json").write_json(49)


def start(root: Location, seconds: float, mark: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), root.uri, str(seconds), str(mark), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(place: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not place.exists():
        assert time.monotonic() < end, f"{place} did not appear"
        time.sleep(0.02)


def test_what_exists_is_not_computed_again(root: Location) -> None:
    compute = Counter()
    first = StepStore(root).run(STEP, compute)
    again = StepStore(root).run(STEP, compute)
    assert compute.calls == 1
    assert again == first
    assert (again / "deep" / "value.json").read_json() == 49


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, name="cube"),
        replace(STEP, version=2),
        replace(STEP, settings={"of": 8}),
        replace(STEP, settings={"of": 7, "more": None}),
        replace(STEP, inputs={"cohort": "abd"}),
    ],
)
def test_every_part_of_a_step_is_part_of_its_identity(other: Step) -> None:
    assert other.identity != STEP.identity


def test_the_order_of_settings_does_not_matter() -> None:
    one, two = (
        Step(name="s", version=1, settings={"a": 1, "b": 2}),
        Step(name="s", version=1, settings={"b": 2, "a": 1}),
    )
    assert one.identity == two.identity


def test_a_computation_that_fails_leaves_nothing_that_looks_finished(root: Location) -> None:
    def fail(folder: Location) -> None:
        (folder / "half").write_text("half")
        raise ArithmeticError("no")

    store = StepStore(root)
    with pytest.raises(ArithmeticError):
        store.run(STEP, fail)
    assert store.find(STEP) is None
    assert [record.state for record in store.list_steps()] == ["unfinished"]
    folder = store.run(STEP, Counter())
    assert [item.name for item in folder.list()] == ["deep"], "the failed attempt's files are not part of the result"
    assert not any("half" in item.path for item in store.locate(STEP).list(recursive=True))


def test_a_damaged_step_is_named_and_not_overwritten(root: Location) -> None:
    store = StepStore(root)
    folder = store.run(STEP, Counter())
    (folder / "deep" / "value.json").write_text("50\n")
    with pytest.raises(StepDamaged, match="other content"):
        store.run(STEP, Counter())
    (folder / "deep" / "value.json").delete()
    with pytest.raises(StepDamaged, match="is missing"):
        store.run(STEP, Counter())
    assert [record.state for record in store.list_steps()] == ["damaged"]
    (store.locate(STEP) / "done.json").write_text("{")
    with pytest.raises(StepDamaged, match="cannot be read"):
        store.find(STEP)


def test_the_list_says_size_inputs_and_what_is_referred_to(root: Location) -> None:
    store = StepStore(root, commit="1.0 abc")
    store.run(STEP, Counter())
    report = root / "report.txt"
    report.write_text("49")
    used = Step(name="sum", version=1, inputs={"square": STEP.identity})
    lone = Step(name="lone", version=1)
    writer = StepStore(root)
    writer.run(used, Counter())
    writer.refer(report)
    store.run(lone, Counter())
    records = {record.name: record for record in store.list_steps() if record.state == "done"}
    assert {name: record.referred for name, record in records.items()} == {"square": True, "sum": True, "lone": False}
    assert records["square"].inputs == {"cohort": "abc"}
    assert records["square"].commit == "1.0 abc"
    assert records["square"].bytes > 0
    store.remove([records["lone"]])
    assert store.find(lone) is None
    assert store.find(STEP) is not None
    report.delete()
    assert not any(record.referred for record in store.list_steps()), "a report that is gone refers to nothing"


def test_two_processes_that_ask_at_once_compute_once_and_in_a_bucket_one_result_counts(
    root: Location, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    pair = [start(root, 1.0, mark) for _ in range(2)]
    assert [int(process.communicate(timeout=120)[0]) for process in pair] == [10, 10]
    assert mark.read_text() in (("computed\n",) if root.is_local else ("computed\n", "computed\ncomputed\n"))
    record = StepStore(root).list_steps()[0]
    attempt = StepStore(root).find(STEP)
    assert record.state == "done" and attempt is not None
    assert {name.split("/")[0] for name in (record.folder / "done.json").read_json()["files"]} == {
        "step.json",
        attempt.name,
    }


@pytest.mark.parametrize("how", ["resume", "anew"])
def test_a_killed_step_is_not_finished_and_the_next_process_goes_on_or_starts_anew(
    root: Location, tmp_path: Path, how: str
) -> None:
    mark = tmp_path / "mark"
    victim = start(root, 20.0, mark, how)
    folder = StepStore(root).locate(STEP)
    wait_for(mark)
    while not any((item / "00").exists() for item in folder.list() if item.name.startswith("attempt-")):
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert StepStore(root).find(STEP) is None
    assert [record.state for record in StepStore(root).list_steps()] == ["unfinished"]
    heir = start(root, 0.0, tmp_path / "heir", how)
    assert int(heir.communicate(timeout=120)[0]) == 10
    found = StepStore(root).find(STEP)
    assert found is not None
    assert (found / "00").read_text() == str(mark if how == "resume" else tmp_path / "heir")


def test_a_process_that_stood_still_is_overtaken_and_takes_the_others_result(tmp_path: Path) -> None:
    root, mark = open_location(tmp_path / "steps"), tmp_path / "mark"
    sleeper = start(root, 1.0, mark)
    wait_for(mark)
    os.kill(sleeper.pid, signal.SIGSTOP)
    heir = start(root, 0.0, tmp_path / "heir")
    assert int(heir.communicate(timeout=60)[0]) == 10, "the lease of a process that stands still expires"
    os.kill(sleeper.pid, signal.SIGCONT)
    assert int(sleeper.communicate(timeout=60)[0]) == 10
    folder = StepStore(root).find(STEP)
    assert folder is not None
    assert (folder / "05").read_text() == str(tmp_path / "heir")


def test_a_step_that_is_being_computed_is_not_removed(tmp_path: Path) -> None:
    root, mark = open_location(tmp_path / "steps"), tmp_path / "mark"
    process = start(root, 3.0, mark)
    wait_for(mark)
    store = StepStore(root)
    records = store.list_steps()
    assert [record.state for record in records] == ["running"]
    with pytest.raises(StorageError, match="being computed"):
        store.remove(records)
    process.kill()
    process.wait()

"""A sweep whose driver is killed, terminated or interrupted three times ends up as one left in peace."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from physioray.sweep_journal import read_sweep
from tests.sweep_trials import PAUSE, fit_logistic, make_plan, sweep_by_hand
from tests.test_sweep_driver import strip

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent


def start(out: Path, sampler: str, concurrent: int) -> subprocess.Popen:
    """The same command every time, with its own cluster, in a session of its own."""
    command = [sys.executable, "-m", "tests.sweep_trials", str(out), sampler, str(concurrent)]
    environment = os.environ | {PAUSE: "0.3", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < until, "the moment to interrupt never came"
        time.sleep(0.02)


def count(out: Path, pattern: str) -> int:
    return len(list(out.glob(f"trials/*/{pattern}")))


MOMENTS: list[tuple[signal.Signals, Callable[[Path], bool]]] = [
    # Planned, and nothing run yet or hardly; in the middle of a trial; with some trials ended.
    (signal.SIGKILL, lambda out: count(out, "planned.json") >= 1),
    (signal.SIGTERM, lambda out: count(out, "reports.json") >= 1),
    (signal.SIGINT, lambda out: count(out, "outcome.json") >= 2 and count(out, "running.json") >= 1),
]


@pytest.mark.parametrize(("sampler", "concurrent"), [("tpe", 1), ("grid", 2), ("tpe", 2)])
def test_three_interruptions_lose_nothing_and_repeat_nothing(tmp_path: Path, sampler: str, concurrent: int) -> None:
    out = tmp_path / "sweep"
    ended: dict[Path, str] = {}
    for how, moment in MOMENTS:
        process = start(out, sampler, concurrent)
        wait_for(lambda moment=moment: moment(out), process)  # type: ignore[misc]
        if how == signal.SIGKILL:
            # The head of the cluster goes with it.
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(how)
        process.wait(timeout=60)
        assert process.returncode != 0
        ended |= {path: path.read_text() for path in out.glob("trials/*/outcome.json")}
    process = start(out, sampler, concurrent)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    result = read_sweep(out)
    assert [trial.number for trial in result.trials] == list(range(6))
    assert {trial.state for trial in result.trials} <= {"finished", "stopped"}
    # What had ended was not touched; no pass whose checkpoint stood was run again, and nobody wrote beside the heir.
    assert all(path.read_text() == text for path, text in ended.items())
    for trial in result.trials:
        folder = out / "trials" / trial.name / "run"
        passes = [(path.name.split("-")[0], json.loads(path.read_text())) for path in folder.glob("passes/*")]
        numbers = [number for number, _ in passes]
        assert len(numbers) == len(set(numbers)), f"trial {trial.number} ran a pass twice: {sorted(numbers)}"
        order = [entry["process"] for _, entry in sorted(passes, key=lambda item: item[1]["time"])]
        turns = [process for place, process in enumerate(order) if not place or order[place - 1] != process]
        assert len(turns) == len(set(turns)), "two processes wrote to one trial in turns"
    if concurrent == 1 or sampler == "grid":
        plan = make_plan(sampler, **({"scheduler": None} if sampler == "grid" else {}))
        assert strip(result) == strip(sweep_by_hand(plan, fit_logistic, tmp_path / "calm"))

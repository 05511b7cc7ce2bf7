"""What a sweep commits, how it goes on, what it refuses: driven by hand, in one process, without a cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from physioray.leases import Lease, hold, is_held, own, wait_until_free
from physioray.search_space import choice, integers, uniform
from physioray.storage import StorageError, open_location
from physioray.sweep_driver import StoppingRule
from physioray.sweep_journal import OWNER_FILE, RUNNING_FILE, SweepJournal, SweepResult, TrialRecord, read_sweep
from physioray.sweep_plan import AshaConfig, MedianConfig, Objective, SweepPlan
from physioray.sweep_search import choose_parameters, measure_importance
from physioray.sweep_trial import Trial
from tests.sweep_trials import PASSES, FitConfig, fit_logistic, make_plan, sweep_by_hand


class Killed(BaseException):
    """The end of a process, as far as one process can play it."""


def strip(result: SweepResult) -> list[tuple]:
    """All of a sweep that must not depend on how often it was interrupted: everything but seconds."""
    return [
        (
            trial.number,
            dict(trial.parameters),
            trial.state,
            trial.reason,
            [{name: value for name, value in line.items() if name != "seconds"} for line in trial.reports],
        )
        for trial in result.trials
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep_by_hand(make_plan(), fit_logistic, tmp_path_factory.mktemp("undisturbed"))


def test_a_sweep_finds_better_settings_and_gives_bad_ones_up(undisturbed: SweepResult) -> None:
    states = [trial.state for trial in undisturbed.trials]
    assert len(states) == 6 and set(states) == {"finished", "stopped"}
    best = undisturbed.best
    assert best is not None and best.last["epoch"] == PASSES
    assert best.last["score"] == max(t.last["score"] for t in undisturbed.trials if t.state == "finished")
    assert all(trial.last["epoch"] < PASSES for trial in undisturbed.trials if trial.state == "stopped")


@pytest.mark.parametrize(("number", "epoch"), [(0, 1), (2, 2), (4, 1)])
def test_a_serial_search_goes_on_as_if_it_had_never_been_interrupted(
    undisturbed: SweepResult, tmp_path: Path, number: int, epoch: int
) -> None:
    ended = undisturbed.trials[number].last["epoch"]

    def end_there(trial: Trial) -> None:
        report = trial.report

        def killed_report(**line: float) -> None:
            if trial.number == number and line["epoch"] == min(epoch, ended):
                raise Killed
            report(**line)

        trial.report = killed_report  # type: ignore[method-assign]
        fit_logistic(trial)

    with pytest.raises(Killed):
        sweep_by_hand(make_plan(), end_there, tmp_path)
    assert len(read_sweep(tmp_path).trials) == number + 1
    again = sweep_by_hand(make_plan(), fit_logistic, tmp_path)
    assert strip(again) == strip(undisturbed)


def test_trials_with_an_outcome_are_never_touched_again(undisturbed: SweepResult, tmp_path: Path) -> None:
    plan = make_plan()
    sweep_by_hand(plan, fit_logistic, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/**/*") if path.is_file()}

    def refuse(trial: Trial) -> None:
        raise AssertionError(f"trial {trial.number} was run again")

    again = sweep_by_hand(plan, refuse, tmp_path)
    assert strip(again) == strip(undisturbed)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/**/*") if path.is_file()}
    assert after == before
    more = sweep_by_hand(make_plan(trials=8), fit_logistic, tmp_path)
    assert strip(more)[:6] == strip(undisturbed) and len(more.trials) == 8


def test_a_trial_that_had_returned_is_not_run_again_though_its_outcome_was_lost(tmp_path: Path) -> None:
    plan = make_plan(trials=1)
    first = sweep_by_hand(plan, fit_logistic, tmp_path)
    (tmp_path / "trials" / "0000" / "outcome.json").unlink()
    again = sweep_by_hand(plan, fit_logistic, tmp_path)
    assert strip(again) == strip(first)
    assert len(list((tmp_path / "trials" / "0000" / "run" / "calls").iterdir())) == 1


def test_a_failing_trial_is_tried_again_then_recorded_with_its_reason_and_the_others_run(tmp_path: Path) -> None:
    def fail_sometimes(trial: Trial) -> None:
        calls = len(open_location(trial.folder.path + "/calls").list())
        if trial.number == 1 or (trial.number == 2 and calls == 0):
            (trial.folder / "calls" / str(calls)).write_text("")
            raise RuntimeError(f"no luck {calls}")
        fit_logistic(trial)

    result = sweep_by_hand(make_plan("grid", trials=4, max_failures=2, scheduler=None), fail_sometimes, tmp_path)
    assert [trial.state for trial in result.trials] == ["finished", "failed", "finished", "finished"]
    assert result.trials[1].reason == "RuntimeError: no luck 2"
    assert result.trials[1].failures == tuple(f"RuntimeError: no luck {number}" for number in range(3))
    assert result.trials[2].failures == ("RuntimeError: no luck 0",)


def test_a_trial_that_reports_no_number_or_lacks_what_is_sought_fails_and_says_so(tmp_path: Path) -> None:
    def report_badly(trial: Trial) -> None:
        if trial.number == 0:
            trial.report(epoch=1, score=float("nan"))
        elif trial.number == 1:
            trial.report(epoch=1, accuracy=0.5)

    result = sweep_by_hand(make_plan("grid", trials=3, max_failures=0), report_badly, tmp_path)
    assert [trial.state for trial in result.trials] == ["failed"] * 3
    assert "finite numbers, but got score = nan" in result.trials[0].reason
    assert "lacks score; it has accuracy" in result.trials[1].reason
    assert "lacks score" in result.trials[2].reason


def test_another_sweep_is_refused_with_what_differs(tmp_path: Path) -> None:
    plan = make_plan(trials=1)
    sweep_by_hand(plan, fit_logistic, tmp_path)
    for changed, told in [
        (replace(plan, seed=5), "seed was 0 and is now 5"),
        (replace(plan, base={"fit": FitConfig(passes=9)}), "base.fit.passes was 4 and is now 9"),
        (replace(plan, inputs={"cohort": "abc"}), "inputs.cohort was None and is now 'abc'"),
        (replace(plan, space={"fit.penalty": uniform(0.1, 0.2)}), r"order was \['fit.learning_rate', 'fit.penalty'\]"),
    ]:
        with pytest.raises(StorageError, match=told):
            SweepJournal(folder=open_location(tmp_path), space=plan.space).claim(changed)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(StorageError, match=r"thesis.tex"):
        SweepJournal(folder=open_location(strange), space=plan.space).claim(plan)
    with pytest.raises(StorageError, match="Has the sweep been started"):
        read_sweep(str(strange))


def test_the_next_settings_follow_from_seed_number_and_history_alone() -> None:
    plan = make_plan(trials=40)
    records = [
        TrialRecord(
            number=number,
            parameters=choose_parameters(plan, number, []) if number < 12 else {},
            state="finished",
            reports=({"epoch": 4.0, "score": float(number % 5)},),
        )
        for number in range(12)
    ]
    chosen = choose_parameters(plan, 12, records)
    assert choose_parameters(plan, 12, records[::-1]) == chosen
    assert choose_parameters(replace(plan, seed=1), 12, records) != chosen
    others = [replace(record, reports=({"epoch": 4.0, "score": -float(record.number)},)) for record in records]
    assert choose_parameters(plan, 12, others) != chosen
    assert len({tuple(record.parameters.values()) for record in records}) == 12


def test_every_kind_of_setting_is_drawn_from_its_own_space() -> None:
    base = {"one": 1, "other": "x", "third": 0.5, "pair": (1, 2)}
    space = {
        "one": integers(1, 9, step=2),
        "other": choice(["x", "y"]),
        "third": uniform(0.1, 0.5, step=0.2),
        "pair": choice([(1, 2), (3, 4)]),
    }
    for sampler in ("random", "tpe"):
        objectives = (Objective(metric="score"), Objective(metric="seconds", mode="min"))
        plan = SweepPlan(space=space, base=base, objectives=objectives, sampler=sampler, trials=30)
        records: list[TrialRecord] = []
        for number in range(30):
            parameters = choose_parameters(plan, number, records)
            line = {"epoch": 1.0, "score": float(parameters["one"]), "seconds": 1.0}
            state = ("finished", "stopped", "failed")[number % 3]
            records.append(TrialRecord(number=number, parameters=parameters, state=state, reports=(line,)))
        assert {record.parameters["one"] for record in records} <= {1, 3, 5, 7, 9}
        assert {record.parameters["pair"] for record in records} == {(1, 2), (3, 4)}
        assert {round(record.parameters["third"], 9) for record in records} <= {0.1, 0.3, 0.5}
        shares = measure_importance(plan, records)
        # The score is the setting itself, and seconds do not vary.
        assert set(shares) == {"score"} and max(shares["score"], key=shares["score"].__getitem__) == "one"
        assert sum(shares["score"].values()) == pytest.approx(1)


def halve_slowly(courses: dict[int, list[float]], grace: int, most: int, reduction: int) -> dict[int, int]:
    """Asynchronous successive halving for trials one after the other: the pass at which each one ends."""
    rungs: dict[int, list[float]] = {}
    ended = {}
    for number, course in courses.items():
        ended[number] = len(course)
        for epoch, score in enumerate(course, 1):
            rung = grace
            while rung < epoch:
                rung *= reduction
            if rung != epoch or epoch >= most:
                continue
            others = sorted(rungs.setdefault(rung, []))
            rungs[rung].append(score)
            if others:
                place = (1 - 1 / reduction) * (len(others) - 1)
                low, share = int(place), place - int(place)
                cutoff = others[low] + share * (others[min(low + 1, len(others) - 1)] - others[low])
                if score < cutoff:
                    ended[number] = epoch
                    break
    return ended


@pytest.mark.parametrize(("grace", "reduction"), [(1, 2), (1, 3), (2, 2)])
def test_halving_gives_up_whom_a_slow_account_gives_up_also_when_told_again(grace: int, reduction: int) -> None:
    courses = {number: [((number * 7) % 11) + 0.1 * epoch for epoch in range(9)] for number in range(11)}
    plan = make_plan(scheduler=AshaConfig(grace_passes=grace, most_passes=9, reduction=reduction))
    rule, ended = StoppingRule(plan), {}
    for number, course in courses.items():
        ended[number] = len(course)
        for epoch, score in enumerate(course, 1):
            line = {"epoch": float(epoch), "score": score}
            decision = rule.judge(number, line)
            # A retried trial tells its reports again: they count once.
            assert rule.judge(number, line) == decision
            if decision:
                ended[number] = epoch
                break
    assert ended == halve_slowly(courses, grace, 9, reduction)
    assert min(ended.values()) < 9


def test_median_stopping_gives_up_a_trial_below_the_others(tmp_path: Path) -> None:
    def follow(trial: Trial) -> None:
        for epoch in range(1, 5):
            trial.report(epoch=epoch, score=1.0 if trial.number < 3 else 0.1)

    plan = make_plan("grid", scheduler=MedianConfig(grace_passes=2, least_trials=3))
    result = sweep_by_hand(plan, follow, tmp_path)
    assert [(trial.state, trial.last["epoch"]) for trial in result.trials] == [("finished", 4.0)] * 3 + [
        ("stopped", 2.0)
    ] * 3


def test_a_sweep_has_one_process_at_a_time(tmp_path: Path) -> None:
    place = open_location(tmp_path) / OWNER_FILE
    with own(place), pytest.raises(StorageError, match=f"held by process {os.getpid()}"), own(place):
        pass
    assert not (tmp_path / "owner.json").exists()


def test_a_lease_of_a_dead_process_is_free_and_one_elsewhere_after_it_stands_still(tmp_path: Path) -> None:
    place = open_location(tmp_path) / RUNNING_FILE
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = Lease(place).describe()
    stat = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
    place.write_json(holder | {"process": child.pid, "started": stat[19]})
    assert is_held(place)
    child.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while is_held(place):
        # Dead is dead, also before anybody has asked for its exit status.
        assert time.monotonic() < until
    child.wait()
    assert not is_held(place)
    place.write_json(holder | {"machine": "elsewhere", "token": "theirs"})
    began = time.monotonic()
    wait_until_free(place, lease_seconds=0.5)
    assert time.monotonic() - began >= 0.5
    beating = threading.Event()

    def beat() -> None:
        count = 0
        while not beating.wait(0.05):
            count += 1
            place.write_json(holder | {"machine": "elsewhere", "beats": count})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StorageError, match="elsewhere still works"):
            wait_until_free(place, patience=0.5, lease_seconds=20)
        with pytest.raises(StorageError, match="on elsewhere"), own(place, lease_seconds=20):
            pass
    finally:
        beating.set()
        thread.join()
    wait_until_free(place, patience=20, lease_seconds=0.3)


def test_a_worker_whose_sweep_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from functools import partial\n"
        "from physioray.leases import Lease, end_if_lost, hold\n"
        "from physioray.storage import open_location\n"
        "folder = open_location(sys.argv[1])\n"
        "lease = Lease(folder / 'running.json', token='old')\n"
        "lease.write()\n"
        "with hold(lease, partial(end_if_lost, folder / 'owner.json', 'old')):\n"
        "    print('here', flush=True); time.sleep(60)\n"
    )
    place = open_location(tmp_path) / "owner.json"
    place.write_json({"token": "old"})
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None and worker.stdout.readline() == "here\n"
    time.sleep(1.5)
    assert worker.poll() is None
    place.write_json({"token": "new"})
    assert worker.wait(timeout=10) == 17
    # It did not give back a lease; the new owner sees that its process is gone.
    assert json.loads((tmp_path / "running.json").read_text())["token"] == "old"
    assert not is_held(open_location(tmp_path) / "running.json")


def test_a_lease_that_somebody_else_took_is_not_given_back(tmp_path: Path) -> None:
    lease = Lease(open_location(tmp_path) / RUNNING_FILE)
    lease.write()
    with hold(lease):
        lease.place.write_json({"token": "theirs"})
    assert lease.place.read_json() == {"token": "theirs"}

"""What a sweep tells those who watch it, and what it makes of machines that are lost."""

from pathlib import Path

from physioray.storage import open_location
from physioray.sweep_driver import LOST_MACHINE, LOW_MEMORY, SweepDriver
from physioray.sweep_journal import SweepJournal
from tests.sweep_trials import make_plan


def make_driver(folder: Path, trials: int) -> SweepDriver:
    plan = make_plan(trials=trials, max_failures=1)
    journal = SweepJournal(folder=open_location(folder), space=plan.space)
    journal.claim(plan)
    return SweepDriver(plan, journal)


def test_a_lost_machine_is_no_failure_of_its_trial_but_a_process_that_dies_is(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, 1)
    for _ in range(5):
        assert driver.start_trial() == 0
        driver.deaths[0] = f"its process died: The actor died because {LOST_MACHINE}. Node Id: 0123"
        driver.end_attempt(0)
    for state in ("planned", "failed"):
        assert driver.start_trial() == 0
        driver.deaths[0] = "its process died: out of memory"
        driver.end_attempt(0)
        assert driver.records[0].state == state
    assert driver.is_done and len(driver.records[0].failures) == 7


def test_one_kill_for_lack_of_memory_counts_once_however_many_processes_it_took(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, 1)
    first, second = (f"its process died: the node {LOW_MEMORY}, {used} GB used" for used in (5.31, 5.32))
    # An idle process that was killed with the trial's own is met by the next attempt; a second kill is another.
    for reason, state in ((first, "planned"), (first, "planned"), (second, "failed")):
        assert driver.start_trial() == 0
        driver.deaths[0] = reason
        driver.end_attempt(0)
        assert driver.records[0].state == state
    assert driver.records[0].failures == (first, second)


def test_every_change_is_told_as_numbers_of_trials_that_add_up(tmp_path: Path) -> None:
    driver, told = make_driver(tmp_path, 3), []
    driver.tell = lambda states, best: told.append((dict(states), best))
    first = driver.start_trial()
    assert first is not None
    driver.journal.write_reports(first, [{"epoch": 4.0, "score": 0.5, "seconds": 1.0}], ended=True)
    driver.end_attempt(first)
    assert all(sum(states.values()) == 3 for states, _ in told)
    nothing = {"running": 0, "waiting": 0, "finished": 0, "stopped": 0, "failed": 0}
    assert told[0] == (nothing | {"running": 1, "waiting": 2}, None)
    assert told[-1] == (nothing | {"finished": 1, "waiting": 2}, 0.5)

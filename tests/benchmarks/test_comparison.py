"""The arithmetic of the benchmarks' table; the benchmarks themselves run with make bench."""

from pathlib import Path

import pytest

from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook, take_turns

pytestmark = pytest.mark.plain


def test_ratios_say_how_many_times_as_good_whatever_the_unit() -> None:
    rates = Comparison(title="", unit="windows/s", better="more", figures={OURS: [20.0, 30.0], "peer": [10.0, 10.0]})
    seconds = Comparison(title="", unit="s", better="less", figures={OURS: [1.0, 2.0], "peer": [4.0, 4.0]})
    assert rates.list_ratios("peer") == [2.0, 3.0] and seconds.list_ratios("peer") == [4.0, 2.0]


def test_a_goal_is_missed_by_the_median_and_one_of_several_may_suffice() -> None:
    figures = {OURS: [1.0, 1.0, 5.0], "peer": [1.0, 1.0, 1.0], "limit": [1.0, 1.0, 1.0]}
    goals = (Goal(against="peer", ratio=2.0), Goal(against="limit", ratio=0.8))
    both = Comparison(title="", unit="1/s", better="more", figures=figures, goals=goals)
    either = Comparison(title="", unit="1/s", better="more", figures=figures, goals=goals, one_goal_suffices=True)
    assert [goal.against for goal in both.find_missed()] == ["peer"]
    assert not either.find_missed()


def test_contenders_take_turns_and_the_file_holds_every_figure(tmp_path: Path) -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = take_turns({OURS: lambda: note("a"), "peer": lambda: note("b")}, repeats=3)
    assert order == ["a", "b", "b", "a", "a", "b"] and figures == {OURS: [1, 4, 5], "peer": [2, 3, 6]}
    book = Notebook(tmp_path)
    book.keep(Comparison(title="t", unit="s", better="less", figures=figures))
    assert '"physioray"' in book.path.read_text()
    book.leave_out("a row", "no GPU")
    assert book.not_run == ["a row: not run yet, no GPU"]

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.benchmarks.comparison import Notebook, describe_comparison

NOTEBOOK = pytest.StashKey[Notebook]()


def pytest_configure(config: pytest.Config) -> None:
    folder = Path(os.environ.get("PHYSIORAY_BENCHMARKS", config.rootpath / "runs" / "benchmarks"))
    config.stash[NOTEBOOK] = Notebook(folder)


@pytest.fixture
def notebook(pytestconfig: pytest.Config) -> Notebook:
    """Where a benchmark keeps its comparisons."""
    return pytestconfig.stash[NOTEBOOK]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    book = config.stash[NOTEBOOK]
    if not book.rows and not book.not_run:
        return
    terminalreporter.section("benchmarks, side by side")
    for row in book.rows:
        for line in describe_comparison(row):
            terminalreporter.write_line(line)
    for line in book.not_run:
        terminalreporter.write_line(line)
    if not book.rows:
        return
    terminalreporter.write_line(f"Every figure: {book.path}")

import os

# Two workers of pytest-xdist on two cores, each with as many threads as there are cores, would only stand in each
# other's way. Before torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-benchmarks", action="store_true", help="run tests/benchmarks, which print figures")


def group_files(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`: a file's tests run in one process, and so do all that start a Ray cluster or
    machines, so that two clusters never stand side by side."""
    heavy = {item.path for item in items if any(item.get_closest_marker(name) for name in ("ray", "cluster"))}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if item.path in heavy else str(item.path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    group_files(items)
    if config.getoption("--run-benchmarks"):
        return
    skip = pytest.mark.skip(reason="a benchmark: run it with make bench")
    for item in items:
        if "benchmarks" in item.path.parts and not item.get_closest_marker("plain"):
            item.add_marker(skip)

"""The rules of the house that a linter does not know."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("physioray", "experiments") for path in (ROOT / folder).rglob("*.py"))
KNOWS_THE_CLUSTER = {
    "physioray.cli",
    "physioray.sweep",
    "physioray.sweep_experiment",
    "physioray.local_cluster",
    # The sweep's own two halves: what decides (Optuna, Tune's schedulers) stands apart from what runs (Tune).
    "physioray.sweep_driver",
    "physioray.sweep_search",
    "physioray.distribute",
    "physioray.spread",
    "physioray.infer_many",  # many recordings at once; distribute is about training
    "physioray.data.shards",
    "physioray.data.stream",
}


def read_settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def list_tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_the_contract_on_the_cluster_lists_every_other_module() -> None:
    contracts = read_settings()["tool"]["importlinter"]["contracts"]
    listed = next(set(c["source_modules"]) for c in contracts if "know the cluster" in c["name"])
    modules = {name_module(path) for path in (ROOT / "physioray").rglob("*.py") if path.name != "__init__.py"}
    assert listed == modules - KNOWS_THE_CLUSTER


def test_the_lock_file_pins_what_belongs_together_and_can_be_installed_anywhere() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    # A local suffix such as +cpu does not exist on the public index, a hash fits one build of torch only.
    assert all("+" not in version and "--hash" not in version for version in pins.values())
    assert pins["torch"] == "2.13.0" and pins["ray"].startswith("2.60.") and pins["optuna"].startswith("5.")
    wanted = [*read_settings()["project"]["dependencies"], *read_settings()["project"]["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for line in wanted}
    missing = names - {name.lower().replace("_", "-") for name in pins}
    assert not missing, f"not in requirements.lock: {missing}"


def test_no_file_speaks_of_one_machine() -> None:
    pattern = re.compile("|".join(["/" + folder + "/" for folder in ("home", "work", "oak", "mnt", "scratch")]))
    for path in list_tracked_files():
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".jinja", "") and path.name != "LICENSE":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", SOURCES, ids=name_module)
def test_a_module_fits_in_a_sitting_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "a module has at most 400 lines"
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and name_module(path) + "." + node.name != "physioray.train.train":
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines; only the training loop may have more than 60"

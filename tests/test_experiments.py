"""Every experiment can be imported without doing anything, says what it is for, and answers --help."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(FOLDER.glob("*.py"))
HEADINGS = ("Question", "Run", "Cost", "Watch", "Expect", "Answer")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_experiments() -> None:
    assert {"quickstart", "pretrain_strategy", "finetune"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_importing_an_experiment_does_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = load(path)
    assert callable(module.main) and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_has_every_heading_once_in_order_with_something_behind_it(path: Path) -> None:
    text = load(path).__doc__ or ""
    found = re.findall(r"^([A-Z][a-z]+): (\S)", text, flags=re.MULTILINE)
    assert tuple(name for name, _ in found) == HEADINGS
    assert f"python experiments/{path.name}" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_name_options_that_exist(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(path)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    # Not in processes of their own, which would load PyTorch and Ray once each; tests/test_main_job.py runs one so.
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    named = set(re.findall(r"--[a-z][a-z-]*", module.__doc__ or "")) - {"--logdir"}
    answer = capsys.readouterr().out
    assert named and all(option in answer for option in named)

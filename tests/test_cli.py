"""The command line's own part: exit codes and one line for what a user can mend."""

import errno
from pathlib import Path

import pytest

from physioray.cli import guard, main


def raise_error(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a rate must be positive"), 1, "physioray: a rate must be positive"),
        (OSError(errno.ENOSPC, "No space left"), 1, "free some space"),
        (FileExistsError(errno.EEXIST, "File exists", "here"), 1, "A file stands where a folder must be"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guard(lambda: raise_error(error)) == code
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError):
        guard(lambda: raise_error(AssertionError()))


def test_a_cohort_that_is_none_names_the_command_that_makes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert "physioray ingest SOURCE" in capsys.readouterr().err

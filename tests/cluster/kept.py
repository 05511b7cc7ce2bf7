"""Keeps what a test of the cluster has seen, for people: printed, and written where PHYSIORAY_SHOWN says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

VARIABLE = "PHYSIORAY_SHOWN"


def keep_text(name: str, text: str) -> None:
    """Print a report (shown by `pytest -s`), and keep it as a file."""
    print(text)
    if VARIABLE in os.environ:
        folder = Path(os.environ[VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def keep_pictures(folder: Path) -> None:
    """Keep the pictures of a folder."""
    if VARIABLE in os.environ:
        Path(os.environ[VARIABLE]).mkdir(parents=True, exist_ok=True)
        for picture in folder.glob("*.png"):
            shutil.copy(picture, os.environ[VARIABLE])

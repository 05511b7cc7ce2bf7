"""Reads `montage.toml`: which channels serve a modality, which are subtracted from which, what stages are called.

[channels]
eeg = ["C4-M1", {channel = "C4", minus = "M1"}]
ecg = [{channel = "ECG1", minus = "ECG2"}, "ECG"]

[stages]
"SLEEP-S2" = "N2"
"artefact" = "undefined"
"""

from __future__ import annotations

import tomllib
from typing import Any

from physioray.config import Montage
from physioray.signals import MODALITIES, STAGES
from physioray.storage import Location, StorageError

MONTAGE_FILE = "montage.toml"
_TABLES = ("channels", "stages")
_KEYS = ("channel", "minus")


class MontageError(ValueError):
    """A montage file cannot be used; the message says what must stand there."""


def read_montage(source: Location, file: Location | None = None) -> Montage:
    """Read the montage that was named, or else `montage.toml` of the source; an empty one if there is none.

    Args:
        source: folder or bucket of the recordings.
        file: the file that was named; it must exist.

    Raises:
        MontageError: it is no TOML, or holds a key, modality or stage that does not exist; those that do are listed.
        StorageError: it cannot be read.
    """
    place = file or source / MONTAGE_FILE
    if file is None and not place.exists():
        return Montage()
    try:
        text = place.read_text()
    except FileNotFoundError as error:
        raise StorageError(f"A montage must be a file, but there is none at {place}. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{place} must be readable text, but: {error}. Correct or remove it.") from error
    return parse_montage(text, str(place))


def parse_montage(text: str, name: str = MONTAGE_FILE) -> Montage:
    """Read a montage from the text of its file.

    Raises:
        MontageError: see `read_montage`.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MontageError(f"{name} must be TOML, but: {error}. Correct it.") from error
    _refuse_unknown(name, "tables", content, _TABLES)
    for table in _TABLES:
        if not isinstance(content.get(table, {}), dict):
            raise MontageError(f"{name}: {table} must be a table ([{table}]), but is {content[table]!r}.")
    channels, stages = content.get("channels", {}), content.get("stages", {})
    _refuse_unknown(name, "modalities under [channels]", channels, tuple(MODALITIES))
    choices = []
    for modality, wanted in channels.items():
        for choice in wanted if isinstance(wanted, list) else [wanted]:
            choices.append((modality, *_read_choice(name, modality, choice)))
        if wanted == []:
            raise MontageError(f"{name}: {modality} must name at least one channel, but names none. Leave it out.")
    meanings = (*STAGES, "undefined")
    for stage, meaning in stages.items():
        if meaning not in meanings:
            raise MontageError(f"{name}: {stage!r} must mean one of {', '.join(meanings)}, but means {meaning!r}.")
    return Montage(choices=tuple(choices), stages=tuple(stages.items()))


def _read_choice(name: str, modality: str, choice: Any) -> tuple[str, str]:
    if isinstance(choice, dict):
        _refuse_unknown(name, f"keys of a choice for {modality}", choice, _KEYS)
        parts = (choice.get("channel"), choice.get("minus", ""))
    else:
        parts = (choice, "")
    if not all(isinstance(part, str) for part in parts) or not parts[0] or ("minus" in choice and not parts[1]):
        raise MontageError(
            f'{name}: a choice for {modality} must be a name, or {{channel = "A", minus = "B"}}, but is {choice!r}.'
        )
    return str(parts[0]), str(parts[1])


def _refuse_unknown(name: str, what: str, got: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(got) - set(known))
    if unknown:
        raise MontageError(f"{name}: {what} must be among {', '.join(known)}, but got {', '.join(unknown)}.")

"""Small tables beside the recordings: whose night it is, how old they were, where a signal jumps."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass

from physioray.storage import Location, StorageError

AGE_TABLE = "age-sex.csv"
SUBJECT_TABLE = "record-subject.csv"
JUMP_TABLE = "discontinuities.csv"
_OLDEST = 120.0


@dataclass(frozen=True, kw_only=True)
class SubjectFacts:
    """Whose recording it is: subject, age in years and sex (`M` or `F`), None where not known.

    `note` says what was wrong with an age or sex that was given.
    """

    subject: str
    age: float | None
    sex: str | None
    note: str | None


def read_subject_facts(source: Location) -> dict[str, SubjectFacts]:
    """Read ages, sexes and subjects of a source's recordings, by recording name.

    `age-sex.csv` has the columns Record, Sex, Age (CinC Challenge 2018); `record-subject.csv` has record,
    subject where a subject has several nights. Both may be missing. A recording without a subject is its
    own; an age that is 0, negative, above 120 or not a number is not known, with a note.

    Raises:
        StorageError: a table lacks a column.
    """
    ages: dict[str, tuple[float | None, str | None, str | None]] = {}
    for row in _read_table(source / AGE_TABLE, ("record", "sex", "age")):
        age, age_note = _parse_age(row["age"])
        sex, sex_note = _parse_sex(row["sex"])
        notes = [note for note in (age_note, sex_note) if note]
        if row["record"] in ages:
            notes.append(f"{AGE_TABLE} has this record more than once, the last row counts")
        ages[row["record"]] = (age, sex, "; ".join(notes) or None)
    subjects = {row["record"]: row["subject"] for row in _read_table(source / SUBJECT_TABLE, ("record", "subject"))}
    facts = {}
    for record in sorted({*ages, *subjects}):
        age, sex, note = ages.get(record, (None, None, None))
        facts[record] = SubjectFacts(subject=subjects.get(record) or record, age=age, sex=sex, note=note)
    return facts


def read_discontinuities(source: Location) -> dict[str, list[int]]:
    """Read where recordings jump: sample numbers at the source's rate, ascending, by recording name.

    The optional `discontinuities.csv` beside RECORDS has the columns record and sample; each sample is the
    first after a jump.

    Raises:
        StorageError: a column is missing or a sample is not a whole number above 0.
    """
    jumps: dict[str, set[int]] = {}
    for row in _read_table(source / JUMP_TABLE, ("record", "sample")):
        if not row["sample"].isdigit() or int(row["sample"]) == 0:
            raise StorageError(
                f"A sample in {source / JUMP_TABLE} must be a whole number above 0, "
                f"but {row['record']} has {row['sample']!r}. Correct the row."
            )
        jumps.setdefault(row["record"], set()).add(int(row["sample"]))
    return {record: sorted(samples) for record, samples in jumps.items()}


def _parse_age(text: str) -> tuple[float | None, str | None]:
    try:
        age = float(text)
    except ValueError:
        return None, f"age must be a number of years, but is {text!r}" if text else "age is blank"
    if not (math.isfinite(age) and 0 < age <= _OLDEST):
        return None, f"age must be above 0 and at most {_OLDEST:g}, but is {text}"
    return age, None


def _parse_sex(text: str) -> tuple[str | None, str | None]:
    letter = {"m": "M", "male": "M", "f": "F", "female": "F"}.get(text.lower())
    if letter:
        return letter, None
    return None, f"sex must be M or F, but is {text!r}" if text else None


def _read_table(place: Location, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file with lower-case column names and stripped values; none if there is no file."""
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{place} must be readable text, but: {error}. Correct or remove it.") from error
    reader = csv.DictReader(io.StringIO(text))
    names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    missing = [column for column in columns if column not in names]
    if missing:
        raise StorageError(
            f"{place} must have the columns {', '.join(columns)}, but lacks {', '.join(missing)} "
            f"(it has {', '.join(names) or 'none'})."
        )
    rows = []
    for row in reader:
        cells = {(key or "").strip().lower(): (value or "").strip() for key, value in row.items() if key is not None}
        if cells["record"]:
            rows.append({column: cells[column] for column in columns})
    return rows

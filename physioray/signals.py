"""The words that every room agrees on: modalities, stages, tasks, splits and the columns of a shard.

Sources: Fang et al. 2024 (arXiv 2410.16424) sections 3.1 and 3.2 for the four modalities, their bands and
their rate; the PhysioNet/CinC Challenge 2018 for channel names and units.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

WINDOW_SECONDS = 30
"""One window is 30 s of signal, what sleep laboratories call an epoch."""

BATCH_ROWS = 64
"""Rows (windows) of one Arrow record batch in a shard."""

STAGES = ("W", "N1", "N2", "N3", "REM")
UNKNOWN = -1
"""The label of a window whose answer is not known; such a window never enters a score."""

Split = Literal["pretrain", "train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("pretrain", "train", "validation", "test")
PRETRAINING_SPLITS: tuple[Split, ...] = ("pretrain", "train")
"""Pretraining sees the unlabelled subjects and the training subjects (Fang et al. 2024, section 3.1)."""


WINDOWS = "windows"
SLEEP_WINDOWS = "sleep_windows"
PATIENTS = "patients"
SCOPES: Mapping[str, str] = {
    WINDOWS: "all windows",
    SLEEP_WINDOWS: "windows of sleep",
    PATIENTS: "by patient vote",
}
"""What is counted in a score: every labelled window; only those whose true stage is known and not W; or people, each
with the mean of the probabilities of their windows."""


class LookupMiss(KeyError):
    """A name that does not exist; the message lists the names that do."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @classmethod
    def among(cls, what: str, known: Iterable[str], name: str) -> LookupMiss:
        """The miss of a name among others, with the nearest of them: `what` must be one of `known`."""
        names = list(known)
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return cls(f"{what} must be one of {', '.join(names)}, but got {name!r}.{hint}")


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of physiological signal: where it is found and how it is kept.

    Attributes:
        name: key of the modality in every dictionary and the column of a shard.
        candidates: channel names in order of preference; the first that a recording has is used.
            Matching is exact after removing case and spaces.
        rate: samples per second after ingest, in Hz.
        band: lower and upper edge of the band-pass, in Hz; a lower edge of 0 means low-pass only.
        unit: physical unit that the recording's own unit is converted to.
        plausible: smallest and largest plausible spread (robust standard deviation) of a whole
            recording in `unit`; outside it the unit or the electrode is doubted.
        token_seconds: duration of one token, in seconds.
    """

    name: str
    candidates: tuple[str, ...]
    rate: int
    band: tuple[float, float]
    unit: str
    plausible: tuple[float, float]
    token_seconds: int = 1

    @property
    def samples(self) -> int:
        """Samples in one window."""
        return self.rate * WINDOW_SECONDS

    @property
    def tokens(self) -> int:
        """Tokens in one window."""
        return WINDOW_SECONDS // self.token_seconds


_EEG = ("F3-M2", "F4-M1", "C3-M2", "C4-M1", "O1-M2", "O2-M1")
_EEG_ELSEWHERE: tuple[str, ...] = (
    *("F3-A2", "F4-A1", "C3-A2", "C4-A1", "O1-A2", "O2-A1"),
    *("EEG (C4-A1)", "EEG (C3-O1)", "EEG (O2-A1)"),
    *("EEG Fpz-Cz", "EEG Pz-Oz", "EEG"),
)

MODALITIES: Mapping[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality(
            name="eeg",
            candidates=_EEG + _EEG_ELSEWHERE,
            rate=100,
            band=(0.1, 30.0),
            unit="uV",
            plausible=(1.0, 200.0),
        ),
        Modality(
            name="eog",
            candidates=(
                *("E1-M2", "E2-M1", "E2-M2", "E1-A2", "EOG horizontal", "EOG (right)", "EOG (left)", "EOG"),
                *("E2-A1", "LOC-A2", "ROC-A1", "EOG(L)", "EOG(R)", "LOC-ROC", "ROC-LOC"),
            ),
            rate=100,
            band=(0.1, 30.0),
            unit="uV",
            plausible=(1.0, 400.0),
        ),
        Modality(
            name="emg",
            candidates=("Chin1-Chin2", "Chin", "Chin EMG", "EMG submental", "EMG (chin)", "EMG", "EMG1-EMG2"),
            rate=100,
            band=(0.1, 70.0),
            unit="uV",
            plausible=(0.05, 300.0),
        ),
        Modality(
            name="ecg",
            candidates=("ECG", "EKG", "ECG II", "ECG I", "ECG1-ECG2"),
            rate=100,
            band=(0.1, 70.0),
            unit="mV",
            plausible=(0.005, 5.0),
        ),
        # The respiratory channels that SleepFM and sleep2vec add. The challenge writes them in
        # uncalibrated microvolts, so their plausible range is wide.
        Modality(
            name="airflow",
            candidates=("AIRFLOW", "Resp oro-nasal", "Resp (nasal)", "Nasal pressure"),
            rate=25,
            band=(0.0, 10.0),
            unit="uV",
            plausible=(1e-3, 1e5),
        ),
        Modality(
            name="abdomen",
            candidates=("ABD", "Abdomen", "Resp (abdominal)"),
            rate=25,
            band=(0.0, 10.0),
            unit="uV",
            plausible=(1e-3, 1e5),
        ),
        Modality(
            name="chest",
            candidates=("CHEST", "Thorax", "Resp (chest)"),
            rate=25,
            band=(0.0, 10.0),
            unit="uV",
            plausible=(1e-3, 1e5),
        ),
        Modality(
            name="spo2",
            candidates=("SaO2", "SpO2"),
            rate=4,
            band=(0.0, 1.0),
            unit="%",
            plausible=(0.01, 30.0),
        ),
        # Inter-beat interval is derived from the ECG, not read from a channel; the name is kept free for it.
        Modality(
            name="ibi",
            candidates=("IBI",),
            rate=4,
            band=(0.0, 1.0),
            unit="s",
            plausible=(0.005, 1.0),
        ),
    )
}

PAPER_MODALITIES = ("eeg", "eog", "emg", "ecg")
"""The four modalities of Fang et al. 2024, in the order of this project's columns."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question asked of every window: its classes and the score of guessing.

    Attributes:
        name: key of the task everywhere.
        classes: in the order of their numbers.
        title: for tables and axes.
        scopes: how it is scored, names of `SCOPES`; the first is the paper's.
    """

    name: str
    classes: tuple[str, ...]
    title: str
    scopes: tuple[str, ...] = ("windows",)

    @property
    def chance(self) -> float:
        """Balanced accuracy of a guess: one over the number of classes."""
        return 1.0 / len(self.classes)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(name="sleep", classes=STAGES, title="Sleep stage"),
        Task(name="age", classes=("younger", "older"), title="Age", scopes=(WINDOWS, PATIENTS)),
        Task(name="arousal", classes=("none", "arousal"), title="Arousal", scopes=(WINDOWS, SLEEP_WINDOWS)),
    )
}


def find_modality(name: str) -> Modality:
    """Look a modality up by its name, for example `eeg`.

    Raises:
        LookupMiss: no such modality; the message lists those that exist.
    """
    if name not in MODALITIES:
        raise LookupMiss.among("A modality", MODALITIES, name)
    return MODALITIES[name]


def find_task(name: str) -> Task:
    """Look a task up by its name, for example `sleep`.

    Raises:
        LookupMiss: no such task; the message lists those that exist.
    """
    if name not in TASKS:
        raise LookupMiss.among("A task", TASKS, name)
    return TASKS[name]


def present_column(modality: str) -> str:
    """Name of the column that says in which windows a modality is present."""
    return f"present_{modality}"


def label_column(task: str) -> str:
    """Name of the column that holds a task's label, `UNKNOWN` where there is none."""
    return f"label_{task}"


def shard_schema(modalities: tuple[str, ...], tasks: tuple[str, ...] = tuple(TASKS)) -> pa.Schema:
    """Columns of a shard: one row is one window of one recording.

    `window` is the window's number in the recording, `start` its first sample's time in seconds from the
    start of the recording. A modality's column holds `(samples,)` int16 in steps of the manifest's `step`.
    """
    fields = [pa.field("window", pa.int32()), pa.field("start", pa.float64())]
    fields += [pa.field(present_column(name), pa.bool_()) for name in modalities]
    fields += [pa.field(label_column(task), pa.int8()) for task in tasks]
    fields += [pa.field(name, pa.fixed_shape_tensor(pa.int16(), [find_modality(name).samples])) for name in modalities]
    return pa.schema(fields)

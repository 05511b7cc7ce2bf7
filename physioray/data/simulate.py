"""Writes a cohort of simulated nights in the layout of the CinC Challenge 2018: nothing has to be downloaded.

Stages, events and waveforms carry named effect sizes (`physioray.data.hypnogram`, `night`, `brain_signals`,
`body_signals`, `artefacts`), fixed before any model was compared on them. For scale: logistic regression on log band
powers of EEG, EOG, EMG and ECG gave a balanced accuracy of 0.63 (100 half-hour records) and 0.66 (20 two-hour
records) over five stages, by subject, where 21 records of real excerpts give 0.56.

Whatever is simulated says so: a comment in every header and `SIMULATED.json`.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pyarrow import fs as pafs

from physioray.data import artefacts, body_signals, brain_signals, hypnogram, night
from physioray.data.artefacts import spoil_signals
from physioray.data.body_signals import simulate_body
from physioray.data.brain_signals import simulate_head
from physioray.data.challenge_layout import (
    RATE,
    list_annotations,
    quantise,
    write_annotations,
    write_arousal_labels,
    write_signals,
)
from physioray.data.hypnogram import AGE_DEVIATION, AGE_MEAN
from physioray.data.night import mark_arousals, simulate_night
from physioray.data.signal_shapes import upsample
from physioray.signals import WINDOW_SECONDS
from physioray.storage import Location, open_location

MARKER = "SIMULATED.json"
"""File that says that a folder is simulated, by which arguments and with which effect sizes."""
FORMAT = 1
"""Number of this simulation: the same arguments give the same bytes only under the same number."""
AGE_LIMITS = (18, 93)
MALE_SHARE = 0.65
"""Share of men among the people of the challenge (0.6505)."""
SHORTEST_SECONDS = 2 * WINDOW_SECONDS
"""One window before scoring starts, as every real record has, and one that is scored."""
_PARTS = ("length", "person", "night", "head", "body", "artefacts")
_PARTIAL = ".part"


@dataclass(frozen=True, kw_only=True)
class SimulatedRecord:
    """One record of a simulated cohort: its number among the labelled or the unlabelled ones, and whose it is."""

    seed: int
    number: int
    labelled: bool
    hours: float

    @property
    def name(self) -> str:
        """Name as the challenge gives it, for example `tr03-0005`: half, site, number."""
        return f"{'tr' if self.labelled else 'te'}{3 + self.number % 12:02d}-{self.number + 1:04d}"

    @property
    def half(self) -> str:
        """Folder of the record: `training` with labels, `test` without."""
        return "training" if self.labelled else "test"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the record's files."""
        endings = (".hea", ".mat", ".arousal", "-arousal.mat") if self.labelled else (".hea", ".mat")
        return tuple(f"{self.name}{ending}" for ending in endings)

    def random(self, part: str) -> np.random.Generator:
        """Source of chance of one part of this record, independent of all other records and parts."""
        return np.random.default_rng([self.seed, int(self.labelled), self.number, _PARTS.index(part)])

    def draw_person(self) -> tuple[str, int]:
        """Sex (`F` or `M`) and age in years of the person."""
        random = self.random("person")
        age = AGE_MEAN + AGE_DEVIATION * random.standard_normal()
        return ("M" if random.random() < MALE_SHARE else "F"), int(np.clip(round(age), *AGE_LIMITS))

    def count_samples(self) -> int:
        """Length at 200 Hz: the hours asked for and less than a window more, so that the last one may be partial."""
        extra = int(self.random("length").integers(0, WINDOW_SECONDS * RATE // 20)) * 20
        return round(self.hours * 3600 * RATE) + extra


def list_records(*, subjects: int, hours: float, seed: int, unlabelled_share: float) -> list[SimulatedRecord]:
    """The records of a cohort, labelled ones first; one record per subject.

    Raises:
        ValueError: an argument is out of range; the message says which.
    """
    if subjects < 1:
        raise ValueError(f"--subjects must be at least 1, but got {subjects}. Ask for one or more.")
    if not math.isfinite(hours) or hours * 3600 < SHORTEST_SECONDS:
        raise ValueError(
            f"--hours must give at least two windows ({SHORTEST_SECONDS} s, {SHORTEST_SECONDS / 3600:.4f} h), because "
            f"the first is never scored, but got {hours}. A full night has 7.7 hours."
        )
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, but got {seed}. Choose another.")
    if not 0 <= unlabelled_share <= 1:
        raise ValueError(f"unlabelled_share must be between 0 and 1, but got {unlabelled_share}.")
    # The small term keeps a product such as 0.29 * 100 from falling below the whole number that it is.
    unlabelled = math.floor(subjects * unlabelled_share + 1e-9)
    halves = [(True, number) for number in range(subjects - unlabelled)]
    halves += [(False, number) for number in range(unlabelled)]
    return [
        SimulatedRecord(seed=seed, number=number, labelled=labelled, hours=float(hours)) for labelled, number in halves
    ]


def simulate_record(out: str, record: SimulatedRecord) -> None:
    """Write the folder of one record, whole or not at all; a folder that is whole is left alone.

    Args:
        out: path or URI of the cohort's folder.
        record: which record.
    """
    if is_written(out, record):
        return
    place = open_location(out)
    if not place.is_local:
        return _upload_record(place / record.half / record.name, record)
    folder = os.path.join(out, record.half, record.name)
    # A name of its own, so that a process left over from a killed call cannot write into the same folder.
    beside = os.path.join(out, record.half, f".{record.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    os.makedirs(beside)
    try:
        _write_record(beside, record)
        if not is_written(out, record):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _upload_record(folder: Location, record: SimulatedRecord) -> None:
    """Write a record here and copy its files into a bucket, which has no renaming: the header comes last."""
    with tempfile.TemporaryDirectory() as beside:
        _write_record(beside, record)
        for name in reversed(record.files):
            (folder / name).write_bytes(Path(beside, name).read_bytes())


def _write_record(folder: str, record: SimulatedRecord) -> None:
    """Make the signals and labels of one record and write its files into an existing folder."""
    samples = record.count_samples()
    _, age = record.draw_person()
    this = simulate_night(record.random("night"), samples, age, RATE)
    head = simulate_head(record.random("head"), this)
    channels = {name: upsample(values, RATE // brain_signals.RATE) for name, values in head.items()}
    channels |= simulate_body(record.random("body"), this)
    spoil_signals(record.random("artefacts"), this, channels)
    steps = quantise(channels, samples)
    write_signals(folder, record.name, steps, f"simulated by physioray (seed {record.seed})")
    if record.labelled:
        write_annotations(folder, record.name, list_annotations(this))
        write_arousal_labels(folder, record.name, this, mark_arousals(this, samples, RATE))


def is_written(out: str, record: SimulatedRecord) -> bool:
    """True if all files of a record are there. Each appears whole, so this suffices."""
    folder = open_location(out) / record.half / record.name
    return {item.name for item in folder.list()} >= set(record.files)


def simulate_cohort(
    out: str,
    *,
    subjects: int,
    hours: float,
    seed: int,
    unlabelled_share: float = 0.2,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
) -> None:
    """Write a cohort of simulated nights in the files and folders of the CinC Challenge 2018.

    A call that was interrupted is finished by the same call, with the same bytes; a finished one is left as it is.

    Args:
        out: path or URI of a folder: new, empty, or holding the same call's work.
        subjects: number of people, one record each.
        hours: duration of each record (less than a window more); nights shorter than 7.5 h are cut from a random
            place of a full one.
        seed: same arguments, same bytes. A record does not depend on how many others there are.
        unlabelled_share: share of the subjects (rounded down) without labels, in `test/`.
        progress: called with (records done, records in all), first with those already there.
        processes: how many to use; None uses one per core, and just this one if there is little to do.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: the folder holds something else.
    """
    records = list_records(subjects=subjects, hours=hours, seed=seed, unlabelled_share=unlabelled_share)
    arguments = {"subjects": subjects, "hours": hours, "seed": seed, "unlabelled_share": unlabelled_share}
    place = open_location(out)
    out = place.path if place.is_local else place.uri
    _claim_folder(place, arguments)
    left = [record for record in records if not is_written(out, record)]
    before, total = len(records) - len(left), len(records)

    def tell(done: int) -> None:
        if progress:
            progress(before + done, total)

    tell(0)
    if processes is None:
        # Starting processes costs about a second each, which a few short records do not repay.
        processes = 1 if len(left) * hours < 8 else min(len(left), os.cpu_count() or 1)
    if processes <= 1:
        for done, record in enumerate(left, start=1):
            simulate_record(out, record)
            tell(done)
    else:
        _simulate_in_processes(out, left, processes, tell)
    if place.is_local:
        _remove_leftovers(out)
    people = ((record.name, *record.draw_person()) for record in records)
    table = "Record,Sex,Age\n" + "".join(f"{name},{sex},{age}\n" for name, sex, age in people)
    _write_once(place / "age-sex.csv", table)
    _write_once(place / "RECORDS", "".join(f"{item.half}/{item.name}/{item.name}\n" for item in records))


def _remove_leftovers(out: str) -> None:
    """Remove what a killed call left half-written; every record is whole by now."""
    for half in ("training", "test"):
        folder = os.path.join(out, half)
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.startswith(".") and name.endswith(_PARTIAL):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _simulate_in_processes(
    out: str, records: list[SimulatedRecord], processes: int, tell: Callable[[int], None]
) -> None:
    # A fresh interpreter per process: forking one that has started threads (torch, Ray) can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _end_with_parent) as pool:
        try:
            waiting = [pool.submit(simulate_record, out, record) for record in records]
            for done, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
                future.result()
                tell(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Let this process end when the one that started it does, killed included; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def list_effect_sizes() -> dict[str, Any]:
    """Every named constant of the simulation, `module.NAME` to value: what the signals were made with."""
    modules: tuple[ModuleType, ...] = (hypnogram, night, brain_signals, body_signals, artefacts)
    return {
        f"{module.__name__.rsplit('.', 1)[-1]}.{name}": value
        for module in modules
        for name, value in sorted(vars(module).items())
        if name.isupper() and isinstance(value, int | float | tuple | Mapping)
    }


def _claim_folder(out: Location, arguments: dict[str, Any]) -> None:
    """Make the folder this call's, or refuse it if it holds anything else."""
    marker = out / MARKER
    text = json.dumps(
        {"simulated": True, "format": FORMAT, "arguments": arguments, "effect_sizes": list_effect_sizes()},
        indent=1,
        sort_keys=True,
    )
    if marker.exists():
        found = marker.read_text()
        if found != text + "\n":
            raise FileExistsError(
                f"{out} must hold this same simulation, but holds {_describe(found)}; asked for: {arguments}. "
                "Choose another folder, or remove this one."
            )
    elif out.info().type == pafs.FileType.File or out.list():
        raise FileExistsError(
            f"{out} must be a new or empty folder, or hold an earlier run of the same simulation, but it is neither "
            f"(it has no {MARKER}). Choose another folder."
        )
    else:
        out.make_folder()
        _write_once(marker, text + "\n")


def _describe(found: str) -> str:
    try:
        said = json.loads(found)
        return f"one with {said['arguments']} (format {said['format']}, or other effect sizes)"
    except (ValueError, KeyError, TypeError):
        return f"a {MARKER} that cannot be read"


def _write_once(place: Location, text: str) -> None:
    """Write a file whole or not at all, and leave it alone if it says the same already."""
    if not place.exists() or place.read_text() != text:
        place.write_text(text)

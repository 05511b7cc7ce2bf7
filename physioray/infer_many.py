"""Reads a folder of recordings with a trained model on a Ray cluster, every recording a task.

Every recording has a folder of its own and a row in the ledger, accepted or with its reason; run again, it does what
is missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
from threadpoolctl import threadpool_limits

from physioray.checkpoint import check_identity
from physioray.config import IngestConfig, hash_config
from physioray.data.ledger import (
    LedgerRow,
    hide_credentials,
    key_entries,
    read_rows,
    reject,
    stamp_files,
    write_row,
)
from physioray.data.records import RecordEntry, RejectedRecording
from physioray.data.selection import read_jumps
from physioray.data.shards import name_error, run_tasks, use_ray
from physioray.infer import PAGE_FILE, infer_recording
from physioray.pretrained import PretrainedModel, pack_model, unpack_model
from physioray.storage import Location, is_committed, open_location

SETTINGS_FILE = "settings.json"
LEDGER_FILE = "ledger.csv"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One recording, small enough to be sent; the model comes by reference."""

    key: str
    entry: RecordEntry
    source: str
    out: str
    discontinuities: tuple[int, ...]
    settings: IngestConfig


def infer_many(
    source: Location,
    entries: Sequence[RecordEntry],
    model: PretrainedModel,
    out: Location,
    *,
    settings: IngestConfig | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> list[LedgerRow]:
    """Read every recording of a source; one that cannot be used is a row that says why.

    Args:
        source: folder or bucket.
        entries: its recordings.
        model: sent to the workers, so it need not lie where they can reach it.
        out: folder or bucket: a folder per recording, `ledger/`, and `ledger.csv` at the end.
        settings: as for `infer.infer_recording`.
        address: a running Ray cluster; one is started here for the time if None.
        progress: called with done, total and a note.

    Raises:
        StorageError: `out` holds the reading of another source or by another model.
        KeyboardInterrupt: after all tasks have been stopped; the same call continues.
    """
    used = settings or model.preprocessing
    identity = {
        "source": hide_credentials(source.uri),
        "weights_sha256": model.description["weights_sha256"],
        "settings": hash_config(used),
    }
    place = out / SETTINGS_FILE
    if place.exists():
        check_identity({"identity": place.read_json()}, identity, place)
    out.make_folder()
    place.write_json(identity)
    keyed, jumps = key_entries(entries), read_jumps(source)
    rows = _find_finished(source, out, keyed)
    jobs = [
        _Job(
            key=key,
            entry=entry,
            source=source.uri,
            out=out.uri,
            discontinuities=tuple(jumps.get(entry.name, ())),
            settings=used,
        )
        for key, entry in keyed.items()
        if key not in rows
    ]
    _run(jobs, rows, model, out, address, lambda: _report(progress, rows, len(keyed)))
    ordered = [rows[key] for key in keyed]
    (out / LEDGER_FILE).write_text(_tabulate(ordered))
    return ordered


def _find_finished(source: Location, out: Location, keyed: Mapping[str, RecordEntry]) -> dict[str, LedgerRow]:
    """Rows that need no more work: their recordings are as they were, and what was written is whole."""
    rows = read_rows(out, keyed)
    return {
        key: row
        for key, row in rows.items()
        if row.path == keyed[key].path
        and row.stamp == stamp_files(source, keyed[key])
        and row.kind != "internal"
        and (not row.accepted or is_committed(out / key))
    }


def _run(
    jobs: Sequence[_Job],
    rows: dict[str, LedgerRow],
    model: PretrainedModel,
    out: Location,
    address: str | None,
    report: Callable[[], None],
) -> None:
    report()
    if not jobs:
        return
    with use_ray(address):
        shared = ray.put((model.description["weights_sha256"], pack_model(model)))
        with closing(run_tasks(jobs, partial(_read_one, shared=[shared]))) as outcomes:
            for job, outcome in outcomes:
                if isinstance(outcome, Exception):
                    outcome = reject(job.key, job.entry, "internal", f"internal error: {name_error(outcome)}")
                    write_row(out, outcome)
                rows[job.key] = outcome
                report()


def _report(progress: Progress | None, rows: Mapping[str, LedgerRow], total: int) -> None:
    if progress is not None:
        rejected = sum(not row.accepted for row in rows.values())
        progress(len(rows), total, f"{rejected} rejected")


def _read_one(job: _Job, shared: list[ray.ObjectRef]) -> LedgerRow:
    """The task: one recording to its folder, then its ledger row."""
    with threadpool_limits(1):
        pa.set_cpu_count(1)
        source, out = open_location(job.source), open_location(job.out)
        try:
            model = _unpack(shared[0])
            facts = infer_recording(
                source, job.entry, model, out / job.key, discontinuities=job.discontinuities, settings=job.settings
            )
        except RejectedRecording as error:
            row = reject(job.key, job.entry, "recording", str(error), stamp_files(source, job.entry))
        except OSError:
            raise
        except Exception as error:
            row = reject(job.key, job.entry, "internal", f"internal error: {name_error(error)}")
        else:
            row = LedgerRow(
                key=job.key,
                recording=job.entry.name,
                path=job.entry.path,
                kind="accepted",
                facts=_shorten(facts),
                stamp=stamp_files(source, job.entry),
            )
        write_row(out, row)
        return row


@lru_cache(maxsize=1)
def _unpack(reference: ray.ObjectRef) -> PretrainedModel:
    """The model of this worker process: opened once, not once per recording."""
    import torch

    torch.set_num_threads(1)
    digest, files = ray.get(reference)
    return unpack_model(files, f"the model {digest[:12]} sent to this worker")


def _shorten(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a summary."""
    sleep = summary["tasks"].get("sleep", {})
    return {
        "hours": summary["hours"],
        "windows": summary["windows"],
        "usable_windows": summary["usable_windows"],
        "present": [name for name, entry in summary["modalities"].items() if entry["present_windows"]],
        "doubtful": [name for name, entry in summary["channels"].items() if not entry["plausible"]],
        "minutes": sleep.get("minutes", {}),
        "simulated_recording": summary["simulated_recording"],
        "simulated_training": summary["simulated_training"],
    }


def _tabulate(rows: Sequence[LedgerRow]) -> str:
    """The ledger as a table that a spreadsheet opens."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    names = ("recording", "path", "kind", "reason", "hours", "windows", "usable_windows", "present", "doubtful", "page")
    writer.writerow([*names, "trained_on"])
    for row in rows:
        facts = row.facts
        numbers = [facts.get(name, "") for name in ("hours", "windows", "usable_windows")]
        lists = ["+".join(facts.get(name, [])) for name in ("present", "doubtful")]
        page = f"{row.key}/{PAGE_FILE}" if row.accepted else ""
        told = ("SIMULATED signals" if facts["simulated_training"] else "recorded signals") if facts else ""
        writer.writerow([row.recording, row.path, row.kind, row.reason, *numbers, *lists, page, told])
    return sink.getvalue()

"""Turns a source of recordings into a cohort on a Ray cluster, every recording a task, and can be interrupted anywhere.

A task reads its own recording and writes its own shard and ledger row; only small facts come back to the driver.
A second run with the same settings does what is missing, and starts Ray only if something is.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.util.metrics
from threadpoolctl import threadpool_limits

from physioray.config import IngestConfig
from physioray.data.convert import convert_recording
from physioray.data.ledger import (
    SHARDS,
    IngestError,
    LedgerRow,
    StoredShard,
    claim_cohort,
    describe_identity,
    find_finished,
    key_entries,
    read_rows,
    reject,
    reject_same_name,
    reject_same_signal,
    remove_leftovers,
    stamp_files,
    stamp_inputs,
    write_row,
)
from physioray.data.manifest import IngestSummary, publish_cohort
from physioray.data.records import RecordEntry, RejectedRecording, is_simulated, list_records
from physioray.data.subjects import SubjectFacts, read_discontinuities, read_subject_facts
from physioray.local_cluster import start_local_cluster
from physioray.signals import BATCH_ROWS
from physioray.storage import Location, hash_bytes, is_disk_full, open_location
from physioray.telemetry import export_ingest

_CRASH_RETRIES = 2
_NAMED = 5

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far ingest is: recordings accepted (`done`), rejected and in all, hours of accepted signal, and time.

    `seconds_left` is None until a recording has been finished by this run.
    """

    done: int
    rejected: int
    total: int
    hours: float
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that a task needs, small enough to be sent."""

    key: str
    entry: RecordEntry
    source: str
    anonymous: bool
    cohort: str
    settings: IngestConfig
    subject: SubjectFacts | None
    discontinuities: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _DiskFull:
    """Outcome of a task that found no space for its files."""

    path: str


def ingest_cohort(
    source_uri: str,
    cohort_uri: str,
    settings: IngestConfig = IngestConfig(),  # noqa: B008 (frozen)
    *,
    anonymous: bool = False,
    strict: bool = False,
    address: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestSummary:
    """Convert every recording of a source and write a cohort; what an earlier run finished is kept.

    Args:
        source_uri: folder or bucket in the layout of PhysioNet.
        cohort_uri: folder or bucket to write, empty or of the same source and settings.
        settings: see IngestConfig.
        anonymous: read the source as a public bucket, without credentials.
        strict: rejected recordings are an error, raised once all others are finished.
        address: a running Ray cluster; if None that of RAY_ADDRESS, or one started here for the time.
        progress: called at the start and whenever a recording is finished.

    Raises:
        StorageError: the source is missing, empty or unreadable.
        IngestError: the cohort was made otherwise, no recording was accepted, the disk is full, or `strict`.
        KeyboardInterrupt: after all tasks have been stopped; the same call continues.
    """
    began = time.monotonic()
    source, cohort = open_location(source_uri, anonymous=anonymous), open_location(cohort_uri)
    try:
        summary = _ingest(source, cohort, settings, anonymous, address, progress, began)
    except OSError as error:
        if is_disk_full(error):
            raise _explain_disk_full(cohort) from error
        raise
    if strict and summary.rejected:
        raise IngestError(
            f"No recording may be rejected (strict), but {len(summary.rejected)} of "
            f"{len(summary.rejected) + summary.manifest['counts']['recordings']} were: "
            f"{_name_rejected(summary.rejected)}. Mend or remove them and run the same command."
        )
    return summary


def _ingest(
    source: Location,
    cohort: Location,
    settings: IngestConfig,
    anonymous: bool,
    address: str | None,
    progress: Callable[[Progress], None] | None,
    began: float,
) -> IngestSummary:
    entries = list_records(source)
    subjects, jumps = read_subject_facts(source), read_discontinuities(source)
    identity = describe_identity(source, settings)
    claim_cohort(cohort, identity)
    keyed = key_entries(entries)
    told = {key: (subjects.get(entry.name), tuple(jumps.get(entry.name, ()))) for key, entry in keyed.items()}
    rows = find_finished(cohort, source, keyed, rows=read_rows(cohort, keyed), told=told)
    for row in reject_same_name(source, keyed):
        if row.key not in rows:
            write_row(cohort, row)
            rows[row.key] = row
    jobs = [
        _Job(
            key=key,
            entry=entry,
            source=source.uri,
            anonymous=anonymous,
            cohort=cohort.uri,
            settings=settings,
            subject=told[key][0],
            discontinuities=told[key][1],
        )
        for key, entry in keyed.items()
        if key not in rows
    ]
    _run_jobs(
        jobs, rows, cohort, address, lambda finished: _report(progress, cohort, rows, len(keyed), finished, began)
    )
    for row in reject_same_signal(source, keyed, rows.values()):
        write_row(cohort, row)
        rows[row.key] = row
    rejected = {row.path: row.reason for row in rows.values() if not row.accepted}
    if len(rejected) == len(rows):
        raise IngestError(
            f"At least one recording of {source} must be usable, but all {len(rows)} were rejected: "
            f"{_name_rejected(rejected)}."
        )
    ordered = [rows[key] for key in keyed]
    simulated = is_simulated(source, entries)
    manifest = publish_cohort(cohort, ordered, settings, identity=identity, simulated=simulated)
    remove_leftovers(cohort, ordered)
    return IngestSummary(
        cohort=str(cohort),
        manifest=manifest,
        rejected={row.path: row.reason for row in ordered if not row.accepted},
        converted=len(jobs),
        seconds=time.monotonic() - began,
    )


def _report(
    progress: Callable[[Progress], None] | None,
    cohort: Location,
    rows: Mapping[str, LedgerRow],
    total: int,
    finished_now: int,
    began: float,
) -> None:
    accepted = [row for row in rows.values() if row.accepted]
    hours = sum(row.facts["hours"] for row in accepted)
    if ray.is_initialized():
        outcomes = {"accepted": len(accepted), "rejected": len(rows) - len(accepted), "waiting": total - len(rows)}
        export_ingest(ray.util.metrics, cohort.name, outcomes, hours)
    if progress is None:
        return
    seconds = time.monotonic() - began
    progress(
        Progress(
            done=len(accepted),
            rejected=len(rows) - len(accepted),
            total=total,
            hours=hours,
            seconds=seconds,
            seconds_left=seconds / finished_now * (total - len(rows)) if finished_now else None,
        )
    )


def _run_jobs(
    jobs: Sequence[_Job],
    rows: dict[str, LedgerRow],
    cohort: Location,
    address: str | None,
    report: Callable[[int], None],
) -> None:
    """Run all jobs on the cluster and put their rows into `rows`; stop at the first full disk."""
    report(0)
    if not jobs:
        return
    with use_ray(address), closing(run_tasks(jobs, _convert_and_store)) as outcomes:
        for number, (job, outcome) in enumerate(outcomes, start=1):
            if isinstance(outcome, _DiskFull):
                raise _explain_disk_full(cohort, outcome.path)
            if isinstance(outcome, Exception):
                # The task could not write its own row.
                outcome = reject(job.key, job.entry, "internal", f"internal error: {name_error(outcome)}")
                write_row(cohort, outcome)
            rows[job.key] = outcome
            report(number)


@contextmanager
def use_ray(address: str | None) -> Iterator[None]:
    """Connect to the given cluster, or start one here; leave things as they were found."""
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        start_local_cluster(cpus, logging_level=logging.ERROR)
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(
    jobs: Sequence[Job], work: Callable[[Job], Outcome]
) -> Generator[tuple[Job, Outcome | Exception], None, None]:
    """Outcomes of `work` in the order of finishing, or the error that Ray reports.

    A bounded number of tasks is in flight, and none outlives the iterator.
    """
    # A task whose worker process dies is tried again by Ray; one that raises is not.
    name = getattr(getattr(work, "func", work), "__name__", "work")  # as the cluster's dashboard shows the tasks
    task: Any = ray.remote(num_cpus=1, max_retries=_CRASH_RETRIES)(_call).options(name=name)
    waiting = deque(jobs)
    running: dict[ray.ObjectRef, Job] = {}
    try:
        while waiting or running:
            # Read anew each time: the cluster may grow.
            most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < most:
                job = waiting.popleft()
                running[task.remote(work, job)] = job
            # The timeout lets ctrl-C through and takes up new nodes.
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for reference in ready:
                job = running.pop(reference)
                outcome: Outcome | Exception
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = error
                yield job, outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=10.0)


def _call(work: Callable[[Job], Outcome], job: Job) -> Outcome:
    return work(job)


def _convert_and_store(job: _Job) -> LedgerRow | _DiskFull:
    """The task: one recording to its shard, then its ledger row."""
    with threadpool_limits(1):
        pa.set_cpu_count(1)
        source, cohort = open_location(job.source, anonymous=job.anonymous), open_location(job.cohort)
        try:
            row = _convert(job, source, cohort)
            write_row(cohort, row)
            return row
        except OSError as error:
            if is_disk_full(error):
                return _DiskFull(path=job.entry.path)
            raise


def _convert(job: _Job, source: Location, cohort: Location) -> LedgerRow:
    try:
        converted = convert_recording(
            source, job.entry, job.settings, subject=job.subject, discontinuities=job.discontinuities
        )
        shard = write_shard(cohort, f"{SHARDS}/{job.key}.arrow", converted.table)
    except RejectedRecording as error:
        return reject(job.key, job.entry, "recording", str(error), stamp_files(source, job.entry))
    except Exception as error:
        if is_disk_full(error):
            raise
        return reject(job.key, job.entry, "internal", f"internal error: {name_error(error)}")
    return LedgerRow(
        key=job.key,
        recording=job.entry.name,
        path=job.entry.path,
        kind="accepted",
        facts=converted.facts,
        shard=shard,
        stamp=stamp_inputs(source, job.entry, (job.subject, job.discontinuities)),
    )


def write_shard(cohort: Location, file: str, table: pa.Table) -> StoredShard:
    """Write a recording's windows as an uncompressed Arrow IPC file in record batches of `BATCH_ROWS` rows.

    Args:
        cohort: folder of the cohort.
        file: place within it.
        table: one row per window, columns as in `signals.shard_schema`.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
            writer.write_batch(batch)
    content = sink.getvalue()
    (cohort / file).write_bytes(content)
    return StoredShard(file=file, sha256=hash_bytes(content), bytes=content.size, rows=table.num_rows)


def _explain_disk_full(cohort: Location, path: str | None = None) -> IngestError:
    where = f" while writing {path}" if path else ""
    return IngestError(
        f"{cohort} must have space left, but its disk became full{where}. "
        "Free some and run the same command: it continues with what is missing."
    )


def name_error(error: BaseException) -> str:
    """The cause of an error in one line, with the place in this package that raised it."""
    cause = getattr(error, "cause", None) or error
    frames = traceback.extract_tb(cause.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})" if frames else ""
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}{place}"


def _name_rejected(rejected: Mapping[str, str]) -> str:
    named = "; ".join(f"{path} ({reason})" for path, reason in list(rejected.items())[:_NAMED])
    more = len(rejected) - _NAMED
    return named + (f"; and {more} more" if more > 0 else "")

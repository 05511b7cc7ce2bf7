"""Shards of a bucket: copied once within a bound, read by range beyond it, whole in spite of a bucket that stutters."""

from __future__ import annotations

import http.client
import logging
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from physioray.data import gather
from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource, WindowReader, count_files_allowed
from physioray.data.mirror import IDLE_SECONDS, Mirror, measure_folder
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.storage import StorageError, hash_bytes, open_location
from tests.written_cohorts import write_cohort


class Bucket:
    """An S3 server behind a gate that counts requests, and refuses the first ones of every object if told so."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.address = self.moto.get_host_and_port()
        self.reads: Counter[str] = Counter()
        self.refusals: list[int] = []
        self.seen: Counter[tuple[str, str]] = Counter()
        bucket = self

        class Gate(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.read_body()
                key = (self.command, self.path)
                bucket.seen[key] += 1
                if bucket.seen[key] <= len(bucket.refusals):
                    self.answer(bucket.refusals[bucket.seen[key] - 1], {}, b"")
                    return
                if self.command == "GET" and self.path.endswith(".arrow"):
                    bucket.reads[self.path] += 1
                server = http.client.HTTPConnection(*bucket.address, timeout=30)
                skipped = ("transfer-encoding", "content-length", "expect")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
                server.request(self.command, self.path, body=body, headers=headers)
                reply = server.getresponse()
                self.answer(reply.status, dict(reply.getheaders()), reply.read())
                server.close()

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

            def log_message(self, *_: object) -> None:
                pass

        self.gate = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
        threading.Thread(target=self.gate.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.gate.shutdown()
        self.moto.stop()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    found = Bucket()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.gate.server_port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PHYSIORAY_MIRROR": str(tmp_path / "mirror"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="nights")
    yield found
    found.stop()


def upload(folder: Path) -> str:
    client = boto3.client("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="nights", Key=f"cohort/{path.relative_to(folder)}", Body=path.read_bytes())
    return "s3://nights/cohort"


def add_hashes(cohort: Cohort) -> Cohort:
    """The manifest as ingest writes it, with the hash of every shard."""
    for row in cohort.manifest["recordings"]:
        row["sha256"] = hash_bytes((cohort.location / row["file"]).read_bytes())
    (cohort.location / "manifest.json").write_json(cohort.manifest)
    return Cohort.open(cohort.location.uri)


@pytest.fixture
def local(tmp_path: Path) -> Cohort:
    return add_hashes(write_cohort(tmp_path / "cohort", [70, 20, 20, 20], modalities=("eeg",)))


def read_all(cohort: Cohort) -> np.ndarray:
    return WindowReader(cohort).read(cohort.find_windows()).signals["eeg"]


def test_every_pass_but_the_first_reads_the_local_copy(bucket: Bucket, local: Cohort, tmp_path: Path) -> None:
    uri = upload(tmp_path / "cohort")
    source = GatherSource(Cohort.open(uri), local.find_windows(), batch_size=16)
    for number in range(3):
        mine = GatherSource(local, local.find_windows(), batch_size=16).iterate_pass(number)
        for one, other in zip(mine, source.iterate_pass(number), strict=True):
            assert np.array_equal(one.signals["eeg"], other.signals["eeg"])
    assert set(bucket.reads.values()) == {1} and len(bucket.reads) == 4
    # Another process, or another run: nothing is read again.
    assert np.array_equal(read_all(Cohort.open(uri)), read_all(local))
    assert sum(bucket.reads.values()) == 4


def test_a_run_in_a_bucket_has_the_losses_of_one_in_a_folder(bucket: Bucket, local: Cohort, tmp_path: Path) -> None:
    uri = upload(tmp_path / "cohort")
    tiny = find_preset("tiny")

    def run(cohort: str, out: str) -> list[float]:
        job = PretrainJob.from_preset(tiny, cohort=cohort, out=out, threads=1, splits=("train",))
        job = replace(job, model=replace(job.model, modalities=("eeg",)), train=replace(job.train, passes=2))
        return [record["loss"] for record in pretrain(job).history]

    assert run(uri, "s3://nights/run") == run(str(local.location), str(tmp_path / "run"))
    assert open_location("s3://nights/run/checkpoints/last.pt").exists()
    assert "shards" in next(iter(bucket.reads))


def test_the_mirror_stays_within_its_bound_and_the_rest_is_read_by_range(
    bucket: Bucket, local: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(tmp_path / "cohort")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cohort" / "shards").iterdir())
    monkeypatch.setenv("PHYSIORAY_MIRROR_GB", str((sizes[0] + sizes[1] + 1000) / 1e9))
    there = Cohort.open(uri)
    assert np.array_equal(read_all(there), read_all(local))
    kept = tmp_path / "mirror" / there.fingerprint
    assert measure_folder(kept) <= sizes[0] + sizes[1] + 1000 and len(list(kept.glob("*.arrow"))) == 2
    assert not list(kept.glob("*.part"))
    copied = {path for path in bucket.reads if bucket.reads[path] == 1}
    bucket.reads.clear()
    read_all(Cohort.open(uri))
    assert bucket.reads and not copied & set(bucket.reads), "what fits is not thrown out for what does not"


@pytest.mark.usefixtures("bucket")
def test_what_is_read_by_range_is_kept_within_a_bound_and_read_again_when_it_is_asked_for(
    local: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(tmp_path / "cohort")
    monkeypatch.setenv("PHYSIORAY_MIRROR_GB", "0")
    most = 60 * 2 * 3000  # two of the four shards have no room in it beside a third
    monkeypatch.setattr(gather, "MOST_COPIED_BYTES", most)
    reader, mapped = WindowReader(Cohort.open(uri)), WindowReader(local)
    for start in (0, 70, 90, 110, 0):
        ids = np.arange(start, start + 20)
        assert np.array_equal(reader.read(ids).signals["eeg"], mapped.read(ids).signals["eeg"])
        assert sum(shard.copied_bytes for shard in reader.shards.values()) <= most
    assert len(reader.shards) < 4 == len(mapped.shards)
    assert not any(shard.copied_bytes for shard in mapped.shards.values())


@pytest.mark.usefixtures("bucket", "local")
def test_idle_copies_of_other_cohorts_make_room_and_used_ones_do_not(tmp_path: Path) -> None:
    place = open_location(upload(tmp_path / "cohort")) / "shards/rec001.arrow"
    size = place.info().size
    idle, used = (Mirror(tmp_path / "m", name, 2.5 * size) for name in ("idle", "used"))
    assert idle.fetch(place, None) and used.fetch(place, None)
    mine = Mirror(tmp_path / "m", "mine", 2.5 * size)
    assert mine.fetch(place, None) is None
    long_ago = time.time() - 2 * IDLE_SECONDS
    os.utime(idle.folder, (long_ago, long_ago))
    assert mine.fetch(place, None) and not idle.folder.exists() and used.folder.exists()


@pytest.mark.usefixtures("bucket", "local")
def test_a_shard_that_is_not_what_the_manifest_lists_is_refused_and_not_kept(tmp_path: Path) -> None:
    uri = upload(tmp_path / "cohort")
    boto3.client("s3").put_object(Bucket="nights", Key="cohort/shards/rec002.arrow", Body=b"something else")
    with pytest.raises(StorageError, match=r"rec002\.arrow must be what the cohort's manifest lists"):
        read_all(Cohort.open(uri))
    assert not list((tmp_path / "mirror").rglob("*.part"))


def test_a_bucket_that_says_slow_down_or_stutters_is_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    local = add_hashes(write_cohort(tmp_path / "one", [5], modalities=("eeg",)))
    uri = upload(tmp_path / "one")
    bucket.seen.clear()
    bucket.refusals = [503, 500]
    assert np.array_equal(read_all(Cohort.open(uri)), read_all(local))
    place = open_location("s3://nights/result.json")
    place.write_json({"a": 1})
    assert place.read_json() == {"a": 1}
    # Everything was refused twice, and asked for a third time.
    assert len(bucket.seen) >= 4 and min(bucket.seen.values()) >= 3


def test_a_size_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHYSIORAY_MIRROR_GB", "much")
    with pytest.raises(StorageError, match="must be a number of GB"):
        Mirror.open("x")


def test_a_bucket_address_with_what_is_not_known_is_refused() -> None:
    with pytest.raises(StorageError, match="says anonymous"):
        open_location("s3://nights/cohort?anonymous=true")


def test_more_shards_than_a_process_may_hold_open_are_read_all_the_same(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", [2] * 12, modalities=("spo2",))
    reader = WindowReader(cohort)
    assert reader.most_open == count_files_allowed() // 2 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = WindowReader(cohort)
    few.most_open = 3
    order = np.random.default_rng(0).permutation(cohort.windows)
    assert np.array_equal(few.read(order).signals["spo2"], reader.read(order).signals["spo2"])
    assert len(few.shards) == 3 and len(reader.shards) == 12

"""Ingest from a public bucket, read without credentials, into a private bucket, through a real S3 API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from physioray.data.cohort import Cohort
from physioray.data.ledger import IngestError
from physioray.data.shards import ingest_cohort
from physioray.distribute import join_cluster
from physioray.storage import StorageError, open_location
from tests.buckets import serve_bucket

from .recordings_written import write_source

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    """An S3 server on this machine, and a cluster whose workers know it."""
    with serve_bucket("nights") as settings, pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        with join_cluster(cpus=2):
            yield settings["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), labelled=3, unlabelled=1)


def _upload(source: Path, bucket: str, *, public: bool) -> None:
    client = boto3.client("s3")
    access = {"ACL": "public-read"} if public else {}
    client.create_bucket(Bucket=bucket, **access)
    for path in source.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"1.0/{path.relative_to(source)}", Body=path.read_bytes(), **access)


def test_from_a_public_bucket_to_a_private_one_gives_the_bytes_of_a_folder(source: Path, tmp_path: Path) -> None:
    _upload(source, "public", public=True)
    boto3.client("s3").create_bucket(Bucket="private")
    ingest_cohort(str(source), str(tmp_path / "cohort"))
    local = Cohort.open(tmp_path / "cohort")
    summary = ingest_cohort("s3://public/1.0", "s3://private/cohorts/first", anonymous=True)
    assert summary.converted == 4 and not summary.rejected

    there = Cohort.open("s3://private/cohorts/first")
    assert there.fingerprint == local.fingerprint
    for mine, other in zip(local.recordings, there.recordings, strict=True):
        assert (local.location / mine.file).read_bytes() == (there.location / other.file).read_bytes()
    assert there.read_labels("sleep").tolist() == local.read_labels("sleep").tolist()


def test_an_interrupted_cohort_in_a_bucket_is_completed(source: Path) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="resumed")
    ingest_cohort(str(source), "s3://resumed/cohort")
    whole = {item.path: item.read_bytes() for item in open_location("s3://resumed/cohort/shards").list()}
    for key in ("manifest.json", "ledger/tr00-0001.json", "shards/tr00-0002.arrow"):
        client.delete_object(Bucket="resumed", Key=f"cohort/{key}")
    assert ingest_cohort(str(source), "s3://resumed/cohort").converted == 2
    assert {item.path: item.read_bytes() for item in open_location("s3://resumed/cohort/shards").list()} == whole
    assert ingest_cohort(str(source), "s3://resumed/cohort").converted == 0
    assert Cohort.open("s3://resumed/cohort").windows == 32


def test_a_bucket_that_is_closed_or_absent_is_one_line_that_names_it(source: Path, tmp_path: Path) -> None:
    # The credentials would open the closed bucket; asked to read without them, ingest does not use them.
    _upload(source, "closed", public=False)
    assert ingest_cohort("s3://closed/1.0", str(tmp_path / "allowed")).converted == 4
    for bucket in ("closed", "absent"):
        with pytest.raises((StorageError, IngestError), match=f"s3://{bucket}/1.0") as caught:
            ingest_cohort(f"s3://{bucket}/1.0", str(tmp_path / "cohort"), anonymous=True)
        assert "\n" not in str(caught.value)

"""Windows per second from the memory map to the training loop: by gather, by Ray Data, and what others would use.

All read the same windows, 24 KB each, from the system's cache. The limit is numpy picking rows at random out of one
mapped array per modality into memory that is there already, which no reader of any kind can do without.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource, view_tensor
from physioray.data.stream import StreamSource
from physioray.distribute import join_cluster
from tests.benchmarks.comparison import OURS, REPEATS, Comparison, Goal, Notebook, take_turns
from tests.benchmarks.nights import repeat_night, simulate_nights
from tests.buckets import serve_bucket

BATCH = 256
FILES, RECORDINGS = 24, 96
LIMIT = "random gather from the map, numpy"
FIRST_BATCH = 0.3
SIMULATED = "SIMULATED night, repeated"


@dataclass(frozen=True)
class Maps:
    """Where the windows lie: as a cohort, as one mapped array per modality, and as Parquet."""

    cohort: Cohort
    arrays: Mapping[str, NDArray[np.int16]]
    parquet: Path


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maps]:
    folder = tmp_path_factory.mktemp("reading")
    torch.set_num_threads(1)
    cohort = repeat_night(folder, simulate_nights(folder, 1)[0], folder / "cohort", RECORDINGS, FILES)
    arrays = {}
    (folder / "parquet").mkdir()
    tables = [cohort.open_shard(recording).read_all() for recording in cohort.recordings[:FILES]]
    for name, modality in cohort.modalities.items():
        views = [view_tensor(table.column(name).combine_chunks(), modality.samples) for table in tables]
        np.save(folder / f"{name}.npy", np.concatenate(views))
        arrays[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
    for number, table in enumerate(tables):
        columns = {name: table.column(name).combine_chunks() for name in table.schema.names}
        plain = {name: column.storage if name in arrays else column for name, column in columns.items()}
        pq.write_table(pa.table(plain), folder / "parquet" / f"{number:03d}.parquet", compression="none")
    yield Maps(cohort, arrays, folder / "parquet")
    shutil.rmtree(folder)


def measure_rate(batches: Iterator[Any], count: Callable[[Any], int] = len) -> float:
    """Windows per second of a whole pass, its start included."""
    began = time.perf_counter()
    windows = sum(count(batch) for batch in batches)
    return windows / (time.perf_counter() - began)


def gather_plainly(maps: Maps, turn: int) -> Iterator[int]:
    """The limit: rows in a random order, into arrays that are used again."""
    arrays = list(maps.arrays.values())
    out = [np.empty((BATCH, array.shape[1]), np.int16) for array in arrays]
    order = np.random.default_rng(turn).permutation(len(arrays[0]))
    for first in range(0, len(order) - BATCH + 1, BATCH):
        for array, rows in zip(arrays, out, strict=True):
            np.take(array, order[first : first + BATCH], axis=0, out=rows, mode="clip")
        yield BATCH


class _MapDataset(Dataset[dict[str, torch.Tensor]]):
    """What one would write for a DataLoader: views into the shards' maps, and a batch of rows copied from them."""

    def __init__(self, cohort: Cohort) -> None:
        self.rows: list[tuple[dict[str, NDArray[np.int16]], int]] = []
        for recording in cohort.recordings:
            reader = cohort.open_shard(recording)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                views = {
                    name: view_tensor(batch.column(name), cohort.modalities[name].samples) for name in cohort.modalities
                }
                self.rows += [(views, row) for row in range(len(batch))]
        self.names = list(cohort.modalities)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = [self.rows[place] for place in places]
        return {name: torch.from_numpy(np.stack([views[name][row] for views, row in rows])) for name in self.names}


def _count_loaded(batch: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def _keep(batch: Any) -> Any:
    return batch


@pytest.mark.benchmark_run
def test_gather_is_near_the_limit_and_ahead_of_a_dataloader(maps: Maps, notebook: Notebook) -> None:
    cohort = maps.cohort
    windows = cohort.find_windows()[: len(next(iter(maps.arrays.values())))]
    source = GatherSource(cohort, windows, batch_size=BATCH)
    dataset = torch.utils.data.Subset(_MapDataset(cohort), windows.tolist())
    loaders = {
        workers: DataLoader(
            dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=_keep,
            persistent_workers=workers > 0,
        )
        for workers in (0, 2)
    }  # fmt: skip
    turn = iter(range(100))
    contenders: dict[str, Callable[[], float]] = {
        OURS: lambda: measure_rate(source.iterate_pass(next(turn))),
        LIMIT: lambda: measure_rate(gather_plainly(maps, next(turn)), int),
        "DataLoader, 0 workers": lambda: measure_rate(iter(loaders[0]), _count_loaded),
        "DataLoader, 2 workers": lambda: measure_rate(iter(loaders[2]), _count_loaded),
    }
    for contender in contenders.values():  # maps are touched, workers started
        contender()
    notebook.keep(
        Comparison(
            title="Shuffled batches by gather",
            unit="windows/s",
            better="more",
            figures=take_turns(contenders),
            goals=[
                Goal(against=LIMIT, ratio=0.9),
                Goal(against="DataLoader, 0 workers", ratio=1.0),
                Goal(against="DataLoader, 2 workers", ratio=1.0),
            ],
            note=f"{SIMULATED}; one thread, batches of {BATCH}",
        )
    )


@ray.remote(num_cpus=1)
class _Worker:
    """One of two training workers, which does nothing but take its batches."""

    def __init__(self, uri: str, rank: int) -> None:
        cohort = Cohort.open(uri)
        self.source = StreamSource(cohort, cohort.find_windows(), batch_size=BATCH, rank=rank, world_size=2)

    def take(self, number: int) -> int:
        return sum(len(batch) for batch in self.source.iterate_pass(number))


class _Passes:
    """Passes of one worker, each with the seconds until its first batch."""

    def __init__(self, source: StreamSource) -> None:
        self.source, self.number, self.waits = source, 0, list[float]()

    def take(self) -> float:
        self.number += 1
        return measure_rate(self._note_first(time.perf_counter()))

    def _note_first(self, began: float) -> Iterator[Any]:
        for step, batch in enumerate(self.source.iterate_pass(self.number)):
            if step == 0:
                self.waits.append(time.perf_counter() - began)
            yield batch


def _take_by_two(workers: Sequence[Any], number: int) -> float:
    began = time.perf_counter()
    windows = sum(ray.get([worker.take.remote(number) for worker in workers]))
    return windows / (time.perf_counter() - began)


@pytest.mark.benchmark_run
@pytest.mark.ray
def test_ray_data_keeps_half_of_the_limit_and_begins_at_once(maps: Maps, notebook: Notebook) -> None:
    cohort, parquet = maps.cohort, "read_parquet of the same windows"
    with join_cluster(cpus=4):
        passes = _Passes(StreamSource(cohort, cohort.find_windows(), batch_size=BATCH))
        workers = [_Worker.remote(cohort.location.uri, rank) for rank in range(2)]  # type: ignore[attr-defined]
        names = list(cohort.modalities)

        def read_parquet() -> float:
            read = ray.data.read_parquet(str(maps.parquet), columns=[*names, "label_sleep"])
            return measure_rate(iter(read.iter_batches(batch_size=BATCH, batch_format="pyarrow")), len)

        turn = iter(range(100))
        contenders: dict[str, Callable[[], float]] = {
            "one": passes.take,
            "two": lambda: _take_by_two(workers, next(turn)),
            LIMIT: lambda: measure_rate(gather_plainly(maps, next(turn)), int),
            parquet: read_parquet,
        }
        for contender in contenders.values():
            contender()
        passes.waits.clear()
        figures = take_turns(contenders)
    for name, words in (("one", "one worker"), ("two", "two workers")):
        notebook.keep(
            Comparison(
                title=f"Shuffled batches by Ray Data to {words}",
                unit="windows/s",
                better="more",
                figures={OURS: figures[name], LIMIT: figures[LIMIT], parquet: figures[parquet]},
                goals=[Goal(against=LIMIT, ratio=0.5), Goal(against=parquet, ratio=8.0)],
                note=f"{SIMULATED}; whole passes of {cohort.windows:,} windows (Parquet: a quarter), start included",
            )
        )
    notebook.keep(
        Comparison(
            title="First batch of a pass by Ray Data",
            unit="s",
            better="less",
            figures={OURS: passes.waits, "allowed": [FIRST_BATCH] * REPEATS},
            goals=[Goal(against="allowed", ratio=1.0)],
            note=f"{SIMULATED}; after the first pass",
        )
    )


@pytest.mark.benchmark_run
@pytest.mark.ray
def test_shards_in_a_bucket_cold_and_mirrored(
    maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: Notebook
) -> None:
    boto3 = pytest.importorskip("boto3")
    bucket = ExitStack()
    settings = bucket.enter_context(serve_bucket("nights")) | {"PHYSIORAY_MIRROR": str(tmp_path / "mirror")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    manifest = maps.cohort.manifest | {"recordings": maps.cohort.manifest["recordings"][:8]}
    for row in manifest["recordings"]:
        client.upload_file(str(Path(maps.cohort.location.path, row["file"])), "nights", f"cohort/{row['file']}")
    with join_cluster(cpus=4):
        made: list[StreamSource] = []

        def open_anew() -> float:
            # Under another fingerprint nothing of it is mirrored, nor open in any process.
            from physioray.storage import open_location

            place = open_location("s3://nights/cohort")
            (place / "manifest.json").write_json(manifest | {"fingerprint": f"cohort{len(made)}"})
            cohort = Cohort.open(place.uri)
            made.append(StreamSource(cohort, cohort.find_windows(), batch_size=BATCH))
            return measure_rate(made[-1].iterate_pass(0))

        local = StreamSource(
            maps.cohort, maps.cohort.find_windows()[: sum(row["rows"] for row in manifest["recordings"])],
            batch_size=BATCH,
        )  # fmt: skip
        for _ in range(2):
            measure_rate(local.iterate_pass(0))
        figures: dict[str, list[float]] = {OURS: [], "cold, while shards are mirrored": [], "local shards": []}
        for number in range(1, REPEATS + 1):
            figures["cold, while shards are mirrored"].append(open_anew())
            measure_rate(made[-1].iterate_pass(number))  # every reading process has opened its shards
            figures[OURS].append(measure_rate(made[-1].iterate_pass(number + 1)))
            figures["local shards"].append(measure_rate(local.iterate_pass(number)))
    bucket.close()
    notebook.keep(
        Comparison(
            title="Shuffled batches by Ray Data to one worker, shards on S3, mirrored",
            unit="windows/s",
            better="more",
            figures=figures,
            note=f"{SIMULATED}; S3 by moto on this machine; passes of {len(local.plan.window_ids):,} windows",
        )
    )

"""What looking into a checkpoint leaves: maps, numbers with intervals, examples; kept whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from physioray.observation import TokenGrid
from physioray.reconstruction_quality import Example
from physioray.signals import LookupMiss
from physioray.storage import Location, StorageError, commit_folder, is_committed
from physioray.subject_sums import Number

ANALYSIS_FILE = "analysis.json"
ARRAYS_FILE = "arrays.npz"
NUMBERS_FILE = "numbers.parquet"


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One checkpoint, explained.

    Attributes:
        name: what the reader of the figures calls it.
        identity: hash of all that the result depends on: weights, cohort, settings.
        facts: checkpoint, strategy, cohort and its fingerprint, `simulated`, settings, assumptions, windows by split.
        notes: what a reader must know of the numbers.
        grid: the tokens.
        layers: of the encoder.
        maps: `(layers + 1, T, T)` mean attention per layer, then the rollout; NaN where no window has both tokens.
        numbers: see `subject_sums.Number`.
        examples: by window id and modality; empty if the model does not reconstruct.
    """

    name: str
    identity: str
    facts: Mapping[str, Any]
    notes: Sequence[str]
    grid: TokenGrid
    layers: int
    maps: Float[np.ndarray, "maps t t"]
    numbers: Sequence[Number]
    examples: Mapping[int, Mapping[str, Example]]

    @property
    def simulated(self) -> bool:
        """True if the windows are of simulated nights."""
        return bool(self.facts["simulated"])

    def find(self, quantity: str, place: str, modality: str = "all") -> Number | None:
        """One number, or None where this checkpoint has none (no reconstruction, no such layer or modality)."""
        for number in self.numbers:
            if (number.quantity, number.place, number.modality) == (quantity, place, modality):
                return number
        return None

    def trace(self, quantity: str, modality: str = "all") -> list[Number]:
        """One number at all places that have it, in order.

        Raises:
            LookupMiss: there is no such quantity; the message lists those that exist.
        """
        found = [number for number in self.numbers if (number.quantity, number.modality) == (quantity, modality)]
        if not found:
            known = ", ".join(dict.fromkeys(number.quantity for number in self.numbers))
            raise LookupMiss(f"{self.name} has the quantities {known}, but not {quantity!r} of {modality!r}.")
        return found


def save_analysis(analysis: Analysis, folder: Location) -> None:
    """Write a folder that counts as written only when it is whole; `numbers.parquet` is for others to read."""
    if (folder / "done.json").exists():
        (folder / "done.json").delete()  # while files are replaced, the folder is not whole
    arrays: dict[str, Any] = {"maps": analysis.maps.astype(np.float32)}
    for window, parts in analysis.examples.items():
        for name, example in parts.items():
            for part in ("target", "output", "visible"):
                arrays[f"{window}/{name}/{part}"] = getattr(example, part)
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    (folder / ARRAYS_FILE).write_bytes(sink.getvalue())
    write_numbers([analysis], folder / NUMBERS_FILE)
    described: dict[str, Any] = {"name": analysis.name, "identity": analysis.identity, "facts": dict(analysis.facts)}
    described |= {"notes": list(analysis.notes), "tokens": dict(analysis.grid.counts), "layers": analysis.layers}
    (folder / ANALYSIS_FILE).write_json(described)
    commit_folder(folder, [ARRAYS_FILE, NUMBERS_FILE, ANALYSIS_FILE])


def load_analysis(folder: Location) -> Analysis:
    """Read what `save_analysis` has written.

    Raises:
        StorageError: no whole analysis stands there.
    """
    if not is_committed(folder):
        raise StorageError(f"{folder} must hold a finished analysis, but holds none. Run experiments/figures.py.")
    described = (folder / ANALYSIS_FILE).read_json()
    examples: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    # Pickled objects are refused: a result file never runs code.
    with np.load(io.BytesIO((folder / ARRAYS_FILE).read_bytes()), allow_pickle=False) as arrays:
        maps = arrays["maps"].astype(np.float64)
        for key in arrays.files:
            if key != "maps":
                window, name, part = key.split("/")
                examples.setdefault(int(window), {}).setdefault(name, {})[part] = arrays[key]
    return Analysis(
        name=described["name"],
        identity=described["identity"],
        facts=described["facts"],
        notes=described["notes"],
        grid=TokenGrid.of(described["tokens"]),
        layers=described["layers"],
        maps=maps,
        numbers=_read_numbers(folder / NUMBERS_FILE),
        examples={
            window: {name: Example(**arrays) for name, arrays in parts.items()} for window, parts in examples.items()
        },
    )


_OWN = ("checkpoint", "strategy", "simulated", "cohort_fingerprint", "identity")


def write_numbers(analyses: Sequence[Analysis], place: Location) -> None:
    """One table of all numbers of some checkpoints: a row per number, with the names to join scores by."""
    rows = [
        {
            "checkpoint": analysis.name,
            "strategy": analysis.facts["strategy"],
            "simulated": analysis.simulated,
            "cohort_fingerprint": analysis.facts["cohort_fingerprint"],
            "identity": analysis.identity,
            **asdict(number),
        }
        for analysis in analyses
        for number in analysis.numbers
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_number_schema()), sink, compression="zstd")
    place.write_bytes(sink.getvalue())


def _number_schema() -> pa.Schema:
    kinds = {"simulated": pa.bool_(), "windows": pa.int64(), "subjects": pa.int64()}
    texts = {*_OWN, "quantity", "place", "modality"} - set(kinds)
    names = (*_OWN, *Number.__dataclass_fields__)
    return pa.schema([(name, kinds.get(name, pa.string() if name in texts else pa.float64())) for name in names])


def _read_numbers(place: Location) -> list[Number]:
    # Without threads: Arrow's may abort a short process as it ends (apache/arrow issue 34314).
    source = pa.BufferReader(place.read_bytes())
    table = pq.ParquetFile(source, pre_buffer=False).read(use_threads=False).drop_columns(list(_OWN))
    return [Number(**row) for row in table.to_pylist()]

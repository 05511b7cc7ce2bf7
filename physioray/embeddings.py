"""Turns windows into vectors once, so that every probe after it is seconds: the cache between encoder and probe."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Int8, Int64

from physioray.data.batches import Batch
from physioray.data.cohort import Cohort
from physioray.signals import LookupMiss, label_column
from physioray.storage import Location, StorageError

_LABEL = label_column("")
_NUMBERS = ("window_id", "recording", "subject")


class EmbeddingError(ValueError):
    """Embeddings that no probe can use; the message names the windows."""


@dataclass(frozen=True)
class Embeddings:
    """What a frozen encoder (or any other description) says of some windows.

    Attributes:
        vectors: `(n, features)` float32.
        labels: `(n,)` per task, -1 where unknown.
        subject, recording: `(n,)` indices as in the cohort they come from.
        window_id: `(n,)` numbers of the windows in the cohort.
    """

    vectors: Float32[np.ndarray, "n features"]
    labels: Mapping[str, Int8[np.ndarray, " n"]]
    subject: Int64[np.ndarray, " n"]
    recording: Int64[np.ndarray, " n"]
    window_id: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.window_id)

    def select(self, chosen: Bool[np.ndarray, " n"]) -> Embeddings:
        """The windows where `chosen` `(n,)` is True, in the same order."""
        return Embeddings(
            vectors=self.vectors[chosen],
            labels={task: values[chosen] for task, values in self.labels.items()},
            subject=self.subject[chosen],
            recording=self.recording[chosen],
            window_id=self.window_id[chosen],
        )

    def find_labels(self, task: str) -> Int8[np.ndarray, " n"]:
        """Labels `(n,)` of a task.

        Raises:
            LookupMiss: the embeddings carry no such task; the message lists those they do.
        """
        if task not in self.labels:
            raise LookupMiss(f"The embeddings carry labels of {', '.join(self.labels) or 'no task'}, not of {task!r}.")
        return self.labels[task]

    def check_cohort(self, cohort: Cohort) -> None:
        """Refuse embeddings of windows that are not this cohort's.

        Raises:
            EmbeddingError: a window number is out of range, or stands in another recording or person's night.
        """
        ids = self.window_id
        fits = len(ids) == 0 or (ids.min() >= 0 and ids.max() < cohort.windows)
        if fits and len(ids):
            people = np.array([item.subject_index for item in cohort.recordings], np.int64)
            recording = cohort.locate(ids)[0]
            fits = np.array_equal(recording, self.recording) and np.array_equal(people[recording], self.subject)
        if not fits:
            raise EmbeddingError(
                f"Embeddings must be of the windows of {cohort.location} ({cohort.windows} windows of "
                f"{len(cohort.subjects)} subjects), but these {len(ids)} are of another cohort, or of an older state "
                "of it. Embed this cohort again."
            )

    def check_finite(self) -> None:
        """Refuse embeddings that hold NaN or infinity.

        Raises:
            EmbeddingError: names how many windows and the first of them.
        """
        broken = ~np.isfinite(self.vectors).all(1)
        if broken.any():
            first = ", ".join(str(number) for number in self.window_id[broken][:5])
            raise EmbeddingError(
                f"Embeddings must be finite, but {int(broken.sum())} of {len(self)} windows hold NaN or infinity "
                f"(window ids {first}{', ...' if broken.sum() > 5 else ''}). Look at the training loss and at these "
                "windows' signals."
            )

    def save(self, location: Location) -> None:
        """Write one Arrow IPC file, whole or not at all."""
        flat = pa.array(np.ascontiguousarray(self.vectors).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, max(1, self.vectors.shape[1]))
        columns = {"vectors": vectors} | {name: pa.array(getattr(self, name)) for name in _NUMBERS}
        columns |= {label_column(task): pa.array(values) for task, values in self.labels.items()}
        table = pa.table(columns)
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        location.write_bytes(sink.getvalue())

    @classmethod
    def load(cls, location: Location) -> Embeddings:
        """Read what `save` has written.

        Raises:
            StorageError: no embeddings stand there, or the file is not one.
        """
        try:
            table = pa.ipc.open_file(pa.py_buffer(location.read_bytes())).read_all().combine_chunks()
            width = table.schema.field("vectors").type.list_size
            flat = table.column("vectors").combine_chunks().flatten().to_numpy()
        except (FileNotFoundError, KeyError, pa.ArrowInvalid) as error:
            raise StorageError(f"{location} must hold embeddings, but cannot be read: {error}. Embed again.") from error
        names = [name for name in table.column_names if name.startswith(_LABEL)]
        return cls(
            vectors=flat.reshape(-1, width),
            labels={name[len(_LABEL) :]: table.column(name).to_numpy() for name in names},
            **{name: table.column(name).to_numpy() for name in _NUMBERS},
        )


def embed_windows(encode: Callable[[Batch], Float[np.ndarray, "b features"]], batches: Iterable[Batch]) -> Embeddings:
    """Describe every window of some batches by a vector.

    Args:
        encode: any description of a batch, `(B, features)`: a pretrained encoder, an untrained one, band powers.
        batches: for example `source.iterate_all()`.

    Raises:
        EmbeddingError: there was no batch, or `encode` returned another number of rows than the batch has.
    """
    vectors, kept = [], []
    for batch in batches:
        encoded = np.asarray(encode(batch), np.float32)
        if len(encoded) != len(batch):
            raise EmbeddingError(
                f"An encoder must return {len(batch)} rows for {len(batch)} windows, got {len(encoded)}."
            )
        vectors.append(encoded)
        # Signals are let go: only the small columns of every batch are kept.
        kept.append((batch.labels, batch.subject, batch.recording, batch.window_id))
    if not vectors:
        raise EmbeddingError("Embedding needs at least one batch of windows, but the source delivered none.")
    return Embeddings(
        vectors=np.concatenate(vectors),
        labels={task: np.concatenate([labels[task] for labels, *_ in kept]) for task in kept[0][0]},
        subject=np.concatenate([entry[1] for entry in kept]),
        recording=np.concatenate([entry[2] for entry in kept]),
        window_id=np.concatenate([entry[3] for entry in kept]),
    )

"""Measures how long a piece of work takes, and how much of the processor, apart from other pieces done on its way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds, and CPU seconds of this process with all its threads; of a piece without what was measured within it."""

    def __init__(self) -> None:
        self.inner = (0.0, 0.0)

    @contextmanager
    def measure(self) -> Iterator[dict[str, float]]:
        """Measure the body; `seconds` and `cpu_seconds` stand in the mapping once it has ended."""
        spent: dict[str, float] = {}
        outer, self.inner = self.inner, (0.0, 0.0)
        began, worked = time.time(), time.process_time()
        try:
            yield spent
        finally:
            whole = (time.time() - began, time.process_time() - worked)
            own = [max(0.0, total - inner) for total, inner in zip(whole, self.inner, strict=True)]
            spent |= {"seconds": round(own[0], 3), "cpu_seconds": round(own[1], 3)}
            self.inner = (outer[0] + whole[0], outer[1] + whole[1])

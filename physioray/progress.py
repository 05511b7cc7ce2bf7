"""Shows how far long work has come: counts, a note and the time left, on a terminal or in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType


def format_seconds(seconds: float) -> str:
    """A duration as people say it: `45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, int(round(seconds)))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressLine:
    """One line that is rewritten on a terminal, and a line now and then where output goes to a file."""

    def __init__(self, title: str, unit: str, *, log_seconds: float = 10.0) -> None:
        self.title, self.unit, self.log_seconds = title, unit, log_seconds
        self.began = self.started = time.monotonic()
        self.first_count: int | None = None
        self.moving = False
        self.last_shown = float("-inf")
        self.terminal = sys.stderr.isatty()
        self.width = 0
        self.finished = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal and self.width:
            sys.stderr.write("\n")

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are finished; the time left is judged from this run's own speed."""
        now = time.monotonic()
        if self.first_count is None or (done > self.first_count and not self.moving):
            # The clock starts at the first piece that this run has finished: what comes before is starting up.
            self.moving = self.first_count is not None
            self.first_count, self.started = done, now
        elapsed, made = now - self.started, done - self.first_count
        left = f", {format_seconds(elapsed / made * (total - done))} left" if made > 0 and done < total else ""
        taken = f", {format_seconds(now - self.began)}" if done >= total else ""
        text = f"{self.title}: {done}/{total} {self.unit}{', ' + note if note else ''}{left}{taken}"
        if self.terminal:
            sys.stderr.write("\r" + text.ljust(self.width))
            self.width = max(self.width, len(text))
            sys.stderr.flush()
        elif (done >= total and not self.finished) or now - self.last_shown >= self.log_seconds:
            self.last_shown, self.finished = now, done >= total
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays, above the one that is rewritten."""
        if self.terminal:
            sys.stderr.write("\r" + text.ljust(self.width) + "\n")
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)

"""Runs the parts of a reproduction in order, shows where it stands, and writes down how each part went."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from physioray.journal import Screen
from physioray.progress import format_seconds
from physioray.reproduction.parts import Outcome, Part, Standing
from physioray.storage import Location

COURSE_FILE = "course.json"
SHOWN = 5
"""Failures of a part that are told one by one; the others are counted."""

State = Literal["waiting", "running", "done", "failed", "not finished"]
TIME_IS_UP = "the hours given by --hours were over"


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """How a part stands.

    Attributes:
        name, title: of the part.
        state: `not finished` is one that was left because time was up, or interrupted.
        reason: why it failed or was left; empty if it is done.
        words: what was missing when the command was typed last.
        seconds: it ran in that command.
    """

    name: str
    title: str
    state: State = "waiting"
    reason: str = ""
    words: str = ""
    seconds: float = 0.0


class Course:
    """How the parts of a reproduction stand, kept in its folder."""

    def __init__(self, out: Location, parts: Sequence[Part], screen: Screen) -> None:
        self.out, self.parts, self.screen = out, parts, screen
        self.records = {part.name: PartRecord(name=part.name, title=part.title) for part in parts}

    def write(self) -> None:
        """Keep the records in the folder."""
        (self.out / COURSE_FILE).write_json([asdict(record) for record in self.records.values()])

    def set(self, part: Part, state: State, reason: str = "", seconds: float = 0.0) -> None:
        """Change how a part stands."""
        record = self.records[part.name]
        self.records[part.name] = replace(record, state=state, reason=reason, seconds=record.seconds + seconds)
        self.write()

    def look(self) -> dict[str, Standing]:
        """What every part lacks; what is whole counts as done."""
        found: dict[str, Standing] = {}
        for part in self.parts:
            try:
                standing = part.stand()
            except (OSError, ValueError, LookupError, ArithmeticError) as error:  # running it tells the same
                standing = Standing(missing=1, words=f"cannot be told ({error})")
            found[part.name] = standing
            self.records[part.name] = replace(
                self.records[part.name], words=standing.words if standing.missing else "found done"
            )
            if not standing.missing:
                self.set(part, "failed" if standing.failures else "done", join_reasons(standing.failures))
        self.write()
        return found

    def run(
        self,
        standings: Mapping[str, Standing],
        *,
        deadline: float | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the parts that lack something, in order; one that fails stops no other.

        Args:
            standings: see `look`.
            deadline: in `time.monotonic`; no part, and no piece of the grid, is begun after it.
            after: called after every part that has run.
        """
        waiting = [part for part in self.parts if standings[part.name].missing]
        total = sum(standings[part.name].seconds for part in waiting)
        before = 0.0
        for part in waiting:
            if deadline is not None and time.monotonic() > deadline:
                self.set(part, "not finished", f"{TIME_IS_UP} before it began. The same command goes on.")
                continue
            cost = standings[part.name].seconds
            place = f"part {self.parts.index(part) + 1} of {len(self.parts)}, {part.title}"
            self.run_part(part, PartScreen(self.screen, place, before, cost, total), deadline)
            before += cost
            after()

    def run_part(self, part: Part, screen: Screen, deadline: float | None) -> None:
        """Run one part, and write down how it went."""
        self.set(part, "running", "it was running when this was written; if it no longer is, type the command again")
        began = time.monotonic()
        try:
            outcome = part.run(screen, deadline)
        except KeyboardInterrupt:
            self.set(part, "not finished", "it was interrupted. The same command goes on.", time.monotonic() - began)
            raise
        except Exception as error:  # whatever stops one part must not stop the others, and is told with its reason
            (self.out / f"failure-{part.name}.txt").write_text(traceback.format_exc())
            outcome = Outcome(failures=(f"{type(error).__name__}: {error}",))
        taken = time.monotonic() - began
        if outcome.failures:
            self.set(part, "failed", join_reasons(outcome.failures), taken)
        elif outcome.left:
            reason = f"{len(outcome.left)} pieces were not begun, {TIME_IS_UP}. The same command goes on."
            self.set(part, "not finished", reason, taken)
        else:
            self.set(part, "done", "", taken)
        record = self.records[part.name]
        self.screen.say(f"{part.title}: {record.state} after {format_seconds(taken)}. {record.reason}".rstrip())


class PartScreen:
    """Shows a part's progress as the whole reproduction's: per cent of all work, and so the time left for all."""

    def __init__(self, screen: Screen, place: str, before: float, cost: float, total: float) -> None:
        self.screen, self.place, self.before, self.cost, self.total = screen, place, before, cost, max(total, 1e-9)

    def update(self, done: int, total: int, note: str = "") -> None:
        """A part's count as a share of all work."""
        share = (self.before + self.cost * done / max(1, total)) / self.total
        self.screen.update(round(1000 * share), 1000, f"{self.place}: {note}" if note else self.place)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.screen.say(text)


def join_reasons(reasons: Sequence[str]) -> str:
    """Reasons as one text, the first few in full."""
    rest = f" And {len(reasons) - SHOWN} more." if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + rest


def describe_plan(parts: Sequence[Part], standings: Mapping[str, Standing], processes: int) -> str:
    """What will be computed and what that costs, a line per part."""
    lines = []
    total = 0.0
    for number, part in enumerate(parts, 1):
        standing = standings[part.name]
        total += standing.seconds
        cost = f"{standing.words}, about {format_seconds(standing.seconds)} of one process"
        lines.append(f"  {number}. {part.title}: {cost if standing.missing else 'found done'}")
    if not any(standings[part.name].missing for part in parts):
        return "\n".join([*lines, "All parts are done; only the page is written."])
    lines.append(
        f"In all about {format_seconds(total)} of one process at the rates just measured here, "
        f"{format_seconds(total / max(1, processes))} on {processes} at once."
    )
    return "\n".join(lines)

"""What a reproduction has cost so far: hours of cores and of GPUs, as the steps that it rests on have measured them."""

from __future__ import annotations

from dataclasses import dataclass

from physioray.steps import StepStore
from physioray.storage import Location

TITLES = {
    "pretrain": "pretraining",
    "embed": "embedding windows",
    "probe": "probes",
    "finetune": "trainings on tasks",
    "score": "scoring trainings",
    "analysis": "looking inside",
}


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the steps of one kind took, each counted once however many results rest on it.

    Attributes:
        title: of the kind.
        steps: how many.
        hours: from begin to end, added up; those of parallel steps run at the same time.
        core_hours: of processor time, measured in the steps' own processes.
        gpu_hours: from begin to end of the steps that ran on a GPU.
        unmeasured: steps of an older version, which counted no processor time; their hours count as core-hours.
    """

    title: str
    steps: int
    hours: float
    core_hours: float
    gpu_hours: float
    unmeasured: int


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What everything took, by kind of step, and which code has computed it."""

    kinds: tuple[Spent, ...]
    commits: tuple[str, ...]

    @property
    def total(self) -> Spent:
        """All kinds together."""
        return _add("in all", self.kinds)


def measure_spent(store: StepStore, within: Location) -> Bill:
    """Add up the steps that results in a folder rest on, other steps' inputs among them."""
    kinds: dict[str, list[Spent]] = {}
    commits: set[str] = set()
    for record in store.list_steps(within):
        if record.state != "done" or record.seconds is None:
            continue
        hours = record.seconds / 3600
        old = record.cpu_seconds is None
        spent = Spent(
            title=TITLES.get(record.name, record.name),
            steps=1,
            hours=hours,
            core_hours=hours if record.cpu_seconds is None else record.cpu_seconds / 3600,
            gpu_hours=hours if record.device.startswith("cuda") else 0.0,
            unmeasured=int(old),
        )
        kinds.setdefault(record.name, []).append(spent)
        commits.add(record.commit or "unknown")
    order = [*(name for name in TITLES if name in kinds), *sorted(set(kinds) - set(TITLES))]
    return Bill(kinds=tuple(_add(kinds[name][0].title, kinds[name]) for name in order), commits=tuple(sorted(commits)))


def _add(title: str, parts: tuple[Spent, ...] | list[Spent]) -> Spent:
    return Spent(
        title=title,
        steps=sum(part.steps for part in parts),
        hours=sum(part.hours for part in parts),
        core_hours=sum(part.core_hours for part in parts),
        gpu_hours=sum(part.gpu_hours for part in parts),
        unmeasured=sum(part.unmeasured for part in parts),
    )

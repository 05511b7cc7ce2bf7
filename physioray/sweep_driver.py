"""Decides what happens next in a sweep, and commits it: which trial starts, which is given up, which is tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from physioray.journal import Screen
from physioray.sweep_events import SweepEvents, list_metrics
from physioray.sweep_journal import SweepJournal, SweepResult, TrialRecord, TrialState
from physioray.sweep_plan import EPOCH, AshaConfig, SweepPlan
from physioray.sweep_search import choose_parameters

LOST_MACHINE = "its node has died"
"""Ray's words when a trial's machine is gone, as spot machines go: no failure of the trial's own."""
MOST_LOSSES = 20
LOW_MEMORY = "running low on memory"
"""Ray's words when it has killed processes so that their machine goes on; what follows tells one kill from another."""


class _Who:
    """A trial as Ray Tune's schedulers know one: by its identifier."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:04d}"


class _Nobody:
    """The part of Ray Tune's controller that median stopping asks: no trial waits for another's place."""

    def get_live_trials(self) -> list[Any]:
        return []


class StoppingRule:
    """Says which trials to give up: Ray Tune's schedulers, fed by number so that they can be fed again from the folder.

    Args:
        plan: the sweep; its first objective is judged, at times measured in passes.
    """

    def __init__(self, plan: SweepPlan) -> None:
        sought, config = plan.objectives[0], plan.scheduler
        common: dict[str, Any] = {"time_attr": EPOCH, "metric": sought.metric, "mode": sought.mode}
        # Whoever has come to the last rung has done all its passes: there is nothing left to save.
        self.last_pass = float(config.most_passes) if isinstance(config, AshaConfig) else float("inf")
        self.inner: Any = None
        if isinstance(config, AshaConfig):
            self.inner = AsyncHyperBandScheduler(
                **common,
                grace_period=config.grace_passes,
                max_t=config.most_passes,
                reduction_factor=config.reduction,
                stop_last_trials=False,
            )
        elif config is not None:
            self.inner = MedianStoppingRule(
                **common, grace_period=config.grace_passes, min_samples_required=config.least_trials
            )
        self.known: dict[int, _Who] = {}
        self.judged: dict[int, tuple[float, bool]] = {}

    def judge(self, number: int, line: Mapping[str, float]) -> bool:
        """True if the trial is to be given up after this report; one that was judged before is not counted again."""
        if self.inner is None or line[EPOCH] >= self.last_pass:
            return False
        if number not in self.known:
            self.known[number] = _Who(number)
            self.inner.on_trial_add(_Nobody(), self.known[number])
        epoch, stopped = self.judged.get(number, (float("-inf"), False))
        if stopped or line[EPOCH] <= epoch:
            return stopped
        decision = self.inner.on_trial_result(_Nobody(), self.known[number], dict(line))
        self.judged[number] = (line[EPOCH], decision == TrialScheduler.STOP)
        return self.judged[number][1]


class SweepDriver:
    """Decides what happens next in a sweep and commits it; knows no cluster, so that it can be driven by hand too.

    Args:
        plan: the sweep.
        journal: of its folder, claimed.
        screen: where progress is shown.

    `tell`, if set, takes the number of trials in each state and the best score so far, whenever one changes.
    """

    def __init__(self, plan: SweepPlan, journal: SweepJournal, screen: Screen | None = None) -> None:
        self.plan, self.journal, self.screen = plan, journal, screen
        self.tell: Callable[[Mapping[str, int], float | None], None] | None = None
        self.total = plan.count_trials()
        self.records = {record.number: record for record in journal.read_trials()}
        self.rule = StoppingRule(plan)
        self.events = SweepEvents(journal.folder, plan.base, simulated=plan.simulated)
        self.metrics = list_metrics(tuple(objective.metric for objective in plan.objectives))
        self.running: set[int] = set()
        self.stopped: set[int] = set()
        self.deaths: dict[int, str] = {}
        for number, record in sorted(self.records.items()):
            if record.state != "planned":
                for line in record.reports:
                    self.rule.judge(number, line)
                self.events.rewrite(record, self.metrics)
        self.waiting = [number for number, record in sorted(self.records.items()) if record.state == "planned"]

    @property
    def is_done(self) -> bool:
        """True when every trial has an outcome."""
        return not self.waiting and not self.running and len(self.records) >= self.total

    def start_trial(self) -> int | None:
        """Number of the next trial to run, its parameters committed; None if none is left to start."""
        if self.waiting:
            number = self.waiting.pop(0)
        elif len(self.records) < self.total:
            number = len(self.records)
            parameters = choose_parameters(self.plan, number, list(self.records.values()))
            self.journal.plan_trial(number, parameters)
            self.records[number] = TrialRecord(number=number, parameters=parameters)
        else:
            return None
        self.running.add(number)
        self.events.start(self.records[number], self.metrics)
        self.show()
        return number

    def take_report(self, number: int, line: Mapping[str, float]) -> bool:
        """Take a report of a running trial; True if the trial is to end here."""
        self.events.add(number, line)
        if self.rule.judge(number, line):
            self.stopped.add(number)
            self._commit(number, "stopped", f"given up by the scheduler after pass {line[EPOCH]:g}")
            return True
        return False

    def end_attempt(self, number: int) -> None:
        """A trial's function has ended: it returned, raised (and said so in its folder), or died (see `deaths`)."""
        self.running.discard(number)
        if number in self.stopped:
            return
        before = self.records[number].failures
        record = self.journal.read_trial(number)
        assert record is not None
        _, ended = self.journal.read_reports(number)
        if ended:
            missing = [item.metric for item in self.plan.objectives if item.metric not in record.last]
            if missing:
                reason = f"its last report lacks {', '.join(missing)}; it has {', '.join(sorted(record.last))}"
                self._commit(number, "failed", reason)
            else:
                self._commit(number, "finished")
            return
        if len(record.failures) == len(before):
            reason = self.deaths.pop(number, "its process died")
            # With a trial's process Ray also kills idle ones, whose loss shows only when the next attempt is to begin.
            if LOW_MEMORY not in reason or reason not in before:
                record = replace(record, failures=(*before, reason))
                self.journal.write_failures(number, record.failures)
        self.records[number] = record
        losses = sum(LOST_MACHINE in reason for reason in record.failures)
        if len(record.failures) - min(losses, MOST_LOSSES) > self.plan.max_failures:
            self._commit(number, "failed", record.failures[-1])
        else:
            if self.screen is not None:
                self.screen.say(f"trial {number} is tried again: {record.failures[-1]}")
            self.waiting.append(number)

    def _commit(self, number: int, state: TrialState, reason: str = "") -> None:
        record = self.journal.read_trial(number)
        assert record is not None
        self.records[number] = replace(record, state=state, reason=reason)
        self.events.finish(self.records[number])
        self.journal.write_outcome(number, state, reason)
        if self.screen is not None:
            self.screen.say(self._describe(self.records[number]))
        self.show()

    def _describe(self, record: TrialRecord) -> str:
        metric = self.plan.objectives[0].metric
        score = f", {metric} {record.last[metric]:.4g}" if metric in record.last else ""
        values = ", ".join(f"{name} {_shorten(value)}" for name, value in record.parameters.items())
        return f"trial {record.number} {record.state}{score} ({values}){': ' + record.reason if record.reason else ''}"

    def show(self) -> None:
        """Show counts, the best so far and the time left."""
        result = SweepResult(
            folder=self.journal.folder, settings=self.plan.describe(), trials=tuple(self.records.values())
        )
        running, metric, best = len(self.running - self.stopped), self.plan.objectives[0].metric, result.best
        ended = {state: result.count(state) for state in get_args(TrialState) if state != "planned"}
        done = sum(ended.values())
        if self.tell is not None:
            states = {"running": running, "waiting": self.total - done - running, **ended}
            self.tell(states, None if best is None else best.last[metric])
        if self.screen is None:
            return
        counts = [f"{running} running"]
        counts += [f"{ended[state]} {state}" for state in ("stopped", "failed") if ended[state]]
        if best is not None:
            simulated = "SIMULATED " if self.plan.simulated else ""
            counts.append(f"best {simulated}{metric} {best.last[metric]:.4g} (trial {best.number})")
        self.screen.update(done, self.total, ", ".join(counts))


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

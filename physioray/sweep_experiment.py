"""Runs a sweep experiment from its options, its space and what each trial is granted, with progress and final table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from physioray.distribute import Resources, pretrain_on_cluster
from physioray.journal import AfterPass
from physioray.pretrain import PretrainJob
from physioray.progress import ProgressLine
from physioray.search_space import Space
from physioray.sweep import run_sweep
from physioray.sweep_report import describe_sweep
from physioray.sweep_setup import list_evaluations, set_up_sweep
from physioray.trials import Here, Workplace


@dataclass(frozen=True, kw_only=True)
class OnWorkers:
    """Where a trial with several workers works: it trains under Ray Train, and does all else on one worker's share.

    Attributes:
        resources: of the trial.
    """

    resources: Resources

    @property
    def device(self) -> str:
        """What a worker computes on."""
        return "cuda" if self.resources.gpus_per_worker else "cpu"

    def pretrain(self, job: PretrainJob, after_pass: AfterPass | None) -> object:
        """Pretrain on all workers; `after_pass` is called by the first of them."""
        return pretrain_on_cluster(job, self.resources, after_pass=after_pass)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function where there is a worker's share of CPUs and GPUs: the trial's own process has neither."""
        task: Any = ray.remote(
            num_cpus=self.resources.cpus_per_worker,
            num_gpus=self.resources.gpus_per_worker,
            # Not among the places of the trial's own process, which has only one without CPUs.
            scheduling_strategy="DEFAULT",
        )(_call)
        try:
            return ray.get(task.remote(function))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _call(function: Callable[[], Any]) -> Any:
    return function()


def choose_workplace(resources: Resources) -> Workplace:
    """One worker: the trial's own process, kept warm for the next trial. Several: workers of their own."""
    if resources.workers > 1:
        return OnWorkers(resources=resources)
    return Here(device="cuda" if resources.gpus_per_worker else "cpu")


def run_experiment(options: argparse.Namespace, space: Space, *, resources: Resources, **settings: Any) -> None:
    """Run a sweep by every evaluation that is asked for, or go on with it, and print its table.

    Args:
        options: see `sweep_setup.parse_options`.
        space: dotted settings and their values.
        resources: of one trial; as many trials run at once as fit.
        settings: others of `sweep_setup.set_up_sweep`.
    """
    for evaluation in list_evaluations(options):
        setup = set_up_sweep(
            options,
            space,
            evaluation=evaluation,
            place=choose_workplace(resources),
            threads=resources.cpus_per_worker,
            **settings,
        )
        with ProgressLine(f"sweep by {evaluation}", "trials") as screen:
            result = run_sweep(
                setup.plan,
                setup.run_trial,
                setup.out,
                resources=resources,
                address=options.address,
                concurrent=options.concurrent,
                screen=screen,
            )
        print(describe_sweep(result))
        print(f"The page with the curves: {setup.out}/sweep.html")

"""Chooses the settings of a sweep's next trial, and says afterwards which settings mattered: Optuna, without a memory.

The study is rebuilt from the trials in the sweep's folder whenever something is asked of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as StudyState

from physioray.search_space import Choice, list_grid
from physioray.sweep_journal import TrialRecord
from physioray.sweep_plan import EPOCH, SweepPlan

DRAWS = 20
"""How often new settings are drawn when those drawn were tried before: in small spaces a search soon repeats itself."""


def choose_parameters(plan: SweepPlan, number: int, earlier: Sequence[TrialRecord]) -> dict[str, Any]:
    """The varied settings of a trial: they follow from the plan, its number and the trials before it, and nothing else.

    Args:
        plan: the sweep.
        number: of the new trial.
        earlier: all trials planned before it, as they stand now.
    """
    if plan.sampler == "grid":
        return list_grid(plan.space)[number]
    tried = [dict(record.parameters) for record in earlier]
    parameters: dict[str, Any] = {}
    with _quiet_optuna():
        study = build_study(plan, earlier)
        for draw in range(DRAWS):
            seed = int(np.random.SeedSequence([plan.seed, number, draw]).generate_state(1)[0])
            # Trials that still run count as bad ones, so that neighbours are not all tried at the same time. So do
            # settings that were drawn here and refused: the next draw keeps away from them.
            study.sampler = (
                optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                if plan.sampler == "tpe"
                else optuna.samplers.RandomSampler(seed=seed)
            )
            drawn = study.ask(_list_distributions(plan)).params
            parameters = {
                name: distribution.values[drawn[name]] if isinstance(distribution, Choice) else drawn[name]
                for name, distribution in plan.space.items()
            }
            if parameters not in tried:
                break
    return parameters


def build_study(plan: SweepPlan, records: Sequence[TrialRecord]) -> optuna.Study:
    """The Optuna study of a sweep's trials, in memory: finished, stopped, failed and running ones by number."""
    directions = [
        StudyDirection.MAXIMIZE if objective.mode == "max" else StudyDirection.MINIMIZE for objective in plan.objectives
    ]
    study = optuna.create_study(directions=directions)
    for record in sorted(records, key=lambda record: record.number):
        study.add_trial(_freeze(plan, record))
    return study


def _freeze(plan: SweepPlan, record: TrialRecord) -> FrozenTrial:
    states = {"finished": StudyState.COMPLETE, "stopped": StudyState.PRUNED, "failed": StudyState.FAIL}
    state, sought = states.get(record.state, StudyState.RUNNING), plan.objectives
    # Optuna knows intermediate values of a single objective only.
    steps = {round(line[EPOCH]): line[sought[0].metric] for line in record.reports if sought[0].metric in line}
    return create_trial(
        state=state,
        params={
            name: distribution.values.index(record.parameters[name])
            if isinstance(distribution, Choice)
            else record.parameters[name]
            for name, distribution in plan.space.items()
        },
        distributions=_list_distributions(plan),
        values=[record.last[item.metric] for item in sought] if state == StudyState.COMPLETE else None,
        intermediate_values=steps if len(sought) == 1 and state == StudyState.PRUNED else None,
    )


def _list_distributions(plan: SweepPlan) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for name, item in plan.space.items():
        if isinstance(item, Choice):
            found[name] = CategoricalDistribution(range(len(item.values)))
        elif item.whole:
            step = 1 if item.log else int(item.step or 1)
            found[name] = IntDistribution(int(item.low), int(item.high), log=item.log, step=step)
        else:
            found[name] = FloatDistribution(item.low, item.high, log=item.log, step=item.step)
    return found


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


def measure_importance(plan: SweepPlan, records: Sequence[TrialRecord]) -> dict[str, dict[str, float]]:
    """How much of the variation of each sought metric each varied setting explains, by fANOVA over finished trials.

    Hutter et al. 2014: variance of the marginal over a random forest's prediction, as shares that sum to 1. Empty
    where it cannot be said: fewer than four finished trials, or a metric that does not vary.
    """
    finished = [record for record in records if record.state == "finished"]
    found: dict[str, dict[str, float]] = {}
    if len(finished) < 4:
        return found
    with _quiet_optuna():
        study = build_study(plan, finished)
        for place, objective in enumerate(plan.objectives):
            if len({record.last[objective.metric] for record in finished}) < 2:
                continue
            try:
                shares = optuna.importance.get_param_importances(
                    study,
                    evaluator=optuna.importance.FanovaImportanceEvaluator(seed=plan.seed),
                    target=lambda trial, place=place: trial.values[place],  # type: ignore[misc]
                )
            except (RuntimeError, ValueError):
                continue
            found[objective.metric] = {name: float(share) for name, share in shares.items()}
    return found

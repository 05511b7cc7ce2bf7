"""What the sweep experiments have in common: their options, the settings they start from, and how trials are scored."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.grid import shorten
from physioray.presets import PRESETS, find_preset
from physioray.pretrain import fit_modalities
from physioray.search_space import Space
from physioray.selection import fold_selection
from physioray.steps import find_commit
from physioray.storage import open_location
from physioray.strategies import Strategy, find_strategy
from physioray.sweep_plan import AshaConfig, Objective, SweepPlan
from physioray.sweep_trial import RunTrial
from physioray.trials import Here, TrialPlan, TrialSettings, Workplace, make_base, run_trial

Evaluation = Literal["probe", "finetune"]


def parse_options(description: str) -> argparse.Namespace:
    """The options of a sweep experiment from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of the sweep; run again, it goes on where it stopped")
    parser.add_argument("--steps", default=None, help="folder or URI of the steps (default: beside --out)")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--passes", type=int, default=None, help="passes of every pretraining (default: the preset's)")
    parser.add_argument("--evaluation", default="probe", choices=(*get_args(Evaluation), "both"))
    parser.add_argument("--task", default="sleep", help="whose balanced accuracy is sought, or aggregate")
    parser.add_argument("--seeds", type=int, default=None, help="repetitions of every score (default 5)")
    parser.add_argument("--trials", type=int, default=None, help="how many (default: the experiment's)")
    parser.add_argument("--concurrent", type=int, default=None, help="trials at once (default: as many as fit)")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    parser.add_argument("--smoke", action="store_true", help="minutes on two cores: tiny model, 2 passes, few values")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True)
class SweepSetup:
    """One sweep, ready for `sweep.run_sweep`: what is varied, what a trial does, and where it all goes."""

    plan: SweepPlan
    run_trial: RunTrial
    out: str


def list_evaluations(options: argparse.Namespace) -> tuple[Evaluation, ...]:
    """How the trials are scored: by linear probe, by full finetuning, or first one and then the other."""
    return get_args(Evaluation) if options.evaluation == "both" else (options.evaluation,)


def choose_sizes(options: argparse.Namespace, sizes: tuple[int, ...] = (25, 500)) -> tuple[int, ...]:
    """Numbers of training subjects that the cohort has: those asked for, or the like share of a smaller cohort."""
    folds, _ = fold_selection(Cohort.open(options.cohort), ProbeConfig(seeds=(0,)))
    most = min(len(fold.train) for parts in folds.values() for fold in parts)
    if most >= max(sizes):
        return tuple(sorted(sizes))
    return tuple(sorted({max(2, round(size * most / max(sizes))) for size in sizes}))


def set_up_sweep(
    options: argparse.Namespace,
    space: Space,
    *,
    evaluation: Evaluation,
    strategy: str = "multimae_drop",
    sampler: Literal["tpe", "grid", "random"] = "grid",
    trials: int | None = None,
    halving: bool = False,
    place: Workplace = Here(),  # noqa: B008 (frozen)
    threads: int = 1,
) -> SweepSetup:
    """A sweep over settings of pretraining or evaluation, scored on validation subjects with the test subjects locked.

    Args:
        options: see `parse_options`.
        space: dotted settings and their values; names as in `trials.TrialSettings`.
        evaluation: how a trial is scored.
        strategy: what is pretrained; a name of `strategies.STRATEGIES`.
        sampler: `grid`, `tpe` or `random`.
        trials: how many; of a grid all if None.
        halving: give up the worse trials early, at rungs of passes over the data (probes alone).
        place: where a trial works.
        threads: CPU threads of a worker.
    """
    cohort, chosen = Cohort.open(options.cohort), find_strategy(strategy)
    settings = _choose_settings(options, cohort, chosen)
    passes = settings.train.passes
    rungs = choose_rungs(passes) if halving and evaluation == "probe" else ()
    out = options.out if options.evaluation != "both" else os.path.join(options.out, evaluation)
    store = options.steps or (open_location(options.out).folder / "steps").uri
    plan = TrialPlan(
        cohort=open_location(options.cohort).uri,
        store=open_location(store).uri,
        evaluation=evaluation,
        rungs=rungs,
        threads=threads,
        place=place,
        commit=find_commit(),
    )
    return SweepSetup(
        plan=SweepPlan(
            space=space,
            base=make_base(settings),
            objectives=(Objective(metric=options.task),),
            sampler=sampler,
            trials=options.trials or trials,
            scheduler=AshaConfig(grace_passes=rungs[0], most_passes=passes) if rungs else None,
            inputs={"cohort": cohort.fingerprint, "evaluation": evaluation},
            simulated=cohort.simulated,
            evaluate_command=_name_command(options, evaluation, out, store),
        ),
        run_trial=partial(run_trial, plan=plan),
        out=out,
    )


def _name_command(options: argparse.Namespace, evaluation: Evaluation, out: str, store: str) -> str:
    """The command that scores a trial on test subjects as the sweep has scored it on others."""
    if evaluation == "finetune":
        preset = "tiny" if options.smoke else options.preset
        source = f"--checkpoint {{folder}} --cohort {options.cohort}"
        return f"python experiments/finetune.py {source} --out {out}/best --preset {preset}"
    return f"physioray evaluate {{folder}} {options.cohort} --out {out}/best --steps {store}"


def _choose_settings(options: argparse.Namespace, cohort: Cohort, chosen: Strategy) -> TrialSettings:
    """The settings that trials start from: those of the preset, or tiny ones for a trial run."""
    preset, probe, passes = find_preset(options.preset), ProbeConfig(bootstrap_draws=200), options.passes
    if options.seeds is not None:
        probe = replace(probe, seeds=tuple(range(options.seeds)))
    if options.smoke:
        preset, passes = find_preset("tiny"), passes or 2
        probe = replace(probe, seeds=probe.seeds[: options.seeds or 1], folds=2, bootstrap_draws=50)
    assert chosen.objective is not None
    return TrialSettings(
        model=chosen.fit_model(fit_modalities(preset.model, cohort)),
        objective=chosen.objective,
        train=shorten(chosen.fit_train(preset.train), passes or preset.train.passes),
        probe=replace(probe, tasks=tuple(task for task in probe.tasks if cohort.has_task(task))),
        finetune=shorten(preset.finetune, 2) if options.smoke else preset.finetune,
    )


def choose_rungs(passes: int, reduction: int = 3) -> tuple[int, ...]:
    """Passes after which trials are compared: the end divided by 3, 9, 27, from the first whole pass on."""
    rungs: list[int] = []
    rung = passes
    while rung // reduction >= 1 and len(rungs) < 3:
        rung //= reduction
        rungs.append(rung)
    return tuple(sorted(rungs))

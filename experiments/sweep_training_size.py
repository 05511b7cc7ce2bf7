"""Score against the number of labelled training subjects: one pretraining, many sizes.

Question: how many labelled people does a pretrained encoder need, by linear probe and by full finetuning (Fang et al.
    2024, tables 2 to 4: 25 to 500)?
Run: python experiments/sweep_training_size.py --cohort COHORT --out SWEEP [--evaluation both] [--smoke]
Cost: one pretraining, which all trials share, and a score per size: with probes seconds each. Finetuning: one training
    per size, task, seed and fold.
Watch: tensorboard --logdir SWEEP/tensorboard, and SWEEP/sweep.html at any time.
Expect: a rising curve that flattens; probes need fewer people than finetuning.
Answer: open; what was run so far stands in LOG.md.
"""

import sys

from physioray.cli import guard
from physioray.distribute import Resources
from physioray.progress import ProgressLine
from physioray.search_space import choice
from physioray.sweep import run_sweep
from physioray.sweep_report import describe_sweep
from physioray.sweep_setup import choose_sizes, list_evaluations, parse_options, set_up_sweep

SIZES = (25, 50, 100, 250, 500)
RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
"""Of one trial: as many trials run at once as fit."""


def main() -> None:
    """Run the sweep, or go on with it."""
    options = parse_options(__doc__.splitlines()[0])
    space = {"training_subjects": choice(list(choose_sizes(options, SIZES[::4] if options.smoke else SIZES)))}
    for evaluation in list_evaluations(options):
        setup = set_up_sweep(options, space, evaluation=evaluation, sampler="grid")
        with ProgressLine(f"sweep by {evaluation}", "trials") as screen:
            result = run_sweep(
                setup.plan,
                setup.run_trial,
                setup.out,
                resources=RESOURCES,
                address=options.address,
                concurrent=options.concurrent,
                screen=screen,
            )
        print(describe_sweep(result))
        print(f"The page with the curves: {setup.out}/sweep.html")


if __name__ == "__main__":
    sys.exit(guard(main))

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
from physioray.search_space import choice
from physioray.sweep_experiment import run_experiment
from physioray.sweep_setup import choose_sizes, parse_options

SIZES = (25, 50, 100, 250, 500)
RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
"""Of one trial: as many trials run at once as fit. Several workers train one trial together, under Ray Train."""


def main() -> None:
    """Run the sweep, or go on with it."""
    options = parse_options(__doc__.splitlines()[0])
    space = {"training_subjects": choice(list(choose_sizes(options, SIZES[::4] if options.smoke else SIZES)))}
    run_experiment(options, space, resources=RESOURCES, sampler="grid")


if __name__ == "__main__":
    sys.exit(guard(main))

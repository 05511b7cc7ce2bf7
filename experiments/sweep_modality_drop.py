"""How often, and for how many windows at once, to drop a whole modality in pretraining.

Question: is one dropped modality in every batch (Fang et al. 2024, section 3.3) the best dose, and should windows of a
    batch drop the same one? The share of hidden tokens stays 0.7 in all arms.
Run: python experiments/sweep_modality_drop.py --cohort COHORT --out SWEEP [--evaluation both] [--smoke]
Cost: 20 pretrainings at the most; with probes the worse ones are given up early (successive halving).
    Preset small, 25 passes over 2,000 windows: about an hour on two cores. --smoke: minutes.
Watch: tensorboard --logdir SWEEP/tensorboard, and SWEEP/sweep.html at any time.
Expect: in the paper drop helps age and arousal more than sleep; on small cohorts differences drown in the intervals.
Answer: open; what was run so far stands in LOG.md.
"""

import sys

from physioray.cli import guard
from physioray.distribute import Resources
from physioray.search_space import choice, uniform
from physioray.sweep_experiment import run_experiment
from physioray.sweep_setup import parse_options

RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
"""Of one trial: as many trials run at once as fit. Several workers train one trial together, under Ray Train."""


def main() -> None:
    """Run the sweep, or go on with it."""
    options = parse_options(__doc__.splitlines()[0])
    space = {
        "objective.mask.drop_probability": uniform(0.0, 1.0),
        "objective.mask.drop_scope": choice(["batch", "sample"]),
    }
    trials = 4 if options.smoke else 20
    run_experiment(options, space, resources=RESOURCES, sampler="tpe", trials=trials, halving=True)


if __name__ == "__main__":
    sys.exit(guard(main))

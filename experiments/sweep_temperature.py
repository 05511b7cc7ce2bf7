"""The temperature of the contrastive losses, for each way to contrast.

Question: how sharp should similarities be weighed, and is the best temperature the same for SimCLR-style, pairwise and
    leave-one-out contrasts? The paper prints no value (Fang et al. 2024, appendix F); 0.1 is this project's assumption.
Run: python experiments/sweep_temperature.py --cohort COHORT --out SWEEP [--evaluation both] [--smoke]
Cost: 20 pretrainings at the most, the worse ones given up early with probes. Contrastive pretraining sees every token
    of every modality, about three times the time of a masked one. Preset small, 25 passes over 2,000 windows: some
    hours on two cores. --smoke: minutes.
Watch: tensorboard --logdir SWEEP/tensorboard, and SWEEP/sweep.html at any time.
Expect: a broad optimum around 0.1; very low temperatures are noisy, very high ones learn little.
Answer: open; what was run so far stands in LOG.md.
"""

import sys

from physioray.cli import guard
from physioray.distribute import Resources
from physioray.search_space import choice, loguniform
from physioray.sweep_experiment import run_experiment
from physioray.sweep_setup import parse_options

METHODS = ["simclr", "pairwise", "leave_one_out"]
RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
"""Of one trial: as many trials run at once as fit. Several workers train one trial together, under Ray Train."""


def main() -> None:
    """Run the sweep, or go on with it."""
    options = parse_options(__doc__.splitlines()[0])
    space = {
        "objective.temperature": loguniform(0.02, 1.0),
        "objective.method": choice(["pairwise", "leave_one_out"] if options.smoke else METHODS),
    }
    run_experiment(
        options,
        space,
        resources=RESOURCES,
        strategy="clip_leave_one_out",
        sampler="tpe",
        trials=4 if options.smoke else 20,
        halving=True,
    )


if __name__ == "__main__":
    sys.exit(guard(main))

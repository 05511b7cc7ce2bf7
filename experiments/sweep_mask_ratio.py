"""Figure 3: how much to hide, with and without modality drop, at few and at many training subjects.

Question: which share of hidden tokens gives the best encoder, does the answer depend on dropping a whole modality, and
    does it show only where few subjects are labelled (Fang et al. 2024, section 3.3: 0.6 of what drop leaves, that is
    0.7 in all, best with 25 subjects; figure 3 is for full finetuning)?
Run: python experiments/sweep_mask_ratio.py --cohort COHORT --out SWEEP [--evaluation both] [--smoke]
Cost: 7 ratios x 2 arms pretrained once each and scored at 2 training-set sizes: 14 pretrainings, 28 scores. Preset
    small, 25 passes over 2,000 windows: about an hour on two cores with probes. --smoke: minutes.
Watch: tensorboard --logdir SWEEP/tensorboard, and SWEEP/sweep.html at any time.
Expect: a flat top between 0.5 and 0.8; extremes lose. Few subjects give wide intervals. Test subjects stay locked.
Answer: open; what was run so far stands in LOG.md.
"""

import sys

from physioray.cli import guard
from physioray.distribute import Resources
from physioray.search_space import choice
from physioray.sweep_experiment import run_experiment
from physioray.sweep_setup import choose_sizes, parse_options

RATIOS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
RESOURCES = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
"""Of one trial: as many trials run at once as fit. Several workers train one trial together, under Ray Train."""


def main() -> None:
    """Run the grid, or go on with it."""
    options = parse_options(__doc__.splitlines()[0])
    space = {
        "training_subjects": choice(list(choose_sizes(options))),
        "objective.mask.drop": choice([True, False]),
        "objective.mask.hidden_ratio": choice([0.3, 0.7, 0.9] if options.smoke else RATIOS),
    }
    run_experiment(options, space, resources=RESOURCES, sampler="grid")


if __name__ == "__main__":
    sys.exit(guard(main))

"""The main job: from an ingested cohort to a first table.

Question: on this cohort, does masked pretraining with modality drop (Fang et al. 2024, MultiMAE + input modality
    drop) give a frozen encoder whose linear probe beats the same encoder untrained, and beats band powers?
Run: python experiments/quickstart.py --cohort COHORT --out RUN [--preset small] [--gpus-per-worker 1] [--address auto]
Cost: preset small, 25 passes, 2,000 windows: 8 minutes on two CPU cores (LOG.md). Preset paper: a GPU and days.
Watch: tensorboard --logdir RUN, and RUN/report.html at the end.
Expect: sleep stages clear chance (0.20) by far. On a small cohort the untrained encoder and band powers are close or
    ahead: pretraining needs many passes, and the report says plainly where it stands.
Answer: on the 21 real excerpts pretraining had not overtaken the untrained encoder within 25 passes; see LOG.md.
"""

import argparse
import os
import sys
from dataclasses import replace

from physioray.cli import guard
from physioray.data.cohort import Cohort
from physioray.distribute import Resources, pretrain_on_cluster
from physioray.presets import PRESETS, find_preset
from physioray.pretrain import PretrainJob, choose_passes, fit_modalities
from physioray.progress import ProgressLine
from physioray.report import describe_results, write_report
from physioray.study import run_study


def main() -> None:
    """Pretrain on Ray Train fed by Ray Data, probe, and write RUN/report.html."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of the run; run again, it goes on where it stopped")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--passes", type=int, default=None, help="passes over the data (default: the preset's)")
    parser.add_argument("--workers", type=int, default=1, help="processes that train together (default 1)")
    parser.add_argument("--gpus-per-worker", type=int, default=0, choices=(0, 1), help="(default 0)")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    options = parser.parse_args()

    # What is trained, and on what: cost stands beside the learning rate. Spot machines come and go: a lost worker is
    # replaced often before the run gives up.
    resources = Resources(workers=options.workers, gpus_per_worker=options.gpus_per_worker, retries=10)
    preset = find_preset(options.preset)
    train = replace(preset.train, passes=preset.train.passes if options.passes is None else options.passes)
    job = PretrainJob(
        cohort=options.cohort,
        out=options.out,
        model=fit_modalities(preset.model, Cohort.open(options.cohort)),
        objective=preset.objective,
        train=train,
        keep_passes=choose_passes(train.passes),
        threads=max(1, (os.cpu_count() or 1) // resources.workers),
    )

    with ProgressLine("pretrain", "steps") as screen:
        out = run_study(
            job,
            run_pretraining=lambda job: pretrain_on_cluster(job, resources, address=options.address, screen=screen),
            probe=preset.probe,
            screen=screen,
        )
    page = write_report(out)
    print(describe_results(out))
    print(f"The page with tables and figures: {page}")


if __name__ == "__main__":
    sys.exit(guard(main))

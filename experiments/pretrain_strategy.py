"""One way to pretrain, chosen by name: a row of the paper's Tables 1 and 2 on this cohort.

Question: on the same cohort, folds and budget of passes, how do the strategies of Fang et al. 2024 (unimodal masked
    autoencoders, MultiMAE with and without modality drop, SimCLR-style, CLIP pairwise and leave-one-out) compare by
    linear probe, beside the untrained encoder and band powers?
Run: python experiments/pretrain_strategy.py --strategy multimae_drop --cohort COHORT --out RUN [--preset small]
    Names: multimae_drop, multimae, mae_eeg (eog, emg, ecg ...), simclr, clip_pairwise, clip_leave_one_out.
    The rows "from scratch" are experiments/finetune.py --strategy scratch.
Cost: preset small, 25 passes, two CPU cores, 2,000 windows: minutes for a masked strategy, about three times that for
    the contrastive ones, which see every token of every modality. Preset paper: a GPU and days.
Watch: tensorboard --logdir RUN; for the contrastive strategies `watched/negatives`, the negatives an anchor has.
Expect: in the paper (500 training subjects) sleep 0.744 with drop, 0.734 without, 0.708 leave-one-out, 0.703 pairwise,
    0.656 SimCLR-style, 0.745 for EEG alone. Few passes and few people leave all of them near the untrained encoder.
Answer: 10 passes on 21 real excerpts (LOG.md): the contrastive ones reach 0.59 on sleep and leave the untrained encoder
    (0.57) and band powers (0.55) behind; the masked ones do not (0.54), and predict little more than the mean so far.
"""

import argparse
import os
import sys
from dataclasses import replace

from physioray.cli import guard
from physioray.distribute import Resources, pretrain_on_cluster
from physioray.presets import PRESETS, find_preset
from physioray.pretrain import PretrainJob, choose_passes, pretrain
from physioray.progress import ProgressLine
from physioray.report import describe_results, write_report
from physioray.strategies import STRATEGIES, find_strategy
from physioray.study import run_study


def main() -> None:
    """Pretrain by one strategy, probe, and write RUN/report.html."""
    names = [name for name, strategy in STRATEGIES.items() if strategy.objective is not None]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", required=True, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of the run; run again, it goes on where it stopped")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--passes", type=int, default=None, help="passes over the data (default: the preset's)")
    parser.add_argument("--in-process", action="store_true", help="train in this process instead of on Ray")
    parser.add_argument("--device", default="cpu", help="with --in-process: cpu, or cuda (default cpu)")
    parser.add_argument("--workers", type=int, default=1, help="processes that train together (default 1)")
    parser.add_argument("--gpus-per-worker", type=int, default=0, choices=(0, 1), help="(default 0)")
    parser.add_argument("--spread", action="store_true", help="one worker a machine, as far as there are machines")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    options = parser.parse_args()

    # What is trained, and on what: cost stands beside the learning rate.
    # Spot machines come and go: a lost worker is replaced often before the run gives up.
    resources = Resources(
        workers=options.workers, gpus_per_worker=options.gpus_per_worker, spread=options.spread, retries=10
    )
    preset = find_preset(options.preset)
    preset = replace(
        preset, train=replace(preset.train, passes=preset.train.passes if options.passes is None else options.passes)
    )
    job = PretrainJob.from_strategy(
        find_strategy(options.strategy),
        preset,
        cohort=options.cohort,
        out=options.out,
        keep_passes=choose_passes(preset.train.passes),
        threads=max(1, (os.cpu_count() or 1) // resources.workers),
    )

    with ProgressLine("pretrain", "steps") as screen:

        def run_pretraining(job: PretrainJob) -> object:
            if options.in_process:
                return pretrain(job, device=options.device, screen=screen)
            return pretrain_on_cluster(job, resources, address=options.address, screen=screen)

        out = run_study(job, run_pretraining=run_pretraining, probe=preset.probe, screen=screen, device=options.device)
    page = write_report(out)
    print(describe_results(out))
    print(f"The page with tables and figures: {page}")


if __name__ == "__main__":
    sys.exit(guard(main))

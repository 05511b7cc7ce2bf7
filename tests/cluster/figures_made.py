"""A real ingest, sweep and pretraining in one process on a running cluster, so that there are figures to scrape.

python -m tests.cluster.figures_made FOLDER     goes on training until it is ended; written small, as a test waits
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import ray

from physioray.data.shards import ingest_cohort
from physioray.data.simulate import simulate_cohort
from physioray.distribute import Resources, pretrain_on_cluster
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob
from physioray.strategies import find_strategy
from physioray.sweep import run_sweep
from tests.sweep_trials import fit_logistic, make_plan
from tests.written_cohorts import write_cohort

SWEPT, INGESTED, REJECTED = 3, 3, 1


def main(folder: Path) -> None:
    ray.init(address="auto", log_to_driver=False)
    source = folder / "source"
    simulate_cohort(str(source), subjects=INGESTED + REJECTED, hours=0.05, seed=0, unlabelled_share=0)
    # One recording is cut short, as a download that broke off.
    spoilt = next(source.rglob("*-0001.mat"))
    spoilt.write_bytes(spoilt.read_bytes()[:1000])
    ingest_cohort(str(source), str(folder / "cohort"))
    run_sweep(make_plan(trials=SWEPT), fit_logistic, str(folder / "sweep"), concurrent=1, address="auto")
    preset = find_preset("tiny")
    cohort = write_cohort(folder / "noise", [16] * 10)
    job = PretrainJob.from_strategy(
        find_strategy("multimae_drop"),
        replace(preset, train=replace(preset.train, passes=10_000)),
        cohort=str(cohort.location),
        out=str(folder / "run"),
        threads=1,
    )
    pretrain_on_cluster(job, Resources(), address="auto")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

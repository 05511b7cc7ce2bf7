"""The whole paper in one command: strategies, tables, sweeps and figures, and one page about all of them.

Question: what does all of Fang et al. 2024 (arXiv 2410.16424) look like on this cohort, and which of its claims hold?
Run: python experiments/reproduce_paper.py --cohort COHORT --out OUT [--preset smoke|small|paper] [--hours 2]
    Kill it and type it again: what is done is found done, what was interrupted goes on.
Cost: printed before anything starts, at rates measured on this machine. smoke: under 30 minutes on two cores; its
    scores mean nothing. small on 2,000 windows: about a day on two cores. paper: days on eight GPUs. --hours ends it
    in good order.
Watch: the line of progress says which part runs, how far all is, and the time left; OUT/reproduction.html is written
    after every part.
Expect: on simulated nights nothing about people; on small cohorts wide intervals and claims that cannot be told.
Answer: open; what was run so far stands in LOG.md.
"""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from functools import partial

from physioray.analysis import measure
from physioray.cli import guard
from physioray.distribute import Resources, join_cluster
from physioray.grid import Grid
from physioray.progress import ProgressLine
from physioray.reproduction.course import Course, describe_plan
from physioray.reproduction.page import write_reproduction
from physioray.reproduction.parts import Runners, list_parts, make_options
from physioray.reproduction.plan import PRESETS, find_reproduction
from physioray.spread import measure_on_cluster, spread_work
from physioray.steps import find_commit
from physioray.storage import open_location
from physioray.sweep import run_sweep


def main() -> int:
    """Compute what is missing, and write OUT/reproduction.html."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of everything; run again, it goes on where it stopped")
    parser.add_argument("--steps", default=None, help="folder or URI of the steps (default: OUT/steps)")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--passes", type=int, default=None, help="passes of every pretraining (default: the preset's)")
    parser.add_argument("--finetune-seeds", type=int, default=None, help="repetitions of trainings (default 5)")
    parser.add_argument("--hours", type=float, default=None, help="begin no part, and no training, after so many hours")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    options = parser.parse_args()

    gpus = 1 if options.device == "cuda" else 0  # of a training, a trial, a look inside: as many run at once as fit
    out, deadline = (
        open_location(options.out),
        None if options.hours is None else time.monotonic() + 3600 * options.hours,
    )
    config = find_reproduction(options.preset, passes=options.passes, finetune_seeds=options.finetune_seeds)
    store, cohort = open_location(options.steps or (out / "steps").uri).uri, open_location(options.cohort).uri
    grid = Grid(cohort=cohort, store=store, config=config.grid, device=options.device, threads=1, commit=find_commit())
    resources = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=gpus)
    runners = Runners(
        work=partial(spread_work, grid, gpus=gpus, address=options.address),
        sweep=lambda setup, screen: run_sweep(
            setup.plan, setup.run_trial, setup.out, resources=resources, address=options.address, screen=screen
        ),
        look=lambda job, screen: (
            measure_on_cluster(job, 1, gpus_per_worker=gpus, address=options.address, screen=screen)
            if options.address
            else measure(job, device=options.device, progress=screen.update)
        ),
    )
    parts = list_parts(config, grid, out, make_options(config, grid, options.address), runners)
    with ProgressLine("the paper", "of the work") as screen, ExitStack() as stack:
        course = Course(out, parts, screen)
        standings = course.look()
        screen.say(describe_plan(parts, standings, os.cpu_count() or 1))
        command = " ".join(["python", *sys.argv])
        write = partial(write_reproduction, out, config, grid, parts, course.records, command=command)
        if any(standing.missing for standing in standings.values()):
            stack.enter_context(join_cluster(options.address))
            course.run(standings, deadline=deadline, after=write)
    print(f"The page: {write()}")
    return int(any(record.state == "failed" for record in course.records.values()))


if __name__ == "__main__":
    sys.exit(guard(main))

"""Tables 1 to 7 of the paper on this cohort, beside the paper's numbers, and which of its claims hold here.

Question: what do Fang et al. 2024's tables look like on this cohort, and which of the paper's sentences hold?
Run: python experiments/tables.py --cohort COHORT --out TABLES [--preset smoke|small|paper] [--hours 2] [--address auto]
Cost: printed before anything starts, at the rate measured on this machine. smoke: 20 minutes on two cores at most; its
    scores mean nothing. small on 2,000 windows: hours on two cores, most of them for trainings on tasks; --hours stops
    in good order, and the same command goes on. paper: days on eight GPUs.
Watch: the line of progress; physioray steps STEPS for what is done.
Expect: on simulated nights nothing about people; on small cohorts wide intervals and claims that cannot be told.
Answer: open; what was run so far stands in LOG.md.
"""

import argparse
import os
import sys
import time

from physioray.cli import guard
from physioray.costs import estimate_cost
from physioray.grid import Grid
from physioray.grid_plan import GRIDS, find_grid
from physioray.grid_report import claim_folder, narrow_grid, write_grid
from physioray.grid_scores import collect_scores
from physioray.progress import ProgressLine
from physioray.steps import find_commit
from physioray.storage import open_location
from physioray.work import Work, run_work


def main() -> None:
    """Compute what is missing, and write tables.html, tables.md and scores.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of the tables; run again, it goes on where it stopped")
    parser.add_argument("--steps", default=None, help="folder or URI of the steps (default: beside --out)")
    parser.add_argument("--preset", default="small", choices=list(GRIDS))
    parser.add_argument("--tasks", default=None, help="comma-separated (default: all that have labels)")
    parser.add_argument("--passes", type=int, default=None, help="passes of every pretraining (default: the preset's)")
    parser.add_argument("--finetune-seeds", type=int, default=None, help="repetitions of trainings (default 5)")
    parser.add_argument("--whole", action="store_true", help="trainings on tasks at every training-set size")
    parser.add_argument("--hours", type=float, default=None, help="begin nothing after so many hours")
    parser.add_argument("--in-process", action="store_true", help="one piece after the other, without Ray")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    options = parser.parse_args()

    # A piece of work is one training: as many run at once as there are cores, or GPUs.
    gpus = 1 if options.device == "cuda" else 0
    out = open_location(options.out)
    store = options.steps or (out.folder / "steps").uri
    config = narrow_grid(
        find_grid(options.preset), options.tasks, options.passes, options.finetune_seeds, options.whole
    )
    grid = Grid(
        cohort=options.cohort, store=store, config=config, device=options.device, threads=1, commit=find_commit()
    )
    claim_folder(grid, out)
    work = grid.list_missing()
    with ProgressLine("tables", "% of the work") as screen:
        cost = estimate_cost(grid, work)
        screen.say(
            f"{len(work)} pieces of work are missing. {cost.describe(1 if options.in_process else os.cpu_count() or 1)}"
        )
        done = 0.0

        def show(item: Work, share: float = 0.0) -> None:
            nonlocal done
            done += share
            screen.update(round(100 * done / max(cost.seconds, 1e-9)), 100, item.title)

        deadline = None if options.hours is None else time.monotonic() + 3600 * options.hours
        watch = {"begin": show, "end": lambda item: show(item, cost.by_work[item]), "deadline": deadline}
        if options.in_process or not work:
            failures = run_work(grid.do, work, **watch)
        else:
            from physioray.spread import spread_work  # asked for what exists, nothing of the cluster is loaded

            failures = spread_work(grid, work, gpus=gpus, address=options.address, **watch)
        scores = collect_scores(grid, failures, screen)
    files = write_grid(grid, scores, out)
    print(files.terminal)
    print(f"The page with the tables: {files.html}\nEvery single score: {files.scores}")


if __name__ == "__main__":
    sys.exit(guard(main))

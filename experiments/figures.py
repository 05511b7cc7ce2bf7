"""Looks inside checkpoints: the paper's Figures 2, 4 and 6, with numbers beside every picture.

Question: do pretrained encoders mix modalities more evenly, and more aligned in time, than one trained from scratch
    on sleep stages, and does modality drop keep units equally tuned to all modalities (Fang et al. 2024, section 4.4)?
Run: python experiments/figures.py --checkpoint scratch=RUN1 --checkpoint "MultiMAE=RUN2" --checkpoint "MultiMAE +
    drop=RUN3" --cohort COHORT --out OUT
    A checkpoint is a run's folder or a file of its checkpoints/, of pretraining or finetuning; pass-0000.pt is the
    untrained encoder. Run again, it draws what is measured and measures only what is new.
Cost: 1,000 windows, 32 contexts x 128 draws: minutes per checkpoint of preset small on one CPU core; preset paper
    wants a GPU (--device cuda) or --workers on a cluster.
Watch: the line of progress; OUT/figures.html at the end, OUT/numbers.parquet for further statistics.
Expect: in the paper, vertical bands and a drift to EEG from scratch; attention aligned in time after masked
    pretraining, with a drift to EMG without drop and equal shares with it. Few passes leave maps near uniform.
Answer: on 21 real excerpts the encoder trained from scratch drifts to EEG as in the paper; masked ones attend
    uniformly after 10 passes and in vertical bands after 78, units not equally tuned. Open at the paper's scale.
"""

import argparse
import sys
from dataclasses import replace

from physioray.analysis import AnalysisJob, AnalysisSums, analyse, measure
from physioray.analysis_config import AnalysisConfig
from physioray.analysis_figures import slug
from physioray.analysis_page import describe_analyses, write_page
from physioray.cli import guard
from physioray.progress import ProgressLine
from physioray.storage import open_location


def main() -> None:
    """Measure every checkpoint, draw, and write OUT/figures.html."""
    default = AnalysisConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, action="append", metavar="NAME=PATH", help="once per checkpoint")
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of figures and numbers")
    parser.add_argument("--windows", type=int, default=default.windows, help=f"default {default.windows}")
    parser.add_argument("--contexts", type=int, default=default.contexts, help=f"default {default.contexts}")
    parser.add_argument("--draws", type=int, default=default.draws, help=f"in each context (default {default.draws})")
    parser.add_argument("--splits", default=",".join(default.splits), help="whose windows, in order of preference")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    parser.add_argument("--workers", type=int, default=0, help="readers on a Ray cluster (default: this process alone)")
    parser.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    options = parser.parse_args()

    config = replace(default, windows=options.windows, contexts=options.contexts, draws=options.draws)
    config = replace(config, splits=tuple(options.splits.split(",")))
    pairs = [text.partition("=")[::2] for text in options.checkpoint]
    wrong = [text for text, (name, path) in zip(options.checkpoint, pairs, strict=True) if not (slug(name) and path)]
    if wrong or len({slug(name) for name, _ in pairs}) < len(pairs):
        raise ValueError(f"--checkpoint must be NAME=PATH, each name once, but got {', '.join(options.checkpoint)}.")
    out, found = open_location(options.out), []
    for name, path in pairs:
        job = AnalysisJob(name=name, checkpoint=path, cohort=options.cohort, config=config)
        with ProgressLine(name, "windows encoded" if not options.workers else "shares") as screen:

            def run_measure(job: AnalysisJob, screen: ProgressLine = screen) -> AnalysisSums:
                if options.workers:
                    from physioray.spread import measure_on_cluster

                    gpus = 1 if options.device == "cuda" else 0
                    return measure_on_cluster(
                        job, options.workers, gpus_per_worker=gpus, address=options.address, screen=screen
                    )
                return measure(job, device=options.device, progress=screen.update)

            found.append(analyse(job, out / "checkpoints" / slug(name), run_measure=run_measure))
    page = write_page(found, out)
    print(describe_analyses(found))
    print(f"The page with figures and numbers: {page}")


if __name__ == "__main__":
    sys.exit(guard(main))

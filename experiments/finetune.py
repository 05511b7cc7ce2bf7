"""Training on the tasks themselves: from a pretrained encoder, thawed or frozen, or from scratch.

Question: does finetuning the whole encoder beat the linear probe on it (Fang et al. 2024, Table 4), and does
    pretraining beat training the same architecture from scratch (Table 1)?
Run: python experiments/finetune.py --checkpoint RUN/checkpoints/last.pt --cohort COHORT --out OUT [--frozen]
    python experiments/finetune.py --strategy scratch --cohort COHORT --out OUT [--preset small]
Cost: a training per task, seed and fold. Preset small (10 passes, one seed, 5 folds, 2,000 windows): some minutes per
    task on two CPU cores. Preset paper: 200 passes on a GPU, hours per task at 500 subjects.
Watch: OUT/TASK/.../training.jsonl; the validation loss has its minimum early, and those weights are used.
Expect: in the paper (500 training subjects) finetuned sleep 0.746, age 0.694, arousal 0.588: below the probe for age
    and in the aggregate. From scratch: sleep 0.737, age 0.626, arousal 0.595.
Answer: open; to be filled in beside the table of strategies.
"""

import argparse
import os
import sys

from physioray.checkpoint_scores import check_origin
from physioray.cli import guard
from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.finetune import FinetuneJob, describe_finetuning, evaluate_finetuning
from physioray.presets import PRESETS, find_preset
from physioray.pretrain import fit_modalities
from physioray.pretrainings import open_pretraining
from physioray.progress import ProgressLine
from physioray.protocol import choose_protocol, describe_card
from physioray.report import describe_results, write_report
from physioray.results import PREDICTIONS_FILE, RESULTS_FILE, write_predictions, write_results
from physioray.storage import open_location
from physioray.strategies import STRATEGIES, find_strategy


def main() -> None:
    """Train on every task, score on the folds of the probe, and write OUT/report.html."""
    names = [name for name, strategy in STRATEGIES.items() if strategy.objective is None]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--checkpoint", default=None, help="a pretraining's folder, or one of its checkpoints")
    start.add_argument("--strategy", default=None, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cohort", required=True, help="folder or URI that physioray ingest has written")
    parser.add_argument("--out", required=True, help="folder of the run; run again, it goes on where it stopped")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--tasks", default="sleep,age,arousal", help="comma-separated (default all)")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions (default 1; the paper has 5)")
    parser.add_argument("--frozen", action="store_true", help="keep the encoder as it is, train the head alone")
    parser.add_argument("--other-cohort", action="store_true", help="the encoder may come from another cohort")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    options = parser.parse_args()

    preset, cohort = find_preset(options.preset), Cohort.open(options.cohort)
    probe = ProbeConfig(tasks=tuple(options.tasks.split(",")), seeds=tuple(range(options.seeds)))
    protocol = choose_protocol(cohort, probe)
    model = checkpoint = None
    if options.checkpoint is not None:
        pretraining, identity = open_pretraining(options.checkpoint)
        check_origin(pretraining.checkpoint, identity, cohort, protocol.splits, other_cohort=options.other_cohort)
        checkpoint = pretraining.checkpoint.uri
    if options.strategy is not None:
        model = find_strategy(options.strategy).fit_model(fit_modalities(preset.model, cohort))
    job = FinetuneJob(
        cohort=options.cohort,
        out=options.out,
        task=probe.tasks[0],
        checkpoint=checkpoint,
        model=model,
        train=preset.finetune,
        frozen=options.frozen,
        threads=os.cpu_count(),
    )

    out = open_location(options.out)
    (out / "card.json").write_json(describe_card(cohort, protocol))
    (out / "config.json").write_json(describe_finetuning(job))
    with ProgressLine("train", "steps") as screen:
        found = evaluate_finetuning(job, probe, folds=protocol.folds, device=options.device, screen=screen)
    write_results(out / RESULTS_FILE, found.scores)
    write_predictions(out / PREDICTIONS_FILE, [found.predictions])
    (out / "notes.json").write_json(found.notes)
    page = write_report(out)
    print(describe_results(out))
    print(f"The page with tables and figures: {page}")


if __name__ == "__main__":
    sys.exit(guard(main))

"""The command line: a few verbs that parse paths and import their room when called."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from physioray import __version__

if TYPE_CHECKING:
    from physioray.config import IngestConfig
    from physioray.storage import Location

_FILE = ". A file stands where a folder must be: choose another place, or move the file away."
_HINTS = {
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.ENOSPC: ". The disk is full: free some space; the same command continues where it was.",
    errno.EROFS: ". Choose a place that can be written to.",
    errno.EACCES: ". Choose a place that you may read and write.",
}
"""What to do about errors of the operating system, which only say what happened."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb."""
    options = _build_parser().parse_args(arguments)
    return guard(lambda: options.run(options))


def guard(action: Callable[[], int | None]) -> int:
    """Run a command; errors that a user can mend are one line on standard error, without a traceback.

    Returns:
        The exit status: the action's own (None counts as 0), 1 for an error, 130 after ctrl-C.
    """
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("physioray: stopped; the same command continues where it was.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has had enough; nothing is wrong. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
        hint = _HINTS.get(getattr(error, "errno", None) or 0, "")
        print(f"physioray: {error}{hint}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="physioray", description="From raw nights to filled result tables.")
    parser.add_argument("--version", action="version", version=f"physioray {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    simulate = verbs.add_parser("simulate", help="write a cohort of simulated nights in the CinC 2018 layout")
    simulate.add_argument("out", metavar="OUT", help="folder to write")
    simulate.add_argument("--subjects", type=int, default=40, help="number of subjects, one night each (default 40)")
    simulate.add_argument("--hours", type=float, default=7.7, help="hours of each night (default 7.7)")
    simulate.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    simulate.set_defaults(run=_simulate)

    ingest = verbs.add_parser("ingest", help="turn recordings into a cohort of 30 s windows")
    ingest.add_argument("source", metavar="SOURCE", help="folder or s3:// URI of the recordings")
    ingest.add_argument("cohort", metavar="COHORT", help="folder or s3:// URI to write")
    ingest.add_argument("--modalities", default=None, help="comma-separated, for example eeg,eog,emg,ecg (default)")
    ingest.add_argument("--arousal-rule", choices=("paper", "majority", "any"), default="paper")
    ingest.add_argument("--channels", default=None, help="TOML of channels, derivations and names of stages")
    ingest.add_argument("--dry-run", action="store_true", help="print what would be used, by headers only")
    ingest.add_argument("--strict", action="store_true", help="fail if any recording is rejected")
    ingest.add_argument("--anonymous", action="store_true", help="read a public bucket without credentials")
    ingest.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    ingest.set_defaults(run=_ingest)

    info = verbs.add_parser("info", help="print a cohort's card")
    info.add_argument("cohort", metavar="COHORT")
    info.set_defaults(run=_info)

    _add_model_verbs(verbs)
    return parser


def _add_model_verbs(verbs: Any) -> None:
    """The verbs on what has been trained: scores, steps, inference, export, comparison."""
    evaluate = verbs.add_parser("evaluate", help="score a checkpoint by probes at every training-set size")
    evaluate.add_argument("checkpoint", metavar="RUN", help="folder of a run, or one of its checkpoints")
    evaluate.add_argument("cohort", metavar="COHORT")
    evaluate.add_argument("--out", required=True, help="folder for scores and the page")
    evaluate.add_argument("--steps", default=None, help="folder or s3:// URI of the steps (default: beside --out)")
    evaluate.add_argument("--tasks", default=None, help="comma-separated (default sleep,age,arousal)")
    evaluate.add_argument("--seeds", type=int, default=None, help="number of seeds (default 5)")
    evaluate.add_argument("--other-cohort", action="store_true", help="the encoder may come from another cohort")
    evaluate.add_argument("--device", default="cpu", help="cpu, or cuda (default cpu)")
    evaluate.set_defaults(run=_evaluate)

    steps = verbs.add_parser("steps", help="list what has been computed, and remove what nothing refers to")
    steps.add_argument("store", metavar="STEPS", help="folder or s3:// URI of the steps")
    steps.add_argument("--verify", action="store_true", help="compare every file with its hash")
    remove = steps.add_mutually_exclusive_group()
    remove.add_argument("--remove", metavar="IDENTITY", default=None, help="delete one step")
    remove.add_argument("--remove-unreferenced", action="store_true", help="delete steps that nothing refers to")
    steps.set_defaults(run=_steps)

    infer = verbs.add_parser("infer", help="read recordings with a trained model: embeddings, hypnogram, a page")
    infer.add_argument("recording", metavar="RECORDING", help="a WFDB record or EDF file, or a folder of them")
    infer.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, an exported folder, or a .pt file")
    infer.add_argument("--out", required=True, metavar="DIR", help="folder to write; run again, it goes on")
    infer.add_argument("--channels", default=None, help="file of channels, derivations and stage names (montage.toml)")
    infer.add_argument("--strict", action="store_true", help="fail if any recording cannot be used")
    infer.add_argument("--address", default=None, help="a running Ray cluster, for folders (default: start one here)")
    infer.set_defaults(run=_infer)

    export = verbs.add_parser("export", help="write a run's model for others: safetensors, settings, model card")
    export.add_argument("run_folder", metavar="RUN", help="a run's folder, or the checkpoint of a finetuning")
    export.add_argument("out", metavar="DIR", help="folder to write")
    export.add_argument(
        "--onnx", action="store_true", help="write the encoder as ONNX too: pip install 'physioray[onnx]'"
    )
    export.set_defaults(run=_export)

    compare = verbs.add_parser("compare", help="compare runs with the first of them, on the same people")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of evaluated runs; the first is the reference")
    compare.add_argument(
        "--out", default=None, help="folder for a page, a figure and the numbers (default: print only)"
    )
    compare.set_defaults(run=_compare)


def _simulate(options: argparse.Namespace) -> int:
    from physioray.data.simulate import simulate_cohort
    from physioray.progress import ProgressLine

    with ProgressLine("simulate", "nights") as line:
        simulate_cohort(
            options.out, subjects=options.subjects, hours=options.hours, seed=options.seed, progress=line.update
        )
    print(f"{options.subjects} SIMULATED nights in {options.out}. Next: physioray ingest {options.out} COHORT")
    return 0


def _ingest(options: argparse.Namespace) -> int:
    from physioray.config import AROUSAL_RULES, IngestConfig
    from physioray.data.montage import read_montage
    from physioray.storage import open_location

    source = open_location(options.source, anonymous=options.anonymous)
    montage = read_montage(source, open_location(options.channels) if options.channels else None)
    settings = replace(IngestConfig(), arousal_rule=AROUSAL_RULES[options.arousal_rule], montage=montage)
    if options.modalities:
        settings = replace(settings, modalities=tuple(name.strip() for name in options.modalities.split(",")))
    return _preview(source, settings, strict=options.strict) if options.dry_run else _convert(options, settings)


def _preview(source: Location, settings: IngestConfig, *, strict: bool) -> int:
    from shutil import get_terminal_size

    from physioray.data.preview import describe_preview, preview_source
    from physioray.progress import ProgressLine

    with ProgressLine("dry run", "recordings") as line:
        previews, simulated = preview_source(source, settings, line.update)
    print(describe_preview(previews, settings, simulated=simulated, width=get_terminal_size((120, 24)).columns))
    return int(strict and any(item.reason for item in previews))


def _convert(options: argparse.Namespace, settings: IngestConfig) -> int:
    from physioray.data.shards import Progress, ingest_cohort
    from physioray.progress import ProgressLine

    with ProgressLine("ingest", "recordings") as line:

        def show(state: Progress) -> None:
            note = f"{state.rejected} rejected, {state.hours:.1f} h of signal"
            line.update(state.done + state.rejected, state.total, note)

        summary = ingest_cohort(
            options.source,
            options.cohort,
            settings,
            anonymous=options.anonymous,
            strict=options.strict,
            address=options.address,
            progress=show,
        )
    print(summary.describe())
    return 0


def _info(options: argparse.Namespace) -> int:
    from physioray.data.card import describe_cohort
    from physioray.data.cohort import Cohort

    print(describe_cohort(Cohort.open(options.cohort)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from physioray.checkpoint_scores import score_checkpoint
    from physioray.config import ProbeConfig
    from physioray.data.cohort import Cohort
    from physioray.progress import ProgressLine
    from physioray.report import describe_results, write_report
    from physioray.steps import StepStore, find_commit
    from physioray.storage import open_location

    probe = ProbeConfig()
    if options.tasks:
        probe = replace(probe, tasks=tuple(name.strip() for name in options.tasks.split(",")))
    if options.seeds:
        probe = replace(probe, seeds=tuple(range(options.seeds)))
    out = open_location(options.out)
    steps = open_location(options.steps) if options.steps else out.folder / "steps"
    with ProgressLine("evaluate", "probes") as screen:
        score_checkpoint(
            options.checkpoint,
            Cohort.open(options.cohort),
            StepStore(steps, commit=find_commit()),
            out,
            probe=probe,
            other_cohort=options.other_cohort,
            device=options.device,
            screen=screen,
        )
    page = write_report(out)
    print(describe_results(out))
    print(f"The page with tables and figures: {page}")
    return 0


def _steps(options: argparse.Namespace) -> int:
    from physioray.step_listing import print_steps, remove_steps, verify_steps
    from physioray.steps import StepStore
    from physioray.storage import open_location

    store = StepStore(open_location(options.store))
    if options.remove or options.remove_unreferenced:
        for record in remove_steps(store, identity=options.remove):
            print(f"Removed {record.name} {record.identity}.")
        return 0
    print_steps(store)
    damaged = verify_steps(store) if options.verify else []
    for sentence in damaged:
        print(sentence)
    if options.verify and not damaged:
        print("Every file is what it was when its step finished.")
    return 1 if damaged else 0


def _infer(options: argparse.Namespace) -> int:
    from physioray.data.montage import read_montage
    from physioray.data.records import RejectedRecording
    from physioray.data.selection import find_recordings, read_jumps
    from physioray.infer import PAGE_FILE, describe_summary, infer_recording
    from physioray.origins import open_model
    from physioray.storage import open_location

    place, out = open_location(options.recording), open_location(options.out)
    source, entries = find_recordings(place)
    model = open_model(open_location(options.checkpoint), say=lambda text: print(text, file=sys.stderr))
    montage = read_montage(source, open_location(options.channels) if options.channels else None)
    settings = replace(model.preprocessing, montage=montage)
    if source.path != place.path:
        jumps = read_jumps(source).get(entries[0].name, ())
        try:
            summary = infer_recording(source, entries[0], model, out, discontinuities=jumps, settings=settings)
        except RejectedRecording as error:
            raise ValueError(f"{entries[0].name} cannot be used. {error}") from error
        print(describe_summary(summary))
        print(f"The page: {out / PAGE_FILE}")
        return 0

    from physioray.infer_many import LEDGER_FILE, infer_many
    from physioray.progress import ProgressLine

    with ProgressLine("infer", "recordings") as line:
        rows = infer_many(source, entries, model, out, settings=settings, address=options.address, progress=line.update)
    rejected = [row for row in rows if not row.accepted]
    told = "SIMULATED signals" if model.simulated else "recorded signals"
    print(f"{len(rows) - len(rejected)} recordings read by a model trained on {told}, {len(rejected)} rejected.")
    for row in rejected:
        print(f"  {row.path}: {row.reason}")
    print(f"A page per recording in {out}; the list: {out / LEDGER_FILE}")
    return 1 if len(rejected) == len(rows) or (options.strict and rejected) else 0


def _export(options: argparse.Namespace) -> int:
    from physioray.export import CARD_FILE, export_model
    from physioray.storage import open_location

    out = open_location(options.out)
    model = export_model(
        open_location(options.run_folder), out, onnx=options.onnx, say=lambda text: print(text, file=sys.stderr)
    )
    simulated = " (trained on SIMULATED signals)" if model.simulated else ""
    heads = ", ".join(model.readouts) or "none"
    print(f"{model.description['strategy']}{simulated}: {model.features} features, heads: {heads}.")
    print(f"The model card: {out / CARD_FILE}. Open it: physioray.load({str(out)!r})")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from physioray.run_comparison import compare_runs, describe_comparison, name_runs, open_run, write_comparison
    from physioray.storage import open_location

    names = name_runs(options.runs)
    found = compare_runs([open_run(path, name) for path, name in zip(options.runs, names, strict=True)])
    print(describe_comparison(found), end="")
    if options.out is not None:
        print(f"The page with figure and numbers: {write_comparison(found, open_location(options.out))}")
    return 0 if found.differences else 1


if __name__ == "__main__":
    sys.exit(main())

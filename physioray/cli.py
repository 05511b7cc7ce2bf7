"""The command line: a few verbs that parse paths and import their room when called."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from physioray import __version__

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
    ingest.add_argument("--strict", action="store_true", help="fail if any recording is rejected")
    ingest.add_argument("--anonymous", action="store_true", help="read a public bucket without credentials")
    ingest.add_argument("--address", default=None, help="a running Ray cluster (default: start one here)")
    ingest.set_defaults(run=_ingest)

    info = verbs.add_parser("info", help="print a cohort's card")
    info.add_argument("cohort", metavar="COHORT")
    info.set_defaults(run=_info)

    infer = verbs.add_parser("infer", help="read recordings with a trained model: embeddings, hypnogram, a page")
    infer.add_argument("recording", metavar="RECORDING", help="a WFDB record or EDF file, or a folder of them")
    infer.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, an exported folder, or a .pt file")
    infer.add_argument("--out", required=True, metavar="DIR", help="folder to write; run again, it goes on")
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
    return parser


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
    from physioray.data.shards import Progress, ingest_cohort
    from physioray.progress import ProgressLine

    settings = replace(IngestConfig(), arousal_rule=AROUSAL_RULES[options.arousal_rule])
    if options.modalities:
        settings = replace(settings, modalities=tuple(name.strip() for name in options.modalities.split(",")))
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


def _infer(options: argparse.Namespace) -> int:
    from physioray.data.records import RejectedRecording
    from physioray.data.selection import find_recordings, read_jumps
    from physioray.infer import PAGE_FILE, describe_summary, infer_recording
    from physioray.origins import open_model
    from physioray.storage import open_location

    place, out = open_location(options.recording), open_location(options.out)
    source, entries = find_recordings(place)
    model = open_model(open_location(options.checkpoint), say=lambda text: print(text, file=sys.stderr))
    if source.path != place.path:
        jumps = read_jumps(source).get(entries[0].name, ())
        try:
            summary = infer_recording(source, entries[0], model, out, discontinuities=jumps)
        except RejectedRecording as error:
            raise ValueError(f"{entries[0].name} cannot be used. {error}") from error
        print(describe_summary(summary))
        print(f"The page: {out / PAGE_FILE}")
        return 0

    from physioray.infer_many import LEDGER_FILE, infer_many
    from physioray.progress import ProgressLine

    with ProgressLine("infer", "recordings") as line:
        rows = infer_many(source, entries, model, out, address=options.address, progress=line.update)
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


if __name__ == "__main__":
    sys.exit(main())

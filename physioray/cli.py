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

    compare = verbs.add_parser("compare", help="compare runs with the first of them, on the same people")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of evaluated runs; the first is the reference")
    compare.add_argument(
        "--out", default=None, help="folder for a page, a figure and the numbers (default: print only)"
    )
    compare.set_defaults(run=_compare)
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

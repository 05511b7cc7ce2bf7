"""Trains tiny models on noise for a pass, for tests of what is done with a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from physioray.config import ProbeConfig
from physioray.data.cohort import Cohort
from physioray.origins import complete_run
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.results import write_results
from physioray.storage import Location, open_location
from physioray.strategies import find_strategy
from tests.written_cohorts import write_cohort
from tests.written_runs import make_rows

SPLITS = ("train", "train", "train", "train", "validation", "validation", "test", "test")
PROBE = ProbeConfig(penalties=(1e-2, 1.0))


def write_trained_run(
    folder: Path, *, strategy: str = "multimae_drop", passes: int = 1, complete: bool = True, **cohort: object
) -> tuple[Location, Cohort]:
    """A run of one pass in `folder/run` on the cohort `folder/cohort`; `complete` gives it heads."""
    made = write_cohort(folder / "cohort", [24] * len(SPLITS), splits=SPLITS, absent={"emg": 0.2}, **cohort)  # type: ignore[arg-type]
    out = open_location(str(folder / "run"))
    preset = find_preset("tiny")
    preset = replace(preset, train=replace(preset.train, passes=passes))
    job = PretrainJob.from_strategy(find_strategy(strategy), preset, cohort=str(made.location), out=out.path, threads=1)
    pretrain(job)
    write_results(out / "results.jsonl", make_rows())
    (out / "card.json").write_json({"note": "Held-out test subjects."})
    if complete:
        complete_run(out, cohort=made, probe=PROBE)
    return out, made

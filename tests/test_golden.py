"""The losses of the first ten steps of every strategy, kept in tests/golden: a change of them is a change of method.

One thread, fp32, the tiny preset, a written cohort with absent modalities; relative tolerance 1e-4. After a change
that is meant to change losses, write them anew and say why in the commit:

    OMP_NUM_THREADS=1 python -m tests.test_golden            # all
    OMP_NUM_THREADS=1 python -m tests.test_golden simclr     # some
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.config import MaskConfig, ReconstructionConfig
from physioray.data.cohort import Cohort
from physioray.finetune import FinetuneJob, finetune
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob, pretrain
from physioray.signals import PAPER_MODALITIES
from physioray.strategies import STRATEGIES, find_strategy
from tests.written_cohorts import write_cohort

FOLDER = Path(__file__).parent / "golden"
STEPS = 10
TINY = find_preset("tiny")
ROWS = [
    name for name in STRATEGIES if not name.startswith(("mae_", "scratch_")) or name.split("_")[1] in PAPER_MODALITIES
]
VARIANTS = {
    "multimae_dirichlet": ReconstructionConfig(mask=MaskConfig(sampler="dirichlet", drop=False)),
    "multimae_subset": ReconstructionConfig(mask=MaskConfig(sampler="subset", drop=False)),
}
NAMES = (*ROWS, *VARIANTS)


def write_golden_cohort(folder: Path) -> Cohort:
    # 160 training windows are ten batches of 16, also in pairs.
    return write_cohort(folder, [80, 80, 20, 4], absent={"emg": 0.2, "ecg": 0.1})


def run(name: str, cohort: Cohort, out: Path) -> list[float]:
    """The losses of the first steps of a strategy."""
    torch.set_num_threads(1)
    train = replace(TINY.train, passes=2, validate_every=100)
    places = {"cohort": str(cohort.location), "out": str(out), "threads": 1}
    strategy = find_strategy("multimae" if name in VARIANTS else name)
    if strategy.objective is None:
        settings = replace(TINY.finetune, passes=2)
        job = FinetuneJob(task="sleep", model=strategy.fit_model(TINY.model), train=settings, **places)
        return finetune(job).step_losses[:STEPS]
    pretraining = PretrainJob.from_strategy(strategy, TINY, **places)
    result = pretrain(replace(pretraining, train=train, objective=VARIANTS.get(name, strategy.objective)))
    return result.step_losses[:STEPS]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_golden_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_ten_losses_are_those_on_record(name: str, cohort: Cohort, tmp_path: Path) -> None:
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    losses = run(name, cohort, tmp_path)
    assert len(kept) == len(losses) == STEPS
    np.testing.assert_allclose(losses, kept, rtol=1e-4)


def test_nothing_is_on_record_that_no_strategy_has_and_all_differ() -> None:
    kept = {path.stem: path.read_text() for path in FOLDER.glob("*.json")}
    assert set(kept) == set(NAMES) and len(set(kept.values())) == len(NAMES)


def write(names: list[str]) -> None:
    """Replace the record of some strategies."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_golden_cohort(Path(folder) / "cohort")
        for name in names:
            losses = run(name, cohort, Path(folder) / name)
            (FOLDER / f"{name}.json").write_text(json.dumps(losses, indent=0) + "\n")
            print(f"{name}: {losses[0]:.5f} ... {losses[-1]:.5f}")


if __name__ == "__main__":
    write(sys.argv[1:] or list(NAMES))

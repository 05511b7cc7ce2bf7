"""Training fed by Ray Data, and by reading in process, against the same training on windows that lie on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from physioray.data.cohort import Cohort
from physioray.data.gather import GatherSource
from physioray.data.held import HeldSource
from physioray.objectives.reconstruction import MaskedReconstruction
from physioray.presets import Preset, find_preset
from physioray.pretrain import build_autoencoder
from physioray.train import train
from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook, take_turns
from tests.benchmarks.training import StepClock
from tests.written_cohorts import write_cohort

HELD = "windows on the device already"
PASSES = 2


def measure_fed(
    make_source: Callable[..., Any], cohort: Cohort, sizes: Preset, device: torch.device, passes: int = PASSES
) -> float:
    """Windows per second on the wall, from the end of the third step to the end of the last pass."""
    config = replace(sizes.train, passes=passes, warmup_passes=0)
    source = make_source(cohort, cohort.find_windows(), batch_size=config.batch_size, modalities=sizes.model.modalities)
    steps, warm = passes * source.count_steps(), 3
    clock = StepClock(warm, steps, device, wall=True)
    train(
        model=build_autoencoder(sizes.model, 0),
        objective=MaskedReconstruction(sizes.objective),  # type: ignore[arg-type]
        source=source,
        config=config,
        reporter=clock,
        device=device,
    )
    return (steps - warm) * config.batch_size / clock.seconds


@pytest.mark.benchmark_run
@pytest.mark.ray
@pytest.mark.parametrize(
    ("kind", "preset", "rows"),
    [("cpu", "small", [64] * 4), pytest.param("cuda", "paper", [1024] * 16, marks=pytest.mark.gpu)],
)
def test_feeding_while_training(kind: str, preset: str, rows: list[int], tmp_path: Path, notebook: Notebook) -> None:
    title = f"Ray Data feeding a {'GPU' if kind == 'cuda' else 'CPU'} while training, {preset}"
    if kind == "cuda" and not torch.cuda.is_available():
        notebook.leave_out(title, "no GPU")
        pytest.skip("no GPU")
    pytest.importorskip("ray")
    from physioray.data.stream import StreamSource
    from physioray.distribute import join_cluster

    cohort, sizes, device = write_cohort(tmp_path, rows), find_preset(preset), torch.device(kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with join_cluster(cpus=3):
        sources = {OURS: StreamSource, "gathered in process": GatherSource, HELD: partial(HeldSource, device=device)}
        figures = take_turns(
            {name: partial(measure_fed, source, cohort, sizes, device) for name, source in sources.items()}
        )
    torch.set_num_threads(threads)
    notebook.keep(
        Comparison(
            title=title,
            unit="windows/s",
            better="more",
            figures=figures,
            goals=(Goal(against=HELD, ratio=0.95),),
            note=f"batches of {sizes.train.batch_size}, SIMULATED noise; wall time: needs a core free to read",
        )
    )


@pytest.mark.plain
def test_the_path_of_the_feeding_benchmark_works(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, [32, 32])
    for source in (GatherSource, HeldSource):
        assert measure_fed(source, cohort, find_preset("tiny"), torch.device("cpu"), passes=1) > 0

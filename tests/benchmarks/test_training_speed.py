"""A training step against plain PyTorch and against the processor's rate of matrix products, side by side."""

from __future__ import annotations

import copy

import pytest
import torch

from physioray.models.transformer import compile_blocks
from physioray.presets import find_preset
from physioray.pretrain import build_autoencoder
from tests.benchmarks.comparison import OURS, Comparison, Goal, Notebook, take_turns
from tests.benchmarks.operations import count_step_operations
from tests.benchmarks.plain_model import copy_weights
from tests.benchmarks.training import make_plain_measure, measure_matrix_rate, measure_ours
from tests.benchmarks.workers import measure_workers

PLAIN, LIMIT = "plain PyTorch", "matrix products alone"
VISIBLE = 36


@pytest.mark.benchmark_run
@pytest.mark.parametrize(
    ("preset", "precision", "rows", "steps"),
    [("small", "fp32", 64, 3), ("small", "bf16", 64, 4), ("paper", "fp32", 32, 1), ("paper", "bf16", 16, 2)],
)
def test_training_step_on_a_cpu(preset: str, precision: str, rows: int, steps: int, notebook: Notebook) -> None:
    sizes, device = find_preset(preset), torch.device("cpu")
    operations = count_step_operations(sizes.model, VISIBLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build_autoencoder(sizes.model, 0)
        plain = make_plain_measure(copy_weights(model), sizes, precision=precision, rows=rows, device=device)
        figures = take_turns(
            {
                OURS: lambda: measure_ours(model, sizes, precision=precision, rows=rows, steps=steps, device=device),
                PLAIN: lambda: plain(max(1, steps // 2)),
                LIMIT: lambda: measure_matrix_rate(precision, device) / operations,
            }
        )
    finally:
        torch.set_num_threads(threads)
    goals = (Goal(against=PLAIN, ratio=2.0), Goal(against=LIMIT, ratio=0.8))
    notebook.keep(
        Comparison(
            title=f"training step on a CPU, {preset}, {precision}",
            unit="windows/s",
            better="more",
            figures=figures,
            goals=goals if precision == "fp32" else (Goal(against=LIMIT, ratio=0.35),),
            one_goal_suffices=True,
            note=f"batches of {rows}, SIMULATED noise, CPU time of one thread; {operations / 1e9:.2f} GF a window",
        )
    )


HELD = "the same, batches lying on the device"
GPU_ROWS = (256, 512, 1024, 2048)


def measure_on_device(
    preset: str, device: torch.device, rows: int, *, steps: int, compiled: bool, repeats: int = 5
) -> Comparison:
    """The step on one device, batches copied there and lying there already, with the plain version and the limit."""
    sizes = find_preset(preset)
    operations = count_step_operations(sizes.model, VISIBLE)
    model = build_autoencoder(sizes.model, 0).to(device)
    plain = make_plain_measure(copy_weights(model), sizes, precision="bf16", rows=rows, device=device)
    if compiled:
        model = copy.deepcopy(model)
        compile_blocks(model)
    settings = {"precision": "bf16", "rows": rows, "steps": steps, "device": device, "warm": 3}
    figures = take_turns(
        {
            OURS: lambda: measure_ours(model, sizes, **settings),
            HELD: lambda: measure_ours(model, sizes, held=True, **settings),
            PLAIN: lambda: plain(steps),
            LIMIT: lambda: measure_matrix_rate("bf16", device) / operations,
        },
        repeats,
    )
    return Comparison(
        title=f"training step on one {'GPU' if device.type == 'cuda' else 'CPU'}, {preset}, bf16, batches of {rows}"
        f"{', compiled' if compiled else ''}",
        unit="windows/s",
        better="more",
        figures=figures,
        goals=(Goal(against=LIMIT, ratio=0.45), Goal(against=HELD, ratio=0.95)),
        note=f"SIMULATED noise; {operations / 1e9:.2f} GF a window",
    )


@pytest.mark.benchmark_run
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_training_step_on_a_gpu(rows: int, compiled: bool, notebook: Notebook) -> None:
    if not torch.cuda.is_available():
        notebook.leave_out(f"training step on one GPU, batches of {rows}{', compiled' if compiled else ''}", "no GPU")
        pytest.skip("no GPU")
    notebook.keep(measure_on_device("paper", torch.device("cuda"), rows, steps=20, compiled=compiled))


@pytest.mark.plain
def test_the_path_of_the_gpu_benchmark_works(capsys: pytest.CaptureFixture) -> None:
    row = measure_on_device("tiny", torch.device("cpu"), 4, steps=1, compiled=False, repeats=1)
    assert all(len(values) == 1 and values[0] > 0 for values in row.figures.values())
    assert row.list_ratios(LIMIT)[0] < 1
    capsys.readouterr()


@pytest.mark.benchmark_run
def test_two_workers_of_one_thread_against_one(notebook: Notebook) -> None:
    """The preset's global batch, gloo over the loopback; seconds on the wall, so the cores must be free."""
    sizes = find_preset("small")
    figures = take_turns(
        {
            OURS: lambda: measure_workers(sizes, workers=2, steps=6),
            "one worker": lambda: measure_workers(sizes, workers=1, steps=6),
            "two that do not talk": lambda: measure_workers(sizes, workers=2, steps=6, talking=False),
        }
    )
    notebook.keep(
        Comparison(
            title=f"two workers of one thread, same global batch of {sizes.train.batch_size}, small, fp32",
            unit="windows/s",
            better="more",
            figures=figures,
            goals=(Goal(against="one worker", ratio=1.8),),
            note="SIMULATED noise; seconds on the wall: needs two free cores",
        )
    )

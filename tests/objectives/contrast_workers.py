"""Contrastive steps in one or more processes, for tests that compare them; importable, so that processes can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from physioray.config import ContrastiveConfig, LateFusionConfig
from physioray.models.late_fusion import LateFusion
from physioray.objectives.contrastive import build_contrast
from physioray.presets import PRESETS
from physioray.pretrain import PretrainJob, pretrain
from physioray.tensors import Draw, WindowTensors

CASES = (("simclr", False), ("pairwise", False), ("leave_one_out", True))
"""Methods, and whether the temperature is learned."""


def make_windows(rows: int) -> WindowTensors:
    """Windows of noise; the second and third lack emg, all from the seventh on lack ecg."""
    generator = torch.Generator().manual_seed(1)
    names = PRESETS["tiny"].model.modalities
    present = {name: torch.ones(rows, dtype=torch.bool) for name in names}
    present["emg"][1:3] = False
    present["ecg"][6:] = False
    signals = {name: torch.randn(rows, 3000, generator=generator) * present[name][:, None] for name in names}
    return WindowTensors(signals=signals, present=present, labels={}, window_id=np.arange(rows))


def take(windows: WindowTensors, rows: Sequence[int]) -> WindowTensors:
    """Some rows of a batch."""
    chosen = list(rows)
    return WindowTensors(
        signals={name: signal[chosen] for name, signal in windows.signals.items()},
        present={name: here[chosen] for name, here in windows.present.items()},
        labels={},
        window_id=windows.window_id[chosen],
    )


def run_step(windows: WindowTensors, method: str, learned: bool) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step, added up over the workers as the training loop does."""
    torch.manual_seed(0)
    model = LateFusion(LateFusionConfig(model=PRESETS["tiny"].model, learned_temperature=learned))
    draw = Draw(seed=0, pass_number=0, step=0)
    parts = build_contrast(ContrastiveConfig(method=method))(model, windows, draw)  # type: ignore[arg-type]
    totals, watched = parts.stack(), parts.watched["negatives"]
    if dist.is_initialized():
        dist.all_reduce(totals)
        dist.all_reduce(watched)
    loss = parts.combine(totals[1])
    loss.backward()
    result = {"loss": loss.detach(), "totals": totals, "watched": watched}
    zero = torch.zeros(())
    result |= {name: zero.expand(p.shape).clone() if p.grad is None else p.grad for name, p in model.named_parameters()}
    if dist.is_initialized():
        for name, value in result.items():
            if name not in ("totals", "watched"):
                dist.all_reduce(value)
    return result


def make_job(cohort: str, out: str, method: str) -> PretrainJob:
    """Two passes of a contrastive pretraining at the smallest size."""
    tiny = PRESETS["tiny"]
    return PretrainJob(
        cohort=cohort,
        out=out,
        model=LateFusionConfig(model=tiny.model),
        objective=ContrastiveConfig(method=method),  # type: ignore[arg-type]
        train=replace(tiny.train, passes=2, batch_size=16),
        threads=1,
    )


def run_job(rank: int, workers: int, cohort: str, folder: str) -> None:
    """One process of a whole pretraining, method after method."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    for method, _ in CASES:
        pretrain(make_job(cohort, f"{folder}/{method}", method))
    dist.destroy_process_group()


def work(rank: int, shares: Sequence[Sequence[int]], rows: int, folder: str) -> None:
    """One process: its share of the windows, every case; the first writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=len(shares))
    windows = take(make_windows(rows), shares[rank])
    found = {method: run_step(windows, method, learned) for method, learned in CASES}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()

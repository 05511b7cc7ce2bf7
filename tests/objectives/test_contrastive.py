"""The contrastive losses against slow references in double precision, and one worker against several."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from physioray.config import ContrastiveConfig, LateFusionConfig
from physioray.models.late_fusion import LateFusion
from physioray.objectives.contrastive import (
    LeaveOneOutContrast,
    NeighbourContrast,
    PairwiseContrast,
    build_contrast,
    measure_leave_one_out,
    measure_neighbours,
    measure_pairwise,
)
from physioray.objectives.loss import LossParts
from physioray.presets import PRESETS
from physioray.pretrain import pretrain
from physioray.storage import open_location
from physioray.tensors import Draw, WindowTensors
from tests.objectives.contrast_workers import CASES, make_job, make_windows, run_job, run_step, take, work
from tests.written_cohorts import write_cohort

NAMES = ("eeg", "eog", "emg", "ecg")
DRAW = Draw(seed=0, pass_number=0, step=0)


def make_vectors(rows: int, absent: float = 0.0, seed: int = 0, modalities: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, modalities, 6, generator=generator, dtype=torch.float64)
    here = torch.rand(rows, modalities, generator=generator) >= absent
    return vectors, here


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / math.sqrt(one @ one) / math.sqrt(other @ other))


def cross_entropy(logits: list[float], positive: int) -> float:
    return math.log(sum(math.exp(value) for value in logits)) - logits[positive]


def refer_neighbours(vectors: Tensor, here: Tensor, scale: float) -> dict[str, tuple[float, int]]:
    def similarity(i: int, j: int) -> float:
        both = [m for m in range(here.shape[1]) if here[i, m] and here[j, m]]
        return scale * cosine(torch.cat([vectors[i, m] for m in both]), torch.cat([vectors[j, m] for m in both]))

    def related(i: int, j: int) -> bool:
        return bool((here[i] & here[j]).any())

    usable = [i for i in range(len(vectors)) if related(i, i ^ 1)]
    total = 0.0
    for i in usable:
        others = [j for j in usable if j != i and related(i, j)]
        total += cross_entropy([similarity(i, j) for j in others], others.index(i ^ 1))
    return {"neighbours": (total, len(usable))}


def refer_pairwise(vectors: Tensor, here: Tensor, scale: float) -> dict[str, tuple[float, int]]:
    found = {}
    for a, b in combinations(range(here.shape[1]), 2):
        rows = [i for i in range(len(vectors)) if here[i, a] and here[i, b]]
        total = 0.0
        for place, i in enumerate(rows):
            total += cross_entropy([scale * cosine(vectors[i, a], vectors[j, b]) for j in rows], place)
            total += cross_entropy([scale * cosine(vectors[i, b], vectors[j, a]) for j in rows], place)
        found[f"{NAMES[a]}-{NAMES[b]}"] = (total, 2 * len(rows))
    return found


def refer_leave_one_out(vectors: Tensor, here: Tensor, scale: float) -> dict[str, tuple[float, int]]:
    unit = vectors / (vectors * vectors).sum(-1, keepdim=True).sqrt()
    found = {}
    for m in range(here.shape[1]):
        others = {i: [n for n in range(here.shape[1]) if n != m and here[i, n]] for i in range(len(vectors))}
        rows = [i for i in range(len(vectors)) if here[i, m] and others[i]]
        target = {i: sum(unit[i, n] for n in others[i]) / len(others[i]) for i in rows}
        total = 0.0
        for place, i in enumerate(rows):
            total += cross_entropy([scale * float(unit[i, m] @ target[j]) for j in rows], place)
            total += cross_entropy([scale * float(target[i] @ unit[j, m]) for j in rows], place)
        found[NAMES[m]] = (total, 2 * len(rows))
    return found


MEASURES: dict[str, tuple[Callable[..., LossParts], Callable[..., dict[str, tuple[float, int]]]]] = {
    "simclr": (lambda v, h, s: measure_neighbours(v, h, s), refer_neighbours),
    "pairwise": (lambda v, h, s: measure_pairwise(v, h, s, NAMES[: v.shape[1]]), refer_pairwise),
    "leave_one_out": (lambda v, h, s: measure_leave_one_out(v, h, s, NAMES[: v.shape[1]]), refer_leave_one_out),
}


def measure(method: str, vectors: Tensor, here: Tensor, scale: float = 10.0) -> LossParts:
    return MEASURES[method][0](vectors, here, vectors.new_tensor(scale))


@pytest.mark.parametrize("method", MEASURES)
@pytest.mark.parametrize("absent", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("rows", [2, 12])
def test_every_part_is_that_of_the_reference(method: str, absent: float, scale: float, rows: int) -> None:
    vectors, here = make_vectors(rows, absent, seed=rows)
    parts, expected = measure(method, vectors, here, scale), MEASURES[method][1](vectors, here, scale)
    assert set(parts.sums) == set(expected)
    for name, (total, count) in expected.items():
        assert parts.counts[name].item() == count
        assert parts.sums[name].item() == pytest.approx(total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", MEASURES)
def test_what_is_absent_is_neither_anchor_nor_positive_nor_negative(method: str) -> None:
    # Whatever stands in place of an absent projection, even NaN, neither moves the loss nor has a gradient.
    vectors, here = make_vectors(10, 0.4)
    clean = measure(method, vectors, here)
    spoilt = torch.where(here[..., None], vectors, torch.nan).requires_grad_()
    parts = measure(method, spoilt, here)
    for name in parts.sums:
        assert torch.equal(parts.sums[name], clean.sums[name])
    parts.combine(parts.stack()[1]).backward()
    assert spoilt.grad is not None and (spoilt.grad[~here] == 0).all()
    assert torch.isfinite(spoilt.grad).all() and spoilt.grad[here].any()


@pytest.mark.parametrize("method", MEASURES)
@pytest.mark.parametrize("kept", [(), (2,)])
def test_a_batch_in_which_nothing_can_be_compared_gives_zero_and_no_nan(method: str, kept: Sequence[int]) -> None:
    vectors, here = make_vectors(4)
    here[:] = False
    here[0, list(kept)] = True
    vectors.requires_grad_()
    parts = measure(method, vectors, here)
    loss = parts.combine(parts.stack()[1])
    loss.backward()
    assert loss.item() == 0 and parts.stack()[1].sum() == 0
    assert vectors.grad is not None and not vectors.grad.any()


@pytest.mark.parametrize("method", MEASURES)
def test_the_order_of_a_batch_does_not_matter(method: str) -> None:
    vectors, here = make_vectors(12, 0.3)
    turn = torch.tensor([4, 5, 11, 10, 0, 1, 3, 2, 8, 9, 6, 7])  # pairs stay together
    one, other = measure(method, vectors, here), measure(method, vectors[turn], here[turn])
    for name in one.sums:
        torch.testing.assert_close(one.sums[name], other.sums[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", MEASURES)
def test_gradients_are_those_of_finite_differences(method: str) -> None:
    vectors, here = make_vectors(6, 0.3, modalities=3)

    def loss(values: Tensor, scale: Tensor) -> Tensor:
        parts = MEASURES[method][0](values, here, scale)
        return parts.combine(parts.stack()[1])

    inputs = (vectors.requires_grad_(), torch.tensor(5.0, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, inputs)


def test_with_all_present_the_neighbours_vector_is_the_concatenation_of_the_projections() -> None:
    vectors, here = make_vectors(8)
    flat = torch.nn.functional.normalize(vectors.flatten(1), dim=1)
    logits = (10 * flat @ flat.T).fill_diagonal_(-torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(8) ^ 1, reduction="sum")
    assert measure("simclr", vectors, here).sums["neighbours"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_batch_of_one_is_a_loss_of_zero() -> None:
    for method, rows in (("simclr", 2), ("pairwise", 1), ("leave_one_out", 1)):
        parts = measure(method, *make_vectors(rows))
        assert parts.combine(parts.stack()[1]).item() == pytest.approx(0, abs=1e-12)
        assert parts.watched["negatives"][0] == 0


def test_negatives_are_the_other_usable_candidates_of_an_anchor() -> None:
    def mean(method: str, here: Tensor) -> float:
        total, anchors = measure(method, make_vectors(8)[0], here).watched["negatives"].tolist()
        return total / anchors

    here = make_vectors(8)[1]
    assert [mean(method, here) for method in MEASURES] == [6, 7, 7]
    here[2:] = False
    here[2:, 0] = True  # six windows have eeg alone
    assert mean("simclr", here) == 6 and mean("pairwise", here) == mean("leave_one_out", here) == 1


def test_the_fixed_temperature_divides_and_a_learned_one_takes_its_place() -> None:
    windows = make_windows(6)
    for method, _ in CASES:
        losses = {}
        for temperature, learned in ((0.1, False), (1.0, False), (0.1, True)):
            torch.manual_seed(0)
            model = LateFusion(LateFusionConfig(model=PRESETS["tiny"].model, learned_temperature=learned))
            objective = build_contrast(ContrastiveConfig(method=method, temperature=temperature))  # type: ignore[arg-type]
            parts = objective(model, windows, DRAW)
            losses[temperature, learned] = parts.combine(parts.stack()[1])
        # A learned scale starts at exp(0) = 1, that is at temperature 1.
        assert losses[0.1, True].item() == pytest.approx(losses[1.0, False].item(), rel=1e-6)
        assert losses[0.1, False].item() != pytest.approx(losses[1.0, False].item(), rel=1e-3)


def test_only_neighbours_need_pairs_and_an_odd_batch_is_refused() -> None:
    assert [kind.pairs for kind in (NeighbourContrast, PairwiseContrast, LeaveOneOutContrast)] == [True, False, False]
    model = LateFusion(LateFusionConfig(model=PRESETS["tiny"].model))
    with pytest.raises(ValueError, match="it has 5 rows"):
        NeighbourContrast(ContrastiveConfig(method="simclr"))(model, make_windows(5), DRAW)


def test_one_modality_alone_has_nothing_to_be_compared_with() -> None:
    class Lonely:
        modalities = ("ecg",)

        def project(self, signals: object, present: object) -> dict[str, Tensor]:
            raise AssertionError((signals, present))

        def find_scale(self) -> None:
            return None

    with pytest.raises(ValueError, match="two or more, but it has ecg"):
        PairwiseContrast(ContrastiveConfig(method="pairwise"))(Lonely(), make_windows(2), DRAW)


def test_training_brings_the_modalities_of_a_window_together() -> None:
    # Every modality of a window is the same few tones: what belongs together can be learned.
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(3000) / 100
    tones = torch.stack([(2 * math.pi * (1 + 2 * k) * seconds).sin() for k in range(8)])
    tones = tones + 0.1 * torch.randn(8, 3000, generator=generator)
    here = {name: torch.ones(8, dtype=torch.bool) for name in NAMES}
    windows = WindowTensors(signals={name: tones for name in NAMES}, present=here, labels={}, window_id=np.arange(8))
    torch.manual_seed(0)
    model = LateFusion(LateFusionConfig(model=PRESETS["tiny"].model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        parts = LeaveOneOutContrast(ContrastiveConfig())(model, windows, DRAW)
        loss = parts.combine(parts.stack()[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_workers_with_unequal_shares_take_the_step_of_one_process(tmp_path: Path) -> None:
    # The third worker lacks ecg altogether, and the shares differ in size: rows are padded for the exchange.
    shares = ([0, 1, 4, 5], [2, 3], [6, 7])
    torch.multiprocessing.spawn(work, args=(shares, 8, str(tmp_path)), nprocs=3, join=True)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    windows = make_windows(8)
    order = [row for share in shares for row in share]
    for method, learned in CASES:
        alone, together = run_step(take(windows, order), method, learned), found[method]
        assert torch.equal(alone["totals"][1], together["totals"][1])
        assert torch.equal(alone["watched"], together["watched"])
        assert alone["loss"].item() == pytest.approx(together["loss"].item(), rel=1e-6)
        largest = max(value.abs().max() for name, value in alone.items() if "." in name)
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5 * float(largest), msg=name)
        assert not learned or alone["log_scale"] != 0


@pytest.mark.slow
def test_two_workers_pretrain_as_one_does_validation_included(tmp_path: Path) -> None:
    # Validation has 17 windows, one more than a batch, and pairs are shared: nobody may wait for a worker in vain.
    cohort = write_cohort(tmp_path / "cohort", [20, 24, 17, 5, 13], absent={"emg": 0.3, "ecg": 0.2})
    place = str(cohort.location)
    torch.multiprocessing.spawn(run_job, args=(2, place, str(tmp_path)), nprocs=2, join=True)
    for method, _ in CASES:
        alone = pretrain(make_job(place, str(tmp_path / "alone" / method), method)).history
        lines = (tmp_path / method / "training.jsonl").read_text().splitlines()
        for one, other in zip(alone, map(json.loads, lines), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
            assert other["watched"] == pytest.approx(one["watched"], rel=1e-6)
            assert 0 < one["watched"]["negatives"] < 16
        facts = open_location(str(tmp_path / method / "config.json")).read_json()
        assert facts.get("pairs_per_recording") == (3 if method == "simclr" else None)

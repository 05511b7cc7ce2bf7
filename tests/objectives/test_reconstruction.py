"""The masked reconstruction loss against a slow, obvious reference."""

import numpy as np
import pytest
import torch

from physioray.config import ReconstructionConfig
from physioray.objectives.loss import LossParts
from physioray.objectives.reconstruction import measure_reconstruction


def make_case(rows: int = 5) -> tuple[dict, dict, dict]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"eeg": (30, 100), "airflow": (30, 25)}
    outputs = {m: torch.randn(rows, *size, generator=generator) for m, size in sizes.items()}
    signals = {m: torch.randn(rows, size[0] * size[1], generator=generator) for m, size in sizes.items()}
    hidden = {m: torch.rand(rows, size[0], generator=generator) < 0.6 for m, size in sizes.items()}
    return outputs, signals, hidden


def reference(outputs: dict, signals: dict, hidden: dict, *, weighting: str, normalise: bool) -> float:
    errors: dict[str, list[float]] = {}
    for name, output in outputs.items():
        rows, tokens, samples = output.shape
        for row in range(rows):
            for token in range(tokens):
                if hidden[name][row, token]:
                    target = signals[name][row, token * samples : (token + 1) * samples].double().numpy()
                    if normalise:
                        target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
                    got = output[row, token].double().numpy()
                    errors.setdefault(name, []).append(float(((got - target) ** 2).mean()))
    if weighting == "token":
        return float(np.mean([value for values in errors.values() for value in values]))
    return float(np.mean([np.mean(values) for values in errors.values()]))


@pytest.mark.parametrize("weighting", ["modality", "token"])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_that_of_the_reference(weighting: str, normalise: bool) -> None:
    case = make_case()
    config = ReconstructionConfig(weighting=weighting, normalise_target=normalise)  # type: ignore[arg-type]
    parts = measure_reconstruction(*case, config)
    loss = float(parts.combine(parts.stack()[1]))
    assert loss == pytest.approx(reference(*case, weighting=weighting, normalise=normalise), rel=1e-5)


def test_visible_and_absent_tokens_never_enter_the_loss() -> None:
    outputs, signals, hidden = make_case()
    before = measure_reconstruction(outputs, signals, hidden, ReconstructionConfig())
    changed = {m: torch.where(hidden[m][..., None], out, out + 100) for m, out in outputs.items()}
    after = measure_reconstruction(changed, signals, hidden, ReconstructionConfig())
    assert torch.equal(before.stack(), after.stack())


def test_a_modality_without_a_hidden_token_does_not_dilute_the_mean() -> None:
    outputs, signals, hidden = make_case()
    alone = measure_reconstruction(
        {"eeg": outputs["eeg"]}, {"eeg": signals["eeg"]}, {"eeg": hidden["eeg"]}, ReconstructionConfig()
    )
    hidden["airflow"] = torch.zeros_like(hidden["airflow"])
    both = measure_reconstruction(outputs, signals, hidden, ReconstructionConfig())
    assert float(both.combine(both.stack()[1])) == pytest.approx(float(alone.combine(alone.stack()[1])))


@pytest.mark.parametrize("weighting", ["modality", "token"])
def test_shares_of_workers_add_up_to_the_loss_of_the_global_batch(weighting: str) -> None:
    outputs, signals, hidden = make_case(rows=7)
    config = ReconstructionConfig(weighting=weighting)  # type: ignore[arg-type]
    whole = measure_reconstruction(outputs, signals, hidden, config)

    def share(rank: int) -> LossParts:
        def part(values: dict) -> dict:
            return {m: value[rank::2] for m, value in values.items()}

        return measure_reconstruction(part(outputs), part(signals), part(hidden), config)

    totals = share(0).stack() + share(1).stack()
    together = share(0).combine(totals[1]) + share(1).combine(totals[1])
    assert float(together) == pytest.approx(float(whole.combine(whole.stack()[1])), rel=1e-6)


def test_nothing_hidden_is_a_loss_of_zero_with_a_gradient() -> None:
    outputs, signals, hidden = make_case()
    outputs = {m: out.requires_grad_() for m, out in outputs.items()}
    parts = measure_reconstruction(
        outputs, signals, {m: torch.zeros_like(h) for m, h in hidden.items()}, ReconstructionConfig()
    )
    loss = parts.combine(parts.stack()[1])
    loss.backward()
    assert float(loss) == 0 and all(float(out.grad.abs().sum()) == 0 for out in outputs.values())

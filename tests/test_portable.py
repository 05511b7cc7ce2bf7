"""The encoder as a network file: the same embeddings as PyTorch's, whatever is present."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from physioray.cli import main
from physioray.origins import open_model
from physioray.portable import DenseEncoder
from physioray.pretrained import PretrainedModel
from physioray.storage import Location, is_committed, open_location
from tests.trained_runs import write_trained_run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module", params=["multimae_drop", "clip_leave_one_out"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Location:
    folder = tmp_path_factory.mktemp("trained")
    return write_trained_run(folder, strategy=request.param, modalities=("eeg", "emg", "airflow"))[0]


def make_windows(model: PretrainedModel, count: int = 9) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Noise, and every combination of three modalities but none."""
    generator = np.random.default_rng(0)
    present = np.array([[(k % 7 + 1) >> bit & 1 for bit in range(3)] for k in range(count)], bool)
    sizes = {name: model.description["modalities"][name]["samples"] for name in model.modalities}
    return {name: generator.standard_normal((count, n)).astype(np.float32) for name, n in sizes.items()}, present


def embed(model: PretrainedModel, signals: dict[str, np.ndarray], present: np.ndarray) -> np.ndarray:
    here = {name: torch.from_numpy(present[:, k].copy()) for k, name in enumerate(model.modalities)}
    return model({name: torch.from_numpy(values) for name, values in signals.items()}, here).detach().numpy()


def test_computing_all_tokens_and_leaving_absent_ones_out_gives_the_same_embedding(run: Location) -> None:
    model = open_model(run)
    signals, present = make_windows(model)
    dense = DenseEncoder(model.encoder).eval()
    found = dense(torch.from_numpy(present), *(torch.from_numpy(signals[name]) for name in dense.names))
    np.testing.assert_allclose(found.detach().numpy(), embed(model, signals, present), atol=1e-5)


@pytest.mark.slow
def test_the_network_file_gives_pytorch_s_embeddings_to_1e_4(run: Location, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'physioray[onnx]'")
    import onnxruntime

    assert main(["export", run.path, str(tmp_path / "m"), "--onnx"]) == 0
    assert is_committed(open_location(str(tmp_path / "m")))
    session = onnxruntime.InferenceSession(str(tmp_path / "m" / "encoder.onnx"))
    model = open_model(run)
    for count in (1, 9):
        signals, present = make_windows(model, count)
        found = session.run(None, {"present": present, **signals})[0]
        np.testing.assert_allclose(found, embed(model, signals, present), atol=1e-4)

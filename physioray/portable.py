"""Writes an encoder as an ONNX network, for programs without PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from physioray.models.fused import FusedEncoder
from physioray.models.late_fusion import LateFusionEncoder
from physioray.pretrained import PretrainedModel
from physioray.storage import Location, StorageError

ONNX_FILE = "encoder.onnx"
_EXAMPLES = 2


class DenseEncoder(nn.Module):
    """An encoder whose shapes do not depend on what is present, as a network file needs them.

    All tokens are computed and those of absent modalities left out of every attention and of the mean, instead of not
    being computed at all: the same embedding to rounding.

    Args:
        encoder: fused, or one per modality.

    Attributes:
        names: modalities, in the order of the arguments.
    """

    def __init__(self, encoder: FusedEncoder | LateFusionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = tuple(encoder.tokens)

    def forward(
        self, present: Bool[Tensor, "b modalities"], *signals: Float[Tensor, "b _"]
    ) -> Float[Tensor, "b features"]:
        """Embeddings of windows that have at least one modality.

        Args:
            present: `(B, modalities)` in the order of `names`.
            signals: `(B, samples)` per modality, in scales of the recording; anything finite where absent.
        """
        if isinstance(self.encoder, FusedEncoder):
            return _embed(self.encoder, self.names, present, signals)
        parts = []
        for place, name in enumerate(self.names):
            here = present[:, place : place + 1]
            found = _embed(self.encoder.find_encoder(name), (name,), torch.ones_like(here), (signals[place],))
            parts.append(torch.where(here, found, torch.zeros_like(found)))
        return torch.cat(parts, 1)


def _embed(
    encoder: FusedEncoder, names: Sequence[str], present: Tensor, signals: Sequence[Tensor]
) -> Float[Tensor, "b features"]:
    tokens, real = [], []
    for place, name in enumerate(names):
        count = encoder.tokens[name]
        chunks = signals[place].unflatten(1, (count, -1))
        made = encoder.tokenizers[name](chunks.flatten(0, 1)).unflatten(0, (-1, count))
        tokens.append(made + encoder.find_positions(name) + encoder.modality_vectors[name])
        real.append(present[:, place : place + 1].expand(-1, count))
    together, shown = torch.cat(tokens, 1), torch.cat(real, 1)
    for block in encoder.blocks:
        together = block(together, shown)
    weight = shown[..., None].to(together.dtype)
    return (encoder.norm(together) * weight).sum(1) / weight.sum(1)


def write_onnx(model: PretrainedModel, out: Location) -> Location:
    """Write `encoder.onnx`: inputs `present` (windows, modalities) and one per modality, output `embedding`.

    Signals are windows that are already filtered, resampled and scaled (see PretrainedModel.prepare), in scales of
    the recording: int16 x step.

    Raises:
        StorageError: the packages for ONNX are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StorageError(
            f"Writing ONNX needs onnx and onnxscript: pip install 'physioray[onnx]' ({error})."
        ) from error
    dense = DenseEncoder(model.encoder).cpu().eval()
    samples = [model.description["modalities"][name]["samples"] for name in dense.names]
    inputs = (torch.ones(_EXAMPLES, len(samples), dtype=torch.bool), *(torch.zeros(_EXAMPLES, n) for n in samples))
    windows = torch.export.Dim("windows", min=1)
    # The exporter speaks of packages that are not needed here, and of its own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            dense,
            inputs,
            input_names=["present", *dense.names],
            output_names=["embedding"],
            dynamic_shapes=({0: windows}, tuple({0: windows} for _ in samples)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    place = out / ONNX_FILE
    place.write_bytes(program.model_proto.SerializeToString())
    return place

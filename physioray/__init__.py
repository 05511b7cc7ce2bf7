"""physioray: from raw overnight recordings to pretrained models and filled result tables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from physioray.pretrained import PretrainedModel

__version__ = "0.1.0"
__all__ = ["load"]


def load(folder: str | os.PathLike[str]) -> PretrainedModel:
    """Open a model that `physioray export` has written: a torch module with `embed` and `classify`.

    Args:
        folder: path or URI.

    Raises:
        physioray.storage.StorageError: there is no exported model, or it is damaged.
    """
    # PyTorch takes a second to import, which `import physioray` need not wait for.
    from physioray.pretrained import load_model

    return load_model(folder)

"""Nothing escapes the conformance suites: what looks like an encoder or an objective must be listed."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
from torch import nn

import physioray.models
import physioray.objectives
from physioray.objectives.masking import SAMPLERS
from tests.conformance.listed import ENCODERS, MASKS, OBJECTIVES


def list_classes(room: ModuleType) -> list[type]:
    """Public classes that the modules of a room define."""
    found = []
    for entry in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{entry.name}")
        found += [
            kind
            for name, kind in inspect.getmembers(module, inspect.isclass)
            if kind.__module__ == module.__name__ and not name.startswith("_") and not inspect.isabstract(kind)
        ]
    return [kind for kind in found if not getattr(kind, "_is_protocol", False)]


def find_encoders(classes: list[type]) -> set[type]:
    return {kind for kind in classes if issubclass(kind, nn.Module) and callable(getattr(kind, "embed", None))}


def find_objectives(classes: list[type]) -> set[type]:
    called = [kind for kind in classes if "__call__" in vars(kind) or not issubclass(kind, nn.Module)]
    takes = {"model", "windows", "draw"}
    return {
        kind
        for kind in called
        if callable(getattr(kind, "__call__", None))  # noqa: B004
        and takes <= set(inspect.signature(kind.__call__).parameters)
    }


def test_every_encoder_is_listed() -> None:
    found = find_encoders(list_classes(physioray.models))
    assert found and found == {item.kind for item in ENCODERS}


def test_every_objective_is_listed() -> None:
    found = find_objectives(list_classes(physioray.objectives))
    assert found and found == {item.kind for item in OBJECTIVES}


def test_every_sampler_is_listed() -> None:
    assert {mask.sampler for mask in MASKS.values()} == set(SAMPLERS) and MASKS["drop"].drop


def test_a_new_class_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from physioray.models import fused
    from physioray.objectives import reconstruction

    class Newcomer(nn.Module):
        def embed(self, signals: dict, present: dict) -> None: ...

    class Novelty:
        def __call__(self, model: object, windows: object, draw: object) -> None: ...

    Newcomer.__module__, Novelty.__module__ = fused.__name__, reconstruction.__name__
    monkeypatch.setattr(fused, "Newcomer", Newcomer, raising=False)
    monkeypatch.setattr(reconstruction, "Novelty", Novelty, raising=False)
    assert Newcomer in find_encoders(list_classes(physioray.models))
    assert Novelty in find_objectives(list_classes(physioray.objectives))

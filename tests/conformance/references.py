"""Losses written down as slowly and plainly as possible, one window, one token, one comparison after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor, nn

from physioray.tensors import WindowTensors


def _one(values: Mapping[str, Tensor], row: int) -> dict[str, Any]:
    return {name: value[row : row + 1] for name, value in values.items()}


def reconstruct(model: nn.Module, windows: WindowTensors, visible: Mapping[str, Tensor]) -> float:
    """Mean over modalities of the mean squared error of their hidden tokens; each window passes the model alone."""
    errors: dict[str, list[float]] = {}
    for row in range(len(windows)):
        signals = {name: value.double() for name, value in _one(windows.signals, row).items()}
        outputs = model(signals, _one(visible, row), _one(windows.present, row))
        for name, shown in visible.items():
            for token in range(shown.shape[1]):
                if windows.present[name][row] and not shown[row, token]:
                    got = outputs[name][0, token].detach().numpy()
                    wanted = signals[name][0].numpy()[token * len(got) : (token + 1) * len(got)]
                    errors.setdefault(name, []).append(float(((got - wanted) ** 2).mean()))
    return float(np.mean([np.mean(values) for values in errors.values()]))


def classify(model: nn.Module, windows: WindowTensors, task: str, weights: Sequence[float]) -> float:
    """Weighted mean of -log p(label) over the labelled windows; each window passes the model alone."""
    total = weight = 0.0
    for row in range(len(windows)):
        label = int(windows.labels[task][row])
        if label >= 0:
            signals = {name: value.double() for name, value in _one(windows.signals, row).items()}
            logits = model(signals, _one(windows.present, row))[0].tolist()
            total += weights[label] * cross_entropy(logits, label)
            weight += weights[label]
    return total / weight


def cross_entropy(logits: Sequence[float], positive: int) -> float:
    """-log of the positive's share of the exponentials."""
    return -math.log(math.exp(logits[positive]) / sum(math.exp(value) for value in logits))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _rows(projected: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(projected.values())))
    return [
        {name: value[row].detach().double().numpy() for name, value in projected.items() if bool(present[name][row])}
        for row in range(count)
    ]


def compare_neighbours(projected: Mapping[str, Tensor], present: Mapping[str, Tensor], temperature: float) -> float:
    """NT-Xent over rows 2i and 2i + 1, cosines over the modalities that two windows share."""
    rows = _rows(projected, present)
    usable = [bool(set(row) & set(rows[number ^ 1])) for number, row in enumerate(rows)]
    errors = []
    for i, row in enumerate(rows):
        if not usable[i]:
            continue
        logits, positive = [], -1
        for j, other in enumerate(rows):
            common = [name for name in row if name in other]
            if j == i or not usable[j] or not common:
                continue
            if j == i ^ 1:
                positive = len(logits)
            one, two = (np.concatenate([side[name] for name in common]) for side in (row, other))
            logits.append(_cosine(one, two) / temperature)
        errors.append(cross_entropy(logits, positive))
    return float(np.mean(errors))


def compare_pairs(projected: Mapping[str, Tensor], present: Mapping[str, Tensor], temperature: float) -> float:
    """Every two modalities over the windows that have both, both directions; the mean over pairs of modalities."""
    rows, means = _rows(projected, present), []
    for a, b in combinations(projected, 2):
        both = [row for row in rows if a in row and b in row]
        errors = [
            cross_entropy([_cosine(row[one], other[two]) / temperature for other in both], number)
            for one, two in ((a, b), (b, a))
            for number, row in enumerate(both)
        ]
        means += [np.mean(errors)] if errors else []
    return float(np.mean(means))


def compare_with_rest(projected: Mapping[str, Tensor], present: Mapping[str, Tensor], temperature: float) -> float:
    """Each modality and the mean of the others' normalised vectors, both directions; the mean over modalities."""
    rows = [
        {name: vector / np.linalg.norm(vector) for name, vector in row.items()} for row in _rows(projected, present)
    ]
    means = []
    for name in projected:
        both = [
            (row[name], np.mean([vector for other, vector in row.items() if other != name], axis=0))
            for row in rows
            if name in row and len(row) > 1
        ]
        errors = [cross_entropy([float(a @ t) / temperature for _, t in both], i) for i, (a, _) in enumerate(both)]
        errors += [cross_entropy([float(a @ t) / temperature for a, _ in both], i) for i, (_, t) in enumerate(both)]
        means += [np.mean(errors)] if errors else []
    return float(np.mean(means))

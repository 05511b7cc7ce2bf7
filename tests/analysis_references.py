"""Slow, obvious definitions of what analysis measures, in double precision, for tests to compare with."""

from __future__ import annotations

import math

import numpy as np


def roll_out_slowly(attention):
    """Rollout of one window: attention `(layers, T, T)`, matrix products written out."""
    tokens = attention.shape[1]
    rolled = [[1.0 if i == j else 0.0 for j in range(tokens)] for i in range(tokens)]
    for weights in attention:
        step = [[0.5 * weights[i][j] + (0.5 if i == j else 0.0) for j in range(tokens)] for i in range(tokens)]
        rolled = [[sum(step[i][k] * rolled[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    return np.array(rolled, np.float64)


def entropy_slowly(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def summarise_slowly(weights, present, owner, seconds, group):
    """Numbers of one map of one window over the attending tokens of `group` (a set of modality numbers)."""
    rows = [i for i in range(len(owner)) if present[i] and owner[i] in group]
    here = [j for j in range(len(owner)) if present[j]]
    largest = math.log(max(2, len(here)))
    found = {"off_modality": 0.0, "within_1s": 0.0, "off_modality_within_1s": 0.0, "entropy": 0.0}
    for number in sorted(set(owner)):
        found[f"to_{number}"] = sum(weights[i][j] for i in rows for j in here if owner[j] == number) / len(rows)
    for i in rows:
        for j in here:
            off, near = owner[i] != owner[j], abs(seconds[i] - seconds[j]) <= 1
            found["off_modality"] += weights[i][j] * off / len(rows)
            found["within_1s"] += weights[i][j] * near / len(rows)
            found["off_modality_within_1s"] += weights[i][j] * (off and near) / len(rows)
        found["entropy"] += entropy_slowly([weights[i][j] for j in here]) / largest / len(rows)
    mean_row = [sum(weights[i][j] for i in rows) / len(rows) for j in here]
    found["specificity"] = max(0.0, entropy_slowly(mean_row) / largest - found["entropy"])
    return found


def vary_slowly(embed, context, name, draws):
    """Source variance of every unit of one context: `embed` maps one window's signals to its units."""
    units = [np.asarray(embed({**context, name: draw}), np.float64) for draw in draws]
    mean = sum(units) / len(units)
    return sum((unit - mean) ** 2 for unit in units) / (len(units) - 1)

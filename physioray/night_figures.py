"""Draws one night as a model sees it: stages, probabilities, and which modalities were there."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from physioray.figures import BLUE, GREEN, INK, ORANGE, PALE, PURPLE, STYLE, draw_stages
from physioray.signals import STAGES, WINDOW_SECONDS

STAGE_COLOURS = {"W": "#F0C75E", "N1": "#A9D0EA", "N2": BLUE, "N3": "#173B63", "REM": ORANGE}
_MODALITY_COLOURS = (INK, BLUE, GREEN, PURPLE)
_DPI = 130


def draw_night(
    start: Float[np.ndarray, " n"],
    runs: Sequence[slice],
    present: Mapping[str, Bool[np.ndarray, " n"]],
    *,
    title: str,
    predicted: Int[np.ndarray, " n"] | None = None,
    probabilities: Float[np.ndarray, "n classes"] | None = None,
    true: Int[np.ndarray, " n"] | None = None,
    arousal: Float[np.ndarray, " n"] | None = None,
) -> Figure:
    """One night from top to bottom: scored and predicted stages, probabilities, arousals, modalities present.

    Args:
        start: `(n,)` seconds of the windows from the start of the recording.
        runs: stretches without a jump, see `figures.find_runs`.
        present: `(n,)` per modality.
        title: stands above; says SIMULATED where that is so.
        predicted, true: `(n,)` stages, -1 where unknown.
        probabilities: `(n, 5)` of the stages, NaN where unknown.
        arousal: `(n,)` probability of an arousal, NaN where unknown.
    """
    heights: dict[str, float] = {}
    if true is not None:
        heights["true"] = 1.3
    if predicted is not None and probabilities is not None:
        heights |= {"predicted": 1.3, "probabilities": 1.3}
    if arousal is not None:
        heights["arousal"] = 0.7
    heights["present"] = 0.22 * len(present) + 0.15
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, sum(heights.values()) + 0.9), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))[
            :, 0
        ]
        axes = dict(zip(heights, panels, strict=True))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, weight="bold")
        if true is not None:
            draw_stages(axes["true"], start, true, runs)
            axes["true"].set_ylabel("scored")
        if predicted is not None and probabilities is not None:
            draw_stages(axes["predicted"], start, predicted, runs)
            axes["predicted"].set_ylabel("predicted")
            _draw_probabilities(axes["probabilities"], start, probabilities, runs)
        if arousal is not None:
            for run in runs:
                axes["arousal"].fill_between(*_step(start[run], arousal[run]), color=PURPLE, lw=0, step="post")
            axes["arousal"].set(ylim=(0, 1), ylabel="arousal")
        _draw_presence(axes["present"], start, present)
        panels[-1].set_xlabel("hours from the start of the recording")
        panels[-1].set_xlim(start[0] / 3600, (start[-1] + WINDOW_SECONDS) / 3600)
        figure.align_ylabels(panels)
        return figure


def render_png(figure: Figure) -> bytes:
    """A figure as a picture for slides."""
    sink = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(sink, format="png", dpi=_DPI, metadata={"Software": None})
    return sink.getvalue()


def _step(
    start: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Hours and values of steps, the last one drawn to its end."""
    return np.append(start, start[-1] + WINDOW_SECONDS) / 3600, np.append(values, values[-1])


def _draw_probabilities(
    axes: Axes, start: Float[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], runs: Sequence[slice]
) -> None:
    """Stages' probabilities on top of each other, deep sleep at the bottom."""
    order = [STAGES.index(name) for name in ("N3", "N2", "N1", "REM", "W")]
    for run in runs:
        floor = np.zeros(run.stop - run.start)
        for place in order:
            name, ceiling = STAGES[place], floor + probabilities[run, place]
            hours, low = _step(start[run], floor)
            label = name if run is runs[0] else None
            axes.fill_between(
                hours, low, np.append(ceiling, ceiling[-1]), color=STAGE_COLOURS[name], lw=0, step="post", label=label
            )
            floor = ceiling
    axes.set(ylim=(0, 1), ylabel="probability")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=1.0, reverse=True)


def _draw_presence(axes: Axes, start: Float[np.ndarray, " n"], present: Mapping[str, Bool[np.ndarray, " n"]]) -> None:
    for place, here in enumerate(present.values()):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], here, [False]]).astype(np.int8)))
        bars = [
            (start[a] / 3600, (start[b - 1] + WINDOW_SECONDS - start[a]) / 3600)
            for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
        colour = _MODALITY_COLOURS[place % len(_MODALITY_COLOURS)]
        axes.broken_barh(bars, (-place - 0.3, 0.6), color=colour, lw=0)
        if not here.all():
            axes.axhline(-place, color=PALE, lw=0.5, zorder=0)
    axes.set_yticks([-place for place in range(len(present))], list(present))
    axes.set(ylim=(-len(present) + 0.4, 0.6), ylabel="present")

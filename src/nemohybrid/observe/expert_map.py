"""A picture of expert load: a row a layer, a column an expert."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SPAN = 2.0
"""Colours end at 2 ** -_SPAN and 2 ** _SPAN times the mean; what lies beyond has the colour of the end."""


def relative_load(loads: Sequence[Sequence[float]]) -> np.ndarray:
    """loads [layers, experts] -> log2 of load / mean of the layer, -inf for an expert nobody visited."""
    visits = np.asarray(loads, dtype=np.float64)
    mean = np.maximum(visits.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return np.log2(visits / mean, out=np.full_like(visits, -np.inf), where=visits > 0)


def draw_expert_map(layers: Sequence[str], loads: Sequence[Sequence[float]], path: Path, title: str) -> None:
    """Loads [layers, experts] over the mean of their layer as a PNG: white is the mean, black an expert nobody visited."""
    from matplotlib.figure import Figure  # a second of import, only for who draws

    relative = relative_load(loads)
    count, experts = relative.shape
    figure = Figure(figsize=(min(16.0, 4 + experts * 0.2), min(20.0, 1.8 + count * 0.25)), layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_where(np.isneginf(relative), relative)
    axes.set_facecolor("black")
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-_SPAN, vmax=_SPAN, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer", title=title)
    axes.set_yticks(range(count), layers, fontsize=7)
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "mean", "2", "4"])
    figure.savefig(path, dpi=120)

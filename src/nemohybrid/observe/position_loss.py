"""A picture of the loss by position."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_position_loss(scores: Mapping[str, Sequence[tuple[int, float, float]]], path: Path, title: str) -> None:
    """Name -> (last position, loss there, mean loss up to there), as a PNG; positions on a logarithmic axis."""
    from matplotlib.figure import Figure  # a second of import, only for who draws

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in scores.items():
        known = [(last + 1, loss, mean) for last, loss, mean in points if not math.isnan(loss)]
        if not known:
            continue
        last, losses, means = zip(*known, strict=True)
        (line,) = axes.plot(last, losses, "o-", label=f"{name}: at these positions")
        axes.plot(last, means, "--", color=line.get_color(), label=f"{name}: up to there")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the document, this one included", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)

"""Pictures of a run, from its records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss over steps as a PNG; bits per byte where the records have them."""
    from matplotlib.figure import Figure  # a second of import, only for who draws

    key, unit = (
        ("bits_per_byte", "bits per byte") if any("bits_per_byte" in r for r in records) else ("loss", "nats per token")
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    trained = _points(records, key)
    if trained:
        axes.plot(*zip(*trained, strict=True), linewidth=1, color="#8fb3d9", label="training, each step")
        axes.plot(*zip(*_smooth(trained), strict=True), linewidth=2, color="#1f5fa8", label="training, smoothed")
    if validated := _points(records, f"val_{key}"):
        steps, values = zip(*validated, strict=True)
        axes.plot(steps, values, "o-", color="#c2410c", label="held out")
        axes.annotate(
            f"{values[-1]:.3f}", (steps[-1], values[-1]), textcoords="offset points", xytext=(0, 8), ha="right"
        )
    for name in _sets(records, f"val_{key}"):
        steps, values = zip(*_points(records, f"val_{key}/{name}"), strict=True)
        axes.plot(steps, values, ".--", linewidth=1, label=f"held out, {name}: {values[-1]:.3f}")
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if isinstance(record.get(key), float)]


def _sets(records: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Every NAME of a validation set that has points under `key/NAME`."""
    keys = dict.fromkeys(name for record in records for name in record if name.startswith(f"{key}/"))
    return [name.removeprefix(f"{key}/") for name in keys if _points(records, name)]


def _smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Exponential moving average, corrected for its start."""
    average, mass, result = 0.0, 0.0, []
    for step, value in points:
        average, mass = weight * average + (1 - weight) * value, weight * mass + (1 - weight)
        result.append((step, average / mass))
    return result

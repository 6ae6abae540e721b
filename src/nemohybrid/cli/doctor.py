"""`nemohybrid doctor`: what this machine has, which recipe of `precision` runs how on it, and exactly why where not."""

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nemohybrid.errors import ConfigError

if TYPE_CHECKING:
    import torch

DESCRIPTION = """Look at this machine: versions, its device, and for every recipe of `precision` who can carry it out here.

A backend that is asked for by precision.backend and says no here ends a run before its first step; `auto` takes the first
that says yes. Nothing is trained; on a GPU small products are multiplied."""
PACKAGES = ("torch", "triton", "transformer_engine")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="nemohybrid doctor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    return parser


def main(argv: list[str]) -> int:
    """Print what there is. Raises ConfigError for a GPU that is not there."""
    options = build_parser().parse_args(argv)
    device = _device(options.device)
    print("\n".join([*machine(device), "", *recipes(device)]))
    return 0


def _device(asked: str) -> "torch.device":
    import torch  # takes seconds

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ConfigError(f"torch {torch.__version__} sees no GPU")
    return torch.device("cuda" if there and asked != "cpu" else "cpu")


def machine(device: "torch.device") -> list[str]:
    """Versions, and the device."""
    lines = [f"Python {platform.python_version()}, {', '.join(map(_version, PACKAGES))}"]
    if device.type == "cpu":
        return [*lines, f"CPU: {platform.machine()}, {os.cpu_count()} cores"]
    import torch

    of, (major, minor) = torch.cuda.get_device_properties(device), torch.cuda.get_device_capability(device)
    memory = f"{of.total_memory / 2**30:.0f} GiB"
    return [*lines, f"GPU: {of.name}, {memory}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def recipes(device: "torch.device") -> list[str]:
    """A row a recipe, a column a backend; the reasons why not are numbered, and follow."""
    from nemohybrid.precision.backends import BACKENDS, choose
    from nemohybrid.precision.recipe import RECIPES

    reasons: dict[str, int] = {}
    rows = [{"recipe": "recipe", **{name: name for name in BACKENDS}, "auto": "auto takes"}]
    for recipe in RECIPES.values():
        if recipe.is_quantized:
            cells = {name: _cell(backend.obstacle(recipe, device), reasons) for name, backend in BACKENDS.items()}
            rows.append({"recipe": recipe.name, **cells, "auto": choose(recipe, "auto", device).name})
    footnotes = [f"({number}) {reason}" for reason, number in reasons.items()]
    experts = [name for name, backend in BACKENDS.items() if backend.experts is not None]
    return [*_table(rows), "", *footnotes, f"Stacked experts are multiplied by {', '.join(experts)} alone."]


def _cell(obstacle: str | None, reasons: dict[str, int]) -> str:
    return "yes" if obstacle is None else f"no ({reasons.setdefault(obstacle, len(reasons) + 1)})"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    return ["  ".join(text.ljust(widths[key]) for key, text in row.items()).rstrip() for row in rows]

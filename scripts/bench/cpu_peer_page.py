"""A run of cpu_peer.py in the documentation: what it printed, its raw figures, and its row of the page.

python scripts/bench/cpu_peer.py --page
"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
KEPT = "[the one kept here](cpu_peer.txt) ([every turn and loss](cpu_peer.json))"
"""What the row of this run is known by."""


def keep(report: dict[str, Any], printed: str, folder: Path = BENCHMARKS) -> None:
    """Replace the run that `folder` holds. What the page says in words about it stays for a person to read again."""
    page, text = folder / "cpu_peer.md", to_json(report)
    lines = page.read_text(encoding="utf-8").splitlines()
    (place,) = (number for number, line in enumerate(lines) if KEPT in line)
    lines[place] = row(json.loads(text))
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "cpu_peer.json").write_text(text, encoding="utf-8")
    (folder / "cpu_peer.txt").write_text(printed + "\n", encoding="utf-8")


def to_json(report: dict[str, Any]) -> str:
    """All figures."""
    return json.dumps(report, indent=1, default=asdict) + "\n"


def row(report: dict[str, Any]) -> str:
    """Of the table of figures, from what the JSON file holds."""
    ours, peer = (report[side] for side in ("nemohybrid", "transformers"))
    ratios = [a / b for a, b in zip(ours["tokens_per_second"], peer["tokens_per_second"], strict=True)]
    cells = [
        f"{'with' if report['kernels']['built'] else 'without'} C++ kernels, {KEPT}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})",
        f"{len(ratios)} x {report['settings']['steps']} steps",
        f"{100 * report['busy_during']:.0f} percent",
        ", ".join(f"{side['peak'] / 2**20:.0f}" for side in (ours, peer)),
        ", ".join(f"{(side['peak'] - side['baseline']) / 2**20:.0f}" for side in (ours, peer)),
    ]
    return f"| {' | '.join(cells)} |"

"""Put what a sweep of learning rates found into the documentation: table, picture and raw numbers, none typed by hand.

python scripts/bench/lr_sweep_page.py runs/lr_sweep
"""

import csv
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "stability.md"
BEGIN, END = "<!-- lr_sweep: written by scripts/bench/lr_sweep_page.py -->\n", "<!-- lr_sweep: end -->"


def main(folder: Path) -> None:
    """Copy the files of a sweep and rewrite the section between the marks."""
    shutil.copyfile(folder / "table.csv", ROOT / "docs" / "benchmarks" / "lr_sweep.csv")
    shutil.copyfile(folder / "picture.png", ROOT / "docs" / "images" / "lr_sweep.png")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + section(folder) + END + after, encoding="utf-8")


def section(folder: Path) -> str:
    """The tables, and what they were made of."""
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seeds, arms = {row["seed"] for row in rows}, {row["arm"] for row in rows}
    bad = sum(bool(row["diverged"]) for row in rows)
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    facts = (
        f"{len(rows)} runs of {len(arms)} arms with {len(seeds)} seeds, {bad} diverged; {minutes:.0f} minutes in all."
    )
    parts = [
        facts,
        "Final training loss in nats a byte by learning rate, mean over seeds ± half their spread (no spread: one "
        "seed):",
        (folder / "table.md").read_text().strip(),
        "![Final loss over the learning rate, a line for each arm](images/lr_sweep.png)",
        "How many times larger than in the runs at *stable up to* the outputs of the diverged runs were in their last step "
        "(worst layer, geometric mean over runs):",
        (folder / "growth.md").read_text().strip(),
        "[Every run](benchmarks/lr_sweep.csv).",
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

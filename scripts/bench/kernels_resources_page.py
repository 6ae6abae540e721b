"""Renders docs/benchmarks/kernels_resources.md from what compile_kernels.py found; nothing on the page is typed by hand."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nemohybrid_kernels.launching import ARCHITECTURES, table
from nemohybrid_kernels.shipped import TOLERATED

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels_resources.md"
MEASURED = 4
"""The last columns of a table of binaries: they change with the version of Triton."""

Row = dict[str, Any]
SHORT = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"}
TEXT = """\
# What the kernels take of a GPU

Every configuration that is shipped is compiled for GPUs that need not be there, by `scripts/bench/compile_kernels.py`, which
also writes this page. It says what a program needs, and nothing about its speed: no GPU was involved. What each launch moves
and multiplies stands under [Predicted times](kernels_predicted.md).

```bash
python scripts/bench/compile_kernels.py --page
```

Compiled by Triton {triton} with the ptxas that comes with it. Registers are those of a thread, shared memory is in bytes.
A line stands for all binaries of a configuration at the same tiles, and shows the most that any of them takes. Tensor-core
instructions are counted in the code, where a loop stands once. Tests fail on a spill that is not excused, on more shared
memory than the GPU has (227 KB; 99 KB for sm_80, whose configurations serve smaller GPUs too), on products that became none of
the instructions of their architecture, and when this page is out of date. fp32 is multiplied as three products of TF32, and
may use the instructions of older GPUs.
"""


def render(rows: Sequence[Row]) -> str:
    versions = {row["triton"] for row in rows}
    text = TEXT.format(triton=", ".join(versions))
    parts = [text, *(_architecture(number, rows) for number in ARCHITECTURES), _excuses()]
    return "\n".join(parts)


def without_measurements(page: str) -> str:
    """The page with nothing on it that depends on the version of Triton."""
    lines = re.sub(r"Triton \d\S*", "Triton", page).splitlines()
    return "\n".join("|".join(line.split("|")[: -MEASURED - 1]) if line.startswith("| `") else line for line in lines)


def _architecture(number: int, rows: Iterable[Row]) -> str:
    of = sorted((row for row in rows if row["sm"] == number), key=_group)
    lines = [_line(list(same)) for _, same in groupby(of, key=_group)]
    return "\n".join([f"## sm_{number}", "", *_table(HEADINGS, lines)])


HEADINGS = ["kernel", "when", "type", "tiles", "warps", "stages", "registers", "spilled", "shared", "tensor cores"]


def _group(row: Row) -> tuple[Any, ...]:
    """What one line stands for."""
    entry = -1 if row["entry"] is None else row["entry"]
    return row["kernel"], entry, row["type"], _tiles(row), row["warps"], row["stages"], tuple(row["excuse"] or ())


def _tiles(row: Row) -> str:
    """Those of the table, and the chunk, which is a choice too."""
    names = [*(["CHUNK"] if "CHUNK" in row["sizes"] else []), *row["tiles"]]
    return ", ".join(f"{name} {row['sizes'].get(name, row['tiles'].get(name))}" for name in names)


def _line(same: Sequence[Row]) -> list[str]:
    first = same[0]
    spilled = max(row["spill_stores"] + row["spill_loads"] for row in same)
    counts = {name: max(row["instructions"][name] for row in same) for name in SHORT}
    products = ", ".join(f"{count} {SHORT[name]}" for name, count in counts.items() if count)
    known = [
        f"`{first['kernel']}`",
        _when(first),
        first["type"],
        _tiles(first),
        str(first["warps"]),
        str(first["stages"]),
    ]
    taken = [
        str(max(row["registers"] for row in same)),
        str(spilled),
        str(max(row["shared"] for row in same)),
        products,
    ]
    return known + taken


def _when(row: Row) -> str:
    """The conditions of an entry of the table."""
    if row["entry"] is None:
        return "always"
    conditions = table()[f"sm_{row['sm']}"][row["kernel"]][row["entry"]].get("when", {})
    named = [f"{name} {_range(wanted)}" for name, wanted in conditions.items()]
    return ", ".join(named + ([row["excuse"][2]] if row["excuse"] else [])) or "else"


def _range(wanted: Any) -> str:
    return f"{wanted[0]} to {wanted[1]}" if isinstance(wanted, list) else str(wanted)


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(headings)
    return ["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines), ""]


def _excuses() -> str:
    lines = [f"- `{kernel}`, {dtype}, {size}: {why}." for (kernel, dtype, size), why in TOLERATED.items()]
    return "\n".join(["## Spills that are let be", "", *lines, ""])

"""Writing the operators' configs.json: a kernel a line, so that a change of one is a change of one line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemohybrid_kernels.launching import Config

PACKAGE = Path(__file__).parents[2] / "kernels" / "nemohybrid_kernels"


def write(root: Path, architecture: int, changes: Mapping[tuple[str, int], Config]) -> Iterator[Path]:
    """Sets lines, given as kernel and place, in the column of an architecture; yields the files that were changed."""
    for file in sorted(root.glob("*/configs.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        column = content[f"sm_{architecture}"]
        mine = {line: config for line, config in changes.items() if line[0] in column}
        for (kernel, place), config in mine.items():
            column[kernel][place].update(tiles=dict(config.tiles), warps=config.warps, stages=config.stages)
        if mine:
            file.write_text(text(content), encoding="utf-8")
            yield file


def text(content: Mapping[str, Mapping[str, Any]]) -> str:
    columns = []
    for name, kernels in content.items():
        lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(entries)}" for kernel, entries in kernels.items())
        columns.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(columns) + "\n}\n"

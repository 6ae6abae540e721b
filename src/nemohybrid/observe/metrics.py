"""`metrics.jsonl`: one JSON object a line."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class MetricsWriter:
    """Appends records; each is on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=1, encoding="utf-8")
        if self.file.tell() and not path.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # the line a crash cut short stays alone

    def write(self, record: dict[str, Any]) -> None:
        """Numbers that JSON does not know (NaN, infinities) are written as text."""
        self.file.write(json.dumps({key: _known(value) for key, value in record.items()}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _known(value: Any) -> Any:
    if isinstance(value, list):
        return [_known(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run in order of step, evaluations after their step. Of a step that was replayed, the last counts.

    Lines that a crash left incomplete are passed over.
    """
    latest: dict[tuple[int, bool], dict[str, Any]] = {}
    for record in _records(path):
        latest[record["step"], "val_loss" in record] = record
    return [latest[key] for key in sorted(latest)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def flat(record: "DataclassInstance") -> dict[str, Any]:
    """A step or an evaluation as one level of names: `val_loss/web` is the `val_loss` of the set `web`.

    `position_loss` is a list of [last position of a run, mean loss in it, mean loss up to there].
    `mtp_acceptance/1`, `mtp_acceptance/2`, ... are those of the MTP depths, `mtp_acceptance/1/web` that of a set.
    """
    values: dict[str, Any] = asdict(record)
    sets, positions = values.pop("sets", {}), values.pop("positions", ())
    values |= {"position_loss": [[at["last"], at["loss"], at["cumulative"]] for at in positions]} if positions else {}
    values |= values.pop("metrics", {}) | _by_depth(values)
    for name, score in sets.items():
        values |= {f"{key}/{name}": value for key, value in (score | _by_depth(score)).items()}
    return values


def _by_depth(values: dict[str, Any]) -> dict[str, float]:
    return {f"mtp_acceptance/{depth}": share for depth, share in enumerate(values.pop("mtp_acceptance", ()), 1)}


def scalars(record: "DataclassInstance") -> dict[str, float]:
    """The numbers of a step or an evaluation, for trackers."""
    numbers = {name: value for name, value in flat(record).items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if name != "step"}

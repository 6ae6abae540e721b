"""What ranks tell each other of themselves: a beat every few seconds, and a few last words when the job hangs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nemohybrid.errors import Stopped
from nemohybrid.train.watch.sight import Place

DONE = "done"


@dataclass(frozen=True)
class Beat:
    """A sign of life. started: when the process began; pids: the host and its space of process ids, of which containers may
    have several: where it is the same, a rank can look at the other's process.

    still: seconds since the main thread moved; patient: what it does may take long; left: empty while the rank runs, `DONE`,
    or why it ended. looked: seconds of its steps in which it was looked at; busy: those of them in which the main thread
    waited for nobody; steps: begun by then.
    """

    rank: int
    host: str
    pid: int
    started: float = 0.0
    pids: str = ""
    count: int = 0
    step: int = 0
    phase: str = ""
    still: float = 0.0
    patient: bool = True
    left: str = ""
    busy: float = 0.0
    looked: float = 0.0
    steps: int = 0

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the rank."""
        return self.left.startswith(Stopped.__name__)

    @classmethod
    def read(cls, text: str) -> Beat:
        """What `text` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Entered:
    """How many collectives of a group a rank has entered; ranks: who is in the group."""

    ranks: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LastWords:
    """Where a rank stands when the alarm was given.

    waits_in: the collective it waits in, `sight.DEVICE`, or nothing; places: lines of ours, innermost first;
    groups: name of a process group -> what it has entered of it; neighbours: rank on the same host -> what the system says
    of its process.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    stage: int
    microbatch: int
    still: float
    waits_in: str
    places: tuple[Place, ...]
    innermost: Place
    groups: dict[str, Entered] = field(default_factory=dict)
    neighbours: dict[int, str] = field(default_factory=dict)

    def text(self) -> str:
        """As JSON."""
        groups = {
            name: {"ranks": _packed(entered.ranks), "count": entered.count} for name, entered in self.groups.items()
        }
        return json.dumps(asdict(replace(self, groups={})) | {"groups": groups})

    @classmethod
    def read(cls, text: str) -> LastWords:
        """What `text` wrote."""
        told: dict[str, Any] = json.loads(text)
        told["places"] = tuple(Place(**place) for place in told["places"])
        told["innermost"] = Place(**told["innermost"])
        told["groups"] = {name: Entered(_unpacked(e["ranks"]), e["count"]) for name, e in told["groups"].items()}
        told["neighbours"] = {int(rank): state for rank, state in told["neighbours"].items()}
        return cls(**{f.name: told[f.name] for f in fields(cls)})


def _packed(ranks: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """Ranks of a group mostly follow each other at one distance, and there may be thousands."""
    every = range(ranks[0], ranks[-1] + 1, ranks[1] - ranks[0]) if len(ranks) > 3 and ranks[0] < ranks[1] else range(0)
    return {"range": [every.start, every.stop, every.step]} if tuple(every) == tuple(ranks) else list(ranks)


def _unpacked(told: list[int] | dict[str, list[int]]) -> tuple[int, ...]:
    return tuple(told) if isinstance(told, list) else tuple(range(*told["range"]))

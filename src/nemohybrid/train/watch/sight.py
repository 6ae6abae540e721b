"""Where a thread stands, by its Python stack: the lines of ours, and the collective it waits in."""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from traceback import walk_tb
from types import CodeType, FrameType

OURS = "nemohybrid"
DEVICE = "its device"
"""What a host waits for that has launched all and now wants a number."""
_C10D = "torch.distributed.distributed_c10d"
_PLUMBING = (
    "torch._ops",
    "torch._library",
    "torch._dynamo",
    "torch.distributed.c10d_logger",
    "torch.utils._contextlib",
)
"""Modules, and packages, whose frames lie between a collective and who called it."""
_TALKS = ("torch.distributed", "nemohybrid.parallel")
_COLLECTIVE = re.compile(r"\b(all_gather\w*|all_reduce\w*|reduce_scatter\w*|all_to_all\w*|broadcast|barrier)\b")
_WAIT = re.compile(r"\b(wait|wait_tensor)\(")
_OF_DEVICE = re.compile(r"\.(tolist|item|cpu|synchronize)\(")
_LONGEST_TEXT = 110
_LINES_OF_OURS = 6


@dataclass(frozen=True)
class Place:
    """A line of a program, and the expression of it that runs."""

    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}{f': {self.text}' if self.text else ''}"


@dataclass(frozen=True)
class Sight:
    """waits_in: a collective, `DEVICE`, or nothing; places: lines of ours, innermost first; innermost: the line that runs."""

    waits_in: str
    places: tuple[Place, ...]
    innermost: Place


def frame_of(main: int) -> FrameType | None:
    """Where the main thread stands; while it waits for the backward pass on a GPU, where the thread of that stands, which
    Python has not started and so does not know.
    """
    frames = sys._current_frames()
    frame = frames.get(main)
    if frame is None or module_of(frame) != "torch.autograd.graph":
        return frame
    known = {thread.ident for thread in threading.enumerate()}
    return next((other for ident, other in frames.items() if ident not in known), frame)


def look(stack: Sequence[FrameType]) -> Sight:
    """At a thread, which may go on meanwhile. stack: its frames, innermost first."""
    ours = [place_of(frame) for frame in stack if is_ours(frame)][:_LINES_OF_OURS]
    return Sight(waits_in(stack), tuple(ours), place_of(stack[0]))


def where_raised(error: BaseException) -> Sight | None:
    """At a thread in the moment in which it raised `error`."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return look(frames[::-1]) if frames else None


def waits_in(stack: Sequence[FrameType]) -> str:
    """The collective in which a thread waits, as its caller names it; `DEVICE`; or an empty string.

    Decided by the innermost frame that is no plumbing: functions of torch.distributed name themselves, of other lines the
    text tells.
    """
    inner = [frame for frame in stack if not module_of(frame).startswith(_PLUMBING)]
    if not inner:
        return ""
    module, text = module_of(inner[0]), text_of(inner[0])
    if module == _C10D:
        return [f.f_code.co_name for f in takewhile(lambda f: module_of(f) == _C10D, inner)][-1]
    if module.startswith(_TALKS):
        if named := _COLLECTIVE.search(text):
            return named[1]
        if _WAIT.search(text):
            return "a transfer between ranks" if module.endswith("pipeline") else "a collective"
    return DEVICE if is_ours(inner[0]) and _OF_DEVICE.search(text) else ""


class Glances:
    """`waits_in`, many times a second: what was found at a place is remembered."""

    def __init__(self) -> None:
        self.known: dict[tuple[tuple[CodeType, int], ...], bool] = {}

    def is_waiting(self, frame: FrameType) -> bool:
        """Whether a thread that stands in `frame` waits for others, or for its device."""
        key = tuple((f.f_code, f.f_lasti) for f in _down_to_ours(frame))
        if key not in self.known:
            self.known[key] = bool(waits_in(stack_of(frame)))
        return self.known[key]


def signature(frame: FrameType) -> int:
    """Changes when a thread moves: where it stands in every function of its stack."""
    return hash(tuple((id(f.f_code), f.f_lasti) for f in stack_of(frame)))


def place_of(frame: FrameType) -> Place:
    """The line at which a frame stands; files of packages by their path below the package."""
    module, code = module_of(frame), frame.f_code
    file = module.replace(".", "/") + ".py" if "." in module else code.co_filename.rsplit("/", 1)[-1]
    return Place(file, frame.f_lineno, code.co_name, text_of(frame))


def text_of(frame: FrameType) -> str:
    """The expression that a frame is computing, in one line; the whole line where Python does not know."""
    first, last, begin, end = _positions(frame)
    lines = [linecache.getline(frame.f_code.co_filename, n, frame.f_globals) for n in range(first, last + 1)]
    if not all(lines):
        return ""
    if begin is not None and end is not None:
        lines[-1] = lines[-1].encode()[:end].decode(errors="replace")
        lines[0] = lines[0].encode()[begin:].decode(errors="replace")
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def _positions(frame: FrameType) -> tuple[int, int, int | None, int | None]:
    positions = list(frame.f_code.co_positions())
    first, last, begin, end = positions[frame.f_lasti // 2] if 0 <= frame.f_lasti // 2 < len(positions) else [None] * 4
    if first is None or last is None:
        return frame.f_lineno, frame.f_lineno, None, None
    return first, last, begin, end


def stack_of(frame: FrameType | None) -> list[FrameType]:
    """A frame and those that called it, outward."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _down_to_ours(frame: FrameType) -> Iterator[FrameType]:
    for f in stack_of(frame):
        yield f
        if is_ours(f):
            return


def is_ours(frame: FrameType) -> bool:
    """Whether it runs a line of this project."""
    return module_of(frame).split(".", 1)[0].startswith(OURS)


def module_of(frame: FrameType) -> str:
    """Dotted name of the module of a frame."""
    return frame.f_globals.get("__name__") or ""

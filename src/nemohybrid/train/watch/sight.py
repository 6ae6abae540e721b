"""Where a thread stands, by its Python stack: the lines of ours, and the collective it waits in."""

from __future__ import annotations

import faulthandler
import linecache
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from traceback import extract_tb

import torch

import nemohybrid
import nemohybrid_kernels

DEVICE = "its device"
"""What a host waits for that has launched all and now wants a number."""
_ROOTS = tuple(f"{Path(package.__file__ or '').parents[1]}/" for package in (nemohybrid, nemohybrid_kernels, torch))
_OURS = ("nemohybrid/", "nemohybrid_kernels/")
_BACKWARD = "torch/autograd/graph.py"
_C10D = "torch/distributed/distributed_c10d.py"
_PLUMBING = (
    "torch/_ops.py",
    "torch/_library/",
    "torch/_dynamo/",
    "torch/distributed/c10d_logger.py",
    "torch/utils/_context",
)
"""Files, and folders, whose functions lie between a collective and who called it."""
_TALKS = ("torch/distributed/", "nemohybrid/parallel/")
_COLLECTIVE = re.compile(r"\b(all_gather\w*|all_reduce\w*|reduce_scatter\w*|all_to_all\w*|broadcast|barrier)\(")
_WAIT = re.compile(r"\b(wait|wait_tensor)\(")
_OF_DEVICE = re.compile(r"\.(tolist|item|cpu|synchronize)\(")
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_LINE = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
"""How faulthandler writes what is not ASCII."""
_LONGEST_TEXT = 110
_LINES_OF_OURS = 6


@dataclass(frozen=True)
class Place:
    """A line of a program. Files of packages by their path below what holds the package."""

    file: str
    line: int
    function: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}{f': {self.text}' if self.text else ''}"


Stack = tuple[tuple[str, int, str], ...]
"""(file, line, function), innermost first."""


@dataclass(frozen=True)
class Sight:
    """waits_in: a collective, `DEVICE`, or nothing; places: lines of ours, innermost first; innermost: the line that runs."""

    waits_in: str
    places: tuple[Place, ...]
    innermost: Place


class Stacks:
    """Reads the stacks of the threads of this process.

    By faulthandler, which follows them in one go: a thread that follows the frames of another in Python can be
    interrupted while these vanish, and with the hooks of FSDP (torch 2.13, Python 3.11) that ended in a segmentation fault.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is watched

    def read(self) -> dict[int, Stack]:
        """Thread -> its stack."""
        self.file.seek(0)
        self.file.truncate()
        faulthandler.dump_traceback(self.file, all_threads=True)
        self.file.seek(0)
        return parsed(self.file.read().decode(errors="replace"))

    def close(self) -> None:
        """What was read stays."""
        self.file.close()

    def of(self, main: int) -> Stack:
        """That of the main thread; while it waits for the backward pass on a GPU, that of the thread which runs it and
        which Python has not started, and so does not know.
        """
        stacks = self.read()
        own = stacks.get(main, ())
        if not own or _short(own[0][0]) != _BACKWARD:
            return own
        known = {thread.ident for thread in threading.enumerate()}
        return next((other for ident, other in stacks.items() if other and ident not in known), own)


def parsed(dump: str) -> dict[int, Stack]:
    """What faulthandler has written: thread -> stack."""
    stacks: dict[int, list[tuple[str, int, str]]] = {}
    lines: list[tuple[str, int, str]] = []
    for text in dump.splitlines():
        if thread := _THREAD.match(text):
            lines = stacks.setdefault(int(thread[1], 16), [])
        elif line := _LINE.match(text):
            lines.append((_plain(line[1]), int(line[2]), _plain(line[3])))
    return {ident: tuple(found) for ident, found in stacks.items()}


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda code: chr(int(code[code.lastindex or 0], 16)), text)


def look(stack: Stack) -> Sight:
    """At a thread that stands there."""
    ours = [place_of(entry) for entry in stack if _short(entry[0]).startswith(_OURS)][:_LINES_OF_OURS]
    return Sight(waits_in(stack), tuple(ours), place_of(stack[0]) if stack else Place("?", 0, "?"))


def where_raised(error: BaseException) -> Sight:
    """At a thread in the moment in which it raised `error`."""
    return look(tuple((f.filename, f.lineno or 0, f.name) for f in reversed(extract_tb(error.__traceback__))))


def waits_in(stack: Stack) -> str:
    """The collective in which a thread waits, as its caller names it; `DEVICE`; or an empty string.

    Decided by the innermost line that is no plumbing: functions of torch.distributed name themselves, of other lines the
    text tells.
    """
    inner = [place_of(entry) for entry in down_to_ours(stack)]
    inner = [place for place in inner if not place.file.startswith(_PLUMBING)]
    if not inner:
        return ""
    file, text = inner[0].file, inner[0].text
    if file == _C10D:
        return [place.function for place in takewhile(lambda place: place.file == _C10D, inner)][-1]
    if file.startswith(_TALKS):
        if named := _COLLECTIVE.search(text):
            return named[1]
        if _WAIT.search(text):
            return "a transfer between ranks" if file.endswith("pipeline.py") else "a collective"
    return DEVICE if file.startswith(_OURS) and _OF_DEVICE.search(text) else ""


def down_to_ours(stack: Stack) -> Sequence[tuple[str, int, str]]:
    """From the innermost line to the first of ours."""
    first = next((n for n, entry in enumerate(stack) if _short(entry[0]).startswith(_OURS)), len(stack))
    return stack[: first + 1]


class Glances:
    """Whether a thread waits for others or for its device, asked often: what was found at a place is remembered."""

    def __init__(self) -> None:
        self.known: dict[Sequence[tuple[str, int, str]], bool] = {}

    def is_waiting(self, stack: Stack) -> bool:
        """Of a thread that stands there."""
        key = down_to_ours(stack)
        if key not in self.known:
            self.known[key] = bool(waits_in(stack))
        return self.known[key]


def place_of(entry: tuple[str, int, str]) -> Place:
    """With the text of the line."""
    file, line, function = entry
    text = linecache.getline(file, line).strip()
    return Place(
        _short(file), line, function, text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
    )


def _short(file: str) -> str:
    root = next((root for root in _ROOTS if file.startswith(root)), "")
    return file.removeprefix(root) if root else Path(file).name

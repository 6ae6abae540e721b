"""Layer patterns: the one string that says which layers a model has, e.g. `M-M*-|(ME)x4/*E/*E`. The only parser of it.

    pattern    = part ("/" part)*          the first part is the model, the others are its MTP blocks
    part       = (symbol | "|" | repetition)*
    repetition = "(" part ")" "x" number   may be nested; "|" cuts the main part into pipeline segments

Whitespace means nothing. Without it and without repetition this is the grammar of Megatron-LM's hybrid layer pattern
(megatron/core/models/hybrid/hybrid_layer_allocation.py); docs/pattern.md lists the differences.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import NoReturn

from nemohybrid.errors import ConfigError

DEFAULT_SYMBOLS: Mapping[str, str] = MappingProxyType({"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "MoE"})
MAX_SYMBOLS = 10_000  # far above any model; stops `((M)x9999)x9999` before it fills the memory

_RESERVED = frozenset("|/()xX0123456789")
_REPEAT = re.compile(r"\s*(?P<x>x)?\s*(?P<number>[0-9]*)")
_CONTEXT = 60  # characters shown on each side of a fault, so that a caret is never pushed off the screen


class PatternError(ConfigError):
    """A pattern that cannot be read or cut as asked.

    With a `position` (0-based, in `text`) the message shows the text and a caret under the fault.
    """

    def __init__(self, reason: str, text: str, position: int | None = None, hint: str = "") -> None:
        self.reason, self.text, self.position, self.hint = reason, text, position, hint
        super().__init__(reason if position is None else _pointed(reason, text, position, hint))


@dataclass(frozen=True)
class Segment:
    """Neighbouring layers that a pipeline stage runs in one go; none for a stage that only embeds or only predicts."""

    first_layer: int  # counted from 0 through the whole model
    symbols: str


@dataclass(frozen=True)
class Pattern:
    """A parsed layer pattern. Built by `parse`, which guarantees what the fields promise."""

    segments: tuple[str, ...]  # the main part cut at each "|"; some may be empty, not all
    mtp: str = ""  # the layers of one multi-token-prediction block, "" when there is none
    mtp_depth: int = 0  # how many such blocks; 0 exactly when `mtp` is empty

    @property
    def main(self) -> str:
        """The symbols of all layers, in order, without segment boundaries."""
        return "".join(self.segments)

    @property
    def num_layers(self) -> int:
        """Layers of the model; those of MTP blocks do not count, as in Megatron."""
        return len(self.main)

    @property
    def counts(self) -> Counter[str]:
        """How often each symbol stands in the main part; absent symbols count 0."""
        return Counter(self.main)

    @property
    def mtp_counts(self) -> Counter[str]:
        """How often each symbol stands in all MTP blocks together (one block times `mtp_depth`)."""
        return Counter(self.mtp * self.mtp_depth)

    @property
    def canonical(self) -> str:
        """The pattern without whitespace and repetition; `parse(p.canonical) == p`, and Megatron reads it too."""
        return "|".join(self.segments) + f"/{self.mtp}" * self.mtp_depth

    @property
    def legal_stage_counts(self) -> tuple[int, ...]:
        """The numbers of pipeline stages this pattern can run on, ascending: with "|" those that divide its segments.

        Without it any that leaves every stage a layer: where to cut is then for `nemohybrid.plan.cut` to say.
        """
        if len(self.segments) == 1:
            return tuple(range(1, self.num_layers + 1))
        pieces = len(self.segments)
        return tuple(n for n in range(1, pieces + 1) if pieces % n == 0)

    def check_stages(self, num_stages: int) -> None:
        """Raises PatternError unless `num_stages` is one of `legal_stage_counts`, which it names."""
        if num_stages not in self.legal_stage_counts:
            raise PatternError(self._why_not(num_stages), self.canonical)

    def cut_at(self, lengths: Sequence[int]) -> "Pattern":
        """The same model with "|" after so many layers each; an old "|" is forgotten. 0 makes an empty segment.

        Raises PatternError where the lengths are not those of the whole model, or one is negative.
        """
        if sum(lengths) != self.num_layers or min(lengths) < 0:
            given = " + ".join(map(str, lengths))
            raise PatternError(
                f"segments of {given} = {sum(lengths)} layers do not make num_layers={self.num_layers}", self.canonical
            )
        ends = list(accumulate(lengths))
        return replace(self, segments=tuple(self.main[end - n : end] for end, n in zip(ends, lengths, strict=True)))

    def stage_layers(self, num_stages: int) -> tuple[tuple[Segment, ...], ...]:
        """For each pipeline stage the segments it runs, in the order in which a microbatch visits them.

        Stage r gets segments r, r + num_stages, ... as in Megatron's virtual pipeline: more than one segment a stage
        means an interleaved schedule, and one stage gets them all. Raises PatternError when the segments do not divide,
        naming the numbers that do; and for several stages of a pattern without "|", which `cut_at` adds.
        """
        self.check_stages(num_stages)
        if num_stages > 1 and len(self.segments) == 1:
            raise PatternError(
                f"a pattern without '|' is not cut yet into {num_stages} pipeline stages. Legal: 1; or cut it first "
                "(Pattern.cut_at, nemohybrid.plan.cut)",
                self.canonical,
            )
        first_layers = accumulate(map(len, self.segments), initial=0)
        cut = [Segment(first, symbols) for first, symbols in zip(first_layers, self.segments, strict=False)]
        return tuple(tuple(cut[stage::num_stages]) for stage in range(num_stages))

    def _why_not(self, num_stages: int) -> str:
        if len(self.segments) > 1:
            return (
                f"{len(self.segments)} segments cannot be shared by {num_stages} pipeline stages. "
                f"Legal numbers of stages: {', '.join(map(str, self.legal_stage_counts))}; "
                f"or cut the pattern into a multiple of {num_stages} segments"
            )
        return (
            f"a pattern with num_layers={self.num_layers} leaves some of {num_stages} pipeline stages without a layer. "
            f"Legal numbers of stages: 1 to {self.num_layers}; or place empty segments by hand with '|'"
        )


def parse(text: str, symbols: Mapping[str, str] = DEFAULT_SYMBOLS) -> Pattern:
    """Read a pattern, e.g. `parse("(M-)x3 M*-").main == "M-M-M-M*-"`.

    `symbols` maps each legal symbol to a few words for error messages. Raises PatternError with reason, position and
    caret for everything that is no pattern: unknown symbols, unbalanced or unfinished repetitions, "|" in an MTP part,
    MTP parts that differ, a main part without layers, and anything longer than MAX_SYMBOLS once expanded.
    """
    for symbol in symbols:
        check_symbol(symbol)
    return _Reader(text, symbols).read()


def check_symbol(symbol: str) -> None:
    """Refuse with ConfigError unless `symbol` can name a kind of layer: one visible character, free in the grammar."""
    if len(symbol) != 1 or not symbol.isprintable() or symbol.isspace():
        raise ConfigError(f"{symbol!r} cannot be a layer symbol: it must be one visible character")
    if symbol in _RESERVED:
        raise ConfigError(f"{symbol!r} cannot be a layer symbol: the grammar of patterns uses it")


class _Reader:
    """Reads one pattern from left to right, expanding repetitions on the way; a stack, so that depth has no limit."""

    def __init__(self, text: str, symbols: Mapping[str, str]) -> None:
        self.text, self.symbols = text, symbols
        self.at = 0  # the character being read
        self.size = 0  # symbols and boundaries written so far, in all parts
        self.parts: list[str] = []
        self.part_starts = [0]
        self.written = [""]  # the expanded text of the current part and of each group open in it
        self.open_groups: list[int] = []  # where each of these groups began

    def read(self) -> Pattern:
        while self.at < len(self.text):
            self.read_character(self.text[self.at])
            self.at += 1
        self.end_part()
        return self.pattern()

    def read_character(self, char: str) -> None:
        if char in self.symbols:
            self.write(char, at=self.at)
        elif char == "|":
            self.read_boundary()
        elif char == "(":
            self.open_groups.append(self.at)
            self.written.append("")
        elif char == ")":
            self.close_group()
        elif char == "/":
            self.end_part()
            self.part_starts.append(self.at + 1)
        elif not char.isspace():
            self.refuse_character(char)

    def write(self, items: str, at: int, times: int = 1) -> None:
        self.size += len(items) * times
        if self.size > MAX_SYMBOLS:
            self.fail(f"pattern of more than {MAX_SYMBOLS} symbols", at)
        self.written[-1] += items * times

    def read_boundary(self) -> None:
        if self.parts:
            self.fail("'|' in an MTP part", self.at, "MTP blocks live on the last pipeline stage and cannot be cut")
        self.write("|", at=self.at)

    def close_group(self) -> None:
        if not self.open_groups:
            self.fail("')' without '('", self.at)
        opened, group = self.open_groups.pop(), self.written.pop()
        if not group:
            self.fail("repetition of nothing", opened, "write layers between the parentheses")
        times = self.read_times()
        self.size -= len(group)
        self.write(group, at=opened, times=times)

    def read_times(self) -> int:
        """The number of "x4" after a closing parenthesis; leaves `at` on its last digit."""
        match = _REPEAT.match(self.text, self.at + 1)
        assert match is not None, "every part of the expression is optional"
        if not match["x"]:
            self.fail("group that is not repeated", self.at, "say how often, as in (M-)x4")
        digits = match["number"].lstrip("0")
        if not match["number"]:
            self.fail("'x' without a number", match.start("x"), "say how often, as in (M-)x4")
        if not digits:
            self.fail("repetition 0 times", match.start("number"), "the smallest legal number is 1")
        # Compared by length first: int() refuses numbers of thousands of digits with an error of its own.
        if len(digits) > len(str(MAX_SYMBOLS)) or int(digits) > MAX_SYMBOLS:
            self.fail("repetition too often", match.start("number"), f"the largest legal number is {MAX_SYMBOLS}")
        self.at = match.end() - 1
        return int(digits)

    def end_part(self) -> None:
        if self.open_groups:
            self.fail("'(' that is not closed in its part", self.open_groups[-1])
        self.parts.append(self.written[0])
        self.written = [""]

    def pattern(self) -> Pattern:
        main, *mtp_parts = self.parts
        if not main.strip("|"):
            self.fail("no layers", 0, self.legal_symbols())
        for number, part in enumerate(mtp_parts, start=1):
            if part != mtp_parts[0]:
                at = min(self.part_starts[number], len(self.text) - 1)
                self.fail(f"MTP parts that differ: part 1 is {mtp_parts[0]!r} and part {number} is {part!r}", at)
        mtp = mtp_parts[0] if mtp_parts else ""
        return Pattern(tuple(main.split("|")), mtp, len(mtp_parts) if mtp else 0)

    def refuse_character(self, char: str) -> NoReturn:
        if char in _RESERVED:
            self.fail(f"{char!r} outside a repetition", self.at, "a repetition is written (M-)x4")
        other_case = char.swapcase()
        hint = f"did you mean {other_case}?  " if other_case in self.symbols else ""
        self.fail(f"unknown symbol {char!r}", self.at, hint + self.legal_symbols())

    def legal_symbols(self) -> str:
        return "symbols are " + ", ".join(f"{symbol} ({meaning})" for symbol, meaning in self.symbols.items())

    def fail(self, reason: str, at: int, hint: str = "") -> NoReturn:
        raise PatternError(reason, self.text, at, hint)


def _pointed(reason: str, text: str, position: int, hint: str) -> str:
    """`reason at position p`, the text around it on one line, and under the fault a caret with the hint."""
    start, stop = max(0, position - _CONTEXT), position + _CONTEXT
    before, after = ("..." if start else ""), ("..." if stop < len(text) else "")
    # Line breaks, tabs and control characters would part the caret from what it points at.
    shown = "".join(char if char.isprintable() else " " for char in text[start:stop])
    caret = " " * (len(before) + position - start) + "^" + (f"  {hint}" if hint else "")
    return f"{reason} at position {position} (counted from 0)\n    {before}{shown}{after}\n    {caret}"

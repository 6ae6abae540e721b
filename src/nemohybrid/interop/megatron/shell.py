"""The words of a shell script, as far as they can be known without running anything.

Understood: comments, quotes, continued lines, NAME=value, NAME+=value, NAME=(...), $NAME, ${NAME}, ${NAME:-default},
${NAME[@]}. What only a shell could know ($(...), arithmetic, the environment, conditions) is never computed: such an
expansion stays in the words as it is written.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemohybrid.errors import ConfigError

LONGEST = 5_000_000
"""Characters and words that all variables of a file together may be filled in with; `A=$A$A` doubles with every line."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)")
_BRACES = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<all>\[[@*]\])?(?::?[-=](?P<default>.*))?", re.DOTALL)
_REDIRECTION = re.compile(r"(?:\d*|&)(?:>>?|<)(?:&\d|&-)?")
_DECLARING = ("export", "local", "declare", "readonly", "typeset", "env", "-a", "-x", "then", "else", "do", "{")
_SEPARATORS = "\n;&|()"
_ENDS_A_WORD = " \t" + _SEPARATORS
_OUTSIDE_QUOTES = re.compile(r"[^'\"$`\\ \t\x00\n;&|()]+")
_INSIDE_QUOTES = re.compile(r'[^"$`\\]+')
"""Text that stands for itself."""


@dataclass(frozen=True)
class Piece:
    """Part of a word: text, or an expansion. A quoted one is not split at blanks."""

    text: str
    quoted: bool
    expansion: bool = False


@dataclass
class Word:
    """What the shell takes as one word before it expands anything."""

    line: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def plain(self) -> str:
        """The word as written, without quotes."""
        return "".join(piece.text for piece in self.pieces)


@dataclass
class Statement:
    """A simple command, or one assignment when `name` is set."""

    line: int
    words: list[Word]
    name: str = ""
    append: bool = False
    array: bool = False


def statements(text: str) -> Iterator[Statement]:
    """The simple commands of a script in order; keywords such as `if` stand at the front of theirs.

    Raises ConfigError, with the line, for quotes and brackets that are not closed and for here-documents.
    """
    return _Scanner(text).statements()


class _Scanner:
    """A position in the text, and what can be read from there."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n").replace("\\\n", " \x00")  # the NUL keeps the lines countable
        self.at = 0
        self.line_ends = [at for at, char in enumerate(self.text) if char in "\n\x00"]

    @property
    def line(self) -> int:
        return 1 + bisect_left(self.line_ends, self.at)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def statements(self) -> Iterator[Statement]:
        """The commands of the script, in order; nothing is run."""
        current, starts = Statement(self.line, []), True
        while self.at < len(self.text):
            self._skip_blanks()
            if self.peek() in _SEPARATORS:  # the end of the text too
                if current.words:
                    yield current
                self.at += 1
                current, starts = Statement(self.line, []), True
            elif redirection := _REDIRECTION.match(self.text, self.at):
                self._skip_redirection(redirection)
            elif starts and (assignment := _ASSIGNMENT.match(self.text, self.at)):
                name, append = assignment[1], assignment[2] == "+="
                self.at = assignment.end()
                array = self.peek() == "("
                words = self._array() if array else [self._word()]
                yield Statement(self.line, words, name, append, array)
            else:
                current.words.append(self._word())
                starts = starts and current.words[-1].plain in _DECLARING  # `export A=1` assigns, `run A=1` does not
        if current.words:
            yield current

    def _skip_blanks(self) -> None:
        while self.peek() and self.peek() in " \t\x00":
            self.at += 1
        if self.peek() == "#":
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end

    def _skip_redirection(self, found: re.Match[str]) -> None:
        if self.text.startswith("<<", found.end() - 1):
            raise ConfigError(f"line {self.line}: here-documents (<<) are not read; write the arguments out")
        self.at = found.end()
        if not found[0].endswith(("&-", *(f"&{digit}" for digit in range(10)))):
            self._skip_blanks()
            self._word()

    def _array(self) -> list[Word]:
        start, words = self.line, []
        self.at += 1
        while self.peek() != ")":
            if not self.peek():
                raise ConfigError(f"line {start}: '(' is not closed")
            if self.peek() in " \t\x00\n#":
                self._skip_blanks()
                self.at += self.peek() == "\n"
            elif self.peek() in _SEPARATORS:
                raise ConfigError(f"line {self.line}: {self.peek()!r} inside a list that began in line {start}")
            else:
                words.append(self._word())
        self.at += 1
        return words

    def _word(self) -> Word:
        word = Word(self.line)
        while (char := self.peek()) and char not in _ENDS_A_WORD and char != "\x00":
            if char == "'":
                word.pieces.append(Piece(self._until("'").replace("\x00", "\n"), quoted=True))
            elif char == '"':
                word.pieces += self._double_quoted()
            elif char in "$`":
                word.pieces.append(self._expansion(quoted=False))
            elif char == "\\":
                word.pieces.append(Piece(self.text[self.at + 1 : self.at + 2], quoted=True))
                self.at += 2
            else:
                word.pieces.append(Piece(self._run(_OUTSIDE_QUOTES), quoted=False))
        return word

    def _run(self, plain: re.Pattern[str]) -> str:
        """Characters that stand for themselves; one of a kind that does not, where there are none."""
        found = plain.match(self.text, self.at)
        start, self.at = self.at, found.end() if found else self.at + 1
        return self.text[start : self.at]

    def _until(self, end: str) -> str:
        start = self.line
        found = self.text.find(end, self.at + 1)
        if found < 0:
            raise ConfigError(f"line {start}: {end} is not closed")
        inside, self.at = self.text[self.at + 1 : found], found + 1
        return inside

    def _double_quoted(self) -> Iterator[Piece]:
        start = self.line
        self.at += 1
        yield Piece("", quoted=True)  # "" is a word
        while (char := self.peek()) != '"':
            if not char:
                raise ConfigError(f'line {start}: " is not closed')
            if char in "$`":
                yield self._expansion(quoted=True)
                continue
            escaped = char == "\\" and self.text[self.at + 1 : self.at + 2] in '"$`\\'
            self.at += escaped
            yield Piece(self.peek() if escaped else self._run(_INSIDE_QUOTES).replace("\x00", ""), quoted=True)
            self.at += escaped
        self.at += 1

    def _expansion(self, *, quoted: bool) -> Piece:
        start, line = self.at, self.line
        if self.text.startswith("`", start):
            self._until("`")
        elif self.text.startswith(("${", "$("), start):
            self._skip_brackets(line)
        else:
            name = _NAME.match(self.text, start + 1)
            self.at = name.end() if name else start + 2
        return Piece(self.text[start : self.at], quoted, expansion=True)

    def _skip_brackets(self, line: int) -> None:
        opening = self.text[self.at + 1]
        closing = "})"[opening == "("]
        depth, self.at = 0, self.at + 1
        while True:
            char = self.peek()
            if not char:
                raise ConfigError(f"line {line}: ${opening} is not closed")
            depth += (char == opening) - (char == closing)
            self.at += 1
            if depth == 0:
                return


class Variables:
    """What the assignments of a script have said so far."""

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}
        self.spent = 0  # of LONGEST

    def assign(self, statement: Statement) -> None:
        """`NAME=value` or `NAME=(...)`; with `append` what was there stays in front."""
        words = [text for word in statement.words for text in self.expand(word)]
        if not statement.array:
            words = [" ".join(words)] if words else [""]
        before = self.values.get(statement.name, []) if statement.append else []
        if before and not statement.array:
            words = [*before[:-1], before[-1] + words[0]]
            before = []
        self.values[statement.name] = [*before, *words]
        if statement.append:
            self._spend(self.values[statement.name], statement.line)

    def expand(self, word: Word) -> list[str]:
        """A word -> the words it becomes: none, one, or those of a list or of an unquoted text with blanks."""
        done: list[list[str]] = []
        for piece in word.pieces:
            parts = self._parts(piece, word.line) if piece.expansion else [piece.text]
            for index, part in enumerate(parts):  # the first goes on with the word before it
                if index or not done:
                    done.append([])
                done[-1].append(part)
        return ["".join(parts) for parts in done]

    def _spend(self, texts: list[str], line: int) -> None:
        """Count what is filled in, so that no file takes more memory or time than a long one."""
        self.spent += len(texts) + sum(map(len, texts))
        if self.spent > LONGEST:
            raise ConfigError(f"line {line}: here the variables grow beyond {LONGEST:,} characters")

    def _parts(self, piece: Piece, line: int) -> list[str]:
        if piece.text in ("$@", "$*", "${@}", "${*}"):  # what the script itself would be given
            return []
        body = piece.text[2:-1] if piece.text.startswith("${") else piece.text[1:]
        found = _BRACES.fullmatch(body)
        if piece.text.startswith(("$(", "`")) or not found:
            return [piece.text]
        values = self.values.get(found["name"])
        if values is None and found["default"] is not None:
            values = [self._text(found["default"], line)]
        if values is None:
            return [piece.text]
        self._spend(values, line)
        if found["all"]:
            return values
        whole = piece.quoted or "$(" in values[0] or "`" in values[0]  # a command has blanks of its own
        return values[:1] if whole else values[0].split()

    def _text(self, default: str, line: int) -> str:
        """The default of ${NAME:-default}, which may name other variables."""
        self._spend([default], line)
        [statement] = statements('X="' + default.replace('"', "") + '"')
        return " ".join(text for word in statement.words for text in self.expand(word))

"""What a prepared corpus says about itself, in `<prefix>.json` beside its `.bin` and `.idx`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nemohybrid.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CorpusInfo:
    """What `<prefix>.json` records of a corpus.

    tokens counts the eod of every document; text_bytes the UTF-8 bytes of the text. sources: name and size of each
    file, in bytes. damaged_documents_skipped: left out because they could not be read. unknown_tokens: written where
    the tokenizer has no id for the text.
    """

    tokenizer: dict[str, str | int]
    documents: int
    tokens: int
    text_bytes: int
    empty_documents_skipped: int
    sources: list[dict[str, str | int]]
    damaged_documents_skipped: int = 0
    unknown_tokens: int = 0
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "CorpusInfo":
        """Read back what `save` wrote. Raises DataError for anything else."""
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version {version}; this version reads {FORMAT_VERSION}. Prepare the corpus again"
            )
        try:
            info = cls(**content)
        except TypeError as error:
            raise DataError(f"{path} does not describe a corpus: {error}") from None
        counts = {name: value for name, value in content.items() if name not in ("tokenizer", "sources")}
        if wrong := [name for name, value in counts.items() if type(value) is not int or value < 0] or (
            [] if info.tokens else ["tokens"]
        ):
            raise DataError(f"{path} does not describe a corpus: {wrong[0]} is {counts[wrong[0]]!r}")
        return info

"""The text that comes with the package: seven plays of Shakespeare (public domain), the last one held out."""

import hashlib
import importlib.resources
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nemohybrid.data.corpus import check_files
from nemohybrid.data.prepare import write_corpus
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from nemohybrid.errors import DataError

MARKER = "bundled.json"
# A play starts with its title, a blank line, and its author.
PLAY_START = re.compile(r"^(?=[^\n]+\n\nby William Shakespeare\n)", re.MULTILINE)


class Play(NamedTuple):
    """title: its first line. text: all of it, title included."""

    title: str
    text: str


class BundledData(NamedTuple):
    """What `prepare_bundled` leaves: prefixes of the two corpora, and the tokenizer of both."""

    train: Path
    valid: Path
    tokenizer: Tokenizer


def bundled_text() -> str:
    """The whole file, 938,047 characters of ASCII."""
    file = importlib.resources.files("nemohybrid.data").joinpath("bundled", "shakespeare.txt")
    return file.read_bytes().decode("utf-8")


def plays() -> list[Play]:
    """The plays in the order of the file; their texts joined give the file back."""
    texts = [text for text in PLAY_START.split(bundled_text()) if text]
    return [Play(title=text.partition("\n")[0], text=text) for text in texts]


def prepare_bundled(folder: str | Path, tokenizer: str = "bpe:1024") -> BundledData:
    """Make `folder` hold train (all plays but the last), valid (the whole last play) and their tokenizer.

    tokenizer: as in `make_tokenizer`; a BPE learns from the training plays only. Quick when it is done already, and
    safe when several processes start at once: the folder appears complete, by one rename.
    Raises DataError when `folder` holds something else, or text prepared with another tokenizer.
    """
    folder, marker = Path(folder), _marker(tokenizer)
    if not _is_prepared(folder, marker):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _fill(staging, tokenizer, marker)
            _publish(staging, folder, marker)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return BundledData(folder / "train", folder / "valid", load_tokenizer(folder))


def _fill(folder: Path, spec: str, marker: dict) -> None:
    *train, valid = plays()
    tokenizer = make_tokenizer(spec, lambda: (play.text for play in train))
    tokenizer.save(folder)
    for name, chosen in (("train", train), ("valid", [valid])):
        write_corpus(_documents(chosen), folder / name, tokenizer, _sources(chosen))
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _publish(staging: Path, folder: Path, marker: dict) -> None:
    staging.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    try:
        staging.rename(folder)
    except OSError:  # not empty: another process was first, or it is not ours
        if not _is_prepared(folder, marker):
            raise


def _is_prepared(folder: Path, marker: dict) -> bool:
    """Whether `folder` holds exactly this; False when it is absent or empty. Raises DataError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MARKER).is_file():
        raise DataError(
            f"{folder} exists and was not made by prepare_bundled. Choose another folder, or empty this one"
        )
    found = json.loads((folder / MARKER).read_bytes())
    if found != marker:
        raise DataError(
            f"{folder} holds {json.dumps(found)}, wanted {json.dumps(marker)}. Choose another folder, or delete it"
        )
    for name in ("train", "valid"):
        check_files(folder / name)
    return True


def _marker(spec: str) -> dict:
    """What the prepared folder depends on: the text, and how its tokenizer comes about."""
    recipe = spec if spec.startswith("bpe:") else load_tokenizer(spec).description
    return {"text_sha256": hashlib.sha256(bundled_text().encode("utf-8")).hexdigest(), "tokenizer": recipe}


def _documents(chosen: Sequence[Play]) -> list[Document]:
    return [Document(play.text, place, len(play.text)) for place, play in enumerate(chosen, start=1)]


def _sources(chosen: Sequence[Play]) -> list[dict[str, str | int]]:
    return [{"name": play.title, "bytes": len(play.text.encode("utf-8"))} for play in chosen]

"""The tokenizer of a `data prepare`: loaded, or trained on its inputs once and kept for a command that goes on."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nemohybrid.data.readers import Reading, read_unit
from nemohybrid.data.text import Damage
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from nemohybrid.data.units import Unit, place_in_file
from nemohybrid.errors import DataError

TRAIN_BYTES = 2**30


class Training(NamedTuple):
    """What `bpe:SIZE` learns from: at most `train_bytes` of text of all units, evenly from the heads of the files."""

    units: Sequence[Unit]
    reading: Reading
    skip_damaged: bool
    train_bytes: int

    def fingerprint(self, spec: str) -> str:
        """Equal fingerprints give equal tokenizers."""
        options = {"spec": spec, "reading": self.reading._asdict(), "train_bytes": self.train_bytes}
        units = "".join(unit.fingerprint(options) for unit in self.units)
        return hashlib.sha256(units.encode("ascii")).hexdigest()[:32]


def trained_once(spec: str, training: Training, folder: Path) -> Tokenizer:
    """The tokenizer of `bpe:SIZE`, from `folder` when the same training left it there. Raises DataError."""
    kept = folder / f"trained-{training.fingerprint(spec)}"
    if not kept.is_dir():
        unfinished = folder / "trained.tmp"
        make_tokenizer(spec, lambda: training_texts(training)).save(unfinished)
        unfinished.rename(kept)
    return load_tokenizer(kept)


def training_texts(training: Training) -> Iterator[str]:
    """The texts to learn from, in the order of the inputs. What a small file leaves over goes to those behind it.

    Raises DataError with file and line at what cannot be read, unless that is skipped.
    """
    files = [list(units) for _, units in itertools.groupby(training.units, key=lambda unit: unit.path)]
    left = training.train_bytes
    size = min(left, sum(unit.file_bytes for unit in training.units))
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizer", disable=None) as bar:
        for index, units in enumerate(files):
            share = left // (len(files) - index)
            for text in _first_texts(units, share, training):
                text_bytes = len(text.encode("utf-8"))
                left -= text_bytes
                bar.update(text_bytes)
                yield text


def _first_texts(units: Sequence[Unit], share: int, training: Training) -> Iterator[str]:
    """The texts of one file up to about `share` bytes."""
    for unit in units:
        for document in read_unit(unit, training.reading):
            if share <= 0:
                return
            if not isinstance(document, Damage):
                yield document.text[:share]
                share -= len(document.text.encode("utf-8"))
            elif not training.skip_damaged:
                raise DataError(f"{place_in_file(unit, document.place)}: {document.reason}")

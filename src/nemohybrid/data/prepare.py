"""Text in, corpus out: encode files and write `.bin`, `.idx` and `.json`, all or nothing, resumable in between."""

import errno
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nemohybrid.data.index import token_dtype
from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.parts import DAMAGES_KEPT, Part, StoppedAt, join_parts, write_part
from nemohybrid.data.readers import Reading
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.data.trained import TRAIN_BYTES, Training, trained_once
from nemohybrid.data.units import UNIT_BYTES, Unit, cut_into_units, place_in_file
from nemohybrid.data.workers import Job, Task, TaskFailed, encode_all
from nemohybrid.data.workspace import JOINED, workspace
from nemohybrid.errors import DataError

CORPUS_SUFFIXES = (".bin", ".idx", ".json")
PARTS_VERSION = 1  # of how parts are written: those of another version are encoded again


@dataclass(frozen=True)
class PrepareOptions:
    """How `prepare` works.

    skip_damaged: leave out documents that cannot be read instead of stopping at the first. eod_token: ends a document;
    None: the tokenizer's own. train_bytes: of text that `bpe:SIZE` learns from. unit_bytes: of a file to a part.
    Neither `workers` nor `unit_bytes` changes the corpus.
    """

    reading: Reading = Reading()
    skip_damaged: bool = False
    eod_token: str | None = None
    train_bytes: int = TRAIN_BYTES
    workers: int = 1
    unit_bytes: int = UNIT_BYTES


DEFAULTS = PrepareOptions()


class Prepared(NamedTuple):
    """What `prepare` did.

    damages: the first places that were left out, with reasons. read_bytes: of the inputs, encoded in `seconds`; parts
    that an earlier command had done do not count.
    """

    info: CorpusInfo
    tokenizer: Tokenizer
    damages: list[str]
    read_bytes: int
    seconds: float


class _Encoded(NamedTuple):
    parts: dict[Unit, Part]
    read_bytes: int
    seconds: float


def prepare(
    inputs: Sequence[Path], prefix: str | Path, tokenizer: str | Tokenizer, options: PrepareOptions = DEFAULTS
) -> Prepared:
    """Encode files into one corpus at `prefix`; an existing one is replaced once the new one is whole.

    Documents as `read_unit` finds them, in the order of `inputs`. tokenizer: one, or what `make_tokenizer` knows; saved
    in `<prefix>.tokenizer`. What is done stays in `<prefix>.parts` until the corpus is whole, so that the same call
    goes on after any interruption. Raises DataError with file and line for what cannot be read.
    """
    _refuse_own_outputs(inputs, prefix)
    units = [unit for path in inputs for unit in cut_into_units(path, options.reading.text_field, options.unit_bytes)]
    with _disk_full_explained(prefix), workspace(prefix) as folder:
        chosen = _tokenizer(tokenizer, units, folder, options)
        chosen.save(folder / "tokenizer")
        stems = _stems(units, folder, chosen, options)
        encoded = _encode(stems, Job(str(folder / "tokenizer"), options.reading, options.skip_damaged), options.workers)
        parts = [(stems[unit], encoded.parts[unit]) for unit in units]
        sources: list[dict[str, str | int]] = [{"name": path.name, "bytes": path.stat().st_size} for path in inputs]
        info = _finish(parts, folder / JOINED, prefix, chosen, sources)
        chosen.save(f"{prefix}.tokenizer")
    return Prepared(info, chosen, _damages(units, encoded.parts), encoded.read_bytes, encoded.seconds)


def write_corpus(
    documents: Iterable[Document], prefix: str | Path, tokenizer: Tokenizer, sources: list[dict[str, str | int]]
) -> CorpusInfo:
    """Write one corpus: every document encoded and ended by eod, empty ones left out.

    Token ids are uint16 when the vocabulary is below 65,500, else int32 (Megatron's rule). An existing corpus is
    replaced at the end. Raises DataError when there is no text or an id does not fit the vocabulary.
    """
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        stem = Path(folder) / "part"
        try:
            part = write_part(documents, stem, tokenizer)
        except StoppedAt as error:
            raise DataError(f"document {error.place}: {error.reason}") from None
        return _finish([(stem, part)], Path(folder) / JOINED, target, tokenizer, sources)


def _refuse_own_outputs(inputs: Sequence[Path], prefix: str | Path) -> None:
    """Raises DataError for an input that the corpus would replace, or that lies where its parts are swept away."""
    written = {Path(f"{prefix}{suffix}").resolve() for suffix in CORPUS_SUFFIXES}
    swept = {Path(f"{prefix}{suffix}").resolve() for suffix in (".parts", ".tokenizer")}
    for path in inputs:
        if path.resolve() in written or swept & set(path.resolve().parents):
            raise DataError(f"{path} would be overwritten by the corpus {prefix}. Choose another --output")


def _tokenizer(tokenizer: str | Tokenizer, units: list[Unit], folder: Path, options: PrepareOptions) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer.partition(":")[0] != "bpe":
        return load_tokenizer(tokenizer, options.eod_token)
    training = Training(units, options.reading, options.skip_damaged, options.train_bytes)
    return trained_once(tokenizer, training, folder)


def _stems(units: Sequence[Unit], folder: Path, tokenizer: Tokenizer, options: PrepareOptions) -> dict[Unit, Path]:
    """Where the part of each unit goes: named after all that its tokens depend on, it can be taken for no other."""
    depends_on = {
        "version": PARTS_VERSION,
        "tokenizer": tokenizer.description,
        "reading": options.reading._asdict(),
    }
    return {unit: folder / unit.fingerprint(depends_on) for unit in units}


def _encode(stems: dict[Unit, Path], job: Job, workers: int) -> _Encoded:
    """All parts, those that are there already and those that are not."""
    parts: dict[Unit, Part] = {}
    for unit, stem in stems.items():
        part = Part.load(stem)
        if part and (job.skip_damaged or not part.damaged):
            parts[unit] = part
    tasks = [Task(unit, stem) for unit, stem in stems.items() if unit not in parts]
    done, begin = sum(unit.file_bytes for unit in parts), time.perf_counter()
    to_read = sum(task.unit.file_bytes for task in tasks)
    with (
        tqdm(total=done + to_read, initial=done, unit="B", unit_scale=True, desc="prepare", disable=None) as bar,
        closing(encode_all(tasks, job, workers, bar.update)) as encoded,
    ):
        try:
            for index, part in encoded:
                parts[tasks[index].unit] = part
        except TaskFailed as failure:
            raise _explained(failure, tasks[failure.index].unit) from None
    return _Encoded(parts, to_read, time.perf_counter() - begin)


def _explained(failure: TaskFailed, unit: Unit) -> Exception:
    if isinstance(failure.cause, StoppedAt):
        return DataError(f"{place_in_file(unit, failure.cause.place)}: {failure.cause.reason}")
    return failure.cause


def _finish(
    parts: Sequence[tuple[Path, Part]],
    joined: Path,
    prefix: str | Path,
    tokenizer: Tokenizer,
    sources: list[dict[str, str | int]],
) -> CorpusInfo:
    """Join the parts at `joined`, then give the corpus its name."""
    info = _info([part for _, part in parts], tokenizer, sources)
    join_parts(parts, joined, token_dtype(tokenizer.vocab_size))
    info.save(Path(f"{joined}.json"))
    _publish(joined, prefix)
    return info


def _info(parts: Sequence[Part], tokenizer: Tokenizer, sources: list[dict[str, str | int]]) -> CorpusInfo:
    documents, damaged = sum(part.documents for part in parts), sum(part.damaged for part in parts)
    if documents == 0:
        raise DataError(f"no text to prepare: every document is empty{' or damaged' if damaged else ''}")
    return CorpusInfo(
        tokenizer=tokenizer.description,
        documents=documents,
        tokens=sum(part.tokens for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        empty_documents_skipped=sum(part.empty for part in parts),
        sources=sources,
        damaged_documents_skipped=damaged,
        unknown_tokens=sum(part.unknown_tokens for part in parts),
    )


def _damages(units: Sequence[Unit], parts: dict[Unit, Part]) -> list[str]:
    """The first damages, in the order of the inputs."""
    found = ((unit, place, reason) for unit in units for place, reason in parts[unit].damages)
    return [f"{place_in_file(unit, place)}: {reason}" for unit, place, reason in itertools.islice(found, DAMAGES_KEPT)]


def _publish(joined: Path, prefix: str | Path) -> None:
    """Rename the three files into place. No old index or record ever stands beside new tokens."""
    for suffix in (".json", ".idx"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    for suffix in CORPUS_SUFFIXES:
        Path(f"{joined}{suffix}").replace(f"{prefix}{suffix}")


@contextmanager
def _disk_full_explained(prefix: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"no room left on the disk for {prefix}.parts ({error.strerror}). It needs twice the size of the corpus. "
            "Make room; the same command goes on from the parts that are done"
        ) from error

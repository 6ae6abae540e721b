"""Tokenizers: text to token ids and back, exactly, with the bytes each id stands for.

Every tokenizer here is a table of byte strings, one for each id. Decoding joins entries, streaming decodes that join
as it grows, and bits per byte divide by the lengths: one table, so the three can never disagree.
"""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from nemohybrid.data.text import read_utf8
from nemohybrid.errors import DataError, did_you_mean

EOD_CANDIDATES = ("<|endoftext|>", "</s>")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class Tokenizer(ABC):
    """Text <-> token ids.

    table: the bytes each id stands for; control tokens stand for none. eod: the id that ends every document.
    """

    def __init__(self, table: Sequence[bytes], eod: int):
        self.table = tuple(table)
        self.eod = eod

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a control token: a text that spells one out gets ordinary ids."""

    @property
    @abstractmethod
    def description(self) -> dict[str, str | int]:
        """What tells two tokenizers apart: equal descriptions give equal ids for every text."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` reads back, creating `folder` if need be."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, eod and holes included: every id is below it."""
        return len(self.table)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one id stands for. Raises DataError for an id outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise DataError(
                f"token id {token} is outside this tokenizer's vocabulary. Legal: 0 to {self.vocab_size - 1}"
            )
        return self.table[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Inverse of `encode`."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] number of UTF-8 bytes each id stands for; 0 for eod and other control tokens."""
        return np.array([len(entry) for entry in self.table], dtype=np.int64)


class ByteTokenizer(Tokenizer):
    """One id for each byte value, and 256 for eod."""

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)] + [b""], eod=256)

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    @property
    def description(self) -> dict[str, str | int]:
        """The same for every byte tokenizer."""
        return {"type": "byte", "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which only names the type."""
        _write(folder, TOKENIZER_FILE, json.dumps({"type": "byte"}))


class BpeTokenizer(Tokenizer):
    """A byte-level tokenizer of the Hugging Face `tokenizers` library (GPT-2, Llama 3, Qwen, Nemotron).

    source: the text of a `tokenizer.json`. eod_token: the name of the token that ends a document.
    Raises DataError when `source` is not a tokenizer, is not byte-level, or has no such token.
    """

    def __init__(self, source: str, eod_token: str | None = None, where: str = TOKENIZER_FILE):
        settings, self.backend = _parse(source, where)
        self.source = source
        self.eod_token, eod = _pick_eod(self.backend, eod_token, where)
        super().__init__(_byte_table(self.backend, settings, where), eod)
        canonical = json.dumps(settings, sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the begin or end tokens that the file may ask for."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @property
    def description(self) -> dict[str, str | int]:
        """Type, sizes, eod, and the hash of the file's content (its layout does not count)."""
        return {"type": "bpe", "sha256": self.fingerprint, "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, and the name of eod where Hugging Face keeps it."""
        _write(folder, TOKENIZER_FILE, self.source)
        _write(folder, TOKENIZER_CONFIG_FILE, json.dumps({"eos_token": self.eod_token}))


class StreamingDecoder:
    """Turns ids into text one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        return self.utf8.decode(self.tokenizer.bytes_of(token))

    def finish(self) -> str:
        """What is left: U+FFFD when the ids end inside a character, else nothing."""
        return self.utf8.decode(b"", final=True)


def load_tokenizer(spec: str | Path, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names: `byte`, a `tokenizer.json`, or a folder that holds one.

    eod_token: the token that ends a document; by default what `tokenizer_config.json` beside the file calls
    `eos_token`, else `<|endoftext|>` or `</s>`. Raises DataError when there is none, or nothing to load.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec) / TOKENIZER_FILE if Path(spec).is_dir() else Path(spec)
    if not path.is_file():
        raise DataError(
            f"no tokenizer at {path}. Legal: byte, a tokenizer.json, its folder{did_you_mean(str(spec), ['byte'])}"
        )
    source = read_utf8(path)
    if _json_object(source, str(path)).get("type") == "byte":
        return ByteTokenizer()
    return BpeTokenizer(source, eod_token or _configured_eod(path.with_name(TOKENIZER_CONFIG_FILE)), str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """A byte-level BPE of `vocab_size` ids learnt from `texts`, the same for the same texts.

    Id 0 is `<|endoftext|>`, ids 1 to 256 the bytes, the rest merges (Sennrich et al. 2016, with GPT-2's word
    splitting). No space is put in front, so any text round-trips. A short text may yield fewer ids than asked.
    Raises DataError when `vocab_size` has no room for every byte and eod.
    """
    if vocab_size < 257:
        raise DataError(f"a byte-level BPE of {vocab_size} ids has no room for 256 bytes and eod. Legal: 257 or more")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_CANDIDATES[0]],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BpeTokenizer(backend.to_str())


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]], eod_token: str | None = None) -> Tokenizer:
    """`bpe:SIZE` trained on `texts()`, or whatever else `load_tokenizer` knows. Raises DataError."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return load_tokenizer(spec, eod_token)
    if not size.isascii() or not size.isdecimal():
        raise DataError(f"tokenizer {spec!r} gives no size. Legal: bpe:SIZE, such as bpe:1024")
    return train_bpe(texts(), int(size))


def _parse(source: str, where: str) -> tuple[dict, tokenizers.Tokenizer]:
    settings = _json_object(source, where)
    try:
        backend = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{where} is not a tokenizer.json: {error}") from error
    # A file may carry the truncation and padding of fine-tuning, which would silently shorten documents.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells <|endoftext|> must not end a document
    return settings, backend


def _json_object(source: str, where: str) -> dict:
    try:
        content = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{where} holds no JSON object")
    return content


def _pick_eod(backend: tokenizers.Tokenizer, wanted: str | None, where: str) -> tuple[str, int]:
    """Name and id of the token that ends documents. It must be special, or a text could spell it."""
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    candidates = (wanted,) if wanted else EOD_CANDIDATES
    for name in candidates:
        if name in special:
            return name, special[name]
    raise DataError(
        f"{where} has no special token {' or '.join(map(repr, candidates))} to end documents with. "
        f"It has: {', '.join(sorted(special)) or 'none'}{did_you_mean(wanted or '', special)}"
    )


def _configured_eod(config: Path) -> str | None:
    """`eos_token` of a Hugging Face `tokenizer_config.json`: a name, or an object with the name in `content`."""
    if not config.is_file():
        return None
    name = _json_object(read_utf8(config), str(config)).get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return name if isinstance(name, str) else None


def _byte_table(backend: tokenizers.Tokenizer, settings: dict, where: str) -> list[bytes]:
    """The bytes of every id; empty for special tokens and for ids that the file leaves out."""
    if not _is_byte_level(settings):
        raise DataError(
            f"{where} is not byte-level, so text would not come back exactly. "
            "Legal: a tokenizer.json with a ByteLevel decoder (GPT-2, Llama 3, Qwen, Nemotron), bpe:SIZE, byte"
        )
    byte_of_char = _byte_of_char()
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    table = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if index not in added:
            table[index] = _bytes_of_token(token, byte_of_char)
        elif not added[index].special:
            table[index] = token.encode("utf-8")
    return table


def _bytes_of_token(token: str, byte_of_char: dict[str, int]) -> bytes:
    """As the library's ByteLevel decoder reads it: a token with a character that stands for no byte is plain text."""
    if all(char in byte_of_char for char in token):
        return bytes(byte_of_char[char] for char in token)
    return token.encode("utf-8")


def _is_byte_level(settings: dict) -> bool:
    decoder = settings.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is visible Latin-1, else the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + rank): value for rank, value in enumerate(hidden)}


def _write(folder: str | Path, name: str, text: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_bytes(text.encode("utf-8"))

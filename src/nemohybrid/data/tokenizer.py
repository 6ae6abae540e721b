"""The tokenizers there are: bytes, those of the Hugging Face library, SentencePiece models; trained and loaded."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers

from nemohybrid.data.sentence_pieces import SentencePieceTokenizer
from nemohybrid.data.text import read_utf8
from nemohybrid.data.token_tables import byte_table, prefix_in_front
from nemohybrid.data.tokenizer_base import MODEL_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, write_in
from nemohybrid.errors import DataError, did_you_mean

EOD_CANDIDATES = ("<|endoftext|>", "</s>")


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
        write_in(folder, TOKENIZER_FILE, b'{"type": "byte"}')


class BpeTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library: byte-level (GPT-2, Llama 3, Qwen, Nemotron), or made from a
    SentencePiece model (Llama 2, Mistral, Gemma).

    source: the text of a `tokenizer.json`. eod_token: the name of the token that ends a document.
    Raises DataError when `source` is not a tokenizer, is of another kind, or has no such token.
    """

    def __init__(self, source: str, eod_token: str | None = None, where: str = TOKENIZER_FILE):
        settings, self.backend = _parse(source, where)
        self.source = source
        self.eod_token, eod = _pick_eod(self.backend, eod_token, where)
        table = byte_table(self.backend, settings, where)
        super().__init__(
            table, eod, prefix_in_front(table, self.encode("a")), _unknown(self.backend, settings["model"], table)
        )
        canonical = json.dumps(settings, sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the begin or end tokens that the file may ask for."""
        # the fast one leaves out where each token stood in the text
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @property
    def description(self) -> dict[str, str | int]:
        """Type, sizes, eod, and the hash of the file's content (its layout does not count)."""
        return {"type": "bpe", "sha256": self.fingerprint, "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, and the name of eod where Hugging Face keeps it."""
        write_in(folder, TOKENIZER_FILE, self.source.encode("utf-8"))
        write_in(folder, TOKENIZER_CONFIG_FILE, json.dumps({"eos_token": self.eod_token}).encode("utf-8"))


class StreamingDecoder:
    """Turns the ids that follow a prompt into text one at a time, holding back the bytes of an unfinished character."""

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
    """The tokenizer that `spec` names: `byte`, a `tokenizer.json`, a SentencePiece `.model`, or a folder with either.

    eod_token: the token that ends a document; by default what `tokenizer_config.json` beside the file calls
    `eos_token`, else `<|endoftext|>` or `</s>`. Raises DataError when there is none, or nothing to load.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = _tokenizer_file(Path(spec))
    if not path.is_file():
        raise DataError(
            f"no tokenizer at {path}. Legal: byte, a tokenizer.json, a SentencePiece tokenizer.model, "
            f"the folder of one{did_you_mean(str(spec), ['byte'])}"
        )
    eod_token = eod_token or _configured_eod(path.with_name(TOKENIZER_CONFIG_FILE))
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), eod_token, str(path))
    source = read_utf8(path)
    if _json_object(source, str(path)).get("type") == "byte":
        return ByteTokenizer()
    return BpeTokenizer(source, eod_token, str(path))


def _tokenizer_file(path: Path) -> Path:
    """In a folder that holds both, as Hugging Face's often do, the `tokenizer.json`."""
    if not path.is_dir():
        return path
    model = path / MODEL_FILE
    return model if model.is_file() and not (path / TOKENIZER_FILE).is_file() else path / TOKENIZER_FILE


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


def _unknown(backend: tokenizers.Tokenizer, model: dict, table: Sequence[bytes]) -> int | None:
    """The id of what the model cannot spell; None when it can spell every byte (GPT-2 then names its eod there)."""
    if {bytes([value]) for value in range(256)} <= set(table):
        return None
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else backend.token_to_id(name)

"""SentencePiece models (Kudo & Richardson 2018): `tokenizer.model`, as the table of bytes that every tokenizer is here."""

import hashlib
import json
from pathlib import Path

import sentencepiece

from nemohybrid.data.token_tables import PROBES, piece_bytes, prefix_in_front
from nemohybrid.data.tokenizer_base import (
    MODEL_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    write_in,
)
from nemohybrid.errors import DataError, did_you_mean


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or BPE.

    model: the bytes of a `.model` file. eod_token: the control piece that ends a document; None: the model's `</s>`.
    A model that normalises text (NFKC, spaces dropped) encodes the normalised text; only that comes back.
    Raises DataError when `model` is no such file, has no such piece, or does not decode piece by piece.
    """

    def __init__(self, model: bytes, eod_token: str | None = None, where: str = MODEL_FILE):
        self.backend = _parse(model, where)
        self.model = model
        eod = _pick_eod(self.backend, eod_token, where)
        table = _table(self.backend)
        super().__init__(table, eod, prefix_in_front(table, self.encode("a")), self.backend.unk_id())
        self._check(where)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without begin or end."""
        return self.backend.encode(text, add_bos=False, add_eos=False)

    @property
    def description(self) -> dict[str, str | int]:
        """Type, sizes, eod, and the hash of the file."""
        digest = hashlib.sha256(self.model).hexdigest()
        return {"type": "sentencepiece", "sha256": digest, "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`, and the name of eod where Hugging Face keeps it."""
        write_in(folder, MODEL_FILE, self.model)
        eod_token = json.dumps({"eos_token": self.backend.id_to_piece(self.eod)})
        write_in(folder, TOKENIZER_CONFIG_FILE, eod_token.encode("utf-8"))
        (Path(folder) / TOKENIZER_FILE).unlink(missing_ok=True)  # of another tokenizer; it would be loaded instead

    def _check(self, where: str) -> None:
        """The table must say what the library says, wherever a text has ids for all of it."""
        for text in PROBES:
            ids = self.encode(text)
            if self.unknown not in ids and self.decode(ids) != self.backend.decode(ids):
                raise DataError(
                    f"{where} does not decode piece by piece (is it trained with treat_whitespace_as_suffix?): "
                    f"{text!r} comes back as {self.decode(ids)!r}. Legal: a model with spaces in front of words"
                )


def _parse(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    backend = sentencepiece.SentencePieceProcessor()
    try:
        backend.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(
            f"{where} is not a SentencePiece model: {error}. "
            "Llama 3 has a tokenizer.model of another kind: take its tokenizer.json"
        ) from None
    if backend.get_piece_size() == 0:
        raise DataError(f"{where} is not a SentencePiece model: it holds no pieces")
    return backend


def _pick_eod(backend: sentencepiece.SentencePieceProcessor, wanted: str | None, where: str) -> int:
    """The id that ends documents. It must be a control piece, or a text could spell it."""
    control = {backend.id_to_piece(i): i for i in range(backend.get_piece_size()) if backend.is_control(i)}
    name = wanted or (backend.id_to_piece(backend.eos_id()) if backend.eos_id() >= 0 else "</s>")
    if name not in control:
        raise DataError(
            f"{where} has no control piece {name!r} to end documents with. "
            f"It has: {', '.join(sorted(control)) or 'none'}{did_you_mean(name, control)}"
        )
    return control[name]


def _table(backend: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """The bytes of every piece; none for control pieces, unused ones, and the one for unknown text."""
    silent = (backend.is_control, backend.is_unknown, backend.is_unused)
    return [
        b"" if any(test(index) for test in silent) else piece_bytes(backend.id_to_piece(index))
        for index in range(backend.get_piece_size())
    ]

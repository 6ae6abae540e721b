"""The bytes that each id of a `tokenizer.json` stands for: byte-level files, and those made from SentencePiece models."""

import re

import tokenizers

from nemohybrid.errors import DataError

SPACE = "\u2581"  # SentencePiece's visible stand-in for a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Where two ways to decode would differ: spaces in front, doubled and behind; bytes; characters in no vocabulary.
PROBES = ("a", " a", "a  b ", "Hello, world! It's 12.5", "é😀\n\tb", "don 't", SPACE, "<0x41>")


def byte_table(backend: tokenizers.Tokenizer, settings: dict, where: str) -> list[bytes]:
    """The bytes of every id; empty for special tokens and for ids that the file leaves out.

    Raises DataError when ids of the file do not stand for fixed bytes (WordPiece and others).
    """
    decoders = _decoder_types(settings)
    if "ByteLevel" in decoders:
        return _byte_level_table(backend)
    if decoders & {"Metaspace", "Replace"} and decoders <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        table = _piece_table(backend)
        if _decodes_alike(backend, table):
            return table
    raise DataError(
        f"{where} is not byte-level and not made from SentencePiece, so text would not come back exactly. Legal: a "
        "tokenizer.json with a ByteLevel decoder (GPT-2, Llama 3, Qwen, Nemotron) or with pieces and ByteFallback "
        "(Llama 2, Mistral, Gemma), a SentencePiece tokenizer.model, bpe:SIZE, byte"
    )


def piece_bytes(piece: str) -> bytes:
    """The bytes of an ordinary piece of SentencePiece: `<0x0A>` is one byte, a lower block is a space."""
    match = BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode("utf-8")


def prefix_in_front(table: list[bytes], ids_of_a: list[int]) -> bytes:
    """What a tokenizer puts in front of a text, given its ids of the text `a`: a space, or nothing."""
    return b" " if b"".join(table[index] for index in ids_of_a).startswith(b" ") else b""


def _decoder_types(settings: dict) -> set[str]:
    decoder = settings.get("decoder") or {}
    return {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}


def _byte_level_table(backend: tokenizers.Tokenizer) -> list[bytes]:
    byte_of_char = byte_level_alphabet()
    return _table(backend, lambda token: _bytes_of_token(token, byte_of_char), str.encode)


def _piece_table(backend: tokenizers.Tokenizer) -> list[bytes]:
    return _table(backend, piece_bytes, piece_bytes)


def _table(backend: tokenizers.Tokenizer, bytes_of_token, bytes_of_added) -> list[bytes]:
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    table = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if index not in added:
            table[index] = bytes_of_token(token)
        elif not added[index].special:
            table[index] = bytes_of_added(token)
    return table


def _decodes_alike(backend: tokenizers.Tokenizer, table: list[bytes]) -> bool:
    """Whether the table gives what the library gives, but for one space that the tokenizer itself put in front."""
    prefix = prefix_in_front(table, _ids(backend, "a"))
    return all(
        b"".join(table[index] for index in _ids(backend, text)).removeprefix(prefix).decode("utf-8", errors="replace")
        == backend.decode(_ids(backend, text), skip_special_tokens=True)
        for text in PROBES
    )


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _bytes_of_token(token: str, byte_of_char: dict[str, int]) -> bytes:
    """As the library's ByteLevel decoder reads it: a token with a character that stands for no byte is plain text."""
    if all(char in byte_of_char for char in token):
        return bytes(byte_of_char[char] for char in token)
    return token.encode("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is visible Latin-1, else the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + rank): value for rank, value in enumerate(hidden)}

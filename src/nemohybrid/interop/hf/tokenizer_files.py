"""Tokenizer files that transformers' `AutoTokenizer` reads, and back."""

import json
from functools import cache
from pathlib import Path

import tokenizers

from nemohybrid.data.sentence_pieces import SentencePieceTokenizer
from nemohybrid.data.token_tables import byte_level_alphabet
from nemohybrid.data.tokenizer import EOD_CANDIDATES, BpeTokenizer, ByteTokenizer, load_tokenizer
from nemohybrid.data.tokenizer_base import (
    MODEL_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
)

FAST = "PreTrainedTokenizerFast"
"""The class of transformers that reads any `tokenizer.json`, by the name that old and new releases know."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` or `tokenizer.model`, and its config: what `read_tokenizer` and `AutoTokenizer` read.

    Ids are the same there for a `tokenizer.json`. A SentencePiece model is carried along as it is; transformers makes its
    own tokenizer of it, which may cut a text differently.
    """
    (bytes_as_bpe() if isinstance(tokenizer, ByteTokenizer) else tokenizer).save(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    settings = {**json.loads(path.read_text("utf-8")), "clean_up_tokenization_spaces": False}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        settings["tokenizer_class"] = FAST
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read_tokenizer(folder: Path, eod_token: str | None = None) -> Tokenizer | None:
    """The tokenizer in a Hugging Face folder; None where there is none. Raises DataError for one that we cannot use."""
    if not any((folder / name).is_file() for name in (TOKENIZER_FILE, MODEL_FILE)):
        return None
    tokenizer = load_tokenizer(folder, eod_token)
    return ByteTokenizer() if _is_bytes(tokenizer) else tokenizer


def _is_bytes(tokenizer: Tokenizer) -> bool:
    """Whether its ids are bytes: ours came back."""
    alone = ByteTokenizer()
    is_bpe = isinstance(tokenizer, BpeTokenizer) and tokenizer.backend.normalizer is None
    return is_bpe and (tokenizer.table, tokenizer.eod) == (alone.table, alone.eod)


@cache
def bytes_as_bpe() -> BpeTokenizer:
    """The byte tokenizer in the form that others know: a byte-level BPE without merges, with the same ids."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_level_alphabet(), []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([EOD_CANDIDATES[0]])
    return BpeTokenizer(backend.to_str())

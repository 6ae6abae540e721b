"""Sizes that were not given, from those that were. Overriding `model.hidden_size` alone is therefore always legal."""

import json
from pathlib import Path

from nemohybrid.config.environment import DataSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig

BYTE_VOCABULARY = 257  # 256 bytes, and the end of a document


def derive_vocabulary(config: RunConfig) -> None:
    """Fill an empty `model.vocab_size` in place from the tokenizer, where something is known of one."""
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer_vocabulary(config.data)


def tokenizer_vocabulary(data: DataSection) -> int | None:
    """Token ids of the tokenizer that `data` names, as far as its name, its file or the corpus says."""
    kind, _, size = (data.tokenizer or "").partition(":")
    if kind == "byte":
        return BYTE_VOCABULARY
    if kind == "bpe" and size.isdecimal():
        return int(size)
    if data.bundled:
        return BYTE_VOCABULARY if data.tokenizer is None else _vocabulary_of_file(Path(data.tokenizer))
    if data.tokenizer:
        return _vocabulary_of_file(Path(data.tokenizer))
    known = (_vocabulary_of_corpus(prefix) for prefix in data.corpora)
    return next((ids for ids in known if ids is not None), None)


def _vocabulary_of_corpus(prefix: str) -> int | None:
    """What `data prepare` wrote beside the corpus; None where another program made it and no tokenizer lies there."""
    try:
        return int(json.loads(Path(f"{prefix}.json").read_text())["tokenizer"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return _vocabulary_of_file(Path(f"{prefix}.tokenizer"))


def _vocabulary_of_file(path: Path) -> int | None:
    """Ids of a `tokenizer.json` or SentencePiece model, or of the folder of one; None where it cannot be read."""
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        return _vocabulary_of_file(found[0]) if found else None
    try:
        return _ids_of_sentence_pieces(path) if path.suffix == ".model" else _ids_of_json(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None  # whoever loads it says what is wrong with it


def _ids_of_json(path: Path) -> int:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("type") == "byte":
        return BYTE_VOCABULARY
    vocabulary = content["model"]["vocab"]  # text -> id; of a unigram model a list
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])


def _ids_of_sentence_pieces(path: Path) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def derive_sizes(model: ModelConfig) -> None:
    """Fill every empty size of `model` in place.

    The proportions are those of the published hybrids: Mamba-2 inner width twice the hidden size, squared-ReLU MLPs four
    times, several query heads to a key/value head.
    """
    hidden = model.hidden_size
    if model.vocab_size is None:
        model.vocab_size = BYTE_VOCABULARY
    if model.head_dim is None:
        model.head_dim = _head_dim(hidden)
    if model.num_attention_heads is None:
        model.num_attention_heads = max(2, 2 * (hidden // (2 * model.head_dim)))
    if model.num_query_groups is None:
        model.num_query_groups = _query_groups(model.num_attention_heads)
    if model.mamba_head_dim is None:
        model.mamba_head_dim = _head_dim(hidden)
    if model.mamba_num_heads is None:
        groups = model.mamba_num_groups
        model.mamba_num_heads = groups * max(1, round(2 * hidden / (model.mamba_head_dim * groups)))
    if model.ffn_hidden_size is None:
        model.ffn_hidden_size = 4 * hidden
    _derive_experts(model)


def _derive_experts(model: ModelConfig) -> None:
    if model.moe_ffn_hidden_size is None:
        model.moe_ffn_hidden_size = model.hidden_size
    if model.shared_expert_ffn_hidden_size is None:
        model.shared_expert_ffn_hidden_size = 2 * model.moe_ffn_hidden_size


def _head_dim(hidden: int) -> int:
    """32 for toys, 64 for small models, 128 from width 2048 on, as published."""
    return 32 if hidden < 512 else 64 if hidden < 2048 else 128


def _query_groups(heads: int) -> int:
    """Two key/value heads where the query heads divide by them: the least that tensor parallelism can still cut."""
    return 2 if heads % 2 == 0 else 1

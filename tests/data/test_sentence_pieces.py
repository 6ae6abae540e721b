"""SentencePiece models, and the `tokenizer.json` files that are made from them."""

import functools
import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import prepare, write_corpus
from nemohybrid.data.sentence_pieces import SentencePieceTokenizer
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import BpeTokenizer, StreamingDecoder, Tokenizer, load_tokenizer, train_bpe
from nemohybrid.data.validation import ValidationStream
from nemohybrid.errors import DataError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 5
LIKE_LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
LIKE_GEMMA = LIKE_LLAMA | {"add_dummy_prefix": False}
LIKE_T5 = {"model_type": "unigram", "vocab_size": 40}
SPACE = "\u2581"


@functools.cache
def model_of(**settings_of_training) -> bytes:
    writer = io.BytesIO()
    given_settings = {"vocab_size": 300, "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=writer, **(given_settings | settings_of_training)
    )
    return writer.getvalue()


def hugging_face(prefix: bool, decoders: list | None = None) -> str:
    """The `tokenizer.json` that a SentencePiece BPE like Llama 2's (prefix) or Gemma's becomes."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_of(**LIKE_LLAMA))
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    pairs = [(a, token[len(a) :]) for token in vocab for a in vocab if token[len(a) :] in vocab and token.startswith(a)]
    merges = sorted(pairs, key=lambda pair: vocab["".join(pair)])
    model = tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", SPACE)
    prepend = [tokenizers.normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = tokenizers.normalizers.Sequence([*prepend, replace])
    kinds = tokenizers.decoders
    strip = [kinds.Strip(" ", 1, 0)] if prefix else []
    chosen = decoders or [kinds.Replace(SPACE, " "), kinds.ByteFallback(), kinds.Fuse(), *strip]
    backend.decoder = kinds.Sequence(chosen)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend.to_str()


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return {
        "llama": lambda: SentencePieceTokenizer(model_of(**LIKE_LLAMA)),
        "gemma": lambda: SentencePieceTokenizer(model_of(**LIKE_GEMMA)),
        "llama json": lambda: BpeTokenizer(hugging_face(prefix=True)),
        "gemma json": lambda: BpeTokenizer(hugging_face(prefix=False)),
    }[kind]()


LOSSLESS = ["llama", "gemma", "llama json", "gemma json"]


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(derandomize=True, max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet=" \n\t\r'be</s>0xA\0\u2028\ufffdé\U0001f600", max_size=40))
def test_any_text_round_trips_with_its_bytes_counted(kind, text):
    text = text.replace(SPACE, "_")  # the one character that is not itself: it stands for a space
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    prefix = len(tokenizer.document_prefix) if ids else 0
    assert tokenizer.decode(ids) == text, f"{kind}: text did not come back"
    assert tokenizer.token_bytes()[ids].sum() - prefix == len(text.encode()), f"{kind}: bytes are not those of the text"
    assert tokenizer.eod not in ids, f"{kind}: text produced the end of a document"


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", ["</s>", "<s> to be </s>", "<unk>", "<0x41>"])
def test_text_that_spells_a_control_token_gets_ordinary_ids(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids), "an id of <unk>, <s> or </s>"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind, prefix", [("llama", b" "), ("gemma", b""), ("llama json", b" "), ("gemma json", b"")])
def test_the_space_in_front_of_a_document_is_known_and_goes_once(kind, prefix):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.document_prefix == prefix
    assert tokenizer.decode(tokenizer.encode("  two")) == "  two"
    words = [tokenizer.encode(" to")[-1]]
    assert tokenizer.decode_continuation(words) == tokenizer.bytes_of(words[0]).decode()
    stream = StreamingDecoder(tokenizer)
    streamed = "".join(map(stream.push, tokenizer.encode("é to"))) + stream.finish()
    assert streamed == prefix.decode() + "é to", "a stream goes on after a prompt: its first space is a space"


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_of_a_held_out_text_are_those_of_the_text(kind, tmp_path):
    tokenizer, texts = tokenizer_of(kind), ["to be", "or", " not", "\n", "to be é"]
    write_corpus([Document(text, 1, 1) for text in texts], tmp_path / "c", tokenizer, [])
    tables = {"token_bytes": tokenizer.token_bytes(), "prefix_bytes": tokenizer.prefix_bytes()}
    stream = ValidationStream(Corpus(tmp_path / "c"), 64, eod=tokenizer.eod, **tables)
    first = len(tokenizer.bytes_of(tokenizer.encode(texts[0])[0]).removeprefix(tokenizer.document_prefix))
    scored = sum(batch.scored_bytes for batch in stream.batches(1))
    assert scored == sum(len(text.encode()) for text in texts) - first, "the first token of all is never predicted"


def test_a_json_and_the_model_it_was_made_from_give_the_same_ids():
    for text in (TEXT, " be  to\n", "é\U0001f600"):
        assert tokenizer_of("llama json").encode(text) == tokenizer_of("llama").encode(text)


def test_a_model_that_normalises_gives_back_the_normalised_text():
    tokenizer = SentencePieceTokenizer(model_of(**LIKE_T5))
    assert tokenizer.decode(tokenizer.encode("  to \n be\ufb01 ")) == "to befi"
    assert tokenizer.decode(tokenizer.encode("\n")) == ""


def test_unknown_text_is_counted(tmp_path):
    tokenizer = SentencePieceTokenizer(model_of(**LIKE_T5))
    (tmp_path / "a.txt").write_text("to \U0001f600 be \u4e2d", encoding="utf-8")
    info = prepare([tmp_path / "a.txt"], tmp_path / "c", tokenizer).info
    assert info.unknown_tokens == 2
    assert tokenizer.bytes_of(tokenizer.unknown or 0) == b""


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_saved_tokenizer_comes_back_equal_and_replaces_another(kind, tmp_path):
    train_bpe([TEXT], 300).save(tmp_path / "run")
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.description == tokenizer.description
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    train_bpe([TEXT], 300).save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").description == train_bpe([TEXT], 300).description


def test_descriptions_tell_models_apart():
    descriptions = {json.dumps(tokenizer_of(kind).description) for kind in LOSSLESS}
    assert len(descriptions) == 4
    assert tokenizer_of("llama").description["type"] == "sentencepiece"


def test_a_model_file_and_a_folder_of_hugging_face_are_loaded(tmp_path):
    (tmp_path / "some.model").write_bytes(model_of(**LIKE_LLAMA))
    assert load_tokenizer(tmp_path / "some.model").description == tokenizer_of("llama").description
    (tmp_path / "tokenizer.model").write_bytes(model_of(**LIKE_LLAMA))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert load_tokenizer(tmp_path).eod == 1


def test_eod_is_a_control_piece_that_text_cannot_spell(tmp_path):
    (tmp_path / "a.model").write_bytes(model_of(**LIKE_LLAMA, user_defined_symbols="<sep>", control_symbols="<end>"))
    tokenizer = load_tokenizer(tmp_path / "a.model", "<end>")
    assert tokenizer.decode([*tokenizer.encode("to<sep><end>"), tokenizer.eod]) == "to<sep><end>"
    with pytest.raises(DataError, match=r"no control piece '<sep>'.*It has: </s>, <end>, <s>"):
        load_tokenizer(tmp_path / "a.model", "<sep>")
    with pytest.raises(DataError, match="Did you mean '<end>'"):
        load_tokenizer(tmp_path / "a.model", "<ends>")


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00" * 50], ids=["empty", "tiktoken", "zeros"])
def test_a_file_that_is_no_model_is_named(content, tmp_path, capfd):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_model_with_spaces_behind_words_is_refused():
    with pytest.raises(DataError, match="does not decode piece by piece"):
        SentencePieceTokenizer(model_of(**LIKE_LLAMA, treat_whitespace_as_suffix=True))


@pytest.mark.parametrize(
    "decoders",
    [
        [tokenizers.decoders.WordPiece()],
        [tokenizers.decoders.Replace(SPACE, "_"), tokenizers.decoders.Fuse()],
        [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip("e", 1, 1)],
    ],
    ids=["word pieces", "another replacement", "stripped"],
)
def test_a_json_that_does_not_decode_piece_by_piece_is_refused(decoders):
    with pytest.raises(DataError, match=r"not byte-level and not made from SentencePiece.*Legal"):
        BpeTokenizer(hugging_face(prefix=True, decoders=decoders))


@pytest.mark.parametrize("kind", ["llama", "llama json"])
def test_a_corpus_and_its_tokenizer_decode_to_the_text(kind, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " to be\\n"}\n{"text": "or \U0001f600"}\n', encoding="utf-8")
    prepare([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer_of(kind))
    corpus, tokenizer = Corpus(tmp_path / "c"), load_tokenizer(f"{tmp_path}/c.tokenizer")
    corpus.check_tokenizer(tokenizer)
    assert [tokenizer.decode(corpus.tokens(number).tolist()) for number in range(2)] == [" to be\n", "or \U0001f600"]

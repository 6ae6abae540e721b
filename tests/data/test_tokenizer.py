import functools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    StreamingDecoder,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from nemohybrid.errors import DataError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 5
KINDS = ["byte", "bpe"]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else train_bpe([TEXT], 302)


def edited_bpe(edit) -> str:
    """The tokenizer.json of the BPE above after `edit` of its content."""
    content = json.loads(train_bpe([TEXT], 302).source)
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet=" \n\t\r'se<|endoftext|>\u2028\ufffdé\U0001f600", max_size=60))
def test_any_text_round_trips_with_its_bytes_counted(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, f"{kind}: text did not come back"
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode()), (
        f"{kind}: bytes of the ids are not those of the text"
    )
    assert tokenizer.eod not in ids, f"{kind}: text produced the end of a document"


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_streaming_gives_the_same_text_as_decoding_at_once(kind, ids):
    tokenizer = tokenizer_of(kind)
    stream = StreamingDecoder(tokenizer)
    streamed = "".join(stream.push(token) for token in ids) + stream.finish()
    assert streamed == tokenizer.decode(ids)


def test_streaming_never_prints_half_a_character():
    stream = StreamingDecoder(ByteTokenizer())
    assert [stream.push(byte) for byte in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_eod_stands_for_no_bytes(kind):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod]) == "a"
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_refused(kind):
    tokenizer = tokenizer_of(kind)
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {token} .*Legal: 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([token])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_comes_back_equal(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path / "run")
    for spec in (tmp_path / "run", tmp_path / "run" / "tokenizer.json"):
        loaded = load_tokenizer(spec)
        assert loaded.description == tokenizer.description
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_bpe_has_eod_first_and_exactly_the_size_asked_for():
    tokenizer = train_bpe([TEXT], 300)
    assert (tokenizer.eod, tokenizer.vocab_size) == (0, 300)
    assert tokenizer.encode(" to be") != tokenizer.encode("to be"), "a space was put in front"


def test_descriptions_tell_tokenizers_apart():
    descriptions = [tokenizer_of("byte").description, tokenizer_of("bpe").description]
    descriptions.append(train_bpe([TEXT[::-1]], 302).description)
    assert len({json.dumps(description) for description in descriptions}) == 3


def test_truncation_and_padding_in_the_file_do_not_touch_documents():
    def for_fine_tuning(content):
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    assert BpeTokenizer(edited_bpe(for_fine_tuning)).encode(TEXT) == tokenizer_of("bpe").encode(TEXT)


def test_an_explicit_eod_token_is_used_and_saved(tmp_path):
    def rename(content):
        content["added_tokens"][0]["content"] = "<|end|>"
        content["model"]["vocab"]["<|end|>"] = content["model"]["vocab"].pop("<|endoftext|>")

    (tmp_path / "tokenizer.json").write_text(edited_bpe(rename))
    with pytest.raises(DataError, match=r"no special token '<\|endoftext\|>' or '</s>'.*It has: <\|end\|>"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"Did you mean '<\|end\|>'"):
        load_tokenizer(tmp_path, eod_token="<|ends|>")
    load_tokenizer(tmp_path, eod_token="<|end|>").save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").description == load_tokenizer(tmp_path, "<|end|>").description


def test_the_eos_token_of_a_hugging_face_folder_ends_documents(tmp_path):
    def add(content):
        token = dict(content["added_tokens"][0], id=302, content="<|eot|>")
        content["added_tokens"].append(token)

    (tmp_path / "tokenizer.json").write_text(edited_bpe(add))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eot|>"}}))
    assert load_tokenizer(tmp_path).eod == tokenizer_of("bpe").vocab_size == 302
    assert load_tokenizer(tmp_path).vocab_size == 303


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"not byte-level.*Legal:"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [("{", "not JSON"), ("[" * 10_000, "not JSON"), ("[]", "no JSON object"), ('{"model": 1}', "not a tokenizer.json")],
    ids=["half", "deep", "list", "other"],
)
def test_a_file_that_is_no_tokenizer_is_named(content, message, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError, match=f"tokenizer.json .*{message}|{message}"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("bpe:256", "Legal: 257 or more"),
        ("bpe:big", "Legal: bpe:SIZE"),
        ("bpe:²", "Legal: bpe:SIZE"),
        ("bpe", "Legal: bpe:SIZE"),
        ("bytes", "Did you mean 'byte'"),
        ("absent/tokenizer.json", "Legal: byte, a tokenizer.json"),
    ],
)
def test_a_wrong_spec_names_the_legal_ones(spec, message):
    with pytest.raises(DataError, match=message):
        make_tokenizer(spec, lambda: [TEXT])

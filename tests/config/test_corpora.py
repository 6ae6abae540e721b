"""`data.train`, `data.valid` and `data.split`: one corpus or several, from a shell and from a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemohybrid.config.compose import compose_raw, finish, load_config
from nemohybrid.config.groups import configs_dir
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml, read_config_yaml
from nemohybrid.data.tokenizer import load_tokenizer, train_bpe
from nemohybrid.errors import ConfigError


@pytest.fixture
def corpora(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with the empty files of four corpora below `c/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    for name in ("web", "code", "web_valid", "code_valid"):
        for end in (".bin", ".idx"):
            (tmp_path / "c" / f"{name}{end}").touch()
    return tmp_path


@pytest.fixture
def load(corpora) -> Callable[..., RunConfig]:
    return lambda *overrides: load_config(["model=tiny", "data.train=c/web", *overrides])


@pytest.fixture
def refused(load) -> Callable[..., str]:
    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*overrides)
        return str(caught.value)

    return message


BLEND = "data.train={c/web: 0.7, c/code: 0.3}"
SETS = "data.valid={web: c/web_valid, code: c/code_valid}"


def test_a_blend_and_named_sets_are_read_from_a_shell_word(load):
    data = load(BLEND, SETS).data
    assert dict(data.corpora) == {"c/web": 0.7, "c/code": 0.3}
    assert dict(data.valid_sets) == {"web": "c/web_valid", "code": "c/code_valid"}


def test_one_corpus_is_a_blend_of_one_and_a_set_without_a_name(load):
    data = load("data.valid=c/web_valid").data
    assert (dict(data.corpora), dict(data.valid_sets)) == ({"c/web": 1.0}, {"": "c/web_valid"})


def test_a_blend_is_read_from_a_group_file(corpora):
    configs = corpora / "configs"
    shutil.copytree(configs_dir(), configs)
    lines = ["train:", "  c/web: 7", "  c/code: 3", "valid: {web: c/web_valid}"]
    (configs / "data" / "mine.yaml").write_text("\n".join(lines))
    data = finish(compose_raw(["model=tiny", "data=mine"], configs), 1).data
    assert dict(data.corpora) == {"c/web": 7, "c/code": 3}
    assert dict(data.valid_sets) == {"web": "c/web_valid"}


def test_a_mapping_over_that_of_a_file_changes_weights_and_replaces_it_only_where_it_is_emptied_first(corpora):
    """As Hydra does with every mapping; the documentation says so."""
    configs = corpora / "configs"
    shutil.copytree(configs_dir(), configs)
    (configs / "data" / "mine.yaml").write_text("train: {c/web: 7, c/code: 3}")

    def blend(*overrides: str) -> dict:
        return dict(finish(compose_raw(["model=tiny", "data=mine", *overrides], configs), 1).data.corpora)

    assert blend("data.train={c/web: 5}") == {"c/web": 5, "c/code": 3}
    assert blend("data.train=null", "data.train={c/web_valid: 1}") == {"c/web_valid": 1}
    assert blend("data.train=c/web") == {"c/web": 1}
    with pytest.raises(ConfigError, match=r"use \+data\.train="):
        blend("data.train={c/web_valid: 1}")


def test_a_frozen_blend_cannot_be_changed(load):
    data = load(BLEND).data
    with pytest.raises(TypeError):
        data.train["c/web"] = 1  # pyright: ignore[reportIndexIssue]


def test_a_blend_survives_its_file_and_can_be_put_into_json(load, corpora):
    config = load(BLEND, SETS)
    (corpora / "config.yaml").write_text(config_yaml(config))
    again = read_config_yaml(corpora / "config.yaml")
    assert (again.as_dict(), again.digest()) == (config.as_dict(), config.digest())
    assert list(again.data.corpora) == ["c/web", "c/code"], "their order is part of the run"
    assert json.loads(json.dumps(config.as_dict()))["data"]["train"] == {"c/web": 0.7, "c/code": 0.3}
    OmegaConf.create(config.as_dict())


def test_ranks_with_the_corpora_in_another_order_do_not_train_together(load):
    assert load(BLEND).digest() != load("data.train={c/code: 0.3, c/web: 0.7}").digest()


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan", "true", "much", "null", "[1]"])
def test_a_weight_that_is_no_positive_number_is_refused(refused, weight):
    assert "the weight of c/code is" in refused(f"data.train={{c/web: 1, c/code: {weight}}}")


@pytest.mark.parametrize(
    "override, why",
    [
        ("data.train={}", "names no corpus"),
        ("data.train=[c/web]", "neither a prefix, or {prefix: weight, ...}"),
        ("data.train=3", "neither a prefix"),
        ("data.train={7: 1}", "the prefix 7 is no text"),
        ("data.train={c/web: 1, ./c/web: 2}", "c/web and ./c/web are the same corpus"),
        ("data.train={c/web: 1, c/cod: 2}", "c/cod.bin and c/cod.idx not found. Legal: data.train=c/code, "),
        ("data.train.web=1", "nothing inside"),
        ("data.valid={}", "names no corpus"),
        ("data.valid={a b: c/web}", "the name 'a b' is not made of letters"),
        ("data.valid={a/b: c/web}", "the name 'a/b' is not made of letters"),
        ("data.valid={a: 0.5}", "a is 0.5, not a prefix"),
        ("data.valid={a: c/web_valid, b: c//web_valid}", "are the same corpus"),
        ("data.split=98,1,1", "key=[value1,value2]"),
        ('data.split="98,1,1"', "a list of numbers"),
        ("data.split=[0,1]", "the first above 0"),
        ("data.split=[1,-1]", "none below"),
        ("data.split=[1,inf]", "is no split"),
        ("data.split=[1,1,1,1]", "one to three"),
    ],
)
def test_what_is_no_choice_of_corpora_is_refused(refused, override, why):
    assert why in refused(override), refused(override)


def test_everything_wrong_with_corpora_is_listed_at_once(refused):
    message = refused("data.train={a: -1, b: x}", "data.valid={a b: c}", "data.split=[1,-2]")
    for words in ("weight of a is -1", "weight of b is 'x'", "name 'a b'", "data.split=[1, -2]"):
        assert words in message, message
    assert message.startswith("3 problems"), message


def test_a_split_is_instead_of_validation_corpora_and_not_for_the_bundled_text(load, refused):
    assert load("data.split=[98,1,1]", "train.evaluate_every=5").data.has_validation
    assert "not both" in refused("data.split=[98,1,1]", "data.valid=c/web_valid")
    assert "no validation data" in refused("data.split=[98,0,2]", "train.evaluate_every=5")
    with pytest.raises(ConfigError, match="its own held-out play"):
        load_config(["data=shakespeare", "data.split=[98,2]"])


@pytest.mark.parametrize("word", ["experiment=quickstrat", "data=shakspeare", "data.train=3", "data.bundeld=x"])
def test_a_refused_word_about_data_is_not_also_reported_as_absent_data(corpora, word):
    with pytest.raises(ConfigError) as caught:
        load_config(["model=tiny", "train.evaluate_every=5", word])
    assert str(caught.value).startswith("1 problem "), caught.value


def test_the_vocabulary_comes_from_the_first_corpus_that_knows_its_tokenizer(load, corpora):
    (corpora / "c" / "code.json").write_text('{"tokenizer": {"vocab_size": 4321}}')
    assert load(BLEND).model.vocab_size == 4321


def test_an_empty_vocabulary_is_that_of_a_tokenizer_file(tmp_path):
    """A corpus of Megatron's own tools has no record that would say it."""
    prefix = tmp_path / "mg"
    for end in (".bin", ".idx"):
        prefix.with_suffix(end).write_bytes(b"")
    train_bpe(["to be or not to be"], 270).save(tmp_path / "tokenizer")
    size = load_tokenizer(tmp_path / "tokenizer").vocab_size
    for spec in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.json"):
        config = load_config(["model=tiny", f"data.train={prefix}", f"data.tokenizer={spec}"])
        assert config.model.vocab_size == size
    train_bpe(["to be or not to be"], 270).save(tmp_path / "mg.tokenizer")
    assert load_config(["model=tiny", f"data.train={prefix}"]).model.vocab_size == size

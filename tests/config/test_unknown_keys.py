"""Nothing that is not a key gets into a run, however it is written."""

import random
import shutil

import pytest

from nemohybrid.config.check import find_field
from nemohybrid.config.compose import compose_raw, finish
from nemohybrid.config.groups import configs_dir
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.errors import ConfigError

LEAVES = [path for path, _, _ in leaves(RunConfig())]


def one_edit_away(word: str) -> set[str]:
    """`word` with a letter deleted, doubled, or swapped with the next; never empty, never `word` itself."""
    deleted = {word[:i] + word[i + 1 :] for i in range(len(word))}
    doubled = {word[:i] + word[i] + word[i:] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return {edited for edited in deleted | doubled | swapped if edited not in ("", word)}


@pytest.mark.parametrize("path", LEAVES)
def test_every_key_with_one_edit_is_refused_and_the_true_key_suggested(path):
    parent, _, name = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for edited in one_edit_away(name):
        field, _, complaint = find_field(RunConfig, prefix + edited)
        assert field is None, f"{prefix}{edited} passes for a key"
        assert f"'{path}'" in complaint or name in complaint.partition("Keys here")[2], f"{prefix}{edited}: {complaint}"


@pytest.mark.parametrize("section", sorted({path.split(".")[0] for path in LEAVES if "." in path}))
def test_every_section_with_one_edit_is_refused_and_the_true_section_suggested(section):
    inside = next(path for path in LEAVES if path.startswith(f"{section}."))
    for edited in one_edit_away(section):
        _, _, complaint = find_field(RunConfig, inside.replace(section, edited, 1))
        assert f"'{section}'" in complaint, f"{edited}: {complaint}"


@pytest.mark.parametrize("form", ["{}=1", "+{}=1", "++{}=1", "~{}"])
@pytest.mark.parametrize("key, meant", [("model.hiden_size", "model.hidden_size"), ("train.stpes", "train.steps")])
def test_a_misspelt_key_fails_with_a_suggestion_in_every_override_form(complaint, form, key, meant):
    message = complaint(form.format(key))
    assert f"'{meant}'" in message, message
    assert form.format(key) in message, "the override itself is not shown"


def test_fifty_misspellings_are_all_listed_in_one_error(complaint):
    pick, wrong = random.Random(0), []
    for path in pick.sample([path for path in LEAVES if "." in path], 50):
        parent, _, name = path.rpartition(".")
        wrong.append(f"{parent}.{pick.choice(sorted(one_edit_away(name)))}=1")
    message = complaint(*wrong)
    assert [word for word in wrong if word not in message] == [], "not listed"


def test_an_unknown_key_inside_a_dictionary_value_is_refused_with_a_suggestion(complaint):
    assert "'model.router.groups'" in complaint("model.router={grops: 2}")


def test_a_dictionary_value_of_known_keys_is_taken(compose):
    assert compose("model.router={groups: 2}").model.router.groups == 2


@pytest.mark.parametrize("line", ["hiden_size: 64", "router:\n  grops: 2", "_target_: os.system"])
def test_an_unknown_key_inside_a_group_file_is_refused(tmp_path, line):
    configs = tmp_path / "configs"
    shutil.copytree(configs_dir(), configs)
    (configs / "model" / "mine.yaml").write_text(f"name: mine\n{line}\n")
    with pytest.raises(ConfigError, match=line.split(":")[0] if "router" not in line else "grops"):
        finish(compose_raw(["model=mine", "data=shakespeare"], configs), 1)


@pytest.mark.parametrize("override", ["model=tny", "modle=tiny", "experiment=quickstrat", "optim/adamw=x"])
def test_an_unknown_group_or_option_is_refused(complaint, override):
    assert override in complaint(override)


def test_an_unknown_option_names_the_nearest_and_all_others(complaint):
    message = complaint("model=tny")
    assert "'tiny'" in message
    assert "nemotron_h_8b" in message


@pytest.mark.parametrize("form", ["{}", "+{}", "++{}"])
def test_target_is_refused_and_nothing_is_called(complaint, tmp_path, form):
    sentinel = tmp_path / "sentinel"
    message = complaint(form.format("optim._target_=os.mkdir"), f"+optim._args_=['{sentinel}']")
    assert "_target_" in message
    assert not sentinel.exists(), "a configuration ran code"

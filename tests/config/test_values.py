"""Types, bounds, and what a finished configuration promises."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import Section, leaves
from nemohybrid.config.yaml import config_yaml, read_config_yaml


@pytest.mark.parametrize(
    "override, why",
    [
        ("train.steps=ten", "a whole number"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps=null", "a whole number"),
        ("optim.lr=fast", "a number"),
        ("optim.lr=nan", "finite"),
        ("optim.lr=inf", "finite"),
        ("optim.lr=-1", "at least 0"),
        ("optim.beta1=1.5", "at most 1"),
        ("train.global_batch=0", "at least 1"),
        ("model.tie_embeddings=3", "true or false"),
        ("model.dtype=fp16", "float32, bfloat16"),
        ("model.dtype=bfloat", "'bfloat16'"),
        ("schedule.name=1", "wsd, cosine, constant"),
        ("sample.prompts=ROMEO", "a list of texts"),
        ("model.dt_limit=[0,x]", "a list of numbers"),
        ("train.batch_ramp=3", "is a section"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(complaint, override, why):
    message = complaint(override)
    assert override in message, message
    assert why in message, message


def test_everything_wrong_is_listed_at_once(complaint):
    wrong = {
        "train.stpes=1": "'train.steps'",
        "optim.lr=abc": "a number",
        "train.global_batch=0": "at least 1",
        "model=tny": "'tiny'",
        "train.stop_at=5000": "1 to 1000",
        "model.mamba_num_heads=3": "model.mamba_num_heads=2, 4",
        'model.pattern="M-Q"': "^",
    }
    message = complaint(*wrong)
    assert message.startswith(f"{len(wrong)} problems"), message
    for override, hint in wrong.items():
        assert hint in message, f"{override}: {message}"


def test_a_fault_of_composition_does_not_hide_the_others(complaint):
    message = complaint("+train.steps=5", "train.stpes=1")
    assert "'train.steps'" in message
    assert "already" in message


@pytest.mark.parametrize("override", ["run.dir=2026", "run.name=12", "parallel.data=1", "logging.wandb_project=1.5"])
def test_a_number_given_for_a_text_becomes_text(compose, override):
    key, given = override.split("=")
    config = {path: value for path, _, value in leaves(compose(override))}
    assert config[key] == given


def test_interpolation_reaches_other_keys(compose):
    config = compose("run.name=abc", "run.dir=out/${run.name}", "train.steps=${train.global_batch}")
    assert config.run.dir == "out/abc"
    assert config.train.steps == config.train.global_batch


def test_interpolation_that_leads_nowhere_is_a_config_error(complaint):
    assert "nothing_here" in complaint("run.name=${nothing_here}")


def test_the_run_folder_follows_the_name_when_it_is_not_given(compose):
    assert compose("run.name=abc").run.dir == "runs/abc"


def test_a_composed_configuration_can_be_changed_nowhere(compose):
    config = compose("sample.prompts=[a]")

    def walk(section: Section) -> int:
        for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
            value = getattr(section, field.name)
            with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
                setattr(section, field.name, value)
            assert not isinstance(value, list), f"{field.name} is a list that anyone may change"
        return 1 + sum(walk(v) for v in vars(section).values() if isinstance(v, Section))

    assert walk(config) == 19, "sections were missed"


def other_value(field: dataclasses.Field, value):
    """Something else than `value` of the same kind."""
    if field.metadata["choices"]:
        return next(c for c in field.metadata["choices"] if c != value) if len(field.metadata["choices"]) > 1 else "new"
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else [0.0, 1.0]


def test_the_digest_changes_with_every_single_key():
    base = RunConfig().digest()
    for path, field, value in leaves(RunConfig()):
        config = RunConfig()
        *parents, name = path.split(".")
        section = config
        for parent in parents:
            section = getattr(section, parent)
        setattr(section, name, f"{value}x" if isinstance(value, str) else other_value(field, value))
        assert config.digest() != base, f"{path} is not in the digest: ranks that differ in it would train together"


def test_the_digest_is_the_same_in_another_process(compose):
    overrides = ["data=shakespeare", "model=tiny_moe", "optim.lr=1e-5", "sample.prompts=[a,b]"]
    program = "import sys; from nemohybrid.config.compose import load_config; print(load_config(sys.argv[1:]).digest())"
    done = subprocess.run([sys.executable, "-c", program, *overrides], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == load_config(overrides).digest(), done.stderr


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20).filter(
        lambda t: "${" not in t
    ),
    lr=st.floats(0, 1e6),
    prompts=st.lists(
        st.sampled_from(["1e3", "null", "on", "~", "0x1", "2026-01-01", " a ", "a: b", "#", "'", '"', "\n"])
    ),
)
def test_a_written_configuration_is_read_back_exactly(tmp_path_factory, name, lr, prompts):
    config = RunConfig()
    config.run.name, config.optim.lr, config.sample.prompts = name, lr, prompts
    config.freeze()
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_text(config_yaml(config), encoding="utf-8")
    assert read_config_yaml(file).as_dict() == config.as_dict()


def test_a_composed_configuration_survives_its_file(compose, tmp_path):
    config = compose("experiment=quickstart", "optim.lr=1e-5", "model.dt_limit=[0,0.5]", "model.chunk_size=64")
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert read_config_yaml(tmp_path / "config.yaml").digest() == config.digest()

"""What ships in `configs/`, swapped and resized, and how the shell learns that something is wrong."""

import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemohybrid.config.check import build
from nemohybrid.config.compose import compose_raw, load_config, load_model_config
from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.groups import configs_dir, groups
from nemohybrid.config.rules import violated_rules
from nemohybrid.config.run_config import RunConfig
from nemohybrid.symbols import parse_pattern

SHIPPED = groups()


@pytest.mark.parametrize("name", SHIPPED["model"])
def test_every_shipped_model_composes_and_passes_the_rules_of_models(name):
    config = load_model_config([f"model={name}"])
    assert config.model.name == name, "the file name and the name inside differ"


OWN_DATA = [name for name in SHIPPED["experiment"] if name.startswith(("tiny", "quickstart"))]
"""The others want data.train; tests/config/test_recipes.py looks at them."""


@pytest.mark.parametrize("name", OWN_DATA)
def test_every_shipped_experiment_can_be_trained(name):
    load_config([f"experiment={name}"])


@pytest.mark.parametrize("group", [g for g in SHIPPED if g not in ("model", "experiment", "data")])
def test_every_option_of_every_group_composes(group):
    for option in SHIPPED[group]:
        load_model_config([f"{group}={option}"])


def test_no_shipped_configuration_names_code():
    guilty = [f for f in configs_dir().rglob("*.yaml") if "_target_" in f.read_text()]
    assert not guilty


@pytest.mark.parametrize("model", ["tiny", "tiny_moe", "quickstart"])
def test_a_model_swapped_under_an_experiment_takes_its_vocabulary(model):
    experiment = load_config(["experiment=quickstart"])
    swapped = load_config(["experiment=quickstart", f"model={model}"])
    assert swapped.model.name == model
    assert swapped.model.vocab_size == experiment.model.vocab_size != load_model_config([]).model.vocab_size


def test_the_quickstart_can_be_cut_in_two_later():
    config = load_config(["experiment=quickstart"])
    m = config.model
    layers = parse_pattern(m.pattern).num_layers
    counts = [
        m.num_attention_heads,
        m.num_query_groups,
        m.mamba_num_heads,
        m.mamba_num_groups,
        config.train.global_batch,
    ]
    assert [n % 2 for n in (*counts, layers)] == [0] * 6, counts


@settings(max_examples=200, deadline=None)
@given(hidden=st.integers(16, 1024), name=st.sampled_from(["tiny", "tiny_moe"]))
def test_overriding_the_hidden_size_alone_is_always_legal(hidden, name):
    config = composed_values(name)
    m = config.model
    m.hidden_size = hidden
    derive_sizes(m)
    assert [str(v) for v in violated_rules(config, model_only=True)] == []
    sizes = (
        m.head_dim,
        m.num_attention_heads,
        m.num_query_groups,
        m.mamba_head_dim,
        m.mamba_num_heads,
        m.ffn_hidden_size,
    )
    assert all(isinstance(size, int) and size > 0 for size in sizes), sizes


@settings(max_examples=100, deadline=None)
@given(heads=st.integers(1, 64), groups=st.integers(1, 16), hidden=st.integers(16, 1024))
def test_derived_sizes_fit_those_that_are_given(heads, groups, hidden):
    config = composed_values("tiny")
    m = config.model
    m.num_attention_heads, m.mamba_num_groups, m.hidden_size = heads, groups, hidden
    derive_sizes(m)
    assert [str(v) for v in violated_rules(config, model_only=True)] == []


def composed_values(name: str) -> RunConfig:
    """What Hydra composes for `model=NAME`, before any size is derived."""
    return build(RunConfig, RAW[name], [])


RAW: dict[str, Any] = {name: OmegaConf.to_container(compose_raw([f"model={name}"])) for name in ("tiny", "tiny_moe")}


@pytest.mark.parametrize("hidden", [16, 48, 200, 520])
def test_a_size_overridden_in_the_shell_composes(hidden):
    assert load_config(["model=tiny", "data=shakespeare", f"model.hidden_size={hidden}"]).model.hidden_size == hidden


@pytest.fixture
def shell(tmp_path):
    """`shell(arguments) -> (finished process, seconds, modules loaded)` in an empty folder."""
    program = (
        "import sys; from nemohybrid.__main__ import main; code = main(sys.argv[1:]);"
        "print('LOADED', *sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
    )

    def run(*arguments: str, **environment: str):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, time.monotonic() - started, set(done.stderr.rpartition("LOADED")[2].split())

    return run


def test_a_wrong_configuration_is_told_in_five_seconds_without_torch_or_traceback(shell, tmp_path):
    done, seconds, loaded = shell("train", "data=shakespeare", "train.stpes=3", "optim.lr=abc", "parallel.tensor=3")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for hint in ("'train.steps'", "a number", "parallel.tensor=1, 2"):
        assert hint in done.stderr, done.stderr
    assert not loaded & {"torch", "megatron", "matplotlib"}, "a wrong configuration must be told before slow imports"
    assert seconds < 5, f"{seconds:.1f} s"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_configuration_under_torchrun_starts_no_process_group(shell):
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done, _, loaded = shell("train", "data=shakespeare", "train.global_batch=7", **world)
    assert done.returncode == 1
    assert "train.global_batch=6, 8" in done.stderr
    assert "torch" not in loaded


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"], ["--cfg", "job", "--resolve"]], ids=" ".join)
def test_hydras_flags_answer_and_leave_nothing_behind(shell, tmp_path, flags):
    done, _, loaded = shell("train", "data=shakespeare", "model.hidden_size=48", *flags)
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 48" in done.stdout
    assert "torch" not in loaded
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_groups_and_their_options(shell):
    done, _, _ = shell("train", "--help")
    assert "nemotron_h_8b" in done.stdout
    assert re.search(r"^experiment: .*\bquickstart\b", done.stdout, re.MULTILINE)


def test_a_misspelt_key_beside_a_flag_of_hydras_is_refused(shell):
    done, _, _ = shell("train", "--cfg", "job", "+model.hiden_size=1")
    assert done.returncode == 1
    assert "'model.hidden_size'" in done.stderr

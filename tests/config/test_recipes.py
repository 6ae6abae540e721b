"""Recipes of published pretraining runs: the published numbers, what nobody published, and a small twin of each."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemohybrid.config.compose import compose_raw, finish, load_config, load_model_config
from nemohybrid.config.groups import configs_dir, groups
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.symbols import parse_pattern

LENGTH = 8192
CORPUS = ["data=shakespeare", f"data.sequence_length={LENGTH}"]
PUBLISHED = {  # tokens, sequences of a batch, peak, warmup and decay in tokens, shape; None: not published
    "nemotron_h_8b": (None, 768, None, None, None, None),
    "nemotron_h_56b": (20e12, 768, None, None, None, None),
    "nemotron_nano_v2_12b": (20e12, 768, 4.5e-4, None, 3.6e12, None),
    "nemotron3_nano_30b": (25e12, 3072, 1e-3, 8.4e9, 5e12, "cosine"),
    "nemotron3_5_lightning": (25e12, 3072, 1e-3, 8.4e9, 5e12, "cosine"),
    "nemotron3_super": (25e12, 3072, 4.5e-4, 200e9, 5e12, "minus_sqrt"),
    "nemotron3_ultra": (20e12, 3072, 2.5e-4, 200e9, 5e12, "minus_sqrt"),
}
LONG = {  # after which run, tokens, length, batch, rate, axes (tensor, context, expert, pipeline), shares of 4,096, fewest ranks
    "nemotron_nano_v2_12b_long": ("nemotron_nano_v2_12b", 18.9e9, 2**19, 12, 4.5e-6, (8, 16, 1, 1), None, 128),
    "nemotron3_nano_30b_long": ("nemotron3_nano_30b", 121e9, 2**19, 48, 1e-5, (8, 8, 8, 4), "asked", 256),
    "nemotron3_super_long": ("nemotron3_super", 34e9, 2**20, 16, 4.5e-6, (2, 64, 64, 1), None, 128),
    "nemotron3_super_long_mixed": ("nemotron3_super", 17e9, 2**20, 16, 4.5e-6, (2, 64, 64, 1), 0.5, 128),
    "nemotron3_ultra_long": ("nemotron3_ultra", 33e9, 2**20, 16, 2.5e-6, (8, 32, 128, 2), 0.08, 512),
}
SHAPE = ["schedule.warmup", "schedule.decay_style"]
SLOPE = ["optim.lr", "optim.beta1", "optim.beta2", "schedule.decay", "schedule.min_lr_ratio"]
UNPUBLISHED = {
    "nemotron_h_8b": [*SHAPE, *SLOPE, "model.init_std", "train.steps", "optim.weight_decay", "optim.clip_grad_norm"],
    "nemotron_h_56b": [*SHAPE, *SLOPE],
    "nemotron_nano_v2_12b": SHAPE,
}
GIVEN = {
    "model.init_std": 0.014,
    "train.steps": 2_000_000,
    "optim.lr": 8e-4,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.weight_decay": 0.1,
    "optim.clip_grad_norm": 1.0,
    "schedule.warmup": 8.4e9,
    "schedule.decay": 3e12,
    "schedule.decay_style": "linear",
    "schedule.min_lr_ratio": 0.01,
}


def given(name: str) -> list[str]:
    """Overrides for everything that a recipe does not know."""
    return [f"{key}={GIVEN[key]}" for key in UNPUBLISHED.get(name, [])]


@pytest.fixture(scope="module")
def recipe():
    """`recipe(name)`: the composed run, with what is missing filled in."""
    done: dict[str, RunConfig] = {}

    def compose(name: str) -> RunConfig:
        if name not in done:
            done[name] = load_config([f"experiment={name}", *CORPUS, *given(name)])
        return done[name]

    return compose


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def test_every_experiment_is_a_recipe_or_a_twin_or_a_long_context_phase_or_runs_on_its_own():
    own = {"quickstart", "tiny"} | LONG.keys()
    assert set(groups()["experiment"]) == own | PUBLISHED.keys() | {f"tiny_{name}" for name in PUBLISHED}


@pytest.mark.parametrize("name", LONG)
def test_a_long_context_phase_is_the_published_one_and_the_rest_is_as_in_pretraining(name, recipe):
    before, tokens, length, batch, rate, axes, short, ranks = LONG[name]
    asked = complaint(f"experiment={name}")
    assert "init_from: the run folder" in asked
    words = [f"data.lengths={{{length}: 0.9, 4096: 0.1}}"] if short == "asked" else []
    assert ("data.lengths: " in asked) == bool(words)
    composed = compose_raw([f"experiment={name}", "data=shakespeare", "init_from=null", *words])
    config = finish(composed, ranks)
    parallel = config.parallel
    assert (parallel.tensor, parallel.context, parallel.expert, parallel.pipeline) == axes
    assert (config.data.sequence_length, config.train.global_batch, config.run.name) == (length, batch, name)
    assert config.train.steps == math.ceil(tokens / (batch * length))
    assert short in (None, "asked") or config.data.lengths == {length: 1 - short, 4096: short}
    schedule = config.schedule
    assert (schedule.name, schedule.warmup, schedule.decay, schedule.total) == ("constant", 0, 0, tokens)
    assert (config.optim, config.model) == (replace(recipe(before).optim, lr=rate), recipe(before).model)
    with pytest.raises(ConfigError, match=f"start {ranks} processes"):
        finish(composed, ranks // 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_refuses_to_start_without_what_nobody_published(name):
    message = complaint(f"experiment={name}")
    wanted = ["data.train", *UNPUBLISHED.get(name, [])]
    listed = re.findall(r"^  ([\w.]+): ", message, re.MULTILINE)
    assert sorted(listed) == sorted(wanted), message
    for key in wanted[1:]:
        assert f"give {key}=..." in message, message


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_batches_and_tokens_add_up(name, recipe):
    config, (tokens, batch, peak, warmup, decay, style) = recipe(name), PUBLISHED[name]
    assert (config.train.global_batch, config.data.sequence_length) == (batch, LENGTH)
    assert config.schedule.unit == "tokens"
    if tokens:
        assert config.train.steps == math.ceil(tokens / (batch * LENGTH))
        assert config.schedule.total == tokens
    for value, published in ((config.optim.lr, peak), (config.schedule.warmup, warmup), (config.schedule.decay, decay)):
        assert published in (None, value)
    assert style in (None, config.schedule.decay_style)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_takes_its_model_as_it_is(name, recipe):
    ours, theirs = recipe(name).model.as_dict(), load_model_config([f"model={name}"]).model.as_dict()
    if "model.init_std" in UNPUBLISHED.get(name, []):
        ours["init_std"] = theirs["init_std"]
    if name == "nemotron3_ultra":  # 0.1 instead of 0.3
        assert ours.pop("mtp") == {"repeat_block": True, "loss_weight": 0.1}
        theirs.pop("mtp")
    assert ours == theirs, "the balance and MTP defaults of the schema are those of Nemotron 3"
    assert recipe(name).run.name == name


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("nemotron3")])
def test_balance_and_mtp_are_those_of_nemotron_3(name, recipe):
    router, mtp = recipe(name).model.router, recipe(name).model.mtp
    assert (router.bias_update_rate, router.aux_loss, router.aux_loss_weight) == (1e-3, "sequence", 1e-4)
    assert (router.score, router.expert_bias, router.normalize, router.z_loss_weight) == ("sigmoid", True, True, 0)
    depth = parse_pattern(recipe(name).model.pattern).mtp_depth
    assert depth == (0 if name == "nemotron3_nano_30b" else 2)
    assert mtp.loss_weight == (0.1 if name == "nemotron3_ultra" else 0.3)


def test_published_initial_stds_follow_one_rule_and_ultra_takes_the_one_that_does(recipe):
    """sqrt(0.8 / hidden size), to the digits that were published; 0.014 for Ultra would be the rule for Super's width."""
    for name in PUBLISHED.keys() - {"nemotron_h_8b"}:
        model = recipe(name).model
        assert model.init_std == pytest.approx(math.sqrt(0.8 / model.hidden_size), rel=6e-3), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_differs_in_size_alone(name, recipe):
    """The same optimizer, balance and MTP, and a schedule of the same shape in shares of the run."""
    full, twin = recipe(name), load_config([f"experiment=tiny_{name}"])
    ours = set(UNPUBLISHED.get(name, []))
    for key in ("name", "beta1", "beta2", "eps", "weight_decay", "clip_grad_norm", "lr"):
        assert f"optim.{key}" in ours or getattr(twin.optim, key) == getattr(full.optim, key), key
    for key in ("bias_update_rate", "aux_loss", "aux_loss_weight", "z_loss_weight", "score", "expert_bias"):
        assert getattr(twin.model.router, key) == getattr(full.model.router, key), key
    assert twin.model.mtp == full.model.mtp
    assert twin.model.attention == full.model.attention
    assert (twin.schedule.name, twin.schedule.total, twin.train.steps) == (full.schedule.name, None, 10)
    for key in ("warmup", "decay"):
        if f"schedule.{key}" not in ours:
            share = getattr(full.schedule, key) / (full.schedule.total or 0)
            assert getattr(twin.schedule, key) == pytest.approx(share, rel=1e-9), key
    for key in ("decay_style", "min_lr_ratio"):
        assert f"schedule.{key}" in ours or getattr(twin.schedule, key) == getattr(full.schedule, key), key
    big, small = parse_pattern(full.model.pattern), parse_pattern(twin.model.pattern)
    assert (set(small.main), small.mtp, small.mtp_depth) == (set(big.main), big.mtp, big.mtp_depth)
    if "E" in big.main:
        assert bool(twin.model.moe_latent_size) == bool(full.model.moe_latent_size)
        assert twin.model.shared_expert_ffn_hidden_size == 2 * (twin.model.moe_ffn_hidden_size or 0)


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_latent_mtp"])
def test_the_small_models_can_be_cut_in_two(name):
    m = load_model_config([f"model={name}"]).model
    pattern = parse_pattern(m.pattern)
    counts = {
        "layers": pattern.num_layers,
        "MTP layers": len(pattern.mtp),
        "query heads": m.num_attention_heads,
        "query groups": m.num_query_groups,
        "Mamba heads": m.mamba_num_heads,
        "Mamba groups": m.mamba_num_groups,
        "experts": m.num_experts,
        "expert width": m.moe_ffn_hidden_size,
        "shared width": m.shared_expert_ffn_hidden_size,
        "latent width": m.moe_latent_size or 0,
    }
    assert {what: count for what, count in counts.items() if count is None or count % 2} == {}


@pytest.mark.parametrize("flags, status", [(["--cfg", "job"], 0), (["--cfg", "job", "--resolve"], 1)])
def test_a_recipe_is_shown_and_what_it_lacks_is_named_without_a_traceback(flags, status):
    """In a process of its own: Hydra's main prints, and keeps what it has been asked."""
    done = subprocess.run(
        [sys.executable, "-m", "nemohybrid", "train", "experiment=nemotron_nano_v2_12b", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    shown = done.stdout if status == 0 else done.stderr
    assert "not published" in shown
    assert ("4.5e-4" in shown or "0.00045" in shown) == (status == 0)


# --- required values in files of one's own --------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    """`mine("optim: {lr: ...}", "optim.lr=1")`: an experiment file of these lines, composed and checked."""

    def compose(text: str, *overrides: str) -> RunConfig:
        configs = tmp_path / "configs"
        configs.mkdir(exist_ok=True)
        for entry in configs_dir().iterdir():
            if entry.name != "experiment" and not (configs / entry.name).exists():
                (configs / entry.name).symlink_to(entry)
        (configs / "experiment").mkdir(exist_ok=True)
        (configs / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        return finish(compose_raw(["experiment=mine", "data=shakespeare", *overrides], Path(configs)), 1)

    return compose


def test_a_required_value_is_asked_for_and_then_taken(mine):
    text = "optim: {lr: \"${required:'ask Ada, at noon'}\"}"
    with pytest.raises(ConfigError, match=re.escape("optim.lr: ask Ada, at noon; give optim.lr=...")):
        mine(text)
    assert mine(text, "optim.lr=0.5").optim.lr == 0.5


def test_a_required_value_without_a_reason_is_asked_for(mine):
    with pytest.raises(ConfigError, match=re.escape("train.steps: required; give train.steps=...")):
        mine('train: {steps: "${required:}"}')


def test_other_faults_are_listed_with_the_required_values(mine):
    with pytest.raises(ConfigError) as caught:
        mine("model: {init_std: \"${required:'x'}\"}\noptim: {beta1: 7.0}")
    assert "model.init_std: x" in str(caught.value)
    assert "optim.beta1=7.0: must be at most 1" in str(caught.value)


def test_rules_are_not_judged_by_defaults_that_stand_in_for_required_values(mine):
    with pytest.raises(ConfigError) as caught:
        mine("train: {steps: \"${required:'x'}\"}\nschedule: {warmup: 5000}")
    assert "longer than" not in str(caught.value), "1000 steps is the default of the schema, and nobody's choice"


def test_a_required_value_that_others_follow_is_still_named(mine):
    with pytest.raises(ConfigError, match="run"):
        mine("run: {name: \"${required:'x'}\"}")


def test_looking_at_a_model_asks_only_for_what_the_model_needs():
    with pytest.raises(ConfigError) as caught:
        load_model_config(["experiment=nemotron_h_8b"])
    assert "model.init_std" in str(caught.value)
    assert "optim" not in str(caught.value)
    assert load_model_config(["experiment=nemotron_h_56b"]).model.hidden_size == 8192

"""Arguments of Megatron-LM become overrides that mean the same, and none is passed over in silence."""

import contextlib
import json
import math
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nemohybrid.__main__ import main
from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.check import find_field
from nemohybrid.config.compose import load_config, load_model_config
from nemohybrid.config.groups import configs_dir
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron import counterparts, files, model, shell
from nemohybrid.interop.megatron.arguments import (
    CONTRADICTION,
    DEFAULT,
    NO_COUNTERPART,
    NOT_NEEDED,
    TO_GIVE,
    UNKNOWN,
)
from nemohybrid.interop.megatron.output import as_command, as_experiment, hydra_value, override_words
from nemohybrid.interop.megatron.translate import translate
from nemohybrid.interop.megatron.translation import Translation
from nemohybrid.train.schedule import learning_rate

FIXTURES = Path(__file__).parent / "fixtures" / "megatron"
SUPER = FIXTURES / "nemotron3_super.yaml"


@pytest.fixture
def translated(tmp_path):
    """`translated("--lr 1e-3", ".sh")`: the translation of a file with this text."""

    def run(text: str, suffix: str = ".sh") -> Translation:
        file = tmp_path / f"arguments{suffix}"
        file.write_text(text)
        return translate(file)

    return run


@pytest.fixture
def corpus(tmp_path) -> str:
    """A prefix whose files are there; a configuration looks no further."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").touch()
        (tmp_path / f"{name}.idx").touch()
    return str(tmp_path / "a")


HYBRID = "--hybrid-layer-pattern ME*- --hidden-size 64 --num-attention-heads 4 --num-experts 8 --squared-relu "


def remarks(now: Translation, kind: str) -> str:
    return "\n".join(f"{r.subject}: {r.reason}" for r in now.remarks if r.kind == kind)


def paper_run(translated, *changes: tuple[str, str]) -> Translation:
    """The release test of Super, with the batch and length of the report instead of its own."""
    text = SUPER.read_text()
    for old, new in changes:
        assert old in text, f"the fixture does not say {old}"
        text = text.replace(old, new)
    return translated(text, ".yaml")


# --- the published argument set --------------------------------------------------------------------------------------


def test_the_arguments_of_super_give_its_recipe(translated):
    """993,411 batches of 3072 and 25e12 / 8192 samples instead of the release test's 512 and 24.975e12 / 8192."""
    now = paper_run(
        translated,
        ("global-batch-size: 512", "global-batch-size: 3072"),
        ("train-samples: 12207031", f"train-samples: {993_411 * 3072}"),
        ("lr-decay-samples: 3048706055", "lr-decay-samples: 3051757813"),
    )
    ours = load_config([*override_words(now), "data=shakespeare", "data.sequence_length=8192"], world_size=64)
    recipe = load_config(["experiment=nemotron3_super", "data=shakespeare", "data.sequence_length=8192"])
    ours_model, recipe_model = ours.model.as_dict(), recipe.model.as_dict()
    for values in (ours_model, recipe_model):
        values.pop("name")
        values.pop("ffn_hidden_size")  # there is no MLP layer
    assert ours_model == recipe_model
    assert ours.optim == recipe.optim
    assert (ours.train.steps, ours.train.global_batch) == (recipe.train.steps, recipe.train.global_batch)
    assert ours.data.reset_documents == recipe.data.reset_documents
    plans = [BatchPlan(c.train, c.data.sequence_length) for c in (ours, recipe)]
    for step in (1, 7_000, 7_948, 400_000, 794_700, 794_800, 900_000, 993_000, 993_411):
        got, want = (learning_rate(c, plan, step) for c, plan in zip((ours, recipe), plans, strict=True))
        assert got == pytest.approx(want, rel=1e-4), f"step {step}: samples and tokens give different rates"


def test_the_release_test_of_super_keeps_its_own_batch_and_schedule():
    values = translate(SUPER).overrides
    assert values["train.steps"] == 12_207_031 // 512
    assert values["schedule.unit"] == "samples"
    spans = [values[f"schedule.{key}"] for key in ("warmup", "decay", "total")]
    assert spans == [24_414_063, 610_351_563, 3_048_706_055]
    assert values["schedule.min_lr_ratio"] == 0.01


def test_every_argument_of_super_is_translated_or_named():
    now = translate(SUPER)
    said = "\n".join(r.subject for r in now.remarks)
    silent = [g for g in now.arguments.given.values() if g.name not in now.arguments.taken and g.shown not in said]
    assert [g.shown for g in silent] == []
    assert remarks(now, UNKNOWN) == ""
    assert remarks(now, CONTRADICTION) == ""
    assert "--fp8-param-gather" in remarks(now, NOT_NEEDED)
    assert now.overrides["precision.recipe"] == "mxfp8"
    assert now.overrides["precision.rules"] == [{"layers": ["first 1", "last 14"], "recipe": "bf16"}]
    assert (now.overrides["parallel.tensor"], now.overrides["parallel.sequence"]) == (2, True)
    assert (now.overrides["parallel.expert"], "parallel.expert_tensor" in now.overrides) == (64, False)
    assert "data.train" in remarks(now, TO_GIVE)
    assert "model.norm_epsilon=1e-05" in remarks(now, DEFAULT)


def test_the_arguments_of_lightning_give_its_model(translated, corpus):
    text = (FIXTURES / "nemotron3_5_lightning.yaml").read_text().replace("[${DATA_BLEND}]", f"[{corpus}]")
    now = translated(text, ".yaml")
    config = load_config(override_words(now))
    theirs = load_model_config(["model=nemotron3_5_lightning"]).model
    for name, value in config.model.as_dict().items():
        if name not in ("name", "ffn_hidden_size"):
            assert value == theirs.as_dict()[name], name
    assert (config.schedule.name, config.schedule.warmup, config.schedule.total) == ("cosine", 333, 39735)
    assert (config.data.train, list(config.data.split)) == (corpus, [9999.0, 8.0, 2.0])


def test_a_script_is_read_without_being_run():
    now = translate(FIXTURES / "nemotron_h_56b.sh")
    values = now.overrides
    ours = load_model_config([w for w in override_words(now) if w.startswith("model.")] + ["model.vocab_size=131072"])
    theirs = load_model_config(["model=nemotron_h_56b"]).model
    for name in (
        "pattern",
        "hidden_size",
        "ffn_hidden_size",
        "ssm_state_size",
        "mamba_num_heads",
        "head_dim",
        "init_std",
    ):
        assert getattr(ours.model, name) == getattr(theirs, name), name
    assert values["train.global_batch"] == 768, "BATCH=768 SEQ=... sets two variables"
    assert (values["schedule.name"], values["schedule.min_lr_ratio"], values["optim.beta2"]) == ("cosine", 0.01, 0.95)
    assert values["data.train"] == {"/data/web_text_document": 0.7, "/data/code_text_document": 0.3}
    assert (values["data.split"], values["train.evaluate_every"]) == ([99.0, 1.0, 0.0], 100)
    assert "--seq-length $((8 * 1024))" in remarks(now, TO_GIVE), "arithmetic is not computed, so it has to be given"
    assert "$EXTRA_ARGS" in remarks(now, TO_GIVE)
    assert as_command(now).count("--nproc-per-node") == 1, "that of ours, not the script's"


def test_a_dump_of_a_bridge_recipe_is_read_by_section():
    now = translate(FIXTURES / "nemotron_nano_v2_12b.yaml")
    ours = load_model_config([w for w in override_words(now) if w.startswith("model.")]).model.as_dict()
    theirs = load_model_config(["model=nemotron_nano_v2_12b"]).model.as_dict()
    for name in ours.keys() - {"name", "chunk_size"}:  # a dump without mamba_chunk_size leaves ours
        assert ours[name] == theirs[name], name
    assert now.overrides["data.sequence_length"] == 8192
    assert now.overrides["data.train"] == {"/data/web": 0.7, "/data/code": 0.3}
    assert "model.seq_length=131072" in remarks(now, CONTRADICTION)
    assert "model.some_future_field=3" in remarks(now, UNKNOWN)
    assert "nanov2_bf16_with_fp8_current_scaling_mixed: fp8_block has gradients in E4M3" in remarks(now, NO_COUNTERPART)
    assert now.overrides["precision.recipe"] == "fp8_block"
    assert remarks(now, DEFAULT) == "", "a dump has every field: nothing is assumed"


@pytest.fixture
def published(request, tmp_path) -> Path:
    """A fixture whose corpora are there."""
    for name in ("web", "code", "web_text_document", "code_text_document"):
        (tmp_path / f"{name}.bin").touch()
        (tmp_path / f"{name}.idx").touch()
    text = (FIXTURES / request.param).read_text()
    text = text.replace("/data/", f"{tmp_path}/").replace("${DATA_BLEND}", f"{tmp_path}/web")
    copy = tmp_path / request.param
    copy.write_text(text)
    return copy


ALL = sorted(file.name for file in FIXTURES.iterdir() if file.suffix != ".md")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--pipeline-model-parallel-size 2", {"pipeline": 2}),
        ("--expert-model-parallel-size 4", {"expert": 4}),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 4", {"expert": 4, "expert_tensor": 2}),
        (
            "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
            {"expert": 4},
        ),
        ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", {"expert_tensor": 1}),
        ("--tensor-model-parallel-size 2", {}),
    ],
)
def test_experts_lie_on_the_ranks_as_in_megatron(translated, arguments, expected):
    """There an expert is shared by as many ranks as everything else, unless the file says another number."""
    overrides = translated(f"python pretrain_hybrid.py {HYBRID} {arguments}").overrides
    got = {k.removeprefix("parallel."): v for k, v in overrides.items() if k.startswith("parallel.")}
    assert {k: v for k, v in got.items() if k not in ("tensor", "sequence")} == expected


@pytest.mark.parametrize("published", ALL, indirect=True)
def test_what_is_printed_is_a_command_and_an_experiment_that_compose(published, tmp_path, monkeypatch, capsys):
    assert main(["from-megatron", str(published)]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "), comments=True)
    launcher, overrides = words[: words.index("train")], words[words.index("train") + 1 :]
    ranks = math.prod(int(launcher[launcher.index(n) + 1]) for n in ("--nnodes", "--nproc-per-node") if n in launcher)
    assert launcher[-1] == "nemohybrid"
    pasted = load_config(overrides, ranks)

    assert main(["from-megatron", str(published), "--yaml"]) == 0
    configs = tmp_path / "configs"
    shutil.copytree(configs_dir(), configs)
    (configs / "experiment" / "mine.yaml").write_text(capsys.readouterr().out)
    for module in ("compose", "groups"):
        monkeypatch.setattr(f"nemohybrid.config.{module}.configs_dir", lambda: configs)
    assert load_config(["experiment=mine"], ranks).as_dict() == pasted.as_dict()


# --- single arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--bf16", {"model.dtype": "bfloat16"}),
        ("", {"model.dtype": "float32"}),
        ("--untie-embeddings-and-output-weights", {"model.tie_embeddings": False}),
        ("", {"model.tie_embeddings": True}),
        ("--disable-bias-linear", {"model.linear_bias": False}),
        ("", {"model.linear_bias": True}),
        ("", {"model.head_dim": 16, "model.num_query_groups": 4}),
        ("--group-query-attention --num-query-groups 2", {"model.num_query_groups": 2}),
        ("--group-query-attention", {"model.num_query_groups": 1}),
        ("--kv-channels 32", {"model.head_dim": 32}),
        ("", {"model.mamba_num_heads": 2, "model.mamba_head_dim": 64, "model.ssm_state_size": 128}),
        ("", {"model.ffn_hidden_size": 256, "model.shared_expert_ffn_hidden_size": 0}),
        ("--ffn-hidden-size 96", {"model.ffn_hidden_size": 96, "model.moe_ffn_hidden_size": 96}),
        ("--ffn-hidden-size 96 --moe-ffn-hidden-size 32", {"model.moe_ffn_hidden_size": 32}),
        ("", {"model.moe_ffn_hidden_size": 256}),
        (
            "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk 4",
            {"model.router.groups": 4, "model.router.top_groups": 2},
        ),
        ("--moe-router-num-groups 4", {"model.router.groups": "absent"}),
        ("", {"model.router.score": "softmax", "model.router.normalize": True, "model.router.aux_loss": "none"}),
        ("--moe-router-pre-softmax", {"model.router.normalize": False}),
        ("--moe-router-score-function sigmoid --moe-router-topk 1", {"model.router.normalize": False}),
        ("--moe-aux-loss-coeff 1e-2", {"model.router.aux_loss": "batch", "model.router.aux_loss_weight": 0.01}),
        (
            "--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type global_aux_loss",
            {"model.router.aux_loss": "global"},
        ),
        ("--qk-layernorm", {"model.attention.qk_norm": True}),
        ("--position-embedding-type rope --rotary-base 5e5", {"model.attention.rope_theta": 500000}),
        ("--swiglu", {}),
        ("--clip-grad 0", {"optim.clip_grad_norm": None}),
        ("--recompute-granularity full", {"train.recompute": "layer"}),
        ("", {"optim.beta2": 0.999, "optim.weight_decay": 0.01}),
        ("--reset-attention-mask", {"data.reset_documents": True}),
        ("--train-data-path /a --valid-data-path /b", {"data.train": "/a", "data.valid": "/b"}),
        ("--valid-data-path 1 /x/b 2 /x/c", {"data.valid": {"b": "/x/b", "c": "/x/c"}}),
        ("--data-path /a", {"data.train": "/a", "data.split": [969.0, 30.0, 1.0]}),
        ("--data-path /a /b", {"data.train": {"/a": 1.0, "/b": 1.0}}),
        ("--tokenizer-model /t/tokenizer.json", {"data.tokenizer": "/t/tokenizer.json"}),
        ("--lr 1e-3 --lr 2e-3", {"optim.lr": 2e-3}),
        ("--seed 7 --save-interval 50 --log-interval 3", {"run.seed": 7, "checkpoint.every": 50, "logging.every": 3}),
    ],
)
def test_one_argument_means_here_what_it_means_there(translated, arguments, expected):
    values = translated(HYBRID + arguments).overrides
    assert {key: values.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize("suffix, width", [(".sh", 128), (".json", 256)])
def test_swiglu_is_narrower_where_only_the_hidden_size_is_given(translated, suffix, width):
    """Two thirds of 4 * 64 are 170, in 64s 128; a dump's TransformerConfig takes 4 * 64."""
    text = "--hybrid-layer-pattern -E --hidden-size 64 --num-experts 8 --swiglu"
    dump = {"hybrid_layer_pattern": "-E", "hidden_size": 64, "num_moe_experts": 8, "activation_func": "silu"}
    values = translated(text if suffix == ".sh" else json.dumps({"model": dump}), suffix).overrides
    assert (values["model.ffn_hidden_size"], values["model.moe_ffn_hidden_size"]) == (width, width)


GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 2 "


@pytest.mark.parametrize(
    "arguments, same",
    [
        ("--moe-router-topk 4 --moe-router-score-function sigmoid", True),
        ("--moe-router-topk 4 --moe-router-pre-softmax", True),
        ("--moe-router-topk 4", False),
        ("--moe-router-topk 2 --moe-router-score-function sigmoid", False),
        ("--moe-router-topk 8 --moe-router-score-function sigmoid", False),
        ("--moe-router-topk 8 --moe-router-num-groups 2", True),
    ],
)
def test_groups_that_are_chosen_otherwise_are_named(translated, arguments, same):
    """Megatron-LM adds up topk // 2 scores of a group, or logits before a softmax; here it is always two scores."""
    said = remarks(translated(HYBRID + GROUPS + arguments), NO_COUNTERPART)
    assert ("two best experts" not in said) is same


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            "--train-iters 100 --lr-warmup-iters 10",
            {"unit": "steps", "warmup": 10, "decay": 90, "decay_style": "linear"},
        ),
        ("--train-iters 100 --lr-warmup-fraction 0.1", {"warmup": 0.1, "decay": 90}),
        ("--train-iters 100 --lr-decay-style cosine --lr-decay-iters 80", {"name": "cosine", "total": 80}),
        ("--train-iters 100 --lr-decay-style constant", {"name": "constant"}),
        (
            "--train-samples 1000 --lr-decay-style WSD --lr-wsd-decay-samples 200 --lr-warmup-samples 50",
            {"unit": "samples", "name": "wsd", "decay": 200, "warmup": 50, "decay_style": "exponential"},
        ),
    ],
)
def test_schedules_keep_their_units_and_shapes(translated, arguments, expected):
    values = translated(f"{HYBRID} --global-batch-size 10 --lr 1e-3 --min-lr 1e-4 {arguments}").overrides
    assert {key: values.get(f"schedule.{key}", "absent") for key in expected} == expected
    assert values.get("schedule.min_lr_ratio") == (None if "constant" in arguments else 0.1)


def test_a_ramp_and_samples_give_the_steps_that_megatron_counts(translated):
    """4, 6 and 8 sequences for 100 samples each: 13 and 17 steps, and then 8 at a time."""
    now = translated(f"{HYBRID} --global-batch-size 8 --rampup-batch-size 4 2 200 --train-samples 1000")
    assert [now.overrides[f"train.batch_ramp.{key}"] for key in ("start", "increment", "samples")] == [4, 2, 200]
    consumed, steps = 0, 0
    while consumed + (batch := 4 if consumed < 100 else 6 if consumed < 200 else 8) <= 1000:
        consumed, steps = consumed + batch, steps + 1
    assert now.overrides["train.steps"] == steps


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        ("--hybrid-override-pattern M-M* --mtp-hybrid-override-pattern *- --mtp-num-layers 2", "M-M*/*-/*-"),
        ("--hybrid-layer-pattern 'M-|M*'", "M-|M*"),
        ("--num-layers 3", "*-*-*-"),
        ("--num-layers 2 --num-experts 4", "*E*E"),
    ],
)
def test_patterns_old_and_new_and_none(translated, arguments, pattern):
    assert translated(f"--hidden-size 64 {arguments}").overrides["model.pattern"] == pattern


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--num-layers 5", "the pattern has 4 layers"),
        ("--train-iters 10 --train-samples 100", "Megatron-LM takes only one"),
        ("--train-samples 100 --lr-warmup-iters 10", "the run is counted in samples"),
        ("--train-iters 10 --lr-decay-samples 10", "the run is counted in iters"),
        ("--num-query-groups 2", "no effect in Megatron-LM without --group-query-attention"),
        ("--seq-length 64 --max-position-embeddings 32", "Megatron-LM refuses"),
        ("--lr 1e-3 --lr 2e-3", "the last one counts"),
        ("--lr fast", "is not a number"),
        ("--train-iters 1.5", "is not a whole number"),
        ("--swiglu", "only one"),
        ("--hybrid-override-pattern M-", "differs from --hybrid-layer-pattern"),
        ("--lr-decay-style WSD", "wants lr-wsd-decay-iters"),
        ("--moe-router-num-groups 4", "only with num-groups and group-topk both"),
        ("--moe-router-group-topk 4", "only with num-groups and group-topk both"),
        ("--position-embedding-type none --use-rotary-position-embeddings", "which counts"),
    ],
)
def test_contradictions_are_said(translated, arguments, said):
    assert said in remarks(translated(HYBRID + arguments), CONTRADICTION)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--normalization LayerNorm", "every norm here is an RMSNorm"),
        ("", "every norm here is an RMSNorm (Megatron-LM's default)"),
        ("", "there is no dropout (Megatron-LM's default)"),
        ("--fp16", "bfloat16 or float32"),
        ("--fp8-format hybrid", "the largest of 1024 steps"),
        ("--fp8-format e4m3 --fp8-recipe tensorwise", "fp8_current has gradients in E5M2 here"),
        ("--fp8-format hybrid --fp8-recipe custom", "the user's own code"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-dot-product-attention", "which product has which recipe"),
        ("--optimizer muon", "AdamW is the only optimizer"),
        ("--lr-decay-style inverse-square-root", "wsd, cosine and constant"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-wsd-decay-style 1-sqrt", "style 1-sqrt: decays are linear"),
        ("--moe-router-load-balancing-type sinkhorn", "model.router.aux_loss"),
        ("--context-parallel-size 2", "parallel.context"),
        ("--mtp-num-layers 1", "which layers an MTP block has"),
        ("--start-weight-decay 0.2", "weight decay stays"),
        ("--pretrained-checkpoint /x", "Hugging Face"),
        ("--per-split-data-args-path blend.json", "data.train"),
    ],
)
def test_what_has_no_counterpart_is_named_with_the_reason(translated, arguments, said):
    assert said in remarks(translated(HYBRID + arguments), NO_COUNTERPART)


def test_mtp_weighs_a_tenth_where_the_file_does_not_say(translated):
    now = translated(HYBRID.replace("ME*-", "ME*-/*E"))
    assert now.overrides["model.mtp.loss_weight"] == 0.1
    assert "model.mtp.loss_weight=0.1" in remarks(now, DEFAULT)


def test_how_activations_are_recomputed_is_not_needed(translated):
    said = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --recompute-modules mlp"
    now = translated(HYBRID + said)
    assert now.overrides["train.recompute"] == "layer"
    assert remarks(now, UNKNOWN) == ""
    for flag in ("--recompute-method uniform", "--recompute-num-layers 1", "--recompute-modules mlp"):
        assert flag in remarks(now, NOT_NEEDED), flag


def test_a_pattern_with_foreign_symbols_is_named(translated):
    now = translated("--hidden-size 64 --hybrid-layer-pattern MG*-")
    assert "unknown symbol 'G'" in remarks(now, NO_COUNTERPART)
    assert "model.pattern" not in now.overrides


def test_an_unknown_argument_is_named(translated):
    assert remarks(translated(HYBRID + "--frobnicate 3"), UNKNOWN).startswith("--frobnicate 3")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["--alpha 1", "--beta", "--lr 1e-3", "--seed 3", "--fp8-format e4m3"]), unique=True))
def test_no_argument_is_passed_over_in_silence(tmp_path_factory, arguments):
    file = tmp_path_factory.mktemp("silence") / "a.sh"
    file.write_text(HYBRID + " ".join(arguments))
    now = translate(file)
    for one in now.arguments.given.values():
        said = any(one.shown in remark.subject for remark in now.remarks)
        assert said or one.name in now.arguments.taken, f"{one.text} is neither translated nor named"


def test_every_key_that_can_come_out_exists():
    keys = {key for group in model.NUMBERS.values() for key in group.values()}
    for file in ALL:
        keys |= translate(FIXTURES / file).overrides.keys()
    assert [key for key in keys if find_field(RunConfig, key)[2]] == []


def test_reasons_are_regular_expressions_that_hit_names():
    assert counterparts.verdict("log_throughput", "M-") is not None
    assert counterparts.verdict("mamba_head_dim", "*-") == (NOT_NEEDED, "the pattern has no Mamba-2 layer")
    assert counterparts.verdict("hidden_size", "*-") is None, "an argument with a counterpart has a verdict too"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, values",
    [
        ("A=3\nrun.py --seed $A", "3"),
        ("A=3\nrun.py --seed ${A}", "3"),
        ("run.py --seed ${A:-4}", "4"),
        ("A=3\nrun.py --seed ${A:-4}", "3"),
        ("A=(--seed 5)\nA+=(--bf16)\nrun.py ${A[@]}", "5"),
        ('A="--seed"\nA="$A 6"\nrun.py $A', "6"),
        ("run.py \\\n  --seed \\\n  7", "7"),
        ("run.py --seed=8 # --seed 9", "8"),
        ("export A=9; run.py --seed $A > log 2>&1", "9"),
        ("OPTIONS=' --seed 10 '", "10"),
        ('bash -c "python pretrain.py --seed 11"', "11"),
        ("--seed 12\n--bf16", "12"),
        ("torchrun --seed 1 pretrain.py --seed 13", "13"),
        ("python tools/preprocess.py --seed 1\npython pretrain_gpt.py --seed 14", "14"),
        ("if true; then A=15; fi\nrun.py --seed $A", "15"),
        ('run.py --seed ${A:-"16"}', "16"),
        ('run.py --seed ${A:-6" " }', "6"),
        ("export env local A=17\nrun.py --seed $A", "17"),
        ("A='1'\"8\"\nrun.py --seed=$A", "18"),
    ],
)
def test_shell_is_understood_as_far_as_it_can_be(translated, script, values):
    assert translated(script).overrides["run.seed"] == int(values)


def test_nothing_in_a_script_is_executed(translated, tmp_path):
    mark = tmp_path / "mark"
    now = translated(f"A=$(touch {mark})\n`touch {mark}`\nrun.py --seed $A --lr $(touch {mark}; echo 1)")
    assert not mark.exists()
    assert "run.seed" not in now.overrides
    assert "--seed" in remarks(now, TO_GIVE)


def test_an_assignment_under_a_condition_is_said(translated):
    said = remarks(translated("if [ -n x ]; then\nA=1\nelse\nA=2\nfi\nrun.py --seed $A"), CONTRADICTION)
    assert "A= in line 2" in said
    assert "A= in line 4" in said


@pytest.mark.parametrize(
    "text, suffix, said",
    [
        ("run.py --seed 'x", ".sh", "line 1: ' is not closed"),
        ("A=(1 2", ".sh", "line 1: '(' is not closed"),
        ("x\ncat <<EOF\nEOF", ".sh", "line 2: here-documents"),
        ("a.py --seed 1\nb.py --seed 2", ".sh", "lines 1, 2"),
        ("run.py --lr " + "${A:-" * 600 + "1" + "}" * 600, ".sh", "nested too deeply"),
        ("hello", ".sh", "holds no arguments"),
        ("", ".sh", "holds no arguments"),
        ("train.py $ARGS", ".sh", "holds no arguments"),
        ('{"model": {}}', ".json", "holds no arguments"),
        ('{"--seed": ' + "9" * 5000 + "}", ".json", "is no JSON"),
        ("--seed: " + "9" * 5000, ".yaml", "a number of 5000 characters"),
        ("--seed: 0x" + "f" * 5000, ".yaml", "a number of 5002 characters"),
        ("--seed: !!int x", ".yaml", "cannot be read as plain YAML"),
        ("a: &a [*a]", ".yaml", "an alias inside what it stands for"),
        ("a: *b", ".yaml", "undefined alias"),
        ("- " * 3000, ".yaml", "nested too deeply"),
        ("#" * (files.LARGEST + 1), ".sh", "is larger than"),
        ("a: [", ".yaml", "cannot be read as plain YAML"),
        ("a: !!python/object/apply:os.system [ls]", ".yaml", "cannot be read as plain YAML"),
        ("MODEL_ARGS:\n  --lr: 1\n  --lr: 2", ".yaml", "the key '--lr' again"),
        ("{", ".json", "is no JSON"),
        ('{"a": 1, "a": 2}', ".json", "twice"),
        ("[1]", ".json", "holds no arguments"),
        ("[" * 100_000, ".json", "nested too deeply"),
    ],
)
def test_files_that_cannot_be_read_say_why(translated, text, suffix, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        translated(text, suffix)


@pytest.mark.parametrize(
    "script",
    [
        "A=0123456789\n" + "A=$A$A\n" * 40,
        "A=(1 2 3 4)\n" + 'A=("${A[@]}" "${A[@]}")\n' * 40,
        'A=("" "" "")\n' + 'A=("${A[@]}" "${A[@]}")\n' * 40,
        "A=0123456789\n" + "A=$A$A\n" * 5 + "run.py --lr " + "$A" * 100,
        "A=0123456789\n" + "A=$A$A\n" * 5 + "run.py --lr " + '"$A" ' * 100,
        "A=(1)\n" + "A+=(1)\n" * 200,
        "A=1\n" + "A+=1\n" * 200,
    ],
    ids=["doubled", "list", "empty words", "one word", "many words", "grown list", "grown text"],
)
def test_a_script_that_multiplies_itself_is_refused(translated, monkeypatch, script):
    monkeypatch.setattr(shell, "LONGEST", 10_000)
    with pytest.raises(ConfigError, match="grow beyond 10,000 characters"):
        translated(script + "\nrun.py --seed 1")


@pytest.mark.parametrize("inner", ["[x,x,x,x,x,x,x,x,x]", "{k: v}"], ids=["lists", "mappings"])
def test_aliases_that_multiply_a_file_are_refused(translated, inner):
    levels = "".join(f"b{i + 1}: &b{i + 1} [{','.join([f'*b{i}'] * 9)}]\n" for i in range(9))
    with pytest.raises(ConfigError, match="aliases make it longer than"):
        translated(f"b0: &b0 {inner}\n{levels}", ".yaml")


def test_an_alias_of_a_dump_is_what_it_stands_for(translated):
    dtype = "{_target_: torch.bfloat16, _call_: false}"
    now = translated(f"model:\n  hidden_size: &h 64\n  kv_channels: *h\n  a: &d {dtype}\n  params_dtype: *d", ".yaml")
    assert (now.overrides["model.hidden_size"], now.overrides["model.head_dim"]) == (64, 64)
    assert "model.params_dtype=bfloat16" in remarks(now, NOT_NEEDED)


def test_a_date_is_no_number(translated):
    said = remarks(translated("--seed: 2001-99-99\n--lr: 2001-01-01", ".yaml"), CONTRADICTION)
    assert said.splitlines() == ["--lr 2001-01-01: is not a number", "--seed 2001-99-99: is not a number"]


@pytest.mark.parametrize(
    "script",
    ["env " * 40_000, "run.py" + "".join(f" --a{n}" for n in range(20_000)), "run.py --lr " + "a" * 400_000],
    ids=["declaring", "arguments", "one word"],
)
def test_a_long_script_takes_seconds_not_hours(translated, script):
    """Every step is linear: quadratic ones took from a minute to hours for these."""
    started = time.process_time()
    with contextlib.suppress(ConfigError):
        translated(script)
    assert time.process_time() - started < 10


def test_a_folder_is_no_argument_list(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        translate(tmp_path)


def test_a_file_that_is_not_there_is_an_error_of_the_users(tmp_path, capsys):
    assert main(["from-megatron", str(tmp_path / "none.sh")]) == 1
    assert "no such file" in capsys.readouterr().err


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab-= \\\n'\"$(){}[]@#<>&|;`", max_size=40))
def test_no_text_crashes_the_reader_of_scripts(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("fuzz") / "a.sh"
    file.write_text(text)
    with contextlib.suppress(ConfigError):
        as_command(translate(file))


NAMES = sorted(
    {*files.DEFAULTS, *(name for group in model.NUMBERS.values() for name in group)}
    | {
        *(
            "lr",
            "train_iters",
            "train_samples",
            "global_batch_size",
            "rampup_batch_size",
            "num_layers",
            "data_path",
            "blend",
        ),
        *(
            "split",
            "hybrid_layer_pattern",
            "mtp_num_layers",
            "mtp_hybrid_override_pattern",
            "eval_interval",
            "seq_length",
        ),
        *(
            "lr_warmup_fraction",
            "lr_decay_iters",
            "tokenizer_model",
            "activation_func",
            "valid_data_path",
            "num_query_groups",
        ),
        *("moe_router_num_groups", "moe_router_group_topk", "ffn_hidden_size", "recompute_granularity"),
    }
)
SCALARS = st.sampled_from([None, True, False, 0, -1, 3, 10**30, 1e400, "nan", "x", "$A", "M*", "*E", "0.5", "WSD"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=3)))
def test_no_values_crash_the_translation(tmp_path_factory, values):
    for content in ({"model": values}, {f"--{name}": value for name, value in values.items()}):
        file = tmp_path_factory.mktemp("fuzz") / "a.json"
        file.write_text(json.dumps(content))
        with contextlib.suppress(ConfigError):
            as_command(translate(file))


@pytest.mark.parametrize("blend", [[["/a", "/b"], [1]], [["/a", "/a"], [1, 2]], [["/a"], ["x"]]], ids=str)
def test_a_blend_that_is_none_is_said(translated, blend):
    now = translated(json.dumps({"model": {"hidden_size": 64}, "dataset": {"blend": blend}}), ".json")
    assert "data.train" not in now.overrides
    assert "with a weight each" in remarks(now, CONTRADICTION)


@pytest.mark.parametrize(
    "blend", [[["${oc.env:HOME}/x"], None], [["/a", "$B"], [1, 2]], [["${oc.env:HOME}"]], ["`x`"]], ids=str
)
@pytest.mark.parametrize("field", ["blend", "valid_data_path"])
def test_no_variable_gets_into_the_command(translated, blend, field):
    """Hydra would resolve it when the printed command runs."""
    now = translated(json.dumps({"model": {"hidden_size": 64}, "dataset": {field: blend}}), ".json")
    assert not {"data.train", "data.valid"} & now.overrides.keys()
    assert "the file does not say what the variable is" in remarks(now, TO_GIVE)


@pytest.mark.parametrize("char", ["\n", "\x1b", "\x85", "\ud800"], ids=ascii)
def test_what_cannot_be_written_is_spelled_out(translated, char):
    now = translated(json.dumps({"--data-path": f"/a{char}b", f"--x{char}": [f"{char}rm"]}), ".json")
    for text in (as_command(now), as_experiment(now, f"a{char}model: 1")):
        assert all(line.isprintable() for line in text.split("\n"))
        assert "model: 1" not in text.split("\n")
    assert "data.train" not in now.overrides
    assert "data.train: the file has it with characters" in remarks(now, TO_GIVE)


def test_a_json_dump_reads_like_a_yaml_one(translated):
    values = {"model": {"hybrid_layer_pattern": "M*", "hidden_size": 64}, "optimizer": {"lr": 1e-3}}
    now = translated(json.dumps(values), ".json")
    assert (now.overrides["model.hidden_size"], now.overrides["optim.lr"]) == (64, 1e-3)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.text('\\"ab', max_size=5),
        lambda inner: st.lists(inner, max_size=3),
    )
)
@example("\\0")
@example('\\"')
def test_values_are_written_as_hydra_reads_them(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assume(not ("$" in str(value) or "\n" in str(value) or "\r" in str(value)))
    assert OverridesParser.create().parse_override(f"a={hydra_value(value)}").value() == value

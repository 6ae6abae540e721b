"""Every rule of `config/rules/`: something it refuses, what it says is legal, and something it lets pass."""

import importlib.util
from collections.abc import Callable
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from nemohybrid.config import rules
from nemohybrid.config.compose import compose_raw, finish
from nemohybrid.config.groups import groups
from nemohybrid.config.rules import MODEL_RULES, RUN_RULES, violated_rules
from nemohybrid.config.run_config import RunConfig

E = "model=tiny_moe"
SHIPPED = groups()
# rule -> (overrides it refuses, words its complaint must hold, overrides it lets pass)
CASES = {
    "mamba_heads_over_groups": (
        ["model.mamba_num_heads=9", "model.mamba_num_groups=4"],
        ["9 heads", "model.mamba_num_heads=8, 12", "model.mamba_num_groups=1, 3, 9"],
        ["model.mamba_num_heads=12", "model.mamba_num_groups=4"],
    ),
    "dt_limits": (["model.dt_limit=[0.5,0.1]"], ["0 <= low < high"], ["model.dt_limit=[0,0.1]"]),
    "query_heads_over_groups": (
        ["model.num_attention_heads=6", "model.num_query_groups=4"],
        ["model.num_attention_heads=4, 8", "model.num_query_groups=1, 2, 3, 6"],
        ["model.num_attention_heads=8", "model.num_query_groups=4"],
    ),
    "rope_needs_pairs": (
        ["model.attention.position_embedding=rope", "model.head_dim=33"],
        ["model.head_dim=32, 34"],
        ["model.attention.position_embedding=rope", "model.head_dim=34"],
    ),
    "input_norms_are_of_layers": (['model.no_input_norm="E"'], ["no layer of the pattern is 'E'", "some of M-*"], []),
    "output_norms_are_of_layers": (['model.output_norm="E"'], ["no layer", "some of M-*"], ['model.output_norm="M*"']),
    "something_is_normalised": (
        ['model.no_input_norm="*"'],
        ["model.attention.qk_norm=true", "model.attention.v_norm=true"],
        ['model.no_input_norm="*"', "model.attention.qk_norm=true", "model.attention.v_norm=true"],
    ),
    "top_k_of_experts": ([E, "model.moe_top_k=9"], ["model.moe_top_k=1 to 8"], [E, "model.moe_top_k=8"]),
    "one_expert_needs_its_score": (
        ["model=tiny_moe", "model.moe_top_k=1"],
        ["model.router.normalize=false"],
        ["model=tiny_moe", "model.moe_top_k=1", "model.router.normalize=false"],
    ),
    "router_groups": ([E, "model.router.groups=8"], ["model.router.groups=1, 2, 4"], [E, "model.router.groups=4"]),
    "backend_of_capped_scores": (
        ["model.attention.softcap=30", "kernels.attention_backend=sdpa"],
        ["attention_backend=sdpa: cannot train with model.attention.softcap=30", "auto, flash3, flash2, flex, torch"],
        ["model.attention.softcap=30", "kernels.attention_backend=flex"],
    ),
    "parts_of_the_fused_mixer": (
        ["kernels.mixer_backend=triton", "kernels.ssd_backend=torch", "model.mamba_x_norm=true"],
        ["ssd_backend=torch and model.mamba_x_norm=true part it", "kernels.mixer_backend=auto, separate"],
        ["kernels.mixer_backend=triton", "kernels.ssd_backend=triton"],
    ),
    "policy_of_this_model": (
        ["precision.rules=[{kind: M, recipe: bf16}, {kind: E, recipe: bf16}]"],
        ["precision.rules[1]: fits nothing: no layer is of kind E. Kinds: M, -, *"],
        ["precision.rules=[{kind: M, recipe: bf16}, {kind: E, recipe: bf16, optional: true}]"],
    ),
    "late_recipe_has_a_time": (
        ["precision.late.forward_only=true"],
        ["precision.late.forward_only: counts from precision.late.tokens on, which is empty"],
        ["precision.late.forward_only=true", "precision.late.tokens=1000"],
    ),
    "late_recipe_within_the_run": (
        ["train.steps=2", "train.global_batch=3", "data.sequence_length=10", "precision.late.tokens=60"],
        ["precision.late.tokens=60: comes after the end of the run, which sees 60 tokens", "below 60"],
        ["train.steps=2", "train.global_batch=3", "data.sequence_length=10", "precision.late.tokens=59"],
    ),
    "health_that_is_seen": (
        ["logging.precision_every=5", "precision.backend=transformer_engine"],
        ["precision_every=5: sees nothing of what transformer_engine quantizes", "auto, emulated, torch_native"],
        ["logging.precision_every=5", "precision.backend=torch_native"],
    ),
    "widths_of_the_recipe": (
        ["precision=nvfp4"],
        ["nvfp4 takes multiples of 16, but a rank has 648 outputs of the Mamba in_proj", "precision.recipe=bf16"],
        ["precision=nvfp4", 'precision.rules=[{name: "*.in_proj", recipe: bf16}]'],
    ),
    "data_is_a_number": (["parallel.data=many"], ["auto or a number"], ["parallel.data=1"]),
    "ranks_make_the_world": (["parallel.data=2"], ["start 2 processes"], ["parallel.data=1"]),
    "shards_and_their_copies": (
        ["parallel.data_mode=hybrid", "parallel.data_shard=2"],
        ["parallel.data_shard=2", "1 data rank cannot be cut", "parallel.data_mode=full_shard, replicate"],
        ["parallel.data_mode=hybrid"],
    ),
    "data_shard_of_hybrid": (
        ["parallel.data_mode=shard_grad", "parallel.data_shard=1"],
        ["parallel.data_shard=1", "changes nothing", "parallel.data_shard=null", "parallel.data_mode=hybrid"],
        ["parallel.data_mode=shard_grad"],
    ),
    "reduction_of_shards": (
        ["parallel.data_mode=replicate", "parallel.reduce_every_microbatch=true"],
        ["changes nothing", "parallel.reduce_every_microbatch=false", "full_shard, shard_grad, hybrid"],
        ["parallel.data_mode=shard_grad", "parallel.reduce_every_microbatch=true"],
    ),
    "mamba_over_tensor": (
        ["parallel.tensor=4"],
        ["parallel.tensor=4", "2 Mamba groups", "parallel.tensor=1, 2"],
        ["parallel.tensor=1", "model.mamba_num_groups=3"],
    ),
    "attention_over_tensor": (
        ["parallel.tensor=3"],
        ["parallel.tensor=3", "4 query heads and 2 key/value heads", "parallel.tensor=1, 2"],
        ["parallel.tensor=1"],
    ),
    "mlp_over_tensor": (
        ["parallel.tensor=4", "model.ffn_hidden_size=510"],
        ["parallel.tensor=4", "510 channels of an MLP", "parallel.tensor=1, 2"],
        ["model.ffn_hidden_size=511"],
    ),
    "experts_over_tensor": (
        [E, "parallel.tensor=2", "model.moe_ffn_hidden_size=63", "model.shared_expert_ffn_hidden_size=65"],
        ["63 channels of an expert and 65 channels of the shared expert", "parallel.tensor=1"],
        [E, "model.moe_ffn_hidden_size=63"],
    ),
    "sequence_over_tensor": (
        ["parallel.tensor=4", "data.sequence_length=65"],
        ["data.sequence_length=65", "4 tensor ranks", "data.sequence_length=64, 68", "parallel.sequence=false"],
        ["data.sequence_length=65"],
    ),
    "vocabulary_over_tensor": (
        ["parallel.tensor=2", "model.vocab_size=1"],
        [
            "parallel.tensor=2",
            "more ranks than the vocabulary of 1",
            "model.vocab_size=2 or more",
            "parallel.tensor=up to 1",
        ],
        ["model.vocab_size=1024"],
    ),
    "output_norms_of_whole_outputs": (
        ["parallel.tensor=2", "logging.output_norms=10"],
        ["logging.output_norms=10", "2 tensor ranks", "logging.output_norms=0", "parallel.tensor=1"],
        ["logging.output_norms=10"],
    ),
    "pipeline_stages": (
        ['model.pattern="M-|M-|M-"', "parallel.pipeline=2"],
        ["parallel.pipeline=2", "3"],
        ['model.pattern="M-|M-|M-"'],
    ),
    "virtual_stages": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
        ["2 x 4 stages are more than the 7 layers", "parallel.virtual_pipeline=1 to 3"],
        ["parallel.virtual_pipeline=1"],
    ),
    "schedule_of_stages": (
        ["parallel.pipeline=2", "parallel.schedule=interleaved"],
        ["needs several stages a rank", "parallel.schedule=auto, gpipe, 1f1b", "parallel.virtual_pipeline=2 or more"],
        ["parallel.schedule=auto"],
    ),
    "rounds_of_microbatches": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch=10", "train.microbatch=2"],
        [
            "the 5 microbatches of a step",
            "train.microbatch=1, 5;",
            "parallel.schedule=gpipe",
            "parallel.virtual_pipeline=1",
        ],
        ["train.global_batch=10", "train.microbatch=2"],
    ),
    "parts_do_not_write": (
        ["parallel.pipeline=2", "sample.prompts=[a]"],
        ["sample.prompts=[]", "nemohybrid generate", "parallel.pipeline=1"],
        ["sample.prompts=[a]"],
    ),
    "output_norms_of_all_layers": (
        ["parallel.pipeline=2", "logging.output_norms=5"],
        ["2 pipeline ranks", "logging.output_norms=0", "parallel.pipeline=1"],
        ["logging.output_norms=5"],
    ),
    "experts_to_share": (
        ["parallel.expert=2"],
        ["parallel.expert=2 parallel.expert_tensor=null", "no 'E' layer", "parallel.expert=1"],
        [E, "parallel.expert=1"],
    ),
    "experts_over_ranks": ([E, "parallel.expert=3"], ["parallel.expert=1, 2, 4, 8"], [E]),
    "width_of_experts_over_ranks": (
        [E, "parallel.expert_tensor=2", "model.moe_ffn_hidden_size=63"],
        ["parallel.expert_tensor=2", "63 channels of an expert", "parallel.expert_tensor=1, 3"],
        [E, "parallel.expert_tensor=1", "model.moe_ffn_hidden_size=63"],
    ),
    "experts_over_the_stage": (
        [E, "parallel.expert=2"],
        ["parallel.expert=2 x parallel.expert_tensor=1", "the 1 ranks of a stage", "parallel.expert=1"],
        [E],
    ),
    "tokens_of_folded_experts": (
        [E, "parallel.tensor=2", "parallel.expert=2", "parallel.sequence=false"],
        ["parallel.sequence=true", "parallel.expert=1"],
        [E, "parallel.sequence=false"],
    ),
    "exchange_of_folded_experts": (
        [E, "parallel.dispatcher=deepep", "parallel.expert_room=2"],
        ["parallel.dispatcher=deepep parallel.expert_room=2.0", "no rank lacks an expert", "parallel.dispatcher=auto"],
        [E, "parallel.dispatcher=auto"],
    ),
    "what_deepep_sends": (
        [E, "parallel.dispatcher=deepep", "parallel.expert_tensor=2", "model.dtype=float32", "parallel.expert_room=2"],
        ["several ranks share the width", "sends bfloat16", "needs no room", "parallel.dispatcher=auto, all_to_all"],
        [E],
    ),
    "room_of_an_exchange": (
        [E, "parallel.expert_room=0.5"],
        ["parallel.expert_room=0.5", "less than the mean", "1 or more"],
        [E],
    ),
    "sequence_over_context": (
        ["parallel.context=2", "data.sequence_length=66"],
        ["data.sequence_length=64, 68"],
        ["data.sequence_length=66"],
    ),
    "lengths_make_the_longest": (
        ["data.lengths={100: 1, 256: 3}"],
        ["256 tokens are no whole number of such sequences", "a length of 64, a length of 128"],
        ["data.lengths={64: 1, 256: 3}"],
    ),
    "lengths_over_ranks": (
        ["data.lengths={6: 1, 256: 3}", "parallel.context=2"],
        ["6 tokens do not cut into 2 x 2 pieces", "multiples of 4"],
        ["data.lengths={64: 1, 256: 3}"],
    ),
    "lengths_without_a_ramp": (
        ["data.lengths={64: 1, 256: 3}", "train.batch_ramp.start=4", "train.batch_ramp.increment=4"],
        ["do not take turns while the batch grows", "data.lengths=null"],
        ["data.lengths={256: 1}", "train.batch_ramp.start=4", "train.batch_ramp.increment=4"],
    ),
    "positions_need_an_evaluation": (
        ["train.evaluate_positions=true"],
        ["nothing is evaluated", "train.evaluate_every=1 or more"],
        ["train.evaluate_positions=true", "train.evaluate_every=1"],
    ),
    "method_of_context_ranks": (
        ["parallel.context_method=ring+states"],
        ["changes nothing with parallel.context=1", "parallel.context_method=auto"],
        [],
    ),
    "tokens_of_a_context_rank": (
        ["parallel.context=2", "data.sequence_length=4"],
        ["2 tokens of a rank are fewer than the 3", "data.sequence_length=6 or more"],
        [],
    ),
    "mamba_over_context": (
        ["parallel.context=3", "parallel.context_method=all_to_all"],
        ["parallel.context=3", "8 Mamba heads and 2 groups", "parallel.context=1, 2, 4, 8", "ring+states"],
        [],
    ),
    "attention_over_context": (
        ["parallel.context=3", "parallel.context_method=all_to_all"],
        ["parallel.context=3", "query heads and", "key/value heads of a tensor rank", "ring+states"],
        [],
    ),
    "options_are_of_layers": (
        ['model.pattern="M-"', "model.attention.softcap=50"],
        ["model.attention.softcap=null", "with a *"],
        ['model.pattern="M-/*-"', "model.attention.softcap=50", "model.mamba_bc_norm=true"],
    ),
    "rows_long_enough_to_draft": (
        ['model.pattern="M*/*/*"', "data.sequence_length=2"],
        ["data.sequence_length=3 or more"],
        ['model.pattern="M*/*/*"', "data.sequence_length=3"],
    ),
    "batch_over_ranks": (
        ["train.global_batch=8", "train.microbatch=3"],
        ["train.microbatch=1, 2, 4, 8"],
        ["train.global_batch=8", "train.microbatch=4"],
    ),
    "batch_ramp": (
        ["train.batch_ramp.start=3", "train.microbatch=2"],
        ["train.batch_ramp.start=2, 4"],
        ["train.batch_ramp.start=4", "train.batch_ramp.increment=2", "train.microbatch=2"],
    ),
    "stop_within_steps": (["train.stop_at=1001"], ["train.stop_at=1 to 1000"], ["train.stop_at=1000"]),
    "schedule_fits": (
        ["schedule.warmup=600", "schedule.decay=500"],
        ["schedule.warmup=up to 500"],
        ["schedule.warmup=500", "schedule.decay=500"],
    ),
    "clipping_leaves_something": (["optim.clip_grad_norm=0"], ["null"], ["optim.clip_grad_norm=null"]),
    "betas_below_one": (["optim.beta2=1"], ["optim.beta2"], ["optim.beta2=0.999"]),
    "top_p_keeps_something": (["sample.top_p=0"], ["sample.top_p"], ["sample.top_p=1"]),
    "training_data_exists": (["data=corpus"], ["nemohybrid data prepare", "data=shakespeare"], []),
    "validation_data_exists": (["data.valid=nowhere/x"], ["nowhere/x.bin and nowhere/x.idx not found"], []),
    "evaluation_needs_data": (
        ["data=corpus", "train.evaluate_every=5"],
        ["no validation data"],
        ["train.evaluate_every=5"],
    ),
    "split_is_possible": (["data.split=[0,1]"], ["data.split=[0, 1]", "the first above 0", "[98,1,1]"], []),
    "tokenizer_is_known": (["data.tokenizer=nope"], ["byte, bpe:SIZE"], ["data.tokenizer=bpe:257"]),
    "vocabulary_holds_the_tokenizer": (
        ["data.tokenizer=bpe:512", "model.vocab_size=300"],
        ["512 or more"],
        ["data.tokenizer=bpe:512", "model.vocab_size=512"],
    ),
    "run_has_a_folder": (["run.dir=' '"], ["a folder"], ["run.dir=x"]),
    "overlap_in_window": (["data.valid_overlap=256"], ["data.valid_overlap=0 to 255"], ["data.valid_overlap=255"]),
    "optimizer_is_installed": (["optim=apex_adamw"], ["apex is not installed"], []),
    "wandb_is_installed": (["logging.wandb=true"], ["pip install 'nemohybrid[wandb]'"], []),
    "tensorboard_is_installed": (["logging.tensorboard=true"], ["pip install 'nemohybrid[tensorboard]'"], []),
    "overlap_of_a_stream": (
        ["data.valid_windows=documents", "data.valid_overlap=8"],
        ["data.valid_overlap=0"],
        ["data.valid_windows=documents", "data.valid_overlap=0"],
    ),
    "initial_weights_exist": (["init_from=absent"], ["give a checkpoint or a run folder"], ["init_from=."]),
    "resume_exists": (["resume=later"], ["auto, never"], ["resume=never"]),
}


@cache
def composed(*chosen: str) -> DictConfig:
    return compose_raw(["data=shakespeare", *chosen])


@pytest.fixture
def compose() -> Callable[..., RunConfig]:
    """Like that of the other tests, with Hydra asked once for each choice of groups: it takes a tenth of a second."""

    def merge(*overrides: str, world_size: int = 1) -> RunConfig:
        chosen = [word for word in overrides if word.partition("=")[0] in SHIPPED]
        keys = OmegaConf.from_dotlist([word for word in overrides if word not in chosen])
        return finish(OmegaConf.merge(composed(*chosen), keys), world_size)  # pyright: ignore[reportArgumentType]

    return merge


@pytest.fixture
def no_optional_libraries(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_every_rule_has_a_case_here():
    assert {check.__name__ for check in MODEL_RULES + RUN_RULES} == set(CASES), "a new rule needs a case"


@pytest.mark.parametrize("name", CASES)
def test_rule_refuses_and_says_what_is_legal(name, complaint, no_optional_libraries, monkeypatch):
    (alone,) = [check for check in MODEL_RULES + RUN_RULES if check.__name__ == name]
    monkeypatch.setattr(rules, "MODEL_RULES", [])
    monkeypatch.setattr(rules, "RUN_RULES", [alone])  # no other rule may stand in for it
    overrides, words, _ = CASES[name]
    message = complaint(*overrides)
    assert message.startswith("1 problem "), message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", CASES)
def test_rule_lets_the_legal_pass(name, compose, no_optional_libraries):
    compose(*CASES[name][2])


@pytest.mark.parametrize(
    "override, cure",
    [
        ("optim=apex_adamw", "comes with NGC containers and is not on PyPI"),
        ("optim=te_adamw", "nemohybrid[te]"),
        ("logging.tensorboard=true", "nemohybrid[tensorboard]"),
    ],
)
def test_a_library_that_is_asked_for_and_absent_is_named_with_its_cure(
    complaint, no_optional_libraries, override, cure
):
    assert cure in complaint(override)


def test_a_mistyped_corpus_names_those_that_are_there(complaint, tmp_path):
    for end in ("bin", "idx"):
        (tmp_path / f"train.{end}").touch()
    message = complaint("data=corpus", f"data.train={tmp_path}/trian")
    assert f"data.train={tmp_path}/train" in message


def test_two_sources_of_training_text_are_refused(complaint):
    assert "not both" in complaint("data.train=somewhere")


def test_the_mixer_in_one_of_a_cpu_has_no_parts_of_others_either(complaint, compose):
    message = complaint("kernels.mixer_backend=cpp", "kernels.ssd_backend=torch", "kernels.norm_backend=triton")
    assert "kernels.mixer_backend=cpp: is one operator, kernels.ssd_backend=torch and kernels.norm_backend" in message
    assert "kernels.ssd_backend=auto, cpp" in message
    compose("kernels.mixer_backend=cpp", "kernels.ssd_backend=cpp")


def test_rules_of_absent_layers_are_silent(compose):
    compose('model.pattern="--"', "model.mamba_num_heads=3", "model.num_attention_heads=3", "model.num_query_groups=2")


def test_rules_can_be_asked_about_a_configuration_made_by_hand():
    """None of them relies on what Hydra fills in."""
    config = RunConfig()
    config.train.stop_at = 2000
    assert any("stop_at" in str(v) for v in violated_rules(config))


@pytest.mark.parametrize(
    "overrides, hint",
    [
        (["schedule.warmup=30", "schedule.decay=330", "train.steps=50"], "schedule.decay=up to 20, or a share"),
        (["data=corpus", "data.train=x", "data.tokenizer=bpe:512"], "a prepared corpus has its tokenizer"),
        (["data.tokenizer=bpe:x"], "bpe:257 or more"),
    ],
)
def test_the_hint_can_be_followed(complaint, overrides, hint):
    assert hint in complaint(*overrides)


@pytest.mark.parametrize("steps", [1, 2, 50, 359, 5000])
def test_the_quickstart_can_be_made_shorter_or_longer(compose, steps):
    compose("experiment=quickstart", f"train.steps={steps}")

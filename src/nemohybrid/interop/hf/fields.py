"""Which field of a NemotronH `config.json` says what which of our settings says.

Field meanings and defaults are those of transformers 5.23 `nemotron_h` and of NVIDIA's hub repositories.
"""

from dataclasses import dataclass
from typing import Any

MODEL_TYPE = "nemotron_h"
OURS = "nemohybrid"
"""The object in `config.json` with what Hugging Face has no field for: dotted key of `model` -> value."""

SYMBOL_OF_BLOCK = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""Names in `layers_block_type`, the old ones and those that transformers 5.23 writes, -> our symbols."""
BLOCK_OF_SYMBOL = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""The old names: transformers 5.23 reads them too, and readers before it know no others."""


@dataclass(frozen=True)
class Field:
    """`ours`: dotted key of `model`; `default`: what transformers takes where `theirs` is absent or null.

    symbols: the layers that have it; in a pattern without them it means nothing and is not read.
    """

    ours: str
    theirs: str
    default: Any
    symbols: str = ""
    aliases: tuple[str, ...] = ()


FIELDS = (
    Field("hidden_size", "hidden_size", 4096),
    Field("vocab_size", "vocab_size", 131072),
    Field("tie_embeddings", "tie_word_embeddings", False),
    Field("norm_epsilon", "layer_norm_epsilon", 1e-5),
    Field("init_std", "initializer_range", 0.02),
    Field("rescale_output_init", "rescale_prenorm_residual", True),
    Field("num_attention_heads", "num_attention_heads", 32, "*"),
    Field("num_query_groups", "num_key_value_heads", None, "*"),
    Field("head_dim", "head_dim", 128, "*", ("attention_head_dim",)),
    Field("mamba_num_heads", "mamba_num_heads", 128, "M"),
    Field("mamba_head_dim", "mamba_head_dim", 64, "M"),
    Field("mamba_num_groups", "n_groups", 8, "M", ("mamba_n_groups",)),
    Field("ssm_state_size", "ssm_state_size", 128, "M"),
    Field("conv_kernel", "conv_kernel", 4, "M", ("mamba_d_conv",)),
    Field("conv_bias", "use_conv_bias", True, "M", ("mamba_conv_bias",)),
    Field("chunk_size", "chunk_size", 128, "M", ("mamba_chunk_size",)),
    Field("ffn_hidden_size", "intermediate_size", 21504, "-"),
    Field("num_experts", "n_routed_experts", 8, "E", ("num_local_experts",)),
    Field("moe_top_k", "num_experts_per_tok", 2, "E"),
    Field("moe_ffn_hidden_size", "moe_intermediate_size", 7688, "E"),
    Field("shared_expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", 7688, "E"),
    Field("moe_latent_size", "moe_latent_size", None, "E"),
    Field("router.normalize", "norm_topk_prob", True, "E"),
    Field("router.scaling_factor", "routed_scaling_factor", 1.0, "E"),
    Field("router.groups", "n_group", 1, "E"),
    Field("router.top_groups", "topk_group", 1, "E"),
)

FIXED = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
}
"""Fields with one legal value. transformers switches biases by layer kind; we have one switch for all."""

OURS_ALONE = {
    "pattern",
    "vocab_multiple",
    "dt_min",
    "dt_max",
    "dt_init_floor",
    "attention.rope_theta",
    "router.expert_bias",
    "router.bias_update_rate",
    "router.aux_loss",
    "router.aux_loss_weight",
    "router.z_loss_weight",
    "mtp.repeat_block",
    "mtp.loss_weight",
    "name",
    "dtype",
}
"""Keys of `model` that change nothing in what given weights compute, or that the other fields already say."""

SAID_TWICE = {"chunk_size", "shared_expert_ffn_hidden_size"}
"""Keys of `model` that have a field and may say more: no chunk size is the best for the device, a width of 0 no expert."""

OF_THE_READER = {"dtype"}
"""Keys of `model` that whoever reads a folder chooses; nothing in it may."""

MOST_PADDING = 1024
"""Vocabularies may be padded to a multiple of this, or of themselves: no folder makes us take much more than it holds."""

NOT_THERE = {
    "activation": "MLPs and experts there are squared ReLU",
    "linear_bias": "attention there has no biases",
    "attention.position_embedding": "attention there has no positions",
    "attention.qk_norm": "queries and keys are not normalised there",
    "attention.v_norm": "values are not normalised there",
    "attention.softcap": "scores are not capped there",
    "no_input_norm": "every mixer there reads a normalised stream",
    "output_norm": "no mixer's output is normalised there",
    "mamba_bc_norm": "B and C are not normalised there",
    "mamba_x_norm": "x is not normalised there",
    "dt_limit": "transformers clamps time steps from below only, and not while decoding",
    "router.score": "scores there are sigmoids",
    "router.force_balance": "the router there follows its scores",
}
"""Keys of `model` that must have their default in a model to be exported, and why."""

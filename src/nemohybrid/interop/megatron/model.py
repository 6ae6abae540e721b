"""Arguments of the network."""

from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.translation import Translation
from nemohybrid.pattern import MAX_SYMBOLS, Pattern
from nemohybrid.symbols import parse_pattern

NUMBERS = {
    "": {
        "hidden_size": "model.hidden_size",
        "vocab_size": "model.vocab_size",
        "init_method_std": "model.init_std",
        "norm_epsilon": "model.norm_epsilon",
    },
    "*": {"num_attention_heads": "model.num_attention_heads"},
    "M": {
        "mamba_head_dim": "model.mamba_head_dim",
        "mamba_num_groups": "model.mamba_num_groups",
        "mamba_state_dim": "model.ssm_state_size",
        "mamba_chunk_size": "model.chunk_size",
    },
    "E": {
        "num_experts": "model.num_experts",
        "moe_router_topk": "model.moe_top_k",
        "moe_latent_size": "model.moe_latent_size",
        "moe_router_topk_scaling_factor": "model.router.scaling_factor",
        "moe_router_bias_update_rate": "model.router.bias_update_rate",
        "moe_z_loss_coeff": "model.router.z_loss_weight",
    },
}
"""Layer symbol -> argument -> our key, where a number is a number. "" stands for every model."""

FRACTIONS = (
    "init_method_std",
    "norm_epsilon",
    "moe_router_topk_scaling_factor",
    "moe_router_bias_update_rate",
    "moe_z_loss_coeff",
)
AUXILIARY = {"aux_loss": "batch", "seq_aux_loss": "sequence", "global_aux_loss": "global", "none": "none"}
"""--moe-router-load-balancing-type -> model.router.aux_loss."""


def translate_model(now: Translation) -> None:
    """Pattern first: it decides which of the other arguments mean anything."""
    pattern = _pattern(now)
    symbols = "M*-E" if pattern is None else pattern.main + pattern.mtp
    for symbol, keys in NUMBERS.items():
        for name, key in keys.items():
            if symbol in symbols:
                now.put(key, _number(now, name), name)
    _general(now)
    for symbol, translate in {"*": _attention, "M": _mamba, "-": _mlp, "E": _experts, "/": _mtp}.items():
        if symbol in symbols or (symbol == "/" and pattern is not None and pattern.mtp):
            translate(now)


def _number(now: Translation, name: str) -> float | None:
    return now.arguments.number(name) if name in FRACTIONS else now.arguments.whole(name)


def _pattern(now: Translation) -> Pattern | None:
    """`model.pattern` from the pattern arguments old and new, or from the layers of a plain transformer."""
    text = _pattern_text(now)
    if text is None:
        return None
    try:
        pattern = parse_pattern(text)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        now.no_counterpart(_pattern_argument(now), f"{reason}; give model.pattern")
        return None
    now.put("model.pattern", pattern.canonical)
    _check_counts(now, pattern)
    return pattern


def _pattern_argument(now: Translation) -> str:
    new = now.arguments.has("hybrid_layer_pattern")
    return "hybrid_layer_pattern" if new else "hybrid_override_pattern"


def _pattern_text(now: Translation) -> str | None:
    arguments = now.arguments
    new, old = arguments.word("hybrid_layer_pattern"), arguments.word("hybrid_override_pattern")
    if new and old and new != old:
        now.contradiction(
            "hybrid_override_pattern", f"differs from {arguments.shown('hybrid_layer_pattern')}, which counts"
        )
    text, part = new or old, arguments.word("mtp_hybrid_override_pattern")
    depth = min(arguments.whole("mtp_num_layers") or 0, MAX_SYMBOLS)
    if text is None:
        text = _transformer(now)
    if text and part and "/" not in text:
        return text + f"/{part}" * depth
    if text and "/" in text and part and part != text.split("/")[1]:
        now.contradiction("mtp_hybrid_override_pattern", "differs from the part after / in the pattern, which counts")
    if text and depth and "/" not in text:
        now.no_counterpart("mtp_num_layers", "the file does not say which layers an MTP block has; add /*E or the like")
    return text


def _transformer(now: Translation) -> str | None:
    """`*-` for each layer of a model without a hybrid pattern; None where it cannot be known."""
    arguments = now.arguments
    layers, experts = arguments.whole("num_layers"), arguments.has("num_experts")
    if (
        arguments.flag("is_hybrid_model")
        or arguments.has("hybrid_attention_ratio")
        or not layers
        or layers > MAX_SYMBOLS
    ):
        now.to_give("model.pattern", "the file has no hybrid-layer-pattern; ratios are not translated")
        return None
    if experts and str(arguments.take("moe_layer_freq") or 1) != "1":
        now.no_counterpart("moe_layer_freq", "give model.pattern, with E where experts are and - elsewhere")
        return None
    return ("*E" if experts else "*-") * layers


def _check_counts(now: Translation, pattern: Pattern) -> None:
    arguments = now.arguments
    layers, depth = arguments.whole("num_layers"), arguments.whole("mtp_num_layers")
    hybrid = arguments.has("hybrid_layer_pattern") or arguments.has("hybrid_override_pattern")
    if hybrid and layers is not None and layers != pattern.num_layers:
        now.contradiction("num_layers", f"the pattern has {pattern.num_layers} layers, and the pattern counts")
    if pattern.mtp and depth is not None and depth != pattern.mtp_depth:
        now.contradiction("mtp_num_layers", f"the pattern has {pattern.mtp_depth} MTP parts, and the pattern counts")


def _general(now: Translation) -> None:
    """Embeddings, norms, activation, biases, dropout and dtype."""
    arguments = now.arguments
    untied = arguments.flag("untie_embeddings_and_output_weights")
    if arguments.has("untie_embeddings_and_output_weights") or arguments.defaults:
        now.put("model.tie_embeddings", not untied, "untie_embeddings_and_output_weights")
    if arguments.has("disable_bias_linear") or arguments.take("add_bias_linear") is not None:
        biased = not arguments.flag("disable_bias_linear") and arguments.flag("add_bias_linear")
        now.put("model.linear_bias", biased, "disable_bias_linear", "add_bias_linear")
    normalization = arguments.word("normalization")
    if normalization not in (None, "RMSNorm"):
        now.no_counterpart("normalization", "every norm here is an RMSNorm")
    _activation(now)
    for name in ("hidden_dropout", "attention_dropout"):
        if arguments.number(name):
            now.no_counterpart(name, "there is no dropout")
    _dtype(now)


def _activation(now: Translation) -> None:
    squared, gated = now.arguments.flag("squared_relu"), now.arguments.flag("swiglu")
    other = now.arguments.word("activation_func")
    unit = now.arguments.flag("gated_linear_unit") if now.arguments.has("gated_linear_unit") else gated  # of dumps
    if squared and gated:
        now.contradiction("swiglu", "squared-relu is given too; Megatron-LM takes only one")
    elif unit != gated:
        now.no_counterpart("gated_linear_unit", "squared ReLU is not gated and SiLU is (model.activation)")
    elif squared or gated:
        now.put("model.activation", "squared_relu" if squared else "swiglu")
    elif other or now.arguments.defaults:
        now.no_counterpart(
            "activation_func" if other else "squared_relu", "without it GELU: only squared ReLU and SwiGLU"
        )


def _dtype(now: Translation) -> None:
    arguments = now.arguments
    recipe = arguments.word("mixed_precision.mixed_precision") or ""
    half = arguments.flag("fp16") or arguments.flag("mixed_precision.fp16")
    brain = arguments.flag("bf16") or arguments.flag("mixed_precision.bf16") or "bf16" in recipe
    if half:
        now.no_counterpart("fp16", "models compute in bfloat16 or float32 (model.dtype)")
    if brain or arguments.defaults:
        now.put("model.dtype", "bfloat16" if brain or half else "float32", "bf16", "fp16")


def _attention(now: Translation) -> None:
    arguments = now.arguments
    heads, groups, hidden = (arguments.whole(n) for n in ("num_attention_heads", "num_query_groups", "hidden_size"))
    grouped = arguments.flag("group_query_attention") or not arguments.defaults
    if groups and not grouped:
        now.contradiction("num_query_groups", "has no effect in Megatron-LM without --group-query-attention")
    now.put("model.num_query_groups", (groups or (heads if not arguments.defaults else 1)) if grouped else heads)
    even = hidden // heads if hidden and heads else None
    now.put("model.head_dim", arguments.whole("kv_channels") or even)
    if arguments.flag("qk_layernorm"):
        now.put("model.attention.qk_norm", True)
    _positions(now)


def _positions(now: Translation) -> None:
    """None, or rotary: what the published hybrids have, and what else there is here."""
    arguments = now.arguments
    kind = arguments.word("position_embedding_type")
    if arguments.flag("use_rotary_position_embeddings"):
        if arguments.has("position_embedding_type") and kind != "rope":
            now.contradiction("use_rotary_position_embeddings", f"position-embedding-type is {kind}, which counts")
        else:
            kind = "rope"
    if kind in ("none", "rope"):
        now.put("model.attention.position_embedding", kind)
    elif kind is not None:
        now.no_counterpart(
            "position_embedding_type", "attention has no positions, or rotary ones; the hybrids have none"
        )
    if kind == "rope":
        now.put("model.attention.rope_theta", arguments.number("rotary_base"), "rotary_base")
        if arguments.number("rotary_percent") not in (None, 1.0):
            now.no_counterpart("rotary_percent", "rotary positions turn whole heads")


def _mamba(now: Translation) -> None:
    arguments = now.arguments
    heads, width, hidden = (arguments.whole(n) for n in ("mamba_num_heads", "mamba_head_dim", "hidden_size"))
    expanded = (
        2 * hidden // width if hidden and width else None
    )  # Megatron-LM: the inner width is twice the hidden size
    now.put("model.mamba_num_heads", heads or expanded)
    if now.overrides.get("model.linear_bias"):
        now.no_counterpart("add_bias_linear", "gives Mamba-2 no biases in Megatron-LM; model.linear_bias does")


def _mlp(now: Translation) -> None:
    now.put("model.ffn_hidden_size", _inner_width(now), "ffn_hidden_size")


def _inner_width(now: Translation) -> int | None:
    """Of an MLP: given, or four times the hidden size, of which an argument list with SwiGLU takes two thirds.

    Source: validate_args in megatron/training/arguments.py; TransformerConfig.__post_init__, for dumps, knows no two thirds.
    """
    hidden, given = now.arguments.whole("hidden_size"), now.arguments.whole("ffn_hidden_size")
    if given or not hidden:
        return given
    return hidden * 8 // 3 // 64 * 64 if now.arguments.flag("swiglu") and now.arguments.defaults else 4 * hidden


def _experts(now: Translation) -> None:
    arguments = now.arguments
    width = arguments.whole("moe_ffn_hidden_size") or _inner_width(now)
    now.put("model.moe_ffn_hidden_size", width, "moe_ffn_hidden_size", "ffn_hidden_size")
    now.put("model.shared_expert_ffn_hidden_size", arguments.whole("moe_shared_expert_intermediate_size") or 0)
    now.put(
        "model.router.expert_bias", arguments.flag("moe_router_enable_expert_bias"), "moe_router_enable_expert_bias"
    )
    if arguments.flag("moe_router_force_load_balancing"):
        now.put("model.router.force_balance", True)
    _scores(now)
    _groups(now)
    _balance(now)


def _scores(now: Translation) -> None:
    """Sigmoid scores are normalised over the chosen experts; softmax ones too unless the softmax comes first."""
    arguments = now.arguments
    score, one = arguments.word("moe_router_score_function"), arguments.whole("moe_router_topk") == 1
    if score not in ("sigmoid", "softmax"):
        if score:
            now.no_counterpart("moe_router_score_function", "scores are sigmoid or softmax")
        return
    now.put("model.router.score", score, "moe_router_score_function")
    first = arguments.flag("moe_router_pre_softmax")
    now.put("model.router.normalize", not one if score == "sigmoid" else not first)


def _groups(now: Translation) -> None:
    """Selection within the best groups, of which both sides have the same kind only for two experts a group.

    Megatron-LM (group_limited_topk) adds up the best topk // group-topk of a group, and takes logits for the scores where the
    softmax comes after the selection; without a group-topk it has no groups.
    """
    arguments = now.arguments
    groups, kept, chosen = (arguments.whole(f"moe_router_{name}") for name in ("num_groups", "group_topk", "topk"))
    if not groups or not kept:
        if groups or kept:
            given = "num_groups" if groups else "group_topk"
            now.contradiction(f"moe_router_{given}", "counts in Megatron-LM only with num-groups and group-topk both")
        return
    on_scores = arguments.word("moe_router_score_function") == "sigmoid" or arguments.flag("moe_router_pre_softmax")
    now.put("model.router.groups", groups)
    now.put("model.router.top_groups", kept)
    if groups > kept and ((chosen or 0) // kept != 2 or not on_scores):
        reason = (
            "a group counts here by the scores of its two best experts; in Megatron-LM by its best topk // group-topk, and by "
            "logits where a softmax comes after the selection"
        )
        now.no_counterpart("moe_router_group_topk", reason)


def _balance(now: Translation) -> None:
    arguments = now.arguments
    kinds = arguments.words("moe_router_load_balancing_type")
    weights = arguments.numbers("moe_aux_loss_coeff")
    if len(kinds) > 1 or any(kind not in AUXILIARY for kind in kinds):
        now.no_counterpart(
            "moe_router_load_balancing_type", "one of none, batch, sequence, global (model.router.aux_loss)"
        )
        return
    weight = weights[0] if weights else 0.0
    kind = AUXILIARY[kinds[0]] if kinds and weight else "none"
    now.put("model.router.aux_loss", kind, "moe_router_load_balancing_type")
    if kind != "none":
        now.put("model.router.aux_loss_weight", weight, "moe_aux_loss_coeff")


def _mtp(now: Translation) -> None:
    weight = now.arguments.number("mtp_loss_scaling_factor")
    now.put("model.mtp.loss_weight", weight, "mtp_loss_scaling_factor")
    repeated = now.arguments.flag("mtp_use_repeated_layer")
    now.put("model.mtp.repeat_block", repeated, "mtp_use_repeated_layer")

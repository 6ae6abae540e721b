"""What is said of arguments that are not translated: why they are not needed, or that we have no such thing."""

import re

from nemohybrid.interop.megatron.arguments import NO_COUNTERPART, NOT_NEEDED

Verdict = tuple[str, str]
"""Kind of the remark, and the reason."""

KERNELS = "kernels are chosen by the machine: speed, not results"
PRECISION = "sums, norms, router, moments and gradients over ranks are always fp32"
RANKS = "how ranks share the work changes no result"
FILES = (
    "everything a run writes lies in run.dir, and the same run.dir resumes; checkpoint.every and .keep say how often"
)
LOGS = "metrics.jsonl has a line a step; logging.tensorboard and logging.wandb send it on"
MEMORY = "corpora are memory-mapped and loaded by the trainer itself"
LOW_PRECISION = "which product has which recipe is all that is translated (precision.recipe, precision.rules)"
STORED = "weights are fp32, sent in model.dtype and quantized where they are multiplied"
PATTERN = "the pattern alone says what the model is"
DISPATCH = "no token is dropped; parallel.dispatcher says who takes tokens to experts on other ranks"
AFTERWARDS = "of inference or reinforcement learning: generation is a command of its own"
WEIGHTS = "weights of other programs come through Hugging Face folders"
RECOMPUTE = "saves memory, changes no result; here whole layers: train.recompute=layer"
SAFETY = "numbers that are not finite stop the run, and a signal saves it; always on"

RULES: tuple[tuple[str, str, str], ...] = (
    (
        r"(no_)?use_(mcore_models|legacy_models)|(mtp_)?spec|is_hybrid_model|model_type|hybrid_stack_spec",
        NOT_NEEDED,
        PATTERN,
    ),
    (r"moe_layer_freq|num_layers|hybrid_(attention|mlp)_ratio|mtp_num_layers", NOT_NEEDED, PATTERN),
    (
        r"transformer_impl|attention_backend|use_(flash_attn|te)|.*_fusion(_impl)?|use_fused_.*|fused_.*",
        NOT_NEEDED,
        KERNELS,
    ),
    (r"persist_layer_norm|no_persist_layer_norm|moe_grouped_gemm|moe_use_legacy_grouped_gemm", NOT_NEEDED, KERNELS),
    (r"apply_query_key_layer_scaling|(no_|disable_|use_)?mamba_mem_eff_path|.*mamba_mem_eff_path", NOT_NEEDED, KERNELS),
    (
        r"deterministic_mode|batch_invariant_mode|enable_experimental|.*cuda_graph.*|.*te_rng_tracker",
        NOT_NEEDED,
        KERNELS,
    ),
    (r"cross_entropy_.*|tp_comm_.*|memory_efficient_layer_norm|gradient_accumulation_fusion", NOT_NEEDED, KERNELS),
    (
        r"attention_softmax_in_fp32|moe_router_dtype|(accumulate_allreduce_grads|grad_reduce)_in_\w+",
        NOT_NEEDED,
        PRECISION,
    ),
    (
        r"(main_grads|main_params|exp_avg|exp_avg_sq|megatron_fsdp_.*|pipeline)_dtype|params_dtype",
        NOT_NEEDED,
        PRECISION,
    ),
    (r"mixed_precision\.(grad_reduce_in_fp32|params_dtype|pipeline_dtype|autocast.*|bf16|fp16)", NOT_NEEDED, PRECISION),
    (
        r"use_distributed_optimizer|overlap_.*|no_overlap_.*|ddp(_.*|\..*)|sequence_parallel|align_\w+",
        NOT_NEEDED,
        RANKS,
    ),
    (r"(data|outer_dp)_.*sharding_strategy|use_(megatron|torch)_fsdp.*|num_distributed_optimizer.*", NOT_NEEDED, RANKS),
    (r"(expert_)?(tensor|pipeline|context|data|expert)_?(tensor)?_?(model)?_?parallel.*", NOT_NEEDED, RANKS),
    (r"virtual_pipeline_.*|num_layers_per_virtual_.*|cp_comm_type|hierarchical_context.*|nccl_.*", NOT_NEEDED, RANKS),
    (r"distributed_.*|disable_gloo_.*|use_gloo_.*|high_priority_stream_groups|local_rank|dist\..*", NOT_NEEDED, RANKS),
    (r"comm_overlap(\..*)?|defer_embedding_.*|delay_wgrad.*|batch_p2p.*|variable_seq_lengths|ddp", NOT_NEEDED, RANKS),
    (r"average_in_collective|use_tp_pp_dp_mapping|init_model_with_meta_device|use_cpu_init\w*", NOT_NEEDED, RANKS),
    (r"save(_.*)?|load(_.*)?|no_(save|load)_.*|ckpt_.*|dist_ckpt_.*|async_.*|auto_detect_ckpt.*", NOT_NEEDED, FILES),
    (r"fully_parallel_.*|non_persistent_.*|use_(dist|persistent)_ckpt.*|most_recent_k|storage_.*", NOT_NEEDED, FILES),
    (r"(override|use_checkpoint)_opt_param_scheduler|exit_.*|train_sync_interval", NOT_NEEDED, FILES),
    (r"log_.*|no_log_.*|tensorboard_.*|wandb_.*|timing_.*|logging_.*|one_logger.*|enable_one_logger", NOT_NEEDED, LOGS),
    (r"tensor_inspect(\..*)?|profil.*|nsys.*|record_memory.*|barrier_with.*|filter_warnings|otel.*", NOT_NEEDED, LOGS),
    (
        r"(no_)?mmap_bin_files|num_workers|data_cache_path|path_to_cache|dataloader_type|data_sharding",
        NOT_NEEDED,
        MEMORY,
    ),
    (r"(no_|skip_).*attention_mask.*|create_attention_mask.*|num_dataset_builder_threads", NOT_NEEDED, MEMORY),
    (r"random_seed|pin_memory|persistent_workers|object_storage.*|data_parallel_random_init", NOT_NEEDED, MEMORY),
    (r"moe_(token_dispatcher|flex|hybridep|deepep|enable_deepep|permute|router_padding).*", NOT_NEEDED, DISPATCH),
    (
        r"moe_(shared_expert_overlap|per_layer_logging|pad_expert_input.*|router_fusion|extended_tp)",
        NOT_NEEDED,
        DISPATCH,
    ),
    (
        r"make_vocab_size_divisible_by|should_pad_vocab",
        NOT_NEEDED,
        "rows need no padding; model.vocab_multiple adds some",
    ),
    (r"max_position_embeddings", NOT_NEEDED, "any length can be computed; data.sequence_length is the training one"),
    (r"calculate_per_token_loss", NOT_NEEDED, "the loss is always the mean over the tokens of the global batch"),
    (
        r"tokenizer_type|tiktoken_.*|vocab_extra_ids|hf_tokenizer_kwargs",
        NOT_NEEDED,
        "data.tokenizer is told by its file",
    ),
    (r"eval_iters|eval_global_batch_size|eval_micro_batch_size", NOT_NEEDED, "the whole validation corpus is scored"),
    (r"check_.*|rerun_.*|manual_gc.*|error_injection.*|straggler.*|.*straggler.*", NOT_NEEDED, SAFETY),
    (r"nvrx_.*|ft(\..*)?|inprocess_restart.*|rerun_state_machine\..*|empty_unused_memory_level", NOT_NEEDED, SAFETY),
    (r"(.*_)?recompute(_.*)?|(distribute_saved|checkpoint)_activations", NOT_NEEDED, RECOMPUTE),
    (r"group_query_attention", NOT_NEEDED, "model.num_query_groups says it"),
    (r"rotary_.*|no_rope.*|use_rotary.*|rope_.*|mrope.*", NOT_NEEDED, "attention has no rotary positions here"),
    (r"inference_.*|rl_.*|grpo_.*|langrl_.*|model_temperature|flash_decode|enable_chunked.*", NOT_NEEDED, AFTERWARDS),
    (
        r"env_vars(\..*)?|hf_model_id|hf_model_revision|language_model_type|_.*",
        NOT_NEEDED,
        "of the launcher, not of the model",
    ),
    (
        r"(mixed_precision\.)?((fp8|fp4)_param(_gather)?|fp8_interval|reuse_grad_buf.*)",
        NOT_NEEDED,
        STORED,
    ),
    (r"(mixed_precision\.)?(fp8|fp4)_.*|keep_.*_in_bf16|tp_only_amax_red", NO_COUNTERPART, LOW_PRECISION),
    (r"mixed_precision\..*", NO_COUNTERPART, LOW_PRECISION),
    (
        r"use_precision_aware_optimizer|optimizer_cpu_offload|.*offload.*",
        NO_COUNTERPART,
        "moments and weights stay fp32, on the device",
    ),
    (r"pretrained_checkpoint|finetune|peft(\..*)?|lora.*", NO_COUNTERPART, WEIGHTS),
    (
        r"(per_split_)?data_args_path|test_data_path|mock_data|blend_per_split",
        NO_COUNTERPART,
        "write the corpora into data.train and data.valid",
    ),
    (
        r"moe_(token_drop|expert_capacity|input_jitter|apply_probs|router_topk_limited|shared_expert_gate|upcycling).*",
        NO_COUNTERPART,
        "experts are dropless and weigh as the router says",
    ),
    (r"mtp_detach_heads|mtp_hsm.*", NO_COUNTERPART, "MTP is trained with the model, depth by depth"),
    (
        r"window_size|window_attn.*|multi_latent_attention|.*_lora_rank|.*softmax_type|qk_clip.*|qk_l2_norm",
        NO_COUNTERPART,
        "attention is causal over the whole document, with grouped queries",
    ),
    (r"decoupled_.*|muon_.*|sgd_.*|adaptive_.*", NO_COUNTERPART, "AdamW with one rate is the only optimizer"),
    (
        r"loss_scale|initial_loss_scale|min_loss_scale|hysteresis|loss_scale_window",
        NO_COUNTERPART,
        "bfloat16 and fp32 need no loss scale",
    ),
    (
        r"init_method_xavier_uniform|embedding_init_method_std|use_mup|mup_.*",
        NO_COUNTERPART,
        "weights are drawn with model.init_std",
    ),
    (
        r"apply_layernorm_1p|apply_residual_connection_post_layernorm|fp32_residual_connection",
        NO_COUNTERPART,
        "norms are RMSNorms before the mixer; the residual stream is in model.dtype",
    ),
)
"""Argument (a regular expression for the whole name), kind, reason; the first that fits counts."""

SYMBOL_OF = {"mamba_": ("M", "Mamba-2"), "moe_": ("E", "MoE"), "num_experts": ("E", "MoE"), "mtp_": ("/", "MTP")}
"""Beginning of a name -> what the pattern must have for it to mean anything."""

SIZES = {"ffn_hidden_size": ("-", "MLP"), "num_attention_heads": ("*", "attention"), "kv_channels": ("*", "attention")}


def verdict(name: str, pattern: str) -> Verdict | None:
    """What is said of an argument that nothing was made of; None for one we have never heard of."""
    for beginning, (symbol, kind) in (SYMBOL_OF | SIZES).items():
        if name.startswith(beginning) and pattern and symbol not in pattern:
            return NOT_NEEDED, f"the pattern has no {kind} layer"
    for expression, kind, reason in RULES:
        if re.fullmatch(expression, name):
            return kind, reason
    return None

"""Arguments of the run: batch, schedule, optimizer, data."""

import math
from typing import Any

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.training import BatchRampConfig, TrainSection
from nemohybrid.interop.megatron.counterparts import RECOMPUTE
from nemohybrid.interop.megatron.translation import Translation

SHAPES = ("linear", "cosine", "exponential", "minus_sqrt")
"""Of the WSD decay; the names are the same here."""


def translate_training(now: Translation) -> None:
    """Everything that is not the network."""
    _batch(now)
    _schedule(now)
    _optimizer(now)
    _data(now)
    _run(now)


def _batch(now: Translation) -> None:
    arguments = now.arguments
    now.put("train.global_batch", arguments.whole("global_batch_size"))
    now.put("train.microbatch", arguments.whole("micro_batch_size"))
    if "train.global_batch" not in now.overrides:
        now.to_give(
            "train.global_batch", "the file has no global-batch-size: Megatron-LM's depends on the number of ranks"
        )
    ramp = arguments.numbers("rampup_batch_size")
    if len(ramp) == 3:
        for key, value in zip(("start", "increment", "samples"), ramp, strict=True):
            now.put(f"train.batch_ramp.{key}", int(value))
    now.put("train.steps", _steps(now))
    if "train.steps" not in now.overrides:
        now.to_give("train.steps", "the file has neither train-iters nor train-samples")


def _steps(now: Translation) -> int | None:
    """Iterations; from samples as Megatron-LM counts them, whole batches with the ramp."""
    arguments = now.arguments
    steps, samples = arguments.whole("train_iters"), arguments.whole("train_samples")
    if steps and samples:
        now.contradiction(
            "train_samples", "train-iters is given too; Megatron-LM takes only one. train-iters counts here"
        )
    batch = now.overrides.get("train.global_batch")
    if steps or not samples or not batch:
        return steps
    ramp = BatchRampConfig(
        **{k: now.overrides.get(f"train.batch_ramp.{k}", v) for k, v in vars(BatchRampConfig()).items()}
    )
    if min(batch, ramp.start or 1, ramp.increment) < 1 or (ramp.start or 0) > batch:
        return None  # the configuration says what is wrong with these
    plan = BatchPlan(TrainSection(global_batch=batch, batch_ramp=ramp), sequence_length=1)
    low, high = 0, samples // (ramp.start or batch) + 1
    while low < high:  # the most steps that samples are enough for
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan.samples_before(middle + 1) <= samples else (low, middle - 1)
    return max(1, low)


def _schedule(now: Translation) -> None:
    """Counted in samples where the run is, else in steps."""
    arguments = now.arguments
    by_samples = arguments.has("train_samples") and not arguments.has("train_iters")
    unit, other = ("samples", "iters") if by_samples else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if arguments.number(f"{name}_{other}"):
            now.contradiction(f"{name}_{other}", f"the run is counted in {unit}; Megatron-LM takes only one of the two")
    now.put("schedule.unit", "samples" if by_samples else "steps")
    total = arguments.whole(f"lr_decay_{unit}")
    now.put("schedule.total", total)
    end = total or (arguments.whole("train_samples") if by_samples else now.overrides.get("train.steps"))
    warmup = _warmup(now, unit)
    now.put("schedule.warmup", warmup)
    _decay(now, unit, warmup, end)
    if arguments.number("lr_warmup_init"):
        now.no_counterpart("lr_warmup_init", "the warmup begins at zero")


def _warmup(now: Translation, unit: str) -> float:
    fraction, length = now.arguments.number("lr_warmup_fraction"), now.arguments.number(f"lr_warmup_{unit}")
    if fraction and length:
        now.contradiction("lr_warmup_fraction", f"lr-warmup-{unit} is given too; Megatron-LM takes only one")
    return length or fraction or 0


def _decay(now: Translation, unit: str, warmup: float, end: int | None) -> None:
    """The shape after the warmup, and where it ends."""
    arguments = now.arguments
    style = arguments.word("lr_decay_style")
    if style == "WSD":
        _wsd(now, unit)
    elif style in ("cosine", "constant"):
        now.put("schedule.name", style, "lr_decay_style")
    elif style == "linear":  # the whole way from the warmup on
        now.put("schedule.name", "wsd", "lr_decay_style")
        now.put("schedule.decay_style", "linear", "lr_decay_style")
        share = warmup * end if end and warmup < 1 else warmup
        now.put("schedule.decay", end - share if end else None)
    elif style:
        now.no_counterpart("lr_decay_style", "schedules are wsd, cosine and constant (schedule.name)")
    peak, low = arguments.number("lr"), arguments.number("min_lr")
    if peak and low is not None and style != "constant":
        now.put("schedule.min_lr_ratio", float(f"{low / peak:.12g}"), "min_lr")


def _wsd(now: Translation, unit: str) -> None:
    arguments = now.arguments
    length, shape = arguments.number(f"lr_wsd_decay_{unit}"), arguments.word("lr_wsd_decay_style")
    now.put("schedule.name", "wsd")
    now.put("schedule.decay", length)
    if length is None:
        now.contradiction("lr_decay_style", f"Megatron-LM wants lr-wsd-decay-{unit} with it; give schedule.decay")
    if shape in SHAPES:
        now.put("schedule.decay_style", shape, "lr_wsd_decay_style")
    elif shape:
        now.no_counterpart("lr_wsd_decay_style", f"decays are {', '.join(SHAPES)} (schedule.decay_style)")


def _optimizer(now: Translation) -> None:
    arguments = now.arguments
    now.put("optim.lr", arguments.number("lr"))
    if "optim.lr" not in now.overrides:
        now.to_give("optim.lr", "the file has no lr")
    for name, key in {
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "adam_eps": "eps",
        "weight_decay": "weight_decay",
    }.items():
        now.put(f"optim.{key}", arguments.number(name), name)
    clip = arguments.number("clip_grad")
    if clip == 0:  # never, in Megatron-LM
        now.overrides["optim.clip_grad_norm"] = None
    else:
        now.put("optim.clip_grad_norm", clip, "clip_grad")
    if arguments.word("optimizer") not in (None, "adam"):
        now.no_counterpart("optimizer", "AdamW is the only optimizer")
    if arguments.flag("no_weight_decay_cond_type") or arguments.flag("no_decoupled_weight_decay"):
        now.no_counterpart("no_decoupled_weight_decay", "weight decay is decoupled (AdamW), and spares vectors alone")
    for name in ("start_weight_decay", "end_weight_decay"):
        if arguments.number(name) not in (None, arguments.number("weight_decay")):
            now.no_counterpart(name, "weight decay stays what it is over the run")


def _data(now: Translation) -> None:
    arguments = now.arguments
    now.put("data.sequence_length", arguments.whole("seq_length"))
    if "data.sequence_length" not in now.overrides:
        now.to_give("data.sequence_length", "the file does not say it")
    longest = arguments.whole("max_position_embeddings")
    if longest and longest < now.overrides.get("data.sequence_length", 0):
        now.contradiction("max_position_embeddings", "is less than seq-length, which Megatron-LM refuses")
    resets = arguments.flag("reset_attention_mask") or arguments.flag("reset_position_ids")
    now.put("data.reset_documents", resets, "reset_attention_mask")
    if arguments.flag("eod_mask_loss"):
        now.no_counterpart("eod_mask_loss", "the end of a document is a token to predict like any other")
    train = _corpora(now, "data_path") or _corpora(now, "train_data_path")
    now.put("data.train", train)
    if train is None:
        now.to_give(
            "data.train", "PREFIX of a corpus, or '{prefix: weight, ...}'; corpora of Megatron-LM are read as they are"
        )
    _held_out(now)
    _tokenizer(now)


def _corpora(now: Translation, name: str) -> str | dict[str, float] | None:
    """`prefix`, `weight prefix weight prefix ...`, or [[prefixes], [weights]] of a dump."""
    value = now.arguments.take(name)
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], list):
        return _weighted(now, name, value[0], value[1] or [1.0] * len(value[0]))
    words = now.arguments.words(name)
    if len(words) == 1:
        return words[0]
    if len(words) % 2 or not all(_is_number(word) for word in words[::2]):
        return dict.fromkeys(words, 1.0) or None
    blend = _weighted(now, name, words[1::2], words[::2])
    return next(iter(blend)) if blend and len(blend) == 1 else blend


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _weighted(now: Translation, name: str, prefixes: list[Any], weights: Any) -> dict[str, float] | None:
    """{prefix: weight}; None, and a remark, when they do not match."""
    fits = isinstance(weights, list) and len(weights) == len(prefixes) and all(_is_number(str(w)) for w in weights)
    if not fits or len(set(map(str, prefixes))) < len(prefixes):
        now.contradiction(name, "is no list of different corpora with a weight each; give data.train or data.valid")
        return None
    return {str(prefix): float(weight) for prefix, weight in zip(prefixes, weights, strict=True)} or None


def _held_out(now: Translation) -> None:
    """Validation corpora, or a share of the training corpora."""
    arguments = now.arguments
    valid = _corpora(now, "valid_data_path")
    if isinstance(valid, dict):
        now.put("data.valid", {prefix.rpartition("/")[2]: prefix for prefix in valid})
        now.not_needed("valid_data_path", "the weights: each validation corpus is scored by itself")
    else:
        now.put("data.valid", valid)
    split = arguments.numbers("split")
    if split and not valid:
        now.put("data.split", split)
    elif now.overrides.get("data.train") is not None and arguments.has("data_path") and arguments.defaults:
        now.put("data.split", [969.0, 30.0, 1.0], "split")
    held_out = "data.valid" in now.overrides or len(now.overrides.get("data.split", [])) > 1
    every = arguments.whole("eval_interval")
    if held_out and now.overrides.get("data.train") is not None:
        now.put("train.evaluate_every", every)
    elif every:
        now.not_needed("eval_interval", f"until there is validation data; then train.evaluate_every={every}")


def _tokenizer(now: Translation) -> None:
    """A file that we can read; the names of others are for the user to look up."""
    model = now.arguments.take("tokenizer_model")
    if isinstance(model, str) and model.endswith((".json", ".model")) and "$" not in model:
        now.put("data.tokenizer", model)
    elif model:
        reason = "a tokenizer.json or tokenizer.model, for text in and out; training itself needs only model.vocab_size"
        now.to_give("data.tokenizer", reason)
    if "model.vocab_size" not in now.overrides:
        reason = "where the corpus does not say it: as many rows as the tokenizer has ids"
        now.to_give("model.vocab_size", reason)


def _run(now: Translation) -> None:
    arguments = now.arguments
    now.put("run.seed", arguments.whole("seed"))
    now.put("checkpoint.every", arguments.whole("save_interval"))
    now.put("logging.every", arguments.whole("log_interval"))
    _ranks(now)
    granularity = arguments.word("recompute_granularity")
    if granularity == "full":
        now.put("train.recompute", "layer")
    elif granularity or arguments.flag("recompute_activations"):
        now.not_needed("recompute_granularity", RECOMPUTE)


def _ranks(now: Translation) -> None:
    """How the world is divided. A pipeline without "|" is cut by cost here, and evenly in Megatron-LM."""
    arguments = now.arguments
    tensor = arguments.whole("tensor_model_parallel_size") or 1
    if tensor > 1:
        now.put("parallel.tensor", tensor)
        now.put("parallel.sequence", arguments.flag("sequence_parallel"))
    if (pipeline := arguments.whole("pipeline_model_parallel_size") or 1) > 1:
        now.put("parallel.pipeline", pipeline)
    expert, width = arguments.whole("expert_model_parallel_size") or 1, arguments.whole("expert_tensor_parallel_size")
    if expert > 1:
        now.put("parallel.expert", expert)
    if (width or tensor) != (1 if expert > 1 else tensor):  # what is empty means something else there
        now.put("parallel.expert_tensor", width or tensor)
    if (arguments.whole("context_parallel_size") or 1) > 1:
        reason = "this version cannot lay it out yet; parallel.context is the key"
        now.no_counterpart("context_parallel_size", reason)

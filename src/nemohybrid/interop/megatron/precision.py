"""Arguments of FP8 and FP4, and files that say it for each module: `--te-precision-config-file`."""

from pathlib import Path
from typing import Any, NamedTuple

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.products import products
from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.files import read_yaml
from nemohybrid.interop.megatron.module_names import rule_for
from nemohybrid.interop.megatron.translation import Translation
from nemohybrid.precision.place import Place
from nemohybrid.symbols import parse_pattern

RECIPES = {
    "delayed": ("fp8_delayed", "hybrid"),
    "tensorwise": ("fp8_current", "hybrid"),
    "blockwise": ("fp8_block", "e4m3"),
    "mxfp8": ("mxfp8", "e4m3"),
    "nvfp4": ("nvfp4", "e2m1"),
}
"""Recipe there -> ours, and its format: hybrid means gradients in E5M2."""


class Mixed(NamedTuple):
    """What a preset of Megatron-Bridge (training/mixed_precision.py) stands for; layers at either end stay in BF16."""

    format: str
    recipe: str
    first: int = 0
    last: int = 0


PRESETS = {
    "bf16_with_fp8_delayed_scaling_mixed": Mixed("hybrid", "delayed"),
    "bf16_with_fp8_current_scaling_mixed": Mixed("hybrid", "tensorwise", 1, 1),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": Mixed("hybrid", "tensorwise", 2, 2),
    "nanov2_bf16_with_fp8_current_scaling_mixed": Mixed("hybrid", "blockwise", 2, 2),  # in spite of its name
    "bf16_with_fp8_subchannel_scaling_mixed": Mixed("hybrid", "blockwise"),
    "bf16_with_mxfp8_mixed": Mixed("e4m3", "mxfp8"),
    "bf16_with_nvfp4_mixed": Mixed("e2m1", "nvfp4"),
    "nemotron_3_super_bf16_with_nvfp4_mixed": Mixed("e2m1", "nvfp4", 0, 14),
}
CONFIG_FILE = "te_precision_config_file"


def translate_precision(now: Translation, folder: Path) -> None:
    """`precision.recipe` and `precision.rules`. folder: where the file with the arguments lies; another may lie there too."""
    mixed = _preset(now) or _given(now)
    recipe = None if mixed is None else _recipe(now, mixed)
    ends: list[int | str] = []
    if mixed is not None and recipe is not None:
        now.put("precision.recipe", recipe)
        ends = [f"{end} {count}" for end, count in (("first", mixed.first), ("last", mixed.last)) if count]
        if ends and mixed.recipe == "delayed":
            now.contradiction("first_last_layers_bf16", "Megatron-LM refuses it with delayed scaling; here it counts")
    rules = _rules_of_file(now, folder, recipe, ends)
    if recipe is not None and now.arguments.flag("keep_mtp_spec_in_bf16"):
        rules.insert(0, {"kind": "mtp", "recipe": "bf16"})
    if rules:
        now.put("precision.rules", rules)


def _preset(now: Translation) -> Mixed | None:
    name = now.arguments.word("mixed_precision.mixed_precision")
    if name in (None, "bf16_mixed", *PRESETS):
        return PRESETS.get(name or "")
    now.no_counterpart("mixed_precision.mixed_precision", "no such preset is known here; give precision=...")
    return None


def _given(now: Translation) -> Mixed | None:
    """From arguments of their own, which a dump has in `model` or in `mixed_precision`."""
    fp8, fp4 = (_word(now, f"{kind}_format") or _word(now, kind) for kind in ("fp8", "fp4"))
    ends = _whole(now, "num_layers_at_start_in_bf16", 1), _whole(now, "num_layers_at_end_in_bf16", 1)
    first, last = ends if _flag(now, "first_last_layers_bf16") else (0, 0)
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if now.arguments.has(name) and not first + last and now.arguments.defaults:
            now.contradiction(name, "has no effect in Megatron-LM without --first-last-layers-bf16")
    if fp8 and fp4:
        now.contradiction("fp4_format", "Megatron-LM takes FP8 or FP4, not both; FP4 counts")
    if fp4:
        return Mixed(fp4, _word(now, "fp4_recipe") or "nvfp4", first, last)
    return Mixed(fp8, _word(now, "fp8_recipe") or "delayed", first, last) if fp8 else None


def _word(now: Translation, name: str) -> str | None:
    return now.arguments.word(f"mixed_precision.{name}") or now.arguments.word(name)


def _flag(now: Translation, name: str) -> bool:
    return now.arguments.flag(f"mixed_precision.{name}") or now.arguments.flag(name)


def _whole(now: Translation, name: str, default: int) -> int:
    found = now.arguments.whole(f"mixed_precision.{name}"), now.arguments.whole(name)
    return next((number for number in found if number is not None), default)


def _recipe(now: Translation, mixed: Mixed) -> str | None:
    """Ours; None where there is none."""
    source = next((name for name in _SOURCES if now.arguments.has(name)), _SOURCES[0])
    if mixed.recipe not in RECIPES:
        now.no_counterpart(source, f"{mixed.recipe} is a recipe of the user's own code")
        return None
    recipe, expected = RECIPES[mixed.recipe]
    if mixed.format != expected:
        now.no_counterpart(source, f"{recipe} has gradients in {'E5M2' if expected == 'hybrid' else 'E4M3'} here")
    if recipe == "fp8_delayed" and (_whole(now, "fp8_amax_history_len", 1), _word(now, "fp8_amax_compute_algo")) != (
        1024,
        "max",
    ):
        now.no_counterpart(source, "delayed scaling takes the largest of 1024 steps here")
    return recipe


_SOURCES = (
    "mixed_precision.mixed_precision",
    "fp8_recipe",
    "fp4_recipe",
    "fp8_format",
    "fp4_format",
    "fp8",
    "fp4",
    "mixed_precision.fp8_recipe",
    "mixed_precision.fp4_recipe",
    "mixed_precision.fp8",
    "mixed_precision.fp4",
)


# --- a file of its own: configs, and matchers in order (core/quantization/quant_config.py) ------------------------------


class Matcher(NamedTuple):
    """The products that a matcher means, in our words, and what they have where the arguments quantize, and where they do not.

    None: they keep what the arguments say.
    """

    meant: dict[str, Any]
    quantized: str | None
    unquantized: str | None


def _rules_of_file(now: Translation, folder: Path, recipe: str | None, ends: list[int | str]) -> list[dict[str, Any]]:
    """Rules for matchers, and for the layers at either `end` that the arguments leave in BF16, which most matchers respect."""
    matchers = _matchers(now, folder)
    at_ends, others = [], []
    for of in matchers:
        if recipe is None:
            others += [of.meant | {"recipe": of.unquantized}] if of.unquantized else []
            continue
        if ends and any(matcher.unquantized for matcher in matchers) and "kind" not in of.meant:
            at_ends.append(of.meant | {"layers": ends, "recipe": of.unquantized or "bf16"})
        others.append(of.meant | {"recipe": of.quantized or recipe})
    if ends and recipe is not None:
        at_ends.append({"layers": ends if len(ends) > 1 else ends[0], "recipe": "bf16"})
    if recipe is None and others:
        now.put("precision.recipe", "bf16")
    return [*at_ends, *others]


def _matchers(now: Translation, folder: Path) -> list[Matcher]:
    written = _written(now, folder)
    if written is None:
        return []
    places = _places(now)
    if not places:
        now.no_counterpart(CONFIG_FILE, "which products it means is not known without a pattern; give precision.rules")
        return []
    configs, matchers = written.get("configs"), written.get("matchers")
    if not isinstance(configs, dict) or not isinstance(matchers, dict):
        now.no_counterpart(CONFIG_FILE, "has no configs and matchers; give precision.rules")
        return []
    found = (_matcher(now, str(name), of, configs, places) for name, of in matchers.items())
    return [matcher for matcher in found if matcher is not None]


def _written(now: Translation, folder: Path) -> dict[str, Any] | None:
    """The file, where it lies as the arguments say, or beside them."""
    value = now.arguments.take(CONFIG_FILE) or now.arguments.take("quant_recipe")
    if isinstance(value, dict) or value is None:
        return value
    name = now.arguments.word(CONFIG_FILE)
    path = next((p for p in (folder / (name or ""), folder / Path(name or "").name) if name and p.is_file()), None)
    if path is None:
        now.to_give("precision.rules", f"they are in {value}, which is not here; put it beside this file")
        return None
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: has no configs and matchers")
    return values


def _places(now: Translation) -> list[Place]:
    """The products of the model that has been translated so far."""
    text = now.overrides.get("model.pattern")
    if text is None:
        return []
    model = ModelConfig(pattern=text)
    model.moe_latent_size = now.overrides.get("model.moe_latent_size")
    model.shared_expert_ffn_hidden_size = now.overrides.get("model.shared_expert_ffn_hidden_size")
    model.mtp.repeat_block = bool(now.overrides.get("model.mtp.repeat_block"))
    return products(model, parse_pattern(text))


def _matcher(now: Translation, name: str, of: Any, configs: dict[str, Any], places: list[Place]) -> Matcher | None:
    """None for one that is off, that means none of our products, or that has no counterpart, which is said."""

    def refuse(why: str) -> None:
        now.no_counterpart(CONFIG_FILE, f"matcher {name}: {why}")

    if not isinstance(of, dict) or of.get("enabled", False) is not True:
        return None
    glob, config = of.get("pattern"), configs.get(str(of.get("config")))
    if of.get("type") != "glob" or not isinstance(glob, str):
        return refuse("is no glob")
    if not isinstance(config, dict) or not isinstance(config.get("training_recipe"), dict):
        return refuse(f"the config {of.get('config')} has no training_recipe")
    training = config["training_recipe"]
    if config.get("evaluation_recipe", training) != training:
        refuse("evaluation multiplies as training does here")
    meant = rule_for(glob, places)
    theirs = training.get("fp4_quantization_recipe") or training.get("fp8_quantization_recipe")
    if meant is None:
        say = now.no_counterpart if theirs else now.not_needed
        say(CONFIG_FILE, f"matcher {name}: {glob} means none of the products that can be quantized here")
        return None
    if theirs is not None and theirs not in RECIPES:
        return refuse(f"{theirs} is a recipe of the user's own code")
    recipe, expected = RECIPES[theirs] if theirs else ("bf16", None)
    if expected in ("hybrid", "e4m3") and training.get("fp8_format", "e4m3") != expected:
        refuse(f"{recipe} has gradients in {'E5M2' if expected == 'hybrid' else 'E4M3'} here")
    return Matcher(
        meant,
        recipe if training.get("override_quantized_autocast", True) else None,
        recipe if training.get("override_nonquantized_autocast", False) else None,
    )

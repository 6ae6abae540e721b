"""Arguments of FP8 and FP4, and per-module files, become recipes and rules that mean the same products."""

import fnmatch
from pathlib import Path

import pytest
import yaml

from nemohybrid.config.compose import load_config
from nemohybrid.config.precision import policy_of
from nemohybrid.config.products import products
from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.arguments import CONTRADICTION, NO_COUNTERPART, NOT_NEEDED, TO_GIVE, UNKNOWN
from nemohybrid.interop.megatron.module_names import megatron_name
from nemohybrid.interop.megatron.output import override_words
from nemohybrid.interop.megatron.precision import PRESETS
from nemohybrid.interop.megatron.translate import translate
from nemohybrid.interop.megatron.translation import Translation
from nemohybrid.symbols import parse_pattern

SUPER = Path(__file__).parent / "fixtures" / "megatron" / "nemotron3_super.yaml"
QUANTIZED = """  --fp8-format: e4m3
  --fp8-recipe: mxfp8
  --fp8-param-gather: true
  --first-last-layers-bf16: true
  --num-layers-at-end-in-bf16: 14
"""
NVFP4 = "  --fp4-format: e2m1\n  --fp4-recipe: nvfp4\n"
ENDS = "  --first-last-layers-bf16: true\n  --num-layers-at-start-in-bf16: 0\n  --num-layers-at-end-in-bf16: 14\n"
FILE = "  --te-precision-config-file: /lustre/somewhere/te_quant.cfg\n"


@pytest.fixture
def translated(tmp_path):
    """`translated(NVFP4 + ENDS, file={...})`: Super's arguments with other words on precision, and a file beside them."""

    def run(words: str, file: dict | None = None) -> Translation:
        text = SUPER.read_text()
        assert QUANTIZED in text
        (tmp_path / "model_config.yaml").write_text(text.replace(QUANTIZED, words))
        if file is not None:
            (tmp_path / "te_quant.cfg").write_text(yaml.safe_dump(file, sort_keys=False))
        return translate(tmp_path / "model_config.yaml")

    return run


def remarks(now: Translation, kind: str) -> str:
    return "\n".join(f"{r.subject}: {r.reason}" for r in now.remarks if r.kind == kind)


def matcher(pattern: str, config: str, **changes) -> dict:
    return {"type": "glob", "enabled": True, "pattern": pattern, "config": config} | changes


def config(**training) -> dict:
    return {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": training}


CONFIGS = {
    "bf16": config(),
    "mxfp8": config(fp8_quantization_recipe="mxfp8"),
    "nvfp4": config(fp4_quantization_recipe="nvfp4"),
    "always": config(fp8_quantization_recipe="mxfp8", override_nonquantized_autocast=True),
    "never": config(fp8_quantization_recipe="mxfp8", override_quantized_autocast=False),
    "theirs": config(fp8_quantization_recipe="custom"),
}
TE_QUANT = {  # that of Nemotron 3 Super, as it has been described
    "qkv": matcher("*.linear_qkv", "bf16"),
    "proj": matcher("*.linear_proj", "bf16"),
    "latent": matcher("*mlp.fc[12]_latent_proj", "bf16"),
    "mtp": matcher("mtp.*", "bf16"),
    "out_proj": matcher("*mixer.out_proj", "mxfp8"),
}


def recipes(now: Translation) -> dict[str, str]:
    """Product -> its recipe, as a run would have it."""
    words = [w for w in override_words(now) if w.startswith(("model.", "precision."))]
    composed = load_config([*words, "data=shakespeare", "model.vocab_size=1024"])
    places = products(composed.model, parse_pattern(composed.model.pattern))
    return {place.name: policy_of(composed.precision).of(place).recipe.name for place in places}


def wanted(now: Translation, matchers: dict, default: str, ends: set[int]) -> dict[str, str]:
    """What Megatron-LM would do, product by product: its matchers over its names, first match wins."""
    result = {}
    text = now.overrides["model.pattern"]
    composed = load_config([w for w in override_words(now) if w.startswith("model.")] + ["data=shakespeare"])
    for place in products(composed.model, parse_pattern(text)):
        fits = (m for m in matchers.values() if m["enabled"] and fnmatch.fnmatch(megatron_name(place), m["pattern"]))
        training = CONFIGS[m["config"]]["training_recipe"] if (m := next(fits, None)) else {}
        own = training.get("fp4_quantization_recipe") or training.get("fp8_quantization_recipe") or "bf16"
        if default == "bf16" or (place.layer in ends and not place.mtp):
            result[place.name] = own if training.get("override_nonquantized_autocast") else "bf16"
        else:
            overrides = m is not None and training.get("override_quantized_autocast", True)
            result[place.name] = own if overrides else default
    return result


LAST = set(range(74, 88))


@pytest.mark.parametrize(
    "words, default, ends", [(NVFP4 + ENDS, "nvfp4", LAST), (NVFP4, "nvfp4", set()), ("", "bf16", set())]
)
@pytest.mark.parametrize(
    "matchers",
    [
        TE_QUANT,
        TE_QUANT | {"rest": matcher("*", "mxfp8")},
        {"one": matcher("decoder.layers.1.mlp.experts.linear_fc1", "mxfp8")} | TE_QUANT,
        {"experts": matcher("*mlp.experts.*", "nvfp4"), "rest": matcher("*", "bf16")},
        {"ends": matcher("decoder.layers.8[0-7].*", "always"), "qkv": matcher("*.linear_qkv", "bf16")},
        {"kept": matcher("*.out_proj", "never"), "rest": matcher("*", "mxfp8")},
        {"off": matcher("*", "mxfp8", enabled=False), "shared": matcher("*shared_experts*", "always")},
    ],
)
def test_every_product_has_the_recipe_that_megatron_gives_it(matchers, words, default, ends, translated):
    now = translated(words + FILE, {"configs": CONFIGS, "matchers": matchers})
    assert recipes(now) == wanted(now, matchers, default, ends)


def test_the_file_of_super_gives_its_preset(translated):
    now = translated(NVFP4 + ENDS + FILE, {"configs": CONFIGS, "matchers": TE_QUANT})
    composed = load_config(["model=nemotron3_super", "precision=nemotron3_super_nvfp4", "data=shakespeare"])
    places = products(composed.model, parse_pattern(composed.model.pattern))
    assert recipes(now) == {place.name: policy_of(composed.precision).of(place).recipe.name for place in places}
    assert {"role": "out_proj", "recipe": "mxfp8"} in now.overrides["precision.rules"], "roles are read more easily"


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", None),
        ("  --fp8-format: hybrid\n  --fp8-recipe: tensorwise\n", "fp8_current"),
        ("  --fp8-format: hybrid\n", "fp8_delayed"),
        ("  --fp8-format: e4m3\n  --fp8-recipe: blockwise\n", "fp8_block"),
        ("  --fp8-format: e4m3\n  --fp8-recipe: mxfp8\n", "mxfp8"),
        (NVFP4, "nvfp4"),
        ("  --fp4-format: e2m1\n", "nvfp4"),
    ],
)
def test_a_recipe_has_its_name_here(words, expected, translated):
    now = translated(words)
    assert now.overrides.get("precision.recipe") == expected
    assert "precision.rules" not in now.overrides
    assert remarks(now, UNKNOWN) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_bridge_are_known(name, tmp_path):
    dump = {"model": {"hybrid_layer_pattern": "M-*E", "hidden_size": 64, "fp8": None}, "mixed_precision": name}
    (tmp_path / "dump.yaml").write_text(yaml.safe_dump(dump))
    now = translate(tmp_path / "dump.yaml")
    ends = [f"first {PRESETS[name].first}", f"last {PRESETS[name].last}"]
    rules = now.overrides.get("precision.rules", [])
    assert now.overrides["precision.recipe"] != "bf16"
    assert len(rules) == bool(PRESETS[name].last)
    if rules:
        assert rules[0]["layers"] == (ends if PRESETS[name].first else ends[1])


def test_a_dump_may_have_it_field_by_field(tmp_path):
    fields = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    fields |= {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 3, "fp8_param": True}
    for section in ("model", "mixed_precision"):
        model = {"hybrid_layer_pattern": "M-*E", "hidden_size": 64}
        dump = {"model": model, "mixed_precision": {}} if section == "mixed_precision" else {"model": model}
        dump[section] = dump[section] | fields
        (tmp_path / "dump.yaml").write_text(yaml.safe_dump(dump))
        now = translate(tmp_path / "dump.yaml")
        assert now.overrides["precision.recipe"] == "fp8_current", section
        assert now.overrides["precision.rules"] == [{"layers": ["first 2", "last 3"], "recipe": "bf16"}], section
        assert remarks(now, UNKNOWN) == ""


@pytest.mark.parametrize(
    "words, kind, said",
    [
        ("  --fp8-format: hybrid\n" + ENDS, CONTRADICTION, "refuses it with delayed scaling"),
        ("  --fp8-format: hybrid\n" + NVFP4, CONTRADICTION, "FP8 or FP4, not both"),
        (NVFP4 + "  --num-layers-at-end-in-bf16: 14\n", CONTRADICTION, "without --first-last-layers-bf16"),
        (NVFP4 + FILE, TO_GIVE, "te_quant.cfg, which is not here; put it beside this file"),
        (NVFP4 + "  --fp4-param-gather: true\n", NOT_NEEDED, "quantized where they are multiplied"),
    ],
)
def test_what_does_not_go_together_or_is_not_there_is_said(words, kind, said, translated):
    assert said in remarks(translated(words), kind)


@pytest.mark.parametrize(
    "of, said",
    [
        (matcher("*", "theirs"), "the user's own code"),
        (matcher("*", "nowhere"), "the config nowhere has no training_recipe"),
        (matcher("*", "mxfp8", type="regex"), "is no glob"),
        (matcher("*router*", "mxfp8"), "means none of the products that can be quantized here"),
    ],
)
def test_a_matcher_without_a_counterpart_is_named(of, said, translated):
    now = translated(NVFP4 + FILE, {"configs": CONFIGS, "matchers": {"odd": of}})
    found = remarks(now, NO_COUNTERPART)
    assert "matcher odd: " in found
    assert said in found
    assert "precision.rules" not in now.overrides


def test_another_recipe_for_evaluation_is_said(translated):
    configs = {"bf16": CONFIGS["bf16"] | {"evaluation_recipe": {"fp8_quantization_recipe": "mxfp8"}}}
    now = translated(NVFP4 + FILE, {"configs": configs, "matchers": {"all": matcher("*.linear_qkv", "bf16")}})
    assert "evaluation multiplies as training does here" in remarks(now, NO_COUNTERPART)


def test_a_file_is_read_as_plain_values(translated, tmp_path):
    translated(NVFP4)
    (tmp_path / "te_quant.cfg").write_text("configs: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="cannot be read as plain YAML"):
        translated(NVFP4 + FILE)

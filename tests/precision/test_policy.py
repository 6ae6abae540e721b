"""Which product has which recipe: rules in order, layers by number and share, presets on the published models."""

from dataclasses import replace

import pytest

from nemohybrid.config.compose import load_config
from nemohybrid.config.precision import policy_of
from nemohybrid.config.products import products
from nemohybrid.precision.place import NEVER, ROLES, Place
from nemohybrid.precision.policy import Late, Policy, forward_of, layers, read_rule
from nemohybrid.precision.recipe import RECIPES
from nemohybrid.precision.table import as_json, table
from nemohybrid.symbols import parse_pattern


@pytest.fixture(scope="module")
def resolve():
    """`resolve("nemotron3_super_nvfp4", "nemotron3_super")`: the policy, and what it says of each product of the model."""

    def run(preset: str, model: str, *overrides: str):
        config = load_config([f"precision={preset}", f"model={model}", "data=shakespeare", *overrides])
        policy = policy_of(config.precision)
        return policy, [policy.of(place) for place in products(config.model, parse_pattern(config.model.pattern))]

    return run


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        (0, [0]),
        (-1, [87]),
        (5, [5]),
        (88, [88]),  # which is not there
        ("first 2", [0, 1]),
        ("last 3", [85, 86, 87]),
        ("last 15%", range(74, 88)),  # 13.2 layers are 14, as in Megatron-Bridge's recipe of Super
        ("first 1%", [0]),
        ("last 100%", range(88)),
        ("2..5", [2, 3, 4, 5]),
        ("-3..-1", [85, 86, 87]),
        ("80..-7", [80, 81]),
        ("5..2", []),
    ],
)
def test_layers_are_named_from_either_end_and_by_share(words, expected):
    assert list(layers(words, 88)) == list(expected)


def place(name="layers.3.mixer.fc1", **changes):
    return replace(Place(name, "fc1", layer=3, layers=10, kind="-"), **changes)


@pytest.mark.parametrize(
    "rule, fits",
    [
        ({}, True),
        ({"name": "layers.*.mixer.fc1"}, True),
        ({"name": "*fc2"}, False),
        ({"name": ["*fc2", "*.fc?"]}, True),
        ({"layers": 3}, True),
        ({"layers": -7}, True),
        ({"layers": ["first 2", "3..4"]}, True),
        ({"layers": "last 60%"}, False),
        ({"kind": "-"}, True),
        ({"kind": ["M", "E"]}, False),
        ({"role": ["qkv", "fc1"]}, True),
        ({"role": "fc1", "kind": "M"}, False),
        ({"kind": "mtp"}, False),
    ],
)
def test_all_that_a_rule_says_must_be_so_and_one_of_each_list(rule, fits):
    assert read_rule(rule | {"recipe": "bf16"}).fits(place()) == fits


def test_layers_of_mtp_are_named_by_their_kind_and_by_no_number():
    drafting = place(layer=10, mtp=True)
    assert read_rule({"kind": "mtp", "recipe": "bf16"}).fits(drafting)
    assert read_rule({"kind": "-", "recipe": "bf16"}).fits(drafting)
    for words in (10, "last 1", "last 100%"):
        assert not read_rule({"layers": words, "recipe": "bf16"}).fits(drafting), words


def test_the_first_rule_that_fits_counts_and_the_default_comes_last():
    rules = [{"layers": "last 1", "recipe": "mxfp8"}, {"layers": "last 2", "recipe": "bf16"}, {"recipe": "fp8_block"}]
    policy = Policy(RECIPES["nvfp4"], tuple(map(read_rule, rules[:2])))
    found = [policy.of(place(layer=layer)) for layer in (9, 8, 7)]
    assert [(row.recipe.name, row.rule) for row in found] == [("mxfp8", 0), ("bf16", 1), ("nvfp4", None)]
    assert Policy(RECIPES["nvfp4"], tuple(map(read_rule, rules))).of(place()).recipe.name == "fp8_block"


def test_what_can_never_be_quantized_is_no_role():
    assert not NEVER.keys() & set(ROLES)


# --- recipes of later ------------------------------------------------------------------------------------------------


def test_later_only_what_was_quantized_changes():
    rule = read_rule({"kind": "M", "recipe": "bf16"})
    policy = Policy(RECIPES["nvfp4"], (rule,), Late(1e6, RECIPES["mxfp8"]))
    assert [recipe.name for recipe in policy.of(place()).recipes] == ["nvfp4", "mxfp8"]
    assert [recipe.name for recipe in policy.of(place(kind="M")).recipes] == ["bf16", "bf16"]


def test_rules_of_later_decide_alone():
    late = Late(1e6, RECIPES["mxfp8"], (read_rule({"kind": "-", "recipe": "bf16"}),))
    policy = Policy(RECIPES["nvfp4"], (read_rule({"kind": "M", "recipe": "bf16"}),), late)
    assert [policy.of(place(kind=kind)).late.name for kind in "-M"] == ["bf16", "mxfp8"]


def test_forward_only_keeps_the_products_of_the_backward_pass():
    nvfp4, mxfp8 = RECIPES["nvfp4"], RECIPES["mxfp8"]
    late = Policy(nvfp4, late=Late(1e6, mxfp8, forward_only=True)).of(place()).late
    assert (late.fprop, late.dgrad, late.wgrad) == (mxfp8.fprop, nvfp4.dgrad, nvfp4.wgrad)
    assert late.multiple == 32, "a width must do for both"
    assert late.name not in RECIPES
    assert forward_of(nvfp4, nvfp4) is nvfp4


# --- presets on the models they are of -------------------------------------------------------------------------------

SNAPSHOTS = {
    ("nemotron_h_fp8", "nemotron_h_8b"): """
        M  0, 50      in_proj, out_proj  bf16
           2-48 (22)  in_proj, out_proj  fp8_current
        -  1, 51      fc1, fc2           bf16
           3-49 (22)  fc1, fc2           fp8_current
        *  7-40 (4)   qkv, o_proj        fp8_current""",
    ("nano2_fp8", "nemotron_nano_v2_12b"): """
        M  0, 60      in_proj, out_proj  bf16
           2-58 (26)  in_proj, out_proj  fp8_block
        -  1, 61      fc1, fc2           bf16
           3-59 (26)  fc1, fc2           fp8_block
        *  7-52 (6)   qkv, o_proj        fp8_block""",
    ("nvfp4_12b", "nemotron_nano_v2_12b"): """
        M  0, 54-60 (4)  in_proj, out_proj  bf16
           2-51 (23)     in_proj, out_proj  nvfp4
        -  1, 55-61 (4)  fc1, fc2           bf16
           3-53 (23)     fc1, fc2           nvfp4
        *  7-52 (6)      qkv, o_proj        nvfp4""",
    ("nemotron3_super_nvfp4", "nemotron3_super"): """
        M      0-73 (34)  in_proj                   nvfp4
                          out_proj                  mxfp8
               75-86 (6)  in_proj, out_proj         bf16
        E      1-72 (33)  expert, fc1, fc2          nvfp4
                          latent                    bf16
               74-87 (7)  expert, latent, fc1, fc2  bf16
        *      7-78 (8)   qkv, o_proj               bf16
        mtp *  88         qkv, o_proj               bf16
        mtp E  89         expert, latent, fc1, fc2  bf16""",
    ("nemotron3_ultra_nvfp4", "nemotron3_ultra"): """
        M      0-91 (41)   in_proj                   nvfp4
                           out_proj                  mxfp8
               93-106 (7)  in_proj, out_proj         bf16
        E      1-90 (40)   expert, fc1, fc2          nvfp4
                           latent                    bf16
               92-107 (8)  expert, latent, fc1, fc2  bf16
        *      7-98 (12)   qkv, o_proj               bf16
        mtp *  108         qkv, o_proj               bf16
        mtp E  109         expert, latent, fc1, fc2  bf16""",
}


@pytest.mark.parametrize("preset, model", SNAPSHOTS)
def test_a_preset_says_of_its_model_what_was_published(preset, model, resolve):
    shown = table(*resolve(preset, model))
    wanted = [line.removeprefix("      ") for line in SNAPSHOTS[preset, model].splitlines()[1:]]
    assert shown == ["precision", *wanted]


def test_about_a_sixth_of_the_products_of_the_12b_hybrid_is_in_bf16(resolve):
    """NVIDIA 2025: about 16% of them; which is why the layers, that could not be verified, are likely these."""
    _, chosen = resolve("nvfp4_12b", "nemotron_nano_v2_12b")
    share = sum(not row.recipe.is_quantized for row in chosen) / len(chosen)
    assert share == pytest.approx(0.16, abs=0.005)


def test_a_table_shows_what_comes_later_and_what_rules_split_within_a_role(resolve):
    rules = 'precision.rules=[{name: "*.latent_up", recipe: bf16}]'
    late = "precision.late={tokens: 1000, recipe: mxfp8}"
    shown = table(*resolve("nvfp4", "nemotron3_super", rules, late))
    assert shown[0] == "precision, and from 1,000 tokens on"
    words = [" ".join(line.split()) for line in shown]
    assert "E 1-87 (40) expert, fc1, fc2 nvfp4 then mxfp8" in words
    assert "latent nvfp4 then mxfp8 or bf16" in words, "down and up of a layer differ"


def test_the_file_has_every_product_with_the_rule_that_decided(resolve):
    policy, chosen = resolve("nemotron3_super_nvfp4", "nemotron3_super")
    saved = as_json(policy, chosen)
    assert len(saved["products"]) == len(chosen) == 40 * 2 + 8 * 2 + 40 * 6 + 2 + 6
    assert saved["products"]["layers.0.mixer.out_proj"] == {"recipe": "mxfp8", "rule": 3}
    assert saved["products"]["layers.0.mixer.in_proj"] == {"recipe": "nvfp4", "rule": None}
    assert saved["products"]["mtp.0.layers.1.mixer.experts.up"] == {"recipe": "bf16", "rule": 1}
    assert saved["recipes"]["bf16"] == {}
    assert saved["recipes"]["nvfp4"]["wgrad"]["dy"] == {
        "scaling": "nvfp4",
        "format": "e2m1",
        "hadamard": True,
        "stochastic": True,
    }

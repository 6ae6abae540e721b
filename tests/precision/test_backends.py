"""Who carries a recipe out: the first that can, or the one that was asked for, or an error that says why not."""

import pytest
import torch
from torch import nn

from nemohybrid.errors import ConfigError
from nemohybrid.precision import backends
from nemohybrid.precision.backends import BACKENDS, Backend, choose, surround
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.recipe import RECIPES
from nemohybrid.precision.slot import Slot

CPU = torch.device("cpu")


def test_they_are_tried_in_this_order():
    assert list(BACKENDS) == ["torch_native", "emulated"]


def test_auto_takes_the_first_that_can_and_says_why_not_the_others():
    choice = choose(RECIPES["mxfp8"], "auto", CPU)
    assert choice.name == "emulated"
    assert "not torch_native: torch multiplies BlockWise1x32 on GPUs only" in choice.why
    assert str(choice) == f"mxfp8: emulated ({choice.why})"
    assert isinstance(choice.gemm(RECIPES["mxfp8"], Slot("a")), EmulatedGemm)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_emulation_carries_out_every_recipe_also_for_experts(recipe):
    for experts in (False, True):
        choice = choose(RECIPES[recipe], "emulated", CPU, experts=experts)
        assert (choice.name, choice.why) == (
            ("emulated", "asked for") if RECIPES[recipe].is_quantized else ("plain", "nothing is quantized")
        )


def test_what_is_not_quantized_is_plain_whoever_is_asked():
    choice = choose(RECIPES["bf16"], "torch_native", CPU)
    assert choice.gemm(RECIPES["bf16"], Slot("a")) is plain_gemm


def test_who_was_asked_for_and_cannot_is_never_replaced():
    with pytest.raises(ConfigError, match=r"fp8_block: backend 'torch_native' cannot run on cpu: .*GPUs only"):
        choose(RECIPES["fp8_block"], "torch_native", CPU)
    with pytest.raises(ConfigError, match=r"fp8_current of experts: .* no stacked experts; a rule {role: expert"):
        choose(RECIPES["fp8_current"], "torch_native", CPU, experts=True)
    with pytest.raises(ConfigError, match="no backend 'torch'. Legal: 'auto', 'torch_native'"):
        choose(RECIPES["fp8_current"], "torch", CPU)


def test_a_backend_is_told_once_of_all_its_recipes(monkeypatch):
    told = []
    own = Backend("own", lambda *_: None, EmulatedGemm, around=lambda model, recipes: told.append((model, recipes)))
    monkeypatch.setattr(backends, "BACKENDS", {"own": own, **BACKENDS})
    names, model = ("fp8_current", "bf16", "mxfp8"), nn.Identity()
    surround(model, [choose(RECIPES[name], "own", CPU) for name in names])
    assert told == [(model, [RECIPES["fp8_current"], RECIPES["mxfp8"]])]

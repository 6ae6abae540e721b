"""Who carries a recipe out: the first that can, or the one that was asked for, or an error that says why not."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from nemohybrid.errors import ConfigError
from nemohybrid.precision import backends
from nemohybrid.precision.backends import BACKENDS, Backend, choose, surround
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.recipe import RECIPES
from nemohybrid.precision.slot import Slot

CPU = torch.device("cpu")


def test_they_are_tried_in_this_order():
    assert list(BACKENDS) == ["transformer_engine", "torch_native", "emulated"]


def test_auto_takes_the_first_that_can_and_says_why_not_the_others():
    choice = choose(RECIPES["mxfp8"], "auto", CPU)
    assert choice.name == "emulated"
    assert "not transformer_engine: " in choice.why
    assert (
        "not torch_native: torch multiplies MXFP8 from compute capability 10.0 on (Blackwell), and on no CPU"
        in choice.why
    )
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
    choice = choose(RECIPES["bf16"], "transformer_engine", CPU)
    assert choice.gemm(RECIPES["bf16"], Slot("a")) is plain_gemm


def test_who_was_asked_for_and_cannot_is_never_replaced():
    with pytest.raises(
        ConfigError, match=r"precision.backend=torch_native cannot carry out fp8_block on cpu: .*on no CPU"
    ):
        choose(RECIPES["fp8_block"], "torch_native", CPU)
    with pytest.raises(
        ConfigError, match=r"fp8_current of experts on cpu: .* no stacked experts. .*a rule {role: expert"
    ):
        choose(RECIPES["fp8_current"], "torch_native", CPU, experts=True)
    with pytest.raises(ConfigError, match=r"precision.backend: fp8_current has no backend 'torch'. Legal: 'auto', "):
        choose(RECIPES["fp8_current"], "torch", CPU)


def test_a_backend_makes_the_context_of_all_its_recipes(monkeypatch):
    told, context = [], nullcontext
    own = Backend("own", lambda *_: None, EmulatedGemm, around=lambda recipes: told.append(recipes) or context)
    monkeypatch.setattr(backends, "BACKENDS", {"own": own, **BACKENDS})
    names = ("fp8_current", "bf16", "mxfp8")
    assert surround([choose(RECIPES[name], "own", CPU) for name in names]) is context
    assert told == [[RECIPES["fp8_current"], RECIPES["mxfp8"]]]
    assert surround([]) is nullcontext


def test_nothing_is_imported_that_is_not_there():
    """Choosing looks for Transformer Engine and does not need it."""
    code = "import sys, nemohybrid.precision.backends; assert 'transformer_engine' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

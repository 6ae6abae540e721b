"""Our recipes as Transformer Engine's: which class, with which fields, and what of it an installed version has.

Every field is given: their defaults are read from environment variables when Transformer Engine is imported.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from nemohybrid.precision.recipe import NVFP4, GemmRecipe, Operand, Product

INSTALL = "pip install --no-build-isolation 'nemohybrid[te]' builds it"


@dataclass(frozen=True)
class Described:
    """A recipe object: its class and fields, where a format is its name, and a product whether it splits accumulators.

    predicate: who says whether the hardware has it. power_of_2: of the scales of its quantizers, which are no fields.
    """

    name: str
    predicate: str
    fields: Mapping[str, Any]
    power_of_2: bool | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


# Defaults of Transformer Engine 2.20. What a version does not know of these it does as they say.
ATTENTION = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
DELAYED = ATTENTION | {
    "margin": 0,
    "fp8_format": "HYBRID",
    "amax_history_len": 1024,
    "amax_compute_algo": "max",
    "scaling_factor_compute_algo": None,
    "reduce_amax": True,
}
PRODUCTS = {"fp8_gemm_dgrad": True, "fp8_gemm_wgrad": True}
CURRENT = ATTENTION | PRODUCTS | {"use_power_2_scales": False, "fp8_format": "HYBRID", "fp8_gemm_fprop": False}
BLOCK = (
    ATTENTION
    | PRODUCTS
    | {"use_f32_scales": False, "fp8_format": "E4M3", "fp8_gemm_fprop": True}
    | {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "grad_block_scaling_dim": 1}
)
MX = ATTENTION | {"margin": 0, "fp8_format": "E4M3", "enable_2d_quantization": False}
NVFP = ATTENTION | {
    "disable_rht": False,
    "disable_stochastic_rounding": False,
    "disable_2d_quantization": False,
    "row_scaled_activation": False,
    "nvfp4_4over6": "none",
    "nvfp4_4over6_e4m3_use_256": "all",
    "nvfp4_4over6_err_mode": "MAE",
    "fp4_format": "E2M1",
    "fp8_format": "E4M3",
}
QUANTIZERS = "fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"


def described(recipe: GemmRecipe) -> Described | None:
    """What carries out all six operands as they are, or None."""
    x, w, dy = recipe.fprop.left, recipe.fprop.right, recipe.dgrad.left
    make = MAKERS.get(x.scaling)
    if make is None:
        return None
    of, products = make(x, w, dy, recipe)
    return of if products == (recipe.fprop, recipe.dgrad, recipe.wgrad) else None


Made = tuple[Described, tuple[Product, Product, Product]]


def _made(
    name: str, predicate: str, defaults: Mapping[str, Any], changes: Mapping[str, Any], *operands: Operand
) -> Made:
    """With the operands that such an object multiplies: x, W and dy."""
    x, w, dy = operands
    of = Described(name, predicate, {**defaults, **changes}, defaults=defaults)
    return of, (Product(x, w), Product(dy, w), Product(dy, x))


def _hybrid(dy: Operand) -> str:
    return "HYBRID" if dy.format == "e5m2" else "E4M3"


def _current(x: Operand, w: Operand, dy: Operand, _: GemmRecipe) -> Made:
    made = Operand("current", "e4m3", power_of_2=x.power_of_2)
    changes = {"use_power_2_scales": x.power_of_2, "fp8_format": _hybrid(dy)}
    of, products = _made(
        "Float8CurrentScaling", "is_fp8_available", CURRENT, changes, made, made, replace(made, format=dy.format)
    )
    return replace(of, power_of_2=x.power_of_2), products


def _delayed(x: Operand, w: Operand, dy: Operand, _: GemmRecipe) -> Made:
    """Every rank has its own scales: who reduces them is the whole world, where pipelines have unequal layers."""
    made, changes = Operand("delayed", "e4m3"), {"fp8_format": _hybrid(dy), "reduce_amax": False}
    return _made("DelayedScaling", "is_fp8_available", DELAYED, changes, made, made, replace(made, format=dy.format))


def _block(x: Operand, w: Operand, dy: Operand, _: GemmRecipe) -> Made:
    line, powers = Operand("block", "e4m3", power_of_2=x.power_of_2), x.power_of_2
    dimensions = {"x_block_scaling_dim": x, "w_block_scaling_dim": w, "grad_block_scaling_dim": dy}
    changes = {name: 2 if operand.square else 1 for name, operand in dimensions.items()}
    changes |= {"use_f32_scales": not powers, "fp8_format": _hybrid(dy)}
    square = [replace(line, square=operand.square, format=operand.format) for operand in (x, w, dy)]
    of, products = _made("Float8BlockScaling", "is_fp8_block_scaling_available", BLOCK, changes, *square)
    return replace(of, power_of_2=powers), products


def _mx(x: Operand, w: Operand, dy: Operand, _: GemmRecipe) -> Made:
    line, changes = Operand("mx", "e4m3"), {"fp8_format": _hybrid(dy), "enable_2d_quantization": w.square}
    operands = line, replace(line, square=w.square), replace(line, format=dy.format)
    return _made("MXFP8BlockScaling", "is_mxfp8_available", MX, changes, *operands)


def _nvfp4(x: Operand, w: Operand, dy: Operand, recipe: GemmRecipe) -> Made:
    """Transforms for dW only, and random rounding of gradients only."""
    transformed = recipe.wgrad.left.hadamard
    changes = {
        "disable_rht": not transformed,
        "disable_stochastic_rounding": not dy.stochastic,
        "disable_2d_quantization": not w.square,
    }
    gradient, weight = replace(NVFP4, stochastic=dy.stochastic), replace(NVFP4, square=w.square)
    of, (fprop, dgrad, _) = _made("NVFP4BlockScaling", "is_nvfp4_available", NVFP, changes, NVFP4, weight, gradient)
    wgrad = Product(replace(gradient, hadamard=transformed), replace(NVFP4, hadamard=transformed))
    return of, (fprop, dgrad, wgrad)


MAKERS: Mapping[str, Callable[[Operand, Operand, Operand, GemmRecipe], Made]] = {
    "current": _current,
    "delayed": _delayed,
    "block": _block,
    "mx": _mx,
    "nvfp4": _nvfp4,
}


# --- what is installed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """Transformer Engine's two modules, and its version."""

    pytorch: Any
    recipes: Any
    version: str

    def build(self, of: Described) -> Any:
        """The recipe object. What its class keeps beside its fields, from the environment, is set as well."""
        made = self.recipes
        known = {of_class.name for of_class in fields(getattr(made, of.name))}
        given = {name: self._value(name, value) for name, value in of.fields.items() if name in known}
        recipe = getattr(made, of.name)(**given)
        if of.power_of_2 is not None:
            for name in QUANTIZERS:
                setattr(recipe, name, made.QParams(power_2_scale=of.power_of_2, amax_epsilon=0.0))
        return recipe

    def _value(self, name: str, value: Any) -> Any:
        if name.endswith("_format"):
            return self.recipes.Format[value]
        return self.recipes.MMParams(use_split_accumulator=value) if name.startswith("fp8_gemm_") else value

    def autocast(self, recipe: Any) -> AbstractContextManager[Any]:
        """Within it, its modules multiply by a recipe."""
        if hasattr(self.pytorch, "autocast"):
            return self.pytorch.autocast(enabled=True, recipe=recipe)
        return self.pytorch.fp8_autocast(enabled=True, fp8_recipe=recipe)


@cache
def found() -> Engine:
    """Imports it. Raises ImportError that says what to do."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ImportError(f"transformer_engine is not installed; {INSTALL}")
    try:
        pytorch = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # a library that is missing or of another CUDA
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ImportError(f"transformer_engine does not import: {why}; {INSTALL}") from error
    version = getattr(importlib.import_module("transformer_engine"), "__version__", "of unknown version")
    return Engine(pytorch, recipes, str(version))


def unsupported(engine: Engine, of: Described) -> str | None:
    """What the installed version does not have of a recipe, or None."""
    which = f"Transformer Engine {engine.version} has no"
    if not hasattr(engine.recipes, of.name):
        return f"{which} {of.name}; a newer one has"
    if not hasattr(engine.pytorch, of.predicate):
        return f"{which} {of.predicate}; a newer one has"
    known = {of_class.name for of_class in fields(getattr(engine.recipes, of.name))}
    for name, value in of.fields.items():
        if name not in known and value != of.defaults[name]:
            return f"{which} {of.name}({name}={value}); a newer one has"
    return None

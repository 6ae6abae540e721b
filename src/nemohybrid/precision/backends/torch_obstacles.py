"""What torch can multiply on a device: why not, in words that say what could, and a small product that has the last word."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.precision.backends import emulated
from nemohybrid.precision.backends.packed import TENSORWISE, WAYS
from nemohybrid.precision.backends.torch_native import prepare, scaled_product
from nemohybrid.precision.recipe import GemmRecipe, Operand, Product
from nemohybrid.precision.slot import Slot

PAIRS = {
    (TENSORWISE, TENSORWISE),
    ("BlockWise1x128", "BlockWise128x128"),
    ("BlockWise128x128", "BlockWise1x128"),
    ("BlockWise1x128", "BlockWise1x128"),
    ("BlockWise1x32", "BlockWise1x32"),
    ("BlockWise1x16", "BlockWise1x16"),
}
"""Scales of two operands that torch multiplies."""
LEAST = {TENSORWISE: (8, 9), "BlockWise1x32": (10, 0), "BlockWise1x16": (10, 0)}
"""Compute capability from which on tensor cores have such products; blocks of 128 are for 9.0 alone."""
BLOCKS_OF_128 = "blocks of 128 with compute capability 9.0 (Hopper) and CUDA 12.9 or newer"
NEEDS = {
    TENSORWISE: "FP8 from compute capability 8.9 on (Ada, Hopper)",
    "BlockWise1x128": BLOCKS_OF_128,
    "BlockWise128x128": BLOCKS_OF_128,
    "BlockWise1x32": "MXFP8 from compute capability 10.0 on (Blackwell)",
    "BlockWise1x16": "NVFP4 from compute capability 10.0 on (Blackwell)",
}


def obstacle(recipe: GemmRecipe, device: torch.device) -> str | None:
    """Why torch cannot multiply by a recipe on a device, or None. The last word has a small product of its kind."""
    for product in (recipe.fprop, recipe.dgrad, recipe.wgrad):
        is_quantized = product.left.is_quantized or product.right.is_quantized
        if is_quantized and (
            problem := _no_product(product) or _no_hardware(product, device) or _refusal(product, device)
        ):
            return problem
    return None


def _no_product(of: Product) -> str | None:
    """Operands that no hardware multiplies."""
    for operand in (of.left, of.right):
        if operand.is_quantized and (operand.scaling, operand.square) not in WAYS:
            return f"torch has no product for operands of {operand.scaling}"
    if not (of.left.is_quantized and of.right.is_quantized):
        return "torch has no product of a quantized operand and one that is not"
    left, right = _ways(of)
    if (left, right) not in PAIRS:
        return f"torch has no product of {left} and {right}"
    if of.left.format == of.right.format == "e5m2":
        return "tensor cores have no product of E5M2 with E5M2"
    return None


def _ways(of: Product) -> tuple[str, str]:
    return WAYS[of.left.scaling, of.left.square], WAYS[of.right.scaling, of.right.square]


def _no_hardware(of: Product, device: torch.device) -> str | None:
    """What is known not to work, in words that say what would."""
    way = _ways(of)[0]
    if not hasattr(F, "scaled_mm") and (way != TENSORWISE or not hasattr(torch, "_scaled_mm")):
        return f"torch {torch.__version__} has no scaled_mm for {way}; 2.11 has"
    if device.type == "cpu":
        return None if way == TENSORWISE else f"torch multiplies {NEEDS[way]}, and on no CPU"
    if device.type != "cuda":
        return f"torch multiplies narrow numbers on NVIDIA GPUs and CPUs only, and this is {device.type}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    capability = torch.cuda.get_device_capability(device)
    if (capability[0] != 9) if "128" in way else (capability < LEAST[way]):
        return f"torch multiplies {NEEDS[way]}, it has {capability[0]}.{capability[1]}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if "128" in way and cuda < (12, 9):
        return f"torch multiplies {NEEDS[way]}, and was built for CUDA {torch.version.cuda}"
    return None


@cache
def _refusal(of: Product, device: torch.device) -> str | None:
    """What torch says to a small product of this kind, or None where it multiplies and the result is right."""
    try:
        got, wanted = _small_product(of, device)
    except Exception as error:  # torch refuses with errors of many kinds
        return f"torch {torch.__version__} refuses: {(str(error) or type(error).__name__).splitlines()[0]}"
    if not (got - wanted).norm() <= 1e-2 * wanted.norm():  # nor is NaN right
        return f"torch {torch.__version__} multiplies {_ways(of)[0]} wrongly"
    return None


def _small_product(of: Product, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of 128 x 256 numbers each, as torch multiplies them and emulated. Scales of blocks differ, so their order matters."""
    slot, at = Slot("probe"), torch.arange(128 * 256, device=device)
    of_block = (at // 16).remainder(5) + (at // 128).remainder(3) + (at // 128).remainder(2) * 4  # a power of two
    x = (at.remainder(7).sub(3) * 2.0**of_block).view(128, 256)
    left, right = (_plain(operand) for operand in (of.left, of.right))
    got = scaled_product(prepare(x, left, slot, "x"), prepare(x, right, slot, "x"), torch.float32)
    return got, emulated.multiply(emulated.prepare(x, left, slot, "x"), emulated.prepare(x, right, slot, "x"))


def _plain(operand: Operand) -> Operand:
    """Without what needs a state, random bits or a transform: what is multiplied is of the same kind."""
    return Operand("current" if operand.scaling == "delayed" else operand.scaling, operand.format, operand.square)

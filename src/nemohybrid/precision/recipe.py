"""Recipes: in which numbers each operand of each of the three products of a layer is multiplied.

y = x W^T forward; dx = dy W and dW = dy^T x backward. Each operand is quantized along the dimension that its product sums
over: x and W along the inputs for y, dy and W along the outputs for dx, dy and x along the tokens for dW.
"""

from dataclasses import dataclass, replace
from typing import Literal

Scaling = Literal["none", "current", "delayed", "block", "mx", "nvfp4", "mor", "mor_block"]


@dataclass(frozen=True)
class Operand:
    """How one operand of one product is represented.

    scaling: none, in the layer's own type; current, one scale a tensor from its present largest number; delayed, from
    those of steps before; block, one for 128; mx, a power of two for 32; nvfp4, E4M3 for 16 and one for the tensor; mor, E4M3
    for a tensor that is near enough to it, the mean relative error below `threshold`; mor_block, E4M3, E5M2 or none for each
    block. square: blocks are as many rows as columns, and the transpose has the same numbers. hadamard, stochastic: with
    nvfp4 only.
    """

    scaling: Scaling = "none"
    format: str = "bf16"
    square: bool = False
    power_of_2: bool = False
    hadamard: bool = False
    stochastic: bool = False
    threshold: float = 0.045

    @property
    def is_quantized(self) -> bool:
        return self.scaling != "none"

    @property
    def transposes(self) -> bool:
        """Whether the transposed operand is the transpose of the quantized one."""
        return self.square or self.scaling in ("none", "current", "delayed")


BF16 = Operand()
E4M3, E5M2 = Operand("current", "e4m3"), Operand("current", "e5m2")
NVFP4 = Operand("nvfp4", "e2m1")
_DELAYED = replace(E4M3, scaling="delayed")


@dataclass(frozen=True)
class Product:
    """The operands of a product, in the order in which they are named above."""

    left: Operand = BF16
    right: Operand = BF16


@dataclass(frozen=True)
class GemmRecipe:
    """How a layer multiplies. `multiple`: what widths of its matrices must be multiples of, for hardware or blocks."""

    name: str
    fprop: Product = Product()
    dgrad: Product = Product()
    wgrad: Product = Product()
    multiple: int = 1

    @property
    def is_quantized(self) -> bool:
        return any(operand.is_quantized for operand in self.operands)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All six: x, w; dy, w; dy, x."""
        return tuple(of for product in (self.fprop, self.dgrad, self.wgrad) for of in (product.left, product.right))

    @property
    def is_stochastic(self) -> bool:
        return any(operand.stochastic for operand in self.operands)

    @property
    def is_delayed(self) -> bool:
        return any(operand.scaling == "delayed" for operand in self.operands)


def _of_three(name: str, x: Operand, w: Operand, dy: Operand, multiple: int) -> GemmRecipe:
    """Each tensor in the same representation wherever it is an operand."""
    return GemmRecipe(name, Product(x, w), Product(dy, w), Product(dy, x), multiple)


def _nvfp4(name: str, *, hadamard: bool = True, stochastic: bool = True, square: bool = True) -> GemmRecipe:
    """NVIDIA 2025 (arXiv 2509.25149): square blocks of weights, transforms for dW only, gradients rounded at random."""
    w, dy = replace(NVFP4, square=square), replace(NVFP4, stochastic=stochastic)
    wgrad = Product(replace(dy, hadamard=hadamard), replace(NVFP4, hadamard=hadamard))
    return GemmRecipe(name, Product(NVFP4, w), Product(dy, w), wgrad, 16)


def _fp8_block() -> GemmRecipe:
    """Blocks of 1 x 128, of weights 128 x 128, scales powers of two: as DeepSeek-V3 (arXiv 2412.19437), all in E4M3."""
    line = Operand("block", "e4m3", power_of_2=True)
    return _of_three("fp8_block", line, replace(line, square=True), line, 16)


MX = Operand("mx", "e4m3")
MOR, MOR_BLOCK = Operand("mor", "e4m3", square=True), Operand("mor_block", "e4m3", square=True)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        GemmRecipe("bf16"),
        _of_three("fp8_current", E4M3, E4M3, E5M2, 16),
        _of_three("fp8_delayed", _DELAYED, _DELAYED, replace(_DELAYED, format="e5m2"), 16),
        _fp8_block(),
        _of_three("mxfp8", MX, MX, MX, 32),
        _nvfp4("nvfp4"),
        _nvfp4("nvfp4_no_rht", hadamard=False),
        _nvfp4("nvfp4_no_sr", stochastic=False),
        _nvfp4("nvfp4_1d", square=False),
        _of_three("mor", MOR, MOR, MOR, 16),
        _of_three("mor_block", MOR_BLOCK, MOR_BLOCK, MOR_BLOCK, 16),
    )
}
"""Those that a configuration can name. Formats of FP8 are those of Transformer Engine's HYBRID: E5M2 for gradients."""

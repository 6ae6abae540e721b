"""The three products of a layer by a recipe, whoever multiplies: what is quantized when, and what of it is kept."""

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.precision.hadamard import filled_up
from nemohybrid.precision.recipe import GemmRecipe, Operand, Product
from nemohybrid.precision.slot import Slot

# T tokens, I inputs, O outputs of a layer; M, N rows of the two operands, K what a product sums over

NOWHERE = 0, 0, 0


class Turnable(Protocol):
    """An operand as a backend multiplies it."""

    @property
    def transposed(self) -> Any:
        """The same numbers, transposed."""
        ...


Made = TypeVar("Made", bound=Turnable)


class LayerGemm(ABC, Generic[Made]):
    """A `Gemm` for one layer. A backend says what an operand becomes, and how two of them are multiplied.

    Keeps the quantized weight while the weights are the same, where the slot says that they stay. keeps_dy: whether dy as operand
    of dx, transposed, is that of dW.
    """

    keeps_dy = False

    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        self.recipe, self.slot = recipe, slot
        self._weights: dict[tuple[Operand, bool], Made] = {}
        self._of: tuple[int, int, int] | None = None

    @abstractmethod
    def prepare(self, x: Tensor, operand: Operand, which: str, random: Tensor | None = None) -> Made:
        """x [M, K], "x", "w" or "dy", as it is multiplied. random [M, K]: see `quantize_nvfp4`."""

    @abstractmethod
    def product(
        self,
        of: Product,
        left: Made,
        right: Made,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        """left [M, K], right [N, K] -> left right^T + bias in dtype, of the `shape` (M, N) that it has without filling."""

    @abstractmethod
    def turns(self, operand: Operand) -> bool:
        """Whether what was made of a matrix, transposed, is what would be made of the transposed matrix."""

    def kept(self, rows: Tensor, left: Made) -> tuple[Tensor, ...]:
        """Of x [T, I], for dW: x itself, of which the operand is made again, with the same random bits."""
        return (rows,)

    def x_of_wgrad(self, kept: tuple[Tensor, ...], place: tuple[int, int, int]) -> Made:
        """The operand of dW from what was kept."""
        return self.operand(kept[0].T, self.recipe.wgrad.right, "x", "wgrad.x", place)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        # Where nothing depends on the step, a graph must not: it would be made anew for each.
        place = self.slot.clock.place if self.recipe.is_stochastic else NOWHERE
        return _Multiply.apply(x, weight, bias, self, place)  # pyright: ignore[reportReturnType]

    def operand(self, x: Tensor, operand: Operand, which: str, what: str, place: tuple[int, int, int]) -> Made:
        """Of x or dy [M, K]; `what` of the six operands of a layer it is."""
        x = filled_up(x) if operand.hadamard else x
        return self.prepare(x, operand, which, self.slot.random(x, operand, what, place))

    def weight(self, weight: Tensor, operand: Operand, dtype: torch.dtype, transposed: bool) -> Made:
        """As operand of the forward product, or transposed, of that of dx."""
        if torch.compiler.is_compiling() or not self.slot.keeps or not operand.is_quantized:  # a graph keeps nothing
            return self._made(weight, operand, dtype, transposed)
        now = self.slot.clock.weights, weight.data_ptr(), weight._version
        if self._of != now:
            self._weights, self._of = {}, now
        if (operand, transposed) not in self._weights:
            self._weights[operand, transposed] = self._made(weight, operand, dtype, transposed)
        return self._weights[operand, transposed]

    def _made(self, weight: Tensor, operand: Operand, dtype: torch.dtype, transposed: bool) -> Made:
        if transposed and self.turns(operand):
            return self.weight(weight, operand, dtype, transposed=False).transposed
        matrix = weight.detach().to(dtype)
        return self.prepare(matrix.T if transposed else matrix, operand, "w")


class _Multiply(Function):
    """Keeps the weight as it is, and of x what the backend says."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gemm: LayerGemm[Any], place: tuple[int, int, int]
    ) -> Tensor:
        of, rows = gemm.recipe.fprop, x.reshape(-1, x.shape[-1])
        left = gemm.operand(rows, of.left, "x", "fprop.x", place)
        right = gemm.weight(weight, of.right, x.dtype, transposed=False)
        y = gemm.product(of, left, right, (len(rows), len(weight)), x.dtype, bias)
        ctx.save_for_backward(weight, *gemm.kept(rows, left))
        ctx.gemm, ctx.place, ctx.shape, ctx.bias_dtype = gemm, place, x.shape, None if bias is None else bias.dtype
        return y.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight, *kept), (dy,), gemm, recipe = ctx.saved_tensors, gradients, ctx.gemm, ctx.gemm.recipe
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        (O, I), d_rows = weight.shape, dy.reshape(-1, dy.shape[-1])
        dx = dweight = left = None
        if needs_x or (needs_weight and gemm.keeps_dy):
            left = gemm.operand(d_rows, recipe.dgrad.left, "dy", "dgrad.dy", ctx.place)
        if needs_x:
            right = gemm.weight(weight, recipe.dgrad.right, dy.dtype, transposed=True)
            dx = gemm.product(recipe.dgrad, left, right, (len(d_rows), I), dy.dtype).reshape(ctx.shape)
        if needs_weight:
            if left is not None and gemm.keeps_dy:
                left = left.transposed
            else:
                left = gemm.operand(d_rows.T, recipe.wgrad.left, "dy", "wgrad.dy", ctx.place)
            dweight = gemm.product(recipe.wgrad, left, gemm.x_of_wgrad(tuple(kept), ctx.place), (O, I), weight.dtype)
        dbias = d_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, dweight, dbias, None, None

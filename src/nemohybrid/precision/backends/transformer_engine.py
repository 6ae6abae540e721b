"""Recipes by Transformer Engine: its recipe objects, and its `Linear` for each slot, to which our weight is lent for a call.

What differs from our own: with tensor parallelism each rank scales by the largest number of its own part, random bits are those
of the device's generator, and delayed scaling keeps its histories outside of checkpoints, so that they begin anew on resume.
Weights quantized for good (`quantized_model_init`) are not used: our fp32 parameter stays the only one.

Source: Transformer Engine 2.20, common/recipe, pytorch/quantization.py and pytorch/module/linear.py. Nobody has run it here.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.errors import ConfigError, TrainingError
from nemohybrid.precision.backends.te_recipes import Engine, described, found, unsupported
from nemohybrid.precision.recipe import GemmRecipe
from nemohybrid.precision.slot import Slot

# T tokens, I inputs, O outputs of a layer

TOKENS = {"mx": 32, "nvfp4": 32}
"""What rows must be multiples of: whole blocks, and 16 bytes, which for four bits are 32 numbers; else 16."""
_in_region: ContextVar[bool] = ContextVar("in_region", default=False)


def obstacle(recipe: GemmRecipe, device: torch.device) -> str | None:
    """Why it cannot carry out a recipe on a device, or None."""
    of = described(recipe)
    if of is None:
        return "Transformer Engine has no recipe with these operands"
    if device.type != "cuda":
        return "Transformer Engine runs on NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    try:
        engine = found()
    except ImportError as error:
        return str(error)
    if missing := unsupported(engine, of):
        return missing
    available, why = getattr(engine.pytorch, of.predicate)(return_reason=True)
    if not available:
        return f"Transformer Engine {engine.version}: {why}"
    major, minor = torch.cuda.get_device_capability(device)
    if of.name == "NVFP4BlockScaling" and major != 10:  # its own predicate takes all from 10.0 on
        return f"Transformer Engine trains in NVFP4 with compute capability 10.0 and 10.3 only, it has {major}.{minor}"
    return None


class EngineGemm:
    """A `Gemm` for one layer: a `Linear` of Transformer Engine that owns nothing."""

    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        of = described(recipe)
        assert of is not None, "obstacle() has been asked"
        self.slot, self.engine, self.is_delayed = slot, found(), recipe.is_delayed
        self.recipe = self.engine.build(of)
        self.multiple = TOKENS.get(recipe.fprop.left.scaling, 16)
        self._linear: nn.Module | None = None
        self._of: tuple[int, int, int, bool] | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        short = -len(rows) % self.multiple
        rows = nn.functional.pad(rows, (0, 0, 0, short)) if short else rows
        y = self._multiply(rows, weight)[: len(rows) - short].reshape(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias.to(y.dtype)

    def _multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """With the weight in the dtype of rows, as the other backends quantize it. It is the module's during the call only."""
        linear, is_first = self._module(*weight.shape), self._is_first(weight)
        lent = vars(linear)
        lent["weight"] = weight.to(rows.dtype)
        try:
            with self._region():
                return linear(rows, is_first_microbatch=is_first)
        finally:
            del lent["weight"]

    def _module(self, outputs: int, inputs: int) -> nn.Module:
        """On the meta device, so that it takes no memory; its own parameter is dropped."""
        if self._linear is None:
            linear: nn.Module = self.engine.pytorch.Linear(inputs, outputs, bias=False, device="meta")
            del linear._parameters["weight"]
            self._linear = linear
        return self._linear

    def _is_first(self, weight: Tensor) -> bool | None:
        """Whether the weight must be quantized anew; None: it is for every call. What is made without gradients has no
        transpose, so that it does not serve training."""
        if not self.slot.keeps:
            return None
        now = self.slot.clock.weights, weight.data_ptr(), weight._version, torch.is_grad_enabled()
        is_first, self._of = now != self._of, now
        return is_first

    def _region(self) -> AbstractContextManager[Any]:
        """Its own, but for delayed scaling: that of the whole model, at whose end all scales are renewed."""
        if not self.is_delayed:
            return self.engine.autocast(self.recipe)
        if not _in_region.get():
            raise TrainingError(
                f"{self.slot.name}: delayed scaling of Transformer Engine multiplies within the model's forward pass only. "
                "train.recompute=none, or another precision.backend, computes nothing again in the backward pass"
            )
        return nullcontext()


def around(recipes: Collection[GemmRecipe]) -> Callable[[], AbstractContextManager[Any]]:
    """For delayed scaling, one autocast around each forward pass. Raises ConfigError where other recipes are beside it: at the
    end of that autocast Transformer Engine renews scales as the outermost recipe says."""
    delayed = next((recipe for recipe in recipes if recipe.is_delayed), None)
    if delayed is None:
        return nullcontext
    if len(names := sorted({recipe.name for recipe in recipes})) > 1:
        raise ConfigError(
            f"delayed scaling of Transformer Engine goes with none of its other recipes, and there are {', '.join(names)}. "
            "Legal: one recipe and bf16, or precision.backend=torch_native"
        )
    of = described(delayed)
    assert of is not None, "obstacle() has been asked"
    return partial(_region, found(), found().build(of))


@contextmanager
def _region(engine: Engine, recipe: Any) -> Iterator[None]:
    token = _in_region.set(True)
    try:
        with engine.autocast(recipe):
            yield
    finally:
        _in_region.reset(token)

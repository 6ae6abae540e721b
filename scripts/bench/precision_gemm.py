"""Times the products of a model's layers in low precision beside bf16, one shape after the other, on a GPU.

python scripts/bench/precision_gemm.py --out precision.json        # on a GPU; Nemotron-H-8B
python scripts/bench/precision_gemm.py --rehearse

Two times of each shape and recipe. The layer: its three products, forward and backward, through the slot of the layer, so with
all that is quantized on the way; the weight anew in every pass, as with one microbatch a step. The product: the forward one
alone, of operands that are quantized already; also with the fast accumulation of Hopper, which is off in training. Sides take
turns. A side whose results are further than 1e-3 from those of the emulation has no time.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from timing import device_for, in_turns

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.products import products
from nemohybrid.precision.backends import BACKENDS
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.backends.torch_native import prepare, scaled_product
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.gemm import Gemm, plain_gemm
from nemohybrid.precision.place import Place
from nemohybrid.precision.recipe import RECIPES, GemmRecipe
from nemohybrid.precision.slot import Slot
from nemohybrid.symbols import parse_pattern
from nemohybrid_kernels.machine import machine

TOLERANCE = 1e-3
"""Of the norm of y, dx and dW, from the emulation to torch's own products: the bar of both is that the bytes are the same."""
SIDES = ("torch_native", "transformer_engine")
ENGINE_TOLERANCE = 2e-2
"""Transformer Engine sums the forward product in the accumulators of the tensor cores, as its recipes do by default."""
AIM = 1.5
"""How many times as fast as bf16 a layer should be in fp8_current, over all shapes."""


@dataclass(frozen=True)
class Shape:
    """A matrix of a layer, [outputs, inputs], and how often the model has it."""

    name: str
    outputs: int
    inputs: int
    count: int


@dataclass
class Result:
    """Milliseconds by side ("bf16" and backends), the largest error of a side, and why one has no time."""

    shape: str
    outputs: int
    inputs: int
    count: int
    tokens: int
    recipe: str
    layer_ms: dict[str, float] = field(default_factory=dict)
    product_ms: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def shapes_of(model: str) -> list[Shape]:
    """Those of a named model, each once; the most work first."""
    config = load_model_config([f"model={model}"]).model
    found: dict[tuple[int, int], list[Place]] = {}
    for place in products(config, parse_pattern(config.pattern)):
        if not place.experts:
            found.setdefault((place.outputs, place.inputs), []).append(place)
    shapes = [Shape(f"{of[0].kind} {of[0].role}", *size, len(of)) for size, of in found.items()]
    return sorted(shapes, key=lambda shape: -shape.outputs * shape.inputs * shape.count)


def measure(
    shape: Shape, recipe: GemmRecipe, sides: Sequence[str], tokens: int, device: torch.device, rounds: int
) -> Result:
    """All sides, in turns."""
    result = Result(shape.name, shape.outputs, shape.inputs, shape.count, tokens, recipe.name)
    tensors, slot = _tensors(shape, tokens, device), Slot("layer", clock=Clock())
    emulated = _passes(EmulatedGemm(recipe, slot), *tensors)
    layers: dict[str, Callable[[], object]] = {"bf16": lambda: _passes(plain_gemm, *tensors)}
    for side in sides:
        gemm = BACKENDS[side].gemm(recipe, slot)
        error = max(map(_distance, _passes(gemm, *tensors), emulated))
        result.errors[side] = error
        if error <= _tolerance(side, recipe):
            layers[side] = _with_new_weight(gemm, slot.clock, tensors)
        else:
            result.faults[side] = f"is {error:.1e} from the emulation"
    result.layer_ms = _milliseconds(layers, device, rounds)
    if "torch_native" in layers:
        result.product_ms = _milliseconds(_forward_products(recipe, slot, tensors), device, rounds)
    return result


def _tolerance(side: str, recipe: GemmRecipe) -> float:
    """Where Transformer Engine draws random bits they are others, and nothing can be compared."""
    if side == "torch_native":
        return TOLERANCE
    return math.inf if recipe.is_stochastic else ENGINE_TOLERANCE


def _tensors(shape: Shape, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, W in fp32 and dy, as a model has them."""
    g = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(tokens, shape.inputs, generator=g, device=device).bfloat16().requires_grad_()
    dy = torch.randn(tokens, shape.outputs, generator=g, device=device).bfloat16()
    weight = torch.randn(shape.outputs, shape.inputs, generator=g, device=device) * shape.inputs**-0.5
    return x, weight.requires_grad_(), dy


def _passes(gemm: Gemm, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW."""
    y = gemm(x, weight, None)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dweight


def _distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _with_new_weight(gemm: Gemm, clock: Clock, tensors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    def step() -> None:
        clock.weights_changed()
        _passes(gemm, *tensors)

    return step


def _forward_products(
    recipe: GemmRecipe, slot: Slot, tensors: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Callable[[], object]]:
    """Of operands in bf16, and of those that are quantized already."""
    x, weight = tensors[0].detach(), tensors[1].detach().bfloat16()
    left, right = prepare(x, recipe.fprop.left, slot, "x"), prepare(weight, recipe.fprop.right, slot, "w")
    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: x @ weight.T,
        "torch_native": lambda: scaled_product(left, right, torch.bfloat16),
    }
    if recipe.fprop.left.scaling == "current":
        calls["fast accumulation"] = lambda: scaled_product(left, right, torch.bfloat16, fast=True)
    return calls


def _milliseconds(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    for call in calls.values():
        call()  # compiled, and what is cached is there
    return {name: 1e3 * times.median for name, times in in_turns(calls, device, rounds).items()}


# --- the whole benchmark ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all shapes; exits with 1 where torch's own products differ from the emulation."""
    options = _parse(argv)
    device, began = device_for(options.rehearse), time.monotonic()
    facts = machine(device) | {"date": time.strftime("%Y-%m-%d"), "rehearsal": str(options.rehearse)}
    model, tokens, rounds = ("tiny", 48, 1) if options.rehearse else (options.model, options.tokens, 10)
    print(*(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n", flush=True)
    results, left = list[Result](), list[str]()
    for recipe in (RECIPES[name] for name in options.recipes):
        obstacles = {side: BACKENDS[side].obstacle(recipe, device) for side in SIDES}
        print(*(f"{recipe.name:14}not {side}: {why}" for side, why in obstacles.items() if why), sep="\n")
        sides = [side for side, why in obstacles.items() if why is None]
        for shape in shapes_of(model) if sides else ():
            if time.monotonic() - began > options.seconds:
                left.append(f"{recipe.name} of {shape.name}")
                continue
            results.append(measure(shape, recipe, sides, tokens, device, rounds))
            print(*rows(results[-1]), sep="\n", flush=True)
            if options.out:
                written = {"machine": facts, "model": model, "shapes": [asdict(r) for r in results], "left_out": left}
                options.out.write_text(json.dumps(written, indent=1) + "\n")
    if left:
        print(f"left out for want of time: {'; '.join(left)}")
    print(*summary(results, options.rehearse), sep="\n")
    return 1 if any("torch_native" in result.faults for result in results) else 0


HEADINGS = (
    f"{'recipe':14}{'layer':12}{'[outputs, inputs]':20}{'side':20}"
    f"{'layer ms':>10}{'x bf16':>8}{'product ms':>12}{'x bf16':>8}"
)


def rows(result: Result) -> list[str]:
    """A line a side."""
    size = f"[{result.outputs}, {result.inputs}]"
    start, lines = f"{result.recipe:14}{result.shape:12}{size:20}", []
    for side in dict.fromkeys((*result.layer_ms, *result.product_ms)):
        layer, product = (_with_ratio(times, side) for times in (result.layer_ms, result.product_ms))
        lines.append(f"{start}{side:20}{layer:>18}{product:>20}")
    return [*lines, *(f"{start}{side:20}  {why}" for side, why in result.faults.items())]


def _with_ratio(times: dict[str, float], side: str) -> str:
    return f"{times[side]:.3f}{times['bf16'] / times[side]:>8.2f}" if side in times else "-       -"


def summary(results: Sequence[Result], rehearsal: bool) -> list[str]:
    """All shapes as often as the model has them."""
    if rehearsal:
        return ["A rehearsal: none of these figures measures anything."]
    lines = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        for side in SIDES:
            timed = [r for r in results if r.recipe == recipe and side in r.layer_ms]
            if timed:
                sums = [sum(r.layer_ms[which] * r.count for r in timed) for which in ("bf16", side)]
                aim = f", aim {AIM}" if recipe == "fp8_current" else ""
                lines.append(f"{recipe} by {side}: layers {sums[0] / sums[1]:.2f} times as fast as in bf16{aim}")
    return lines


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemotron_h_8b", help="whose shapes (default %(default)s)")
    parser.add_argument(
        "--recipes", nargs="+", default=["fp8_current", "fp8_block"], choices=_stateless(), metavar="RECIPE"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="rows of x (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, for its code")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def _stateless() -> list[str]:
    return [name for name, recipe in RECIPES.items() if recipe.is_quantized and not recipe.is_delayed]


if __name__ == "__main__":
    sys.exit(main())

"""The products of a built model that a recipe can take over, each with its place and with how ranks share it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.layer import Layer
from nemohybrid.model.linear import Linear
from nemohybrid.model.moe.layer import Experts
from nemohybrid.parallel.collectives import largest_over
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.layout import layout_of
from nemohybrid.precision.binding import Site
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.place import ROLES
from nemohybrid.precision.slot import Amax, Slot
from nemohybrid.symbols import parse_pattern

CUT = {0: ("w", "dy"), 1: ("x", "w")}
"""Axis of a matrix [outputs, inputs] along which ranks share it -> the tensors of which each has a part."""
TOKENS = ("x", "dy")
"""What has a row for every token."""


def clock_of(context: ParallelContext, seed: int) -> Clock:
    """Data ranks have other tokens, so that they draw other bits. Tensor ranks do where they have other columns or tokens of a
    gradient (`Slot.part`), and draw the same where they compute the same."""
    return Clock(seed=seed, rank=context.data.rank)


def sites(model: HybridModel, keeps: bool = True) -> Iterator[Site]:
    """All products of this rank's layers that may be quantized. keeps: whether whole weights stay between two passes."""
    pattern = parse_pattern(model.config.pattern)
    count = pattern.num_layers
    symbols = {number: symbol for stage in model.stages for number, symbol in stage.layers.items()}
    for number, layer in model.layers.named_children():
        where = Slot("", layer=int(number), layers=count, kind=symbols[int(number)])
        yield from _of_layer(layer, f"layers.{number}", replace(where, clock=model.clock, keeps=keeps), model.context)
    for block, drafting in enumerate(model.mtp):
        for number, layer in enumerate(drafting.get_submodule("layers").children()):
            where = Slot("", layer=count + block * len(pattern.mtp) + number, layers=count, kind=pattern.mtp[number])
            where = replace(where, mtp=True, clock=model.clock, keeps=keeps)
            yield from _of_layer(layer, f"mtp.{block}.layers.{number}", where, model.context)


def _of_layer(layer: nn.Module, name: str, where: Slot, context: ParallelContext) -> Iterator[Site]:
    assert isinstance(layer, Layer)
    for path, module in layer.named_modules():
        if isinstance(module, Linear) and module.role in ROLES:
            yield _linear(module, replace(where, name=f"{name}.{path}", role=module.role), context)
        elif isinstance(module, Experts):
            for matrix in ("up", "down"):
                slot = replace(where, name=f"{name}.{path}.{matrix}", role="expert")
                yield _stacked(module, matrix, slot, context)


def _linear(module: Linear, slot: Slot, context: ParallelContext) -> Site:
    """Where a matrix is not cut, ranks have other tokens under sequence parallelism, or compute the same."""
    layout, group = layout_of(module.weight), context.tensor
    outputs, inputs = layout.tensor_shape
    shared: dict[str, Any] = {"parts": _parts((), Group(), context.context)}
    if layout.shard is not None:
        shared = _shared(layout.shard.axis, group, context.context)
    elif layout.partial == "tokens" and context.sequence:
        shared = {"parts": _parts(TOKENS, group, context.context), "part": group.rank}
    return Site(replace(slot, outputs=outputs, inputs=inputs, **shared), module)


def _stacked(module: Experts, matrix: str, slot: Slot, context: ParallelContext) -> Site:
    """Experts on ranks of their own have other tokens on each."""
    layout = layout_of(getattr(module, matrix))
    many, outputs, inputs = layout.tensor_shape
    assert layout.shard is not None, "experts are always shared"
    axis = layout.shard.axis - 1
    shared = _shared(axis, context.tensor, context.context)
    if context.experts is not None:
        shared = _shared(axis, context.experts.tensor, Group()) | {"part": context.tensor.rank}
    return Site(replace(slot, outputs=outputs, inputs=inputs, experts=many, **shared), module, matrix)


def _shared(axis: int, group: Group, context: Group) -> dict[str, Any]:
    """`parts` and `part` of a slot whose matrix is cut along an axis. Where inputs are, all ranks have the same gradient, and
    round it alike, as one rank alone would."""
    return {"parts": _parts(CUT[axis], group, context), "part": group.rank if axis == 0 else 0}


def _parts(cut: tuple[str, ...], group: Group, context: Group) -> dict[str, Amax]:
    """Tensor -> its largest number over the ranks of `group`, where these have parts of it, and over those that share rows."""
    sharing = {name: [ranks for ranks in (group, context) if ranks.size > 1] for name in ("x", "w", "dy")}
    found = {name: [r for r in ranks if name in (cut if r is group else TOKENS)] for name, ranks in sharing.items()}
    return {name: partial(_largest, groups=ranks) for name, ranks in found.items() if ranks}


def _largest(amax: Tensor, groups: Sequence[Group]) -> Tensor:
    for group in groups:
        amax = largest_over(amax, group)
    return amax

"""What a parameter is made of, independent of how it is stored or cut.

Every parameter carries a `ParamLayout`: the logical tensors stacked in it, with their global shapes. Initialisation,
weight decay, gradient norm and checkpoints read it, so all of them agree under every parallel layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Init = Callable[[torch.Generator, tuple[int, ...]], Tensor]
"""Draws the fp32 initial value of one logical tensor: (generator, global shape) -> tensor on the CPU."""


@dataclass(frozen=True)
class Shard:
    """Each rank of the group `over` ("tensor", "expert") holds an equal part of every piece along `axis`."""

    axis: int
    over: str


@dataclass(frozen=True)
class Piece:
    """One logical tensor inside a parameter: its name ("" when it is all of it), global shape and first values."""

    name: str
    shape: tuple[int, ...]
    init: Init


@dataclass(frozen=True)
class ParamLayout:
    """The pieces of one parameter, stacked along axis 0 in this order. `shard` None: every rank holds all of it."""

    pieces: tuple[Piece, ...]
    shard: Shard | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the stacked parameter."""
        return (sum(p.shape[0] for p in self.pieces), *self.pieces[0].shape[1:])

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, never to vectors, judged by the global shape."""
        return len(self.shape) > 1

    def views(self, tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its view of a tensor laid out like the parameter (values, gradient, Adam moments)."""
        start = 0
        for piece in self.pieces:
            yield piece, tensor.narrow(0, start, piece.shape[0])
            start += piece.shape[0]


def parameter(*pieces: Piece, shard: Shard | None = None) -> nn.Parameter:
    """An fp32 parameter with its layout, uninitialised, on the default device (meta while a model is assembled)."""
    layout = ParamLayout(pieces, shard)
    result = nn.Parameter(torch.empty(layout.shape, dtype=torch.float32))
    return attach(result, layout)


def attach(tensor: nn.Parameter, layout: ParamLayout) -> nn.Parameter:
    """Bind a layout to a parameter."""
    tensor.param_layout = layout  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def layout_of(tensor: nn.Parameter) -> ParamLayout:
    """The layout of a parameter. A parameter without one is our mistake."""
    layout = getattr(tensor, "param_layout", None)
    assert layout is not None, "a parameter was created without parallel.layout.parameter()"
    return layout


def logical_name(parameter_name: str, piece: Piece) -> str:
    """`layers.0.mixer.in_proj.weight`, piece z -> `layers.0.mixer.in_proj.z`; its bias -> `...in_proj.z.bias`."""
    if not piece.name:
        return parameter_name
    module, _, attribute = parameter_name.rpartition(".")
    return f"{module}.{piece.name}" + ("" if attribute == "weight" else f".{attribute}")


def logical_views(name: str, owner: nn.Parameter, tensor: Tensor) -> dict[str, Tensor]:
    """Logical name -> view, for a tensor laid out like the parameter `owner` called `name`."""
    return {logical_name(name, piece): view for piece, view in layout_of(owner).views(tensor)}


def logical_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Logical name -> view of the values, for every parameter, detached."""
    result: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters():
        result |= logical_views(name, tensor, tensor.detach())
    return result

"""What a parameter is made of, independent of how it is stored or cut.

Every parameter carries a `ParamLayout`: the logical tensors stacked in it with their global shapes, and which boxes of them
this rank holds. Initialisation, gradient sums, gradient norm, weight decay and checkpoints read it, so all of them agree
under every parallel layout.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nemohybrid.errors import ConfigError
from nemohybrid.parallel.context import ParallelContext

Init = Callable[[torch.Generator, tuple[int, ...]], Tensor]
"""Draws fp32 initial values of some rows of a logical tensor: (generator, shape of the rows) -> tensor on the CPU."""

Partial = Literal["never", "tokens", "always"]
"""When the gradients that tensor ranks compute for a parameter they all hold are summands, and not the same whole: never;
where they share the tokens of the residual stream (sequence parallelism); always, as it sees some of the heads only."""


@dataclass(frozen=True)
class Shard:
    """Each tensor rank holds a part of every piece along `axis`.

    blocks: along `axis` a piece is this many equal blocks, each cut by itself (gate and up of a gated projection).
    even: parts must be equal; else their lengths may differ by one.
    """

    axis: int
    blocks: int = 1
    even: bool = True


@dataclass(frozen=True)
class Piece:
    """One logical tensor inside a parameter: its name ("" when it is all of it), global shape and first values.

    parts: the most it can be cut into; where there are more ranks, several hold the same part. None: any number.
    filled: rows that have first values; those below are zero. None: all.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    parts: int | None = None
    filled: int | None = None


@dataclass(frozen=True)
class Box:
    """A part of a logical tensor and where this rank keeps it: global and local offsets, and its shape.

    copies: tensor ranks that hold the same box of a parameter that is cut; this one is number `copy` of them.
    """

    piece: Piece
    offsets: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]
    copies: int = 1
    copy: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Its view of a local tensor laid out like the parameter."""
        return _narrow(tensor, self.local, self.shape)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """Its view of the whole logical tensor."""
        return _narrow(tensor, self.offsets, self.shape)

    def in_rows(self, first: int, end: int) -> "Box | None":
        """What of it lies in these local rows, which then count from 0; None for nothing."""
        begin, stop = max(self.local[0], first), min(self.local[0] + self.shape[0], end)
        if begin >= stop:
            return None
        offsets = (self.offsets[0] + begin - self.local[0], *self.offsets[1:])
        return replace(
            self, offsets=offsets, local=(begin - first, *self.local[1:]), shape=(stop - begin, *self.shape[1:])
        )


def _narrow(tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for axis, (start, length) in enumerate(zip(offsets, shape, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


@dataclass(frozen=True)
class ParamLayout:
    """The pieces of one parameter, stacked along axis 0 in this order, and what this rank holds of them.

    shard None: every tensor rank holds all of it, and `partial` says what their gradients are. Else this is rank `rank` of
    the `ranks` that share it. `rows`: the rows of that part which a sharding data rank keeps; None: all.

    of_experts: it lies on the grid of experts (`ParallelContext.experts`), and `span` are the rows, which are experts, that
    this expert rank holds. end: 0 or 1 where the first and the last stage of a pipeline both hold it; which of them this is.
    """

    pieces: tuple[Piece, ...]
    shard: Shard | None = None
    rank: int = 0
    ranks: int = 1
    partial: Partial = "tokens"
    rows: tuple[int, int] | None = None
    of_experts: bool = False
    span: tuple[int, int] | None = None
    end: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the stacked parameter."""
        return (sum(p.shape[0] for p in self.pieces), *self.pieces[0].shape[1:])

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, never to vectors, judged by the global shape."""
        return len(self.shape) > 1

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of it, and nothing else does but copies."""
        return self.ranks == 1 and self.rows is None and self.span is None

    @property
    def boxes(self) -> list[Box]:
        """What this rank holds, in the order in which it is stored; empty boxes are left out."""
        return _in_rows(self._stacked(), self.rows)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of this tensor rank's part, before data ranks cut its rows."""
        boxes = self._stacked()
        ends = zip(*(map(sum, zip(box.local, box.shape, strict=True)) for box in boxes), strict=True)
        return tuple(map(max, ends)) if boxes else (0, *self.shape[1:])

    def views(self, tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its view of a tensor laid out like the parameter, of which this rank holds everything."""
        assert self.is_whole, "a part of a parameter has boxes, no pieces"
        return ((box.piece, box.of(tensor)) for box in self.boxes)

    def widths(self) -> list[int]:
        """How many local rows each piece takes, before data ranks cut them."""
        ends = [_end(box for box in self._stacked() if box.piece is piece) for piece in self.pieces]
        return [max(0, end - max((0, *ends[:number]))) for number, end in enumerate(ends)]

    def _stacked(self) -> list[Box]:
        boxes: list[Box] = []
        for piece in self.pieces:
            first = _end(boxes)
            boxes += self._cut(piece, first) if self.shard and self.ranks > 1 else [_all_of(piece, first)]
        return _in_rows([box for box in boxes if 0 not in box.shape], self.span)

    def _cut(self, piece: Piece, first: int) -> list[Box]:
        """One box a block, one behind the other along the axis that is cut."""
        assert self.shard is not None
        axis, blocks = self.shard.axis, self.shard.blocks
        parts, block = min(piece.parts or self.ranks, self.ranks), piece.shape[axis] // blocks
        if self.ranks % parts or (self.shard.even and (piece.shape[axis] % blocks or block % parts)):
            raise ConfigError(
                f"{piece.name or 'a parameter'} {list(piece.shape)} cannot be shared by {self.ranks} ranks"
            )
        copies = self.ranks // parts
        part, copy = divmod(self.rank, copies)
        begin, end = part * block // parts, (part + 1) * block // parts
        boxes, whole = [], _all_of(piece, first)
        for number in range(blocks):
            offsets, local, shape = list(whole.offsets), list(whole.local), list(whole.shape)
            offsets[axis], shape[axis] = number * block + begin, end - begin
            local[axis] += number * (end - begin)
            boxes.append(Box(piece, tuple(offsets), tuple(local), tuple(shape), copies, copy))
        return boxes


def _in_rows(boxes: list[Box], rows: tuple[int, int] | None) -> list[Box]:
    return boxes if rows is None else [part for box in boxes if (part := box.in_rows(*rows))]


def _end(boxes: Iterable[Box]) -> int:
    """Local rows up to the end of the last box."""
    return max((box.local[0] + box.shape[0] for box in boxes), default=0)


def _all_of(piece: Piece, first: int) -> Box:
    zeros = (0,) * len(piece.shape)
    return Box(piece, zeros, (first, *zeros[1:]), piece.shape)


def parameter(
    *pieces: Piece, shard: Shard | None = None, context: ParallelContext | None = None, partial: Partial = "tokens"
) -> nn.Parameter:
    """An fp32 parameter with its layout, uninitialised, on the default device (meta while a model is assembled).

    With a `shard` and a `context` it is this rank's part. Raises ConfigError for pieces that do not divide.
    """
    group = context.tensor if context and shard else None
    layout = ParamLayout(pieces, shard, group.rank if group else 0, group.size if group else 1, partial)
    return attach(nn.Parameter(torch.empty(layout.tensor_shape, dtype=torch.float32)), layout)


def expert_parameter(piece: Piece, shard: Shard, context: ParallelContext) -> nn.Parameter:
    """This rank's part of a stack of all experts [E, ...]: some of them, and of each a part along `shard.axis`.

    Raises ConfigError for experts that do not divide.
    """
    ranks = context.experts
    if ranks is None:
        return parameter(piece, shard=shard, context=context)
    experts, own = piece.shape[0], piece.shape[0] // ranks.expert.size
    if experts % ranks.expert.size:
        raise ConfigError(f"{experts} experts cannot be shared by {ranks.expert.size} ranks")
    first = ranks.expert.rank * own
    layout = ParamLayout(
        (piece,), shard, ranks.tensor.rank, ranks.tensor.size, of_experts=True, span=(first, first + own)
    )
    return attach(nn.Parameter(torch.empty(layout.tensor_shape, dtype=torch.float32)), layout)


def attach(tensor: nn.Parameter, layout: ParamLayout) -> nn.Parameter:
    """Bind a layout to a parameter."""
    tensor.param_layout = layout  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def layout_of(tensor: nn.Parameter) -> ParamLayout:
    """The layout of a parameter. A parameter without one is our mistake."""
    layout = getattr(tensor, "param_layout", None)
    assert layout is not None, "a parameter was created without parallel.layout.parameter()"
    return layout


def local(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor, which FSDP may have made a DTensor (whose import takes a second)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def logical_name(parameter_name: str, piece: Piece) -> str:
    """`layers.0.mixer.in_proj.weight`, piece z -> `layers.0.mixer.in_proj.z`; its bias -> `...in_proj.z.bias`."""
    if not piece.name:
        return parameter_name
    module, _, attribute = parameter_name.rpartition(".")
    return f"{module}.{piece.name}" + ("" if attribute == "weight" else f".{attribute}")


@dataclass(frozen=True)
class Parts:
    """What this rank holds of one logical tensor: its global shape, and (offsets, view) of each box."""

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], Tensor], ...]


def held(tensor: Tensor | Parts) -> list[Tensor]:
    """All that this rank holds of a tensor."""
    return [view for _, view in tensor.boxes] if isinstance(tensor, Parts) else [tensor]


def logical_parts(name: str, owner: nn.Parameter, tensor: Tensor) -> dict[str, Tensor | Parts]:
    """Logical name -> what this rank holds of it, for a tensor laid out like the parameter `owner` called `name`.

    Views that write through: of the whole where the parameter is whole here, else Parts. A piece of which this rank holds
    nothing is left out.
    """
    if layout_of(owner).is_whole:
        return dict(logical_views(name, owner, tensor))
    stored, result = local(tensor), dict[str, Parts]()
    for box in layout_of(owner).boxes:
        key = logical_name(name, box.piece)
        before = result[key].boxes if key in result else ()
        result[key] = Parts(box.piece.shape, (*before, (box.offsets, box.of(stored))))
    return dict(result)


def logical_views(name: str, owner: nn.Parameter, tensor: Tensor) -> dict[str, Tensor]:
    """Logical name -> view, for a tensor laid out like the parameter `owner`, of which this rank holds everything."""
    return {logical_name(name, piece): view for piece, view in layout_of(owner).views(tensor)}


def logical_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Logical name -> view of the values, for every parameter of a model that is whole here, detached."""
    result: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters():
        result |= logical_views(name, tensor, tensor.detach())
    return result

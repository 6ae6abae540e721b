"""The scan as a sequence of kernels, forward and backward, on plain tensors: no autograd, no copies, nothing kept.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded. Outputs may be given, as parts of wider rows: a gradient then needs no concatenation.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch, size_to_cut
from nemohybrid_kernels.ssd.triton import decay_kernels, gradient_kernels, scan_kernels, state_kernels

PROGRAMS = 128
"""Programs that fill a GPU; with fewer, sequences are cut into segments, and groups of heads into blocks."""


@dataclass(frozen=True)
class Call:
    """The arguments of a scan, and what follows from their shapes.

    x [b, L, H, P]; dt [b, L, H]; A [H]; B, C [b, L, G, N]; D, bias [H]; starts [b, L] int32, as `document_starts`;
    initial [b, H, P, N] fp32. The last dimension of x, dt, B and C is contiguous, that of P and N included. With
    `softplus` dt is raw: steps are softplus(dt + bias), then clamped to `limit`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    bias: Tensor | None = None
    starts: Tensor | None = None
    initial: Tensor | None = None
    softplus: bool = False
    limit: tuple[float, float] | None = None
    chunk_size: int | None = None

    batch = property(lambda self: self.x.shape[0])
    L = property(lambda self: self.x.shape[1])
    H = property(lambda self: self.x.shape[2])
    P = property(lambda self: self.x.shape[3])
    G = property(lambda self: self.B.shape[2])
    N = property(lambda self: self.B.shape[3])

    @cached_property
    def chunk(self) -> int:
        """Tokens of a chunk: what was asked for, as a power of two that a tile can have, or what the table says."""
        if self.chunk_size is None:
            return self.config("ssd_chunk").tiles["CHUNK"]
        return min(128, max(16, 1 << (self.chunk_size - 1).bit_length()))

    @property
    def chunks(self) -> int:
        return -(-self.L // self.chunk)

    @property
    def to_cut(self) -> tuple[int, int]:
        """Rows, and chunks of a row, that say how programs share the work."""
        rows, tokens = size_to_cut(self.batch, self.L)
        return rows, -(-tokens // self.chunk)

    @property
    def sizes(self) -> dict[str, int]:
        """What all kernels want to know."""
        return {"L": self.L, "H": self.H, "chunks": self.chunks, "CHUNK": self.chunk}

    @property
    def widths(self) -> dict[str, int]:
        return {"R": self.H // self.G, "P": self.P, "N": self.N, "PADDED_P": padded(self.P)}

    def config(self, kernel: str) -> Config:
        """Its configuration for these shapes, no tile of tokens longer than a chunk."""
        found = config_for(kernel, self.x.device, N=self.N, P=self.P, dtype=dtype_fact(self.x))
        if "ROWS" not in found.tiles:
            return found
        return replace(found, tiles={**found.tiles, "ROWS": min(found.tiles["ROWS"], self.chunk)})

    def vectors(self) -> Tensor:
        """A number for every head and token of whole chunks, [b, H, chunks * CHUNK] fp32, not filled."""
        return self.x.new_empty(self.batch, self.H, self.chunks * self.chunk, dtype=torch.float32)


class Decays(NamedTuple):
    """What `ssd_decays` makes of the time steps."""

    dt: Tensor
    decay: Tensor
    enter: Tensor
    leave: Tensor
    of_chunk: Tensor


class Gradients(NamedTuple):
    """Of the arguments of a `Call`; None where it has none."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor


@dataclass(frozen=True)
class Into:
    """Where gradients go: tensors of the shapes of x, dt, B and C, or None for new ones."""

    x: Tensor | None = None
    dt: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None


class Outputs(NamedTuple):
    """y [b, L, H, P] like x; the state after the last token, [b, H, P, N] fp32; those before each chunk, as `states_of`."""

    y: Tensor
    final: Tensor
    states: Tensor


def forward(call: Call, y: Tensor | None = None) -> Outputs:
    """Into `y`, where it is given."""
    y = like(call.x) if y is None else y
    decays = decays_of(call)
    states, final = states_of(call, decays)
    _scan(call, decays, call.x, call.B, call.C, states, decays.enter, y)
    return Outputs(y, final, states)


def backward(
    call: Call, dy: Tensor, d_final: Tensor | None, into: Into | None = None, states: Tensor | None = None
) -> Gradients:
    """Gradients of everything, from those of y and of the last state. Decays are made again, and `states` unless given."""
    into = into or Into()
    decays = decays_of(call)
    states = states_of(call, decays)[0] if states is None else states
    reverse = _reverse_states(call, decays, dy, d_final, states)
    dx, left = like(call.x) if into.x is None else into.x, call.vectors()
    _scan(call, decays, dy, call.C, call.B, reverse.states, decays.leave, dx, (call.x, left))
    pairs = _pair_gradients(call, decays, dy)
    dB, _ = _group_gradients(call, pairs.CB, call.x, reverse.states, decays.leave, decays.dt, call.C, None, into.B)
    dC, entered = _group_gradients(call, pairs.CB, dy, states, decays.enter, None, call.B, call.C, into.C)
    d_dt, dA, dD, d_bias = _decay_gradients(call, decays, pairs, entered, left, reverse.passed, into.dt)
    return Gradients(dx, d_dt, dA, dB, dC, dD, d_bias, reverse.initial)


def decays_of(call: Call) -> Decays:
    """The time steps, and all factors that follow from them."""
    config = call.config("ssd_decays")
    dt, decay, enter, leave = (call.vectors() for _ in range(4))
    of_chunk = call.x.new_empty(call.batch, call.H, call.chunks, dtype=torch.float32)
    decays = Decays(dt, decay, enter, leave, of_chunk)
    launch(
        decay_kernels.ssd_decays,
        (call.batch * call.chunks, -(-call.H // config.tiles["HEADS"])),
        config,
        **_time_steps(call),
        starts=call.starts,
        dt_out=decays.dt,
        decay_out=decays.decay,
        enter_out=decays.enter,
        leave_out=decays.leave,
        chunk_decay_out=decays.of_chunk,
        **call.sizes,
    )
    return decays


def _time_steps(call: Call) -> dict[str, Any]:
    low, high = call.limit or (None, None)
    given = {"raw": call.dt, "bias": _contiguous(call.bias), "A": _contiguous(call.A)}
    given |= {"SOFTPLUS": call.softplus, "LOW": low, "HIGH": high}
    return given | {"raw_stride_b": call.dt.stride(0), "raw_stride_l": call.dt.stride(1)}


def states_of(call: Call, decays: Decays) -> tuple[Tensor, Tensor]:
    """The states before each chunk, [b, chunks, H, N, P] in x's type, and the one after the last, [b, H, P, N] fp32."""
    loop = _Loop(call, call.x, call.B, decays.leave, decays.dt, decays.of_chunk, reverse=False)
    states, final, _ = loop.run(call.initial)
    return states, final


class _Reverse(NamedTuple):
    states: Tensor  # gradients of the states after each chunk, [b, chunks, H, N, P]
    initial: Tensor  # [b, H, P, N]
    passed: Tensor  # [tiles, b, H, chunks]: gradients of the log decays of whole chunks


def _reverse_states(call: Call, decays: Decays, dy: Tensor, d_final: Tensor | None, states: Tensor) -> _Reverse:
    loop = _Loop(call, dy, call.C, decays.enter, None, decays.of_chunk, reverse=True)
    d_states, d_initial, passed = loop.run(d_final, states)
    assert passed is not None, "with the forward states the loop returns what passed"
    return _Reverse(d_states, d_initial, passed)


@dataclass(frozen=True)
class _Loop:
    """The loop over chunks, in either direction: state <- decay * state + B^T (weight dt x)."""

    call: Call
    x: Tensor
    B: Tensor
    weight: Tensor
    dt: Tensor | None
    decay: Tensor
    reverse: bool

    @cached_property
    def config(self) -> Config:
        return self.call.config("ssd_states")

    @property
    def tiles(self) -> int:
        """Programs that share the state of a head."""
        call, tiles = self.call, self.config.tiles
        return -(-call.N // tiles["BLOCK_N"]) * -(-call.P // tiles["BLOCK_P"])

    def run(self, initial: Tensor | None, forward_states: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state before each chunk (in the loop's direction), the last one, and what passed."""
        call, (rows, chunks) = self.call, self.call.to_cut
        segments = min(max(1, chunks // 4), -(-PROGRAMS // (rows * call.H * self.tiles)))
        if segments > 1:
            initial = self._before_segments(initial, segments)
        states = call.x.new_empty(call.batch, call.chunks, call.H, call.N, call.P)
        passed = None
        if forward_states is not None:
            passed = call.x.new_empty(self.tiles, call.batch, call.H, call.chunks, dtype=torch.float32)
        final, _ = self._launch(initial, segments, states, forward_states, passed)
        return states, final[:, 0 if self.reverse else -1], passed

    def _before_segments(self, initial: Tensor | None, segments: int) -> Tensor:
        """The state before each of the segments, [b, segments, H, P, N]: each adds to a state, and decays it."""
        ends, decays = self._launch(None, segments)
        return combine(ends, decays, initial, self.reverse)

    def _launch(
        self,
        initial: Tensor | None,
        segments: int,
        states: Tensor | None = None,
        forward_states: Tensor | None = None,
        passed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = self.call
        final = call.x.new_empty(call.batch, segments, call.H, call.P, call.N, dtype=torch.float32)
        final_decay = call.x.new_empty(call.batch, segments, call.H, dtype=torch.float32)
        launch(
            state_kernels.ssd_states,
            (call.batch * segments * call.H * self.tiles,),
            self.config,
            x=self.x,
            B=self.B,
            weight=self.weight,
            dt=self.dt,
            chunk_decay=self.decay,
            initial=initial,
            states=states,
            forward_states=forward_states,
            passed=passed,
            final=final,
            final_decay=final_decay,
            **call.sizes,
            segments=segments,
            passed_stride=self.decay.numel(),
            **strides("x", self.x, "blh"),
            **strides("B", self.B, "blg"),
            R=call.H // call.G,
            P=call.P,
            N=call.N,
            REVERSE=self.reverse,
        )
        return final, final_decay


def combine(ends: Tensor, decays: Tensor, initial: Tensor | None, reverse: bool = False) -> Tensor:
    """The state before each segment of a sequence, [b, segments, H, P, N] fp32, wherever the segments were computed.

    ends [b, segments, H, P, N]: the state after each, begun with zeros; decays [b, segments, H]: what it leaves of a state
    that enters; initial [b, H, P, N] enters the first. `reverse`: they follow each other from the last to the first.
    """
    batch, segments, H, P, N = ends.shape
    before = torch.empty_like(ends)
    config = Config({"BLOCK": 1024}, warps=4, stages=1)
    launch(
        state_kernels.ssd_combine,
        (batch * -(-P * N // 1024), H),
        config,
        ends=ends,
        decays=decays,
        initial=initial,
        before=before,
        size=P * N,
        segments=segments,
        REVERSE=reverse,
    )
    return before


def _scan(
    call: Call,
    decays: Decays,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    edge: Tensor,
    y: Tensor,
    exchange: tuple[Tensor, Tensor] | None = None,
) -> None:
    """y, or with `exchange`, x and what it and the states exchanged, dx: see the kernel."""
    tiled = _tiled("ssd_scan", call)
    source, exchanged = exchange or (x, None)
    launch(
        scan_kernels.ssd_scan,
        (call.batch * call.chunks * call.G * tiled.blocks * tiled.tiles,),
        tiled.config,
        x=x,
        B=B,
        C=C,
        D=_contiguous(call.D),
        dt=decays.dt,
        decay=decays.decay,
        edge=edge,
        starts=call.starts,
        states=states,
        y=y,
        source=None if exchange is None else source,
        exchanged=exchanged,
        **call.sizes,
        **call.widths,
        **strides("x", x, "blh"),
        **strides("B", B, "blg"),
        **strides("C", C, "blg"),
        **strides("y", y, "blh"),
        **strides("source", source, "blh"),
        PADDED_N=padded(call.N),
        REVERSE=exchange is not None,
    )


class _Pairs(NamedTuple):
    """What `ssd_pair_gradients` finds."""

    CB: Tensor  # gradient of B C^T, [b, chunks, G, blocks, CHUNK, CHUNK]
    gained: Tensor  # [tiles, b, H, T]
    lost: Tensor  # [tiles, b, H, T]
    product: Tensor
    itself: Tensor
    tile: int  # tokens


def _pair_gradients(call: Call, decays: Decays, dy: Tensor) -> _Pairs:
    tiled = _tiled("ssd_pair_gradients", call)
    dCB = call.x.new_empty(call.batch, call.chunks, call.G, tiled.blocks, call.chunk, call.chunk)
    gained, lost = (call.x.new_empty(tiled.tiles, *decays.dt.shape, dtype=torch.float32) for _ in range(2))
    product, itself = call.vectors(), call.vectors()
    launch(
        gradient_kernels.ssd_pair_gradients,
        (call.batch * call.chunks * call.G * tiled.blocks * tiled.tiles**2,),
        tiled.config,
        x=call.x,
        B=call.B,
        C=call.C,
        dt=decays.dt,
        decay=decays.decay,
        starts=call.starts,
        dy=dy,
        dCB=dCB,
        gained=gained,
        lost=lost,
        product=product,
        itself=itself,
        **call.sizes,
        part_stride=product.numel(),
        **call.widths,
        **strides("x", call.x, "blh"),
        **strides("B", call.B, "blg"),
        **strides("C", call.C, "blg"),
        **strides("dy", dy, "blh"),
        PADDED_N=padded(call.N),
    )
    return _Pairs(dCB, gained, lost, product, itself, tiled.config.tiles["ROWS"])


def _group_gradients(
    call: Call,
    dCB: Tensor,
    x: Tensor,
    states: Tensor,
    weight: Tensor,
    dt: Tensor | None,
    other: Tensor,
    C: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """dB, or with `C` dC and what entered: see `ssd_group_gradients`."""
    config = call.config("ssd_group_gradients")
    tiles, tiles_n = call.chunk // config.tiles["ROWS"], -(-call.N // config.tiles["BLOCK_N"])
    out = like(call.B) if out is None else out
    entered = None
    if C is not None:
        entered = call.x.new_empty(tiles_n, *weight.shape, dtype=torch.float32)
    launch(
        gradient_kernels.ssd_group_gradients,
        (call.batch * call.chunks * call.G * tiles_n * tiles,),
        config,
        x=x,
        states=states,
        weight=weight,
        dt=dt,
        dCB=dCB,
        other=other,
        C=C,
        out=out,
        entered=entered,
        **call.sizes,
        entered_stride=weight.numel(),
        **call.widths,
        **strides("x", x, "blh"),
        **strides("other", other, "blg"),
        **strides("C", other if C is None else C, "blg"),
        **strides("out", out, "blg"),
        BLOCKS=dCB.shape[3],
    )
    return out, entered


def _decay_gradients(
    call: Call,
    decays: Decays,
    pairs: _Pairs,
    entered: Tensor | None,
    left: Tensor,
    passed: Tensor,
    d_dt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of dt, A, D and the bias."""
    assert entered is not None, "the gradient of C tells what entered"
    config = call.config("ssd_decays_backward")
    d_dt = like(call.dt) if d_dt is None else d_dt
    dA, dD, d_bias = (
        None if of is None else call.x.new_empty(call.batch, call.chunks, call.H, dtype=torch.float32)
        for of in (call.A, call.D, call.bias)
    )
    launch(
        decay_kernels.ssd_decays_backward,
        (call.batch * call.chunks, -(-call.H // config.tiles["HEADS"])),
        config,
        **_time_steps(call),
        dt=decays.dt,
        gained=pairs.gained,
        lost=pairs.lost,
        tile=pairs.tile,
        product=pairs.product,
        itself=pairs.itself,
        entered=entered,
        entered_parts=len(entered),
        left=left,
        passed=passed,
        passed_parts=len(passed),
        part_stride=left.numel(),
        passed_stride=decays.of_chunk.numel(),
        d_raw=d_dt,
        dA_out=dA,
        dD_out=dD,
        dbias_out=d_bias,
        **call.sizes,
        d_raw_stride_b=d_dt.stride(0),
        d_raw_stride_l=d_dt.stride(1),
    )
    of_A = _over_chunks(dA, call.A)
    assert of_A is not None, "there is always an A"
    return d_dt, of_A, _over_chunks(dD, call.D), _over_chunks(d_bias, call.bias)


def _over_chunks(parts: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if parts is None or like is None else parts.sum((0, 1)).to(like.dtype)


class _Tiled(NamedTuple):
    config: Config
    blocks: int  # of the heads of a group
    tiles: int  # of the tokens of a chunk


def _tiled(kernel: str, call: Call) -> _Tiled:
    """How programs share chunks and groups: as many heads each as the table says, fewer where a GPU would not be filled."""
    config, R = call.config(kernel), call.H // call.G
    tiles = call.chunk // config.tiles["ROWS"]
    heads, (rows, chunks) = min(config.tiles["HEADS"], 1 << (R - 1).bit_length()), call.to_cut
    while heads > 1 and rows * chunks * call.G * tiles * -(-R // heads) < 2 * PROGRAMS:
        heads //= 2
    return _Tiled(replace(config, tiles={**config.tiles, "HEADS": heads}), -(-R // heads), tiles)


def padded(width: int) -> int:
    """The tile that holds `width`: a power of two, and no product takes less than 16."""
    return max(16, 1 << (width - 1).bit_length())


def like(t: Tensor) -> Tensor:
    """A new, contiguous tensor of the same shape and type."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def strides(name: str, t: Tensor, dims: str) -> dict[str, int]:
    """NAME_stride_b and so on, of the first dimensions of `t`."""
    return {f"{name}_stride_{dim}": t.stride(at) for at, dim in enumerate(dims)}

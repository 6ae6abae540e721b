"""Bytes and FLOPs of the kernels of mamba-ssm, read off its source, and the least that any kernels need.

Counted as in counts.py, where a choice is left to its autotuner in its favour: causal loops end after tiles of 64 tokens. When
its kernels, of version 2.3.2.post1, ran in Triton's interpreter (512 tokens in two chunks), what they read, wrote and multiplied
was within 3 percent of this, kernel by kernel; the products of two, in smaller tiles than these, within 12.
"""

from dataclasses import dataclass

from cases import Sizes
from counts import FP32, Count, Kernel

BF16 = 2
TILE = 64
PROCESSORS = 132
"""Of an H100 or H200: into so many parts, at most, sums over the heads of a group are cut."""


@dataclass(frozen=True)
class Tensors:
    """Bytes of the tensors of a mixer in bf16, with chunks of `chunk` tokens; and FLOPs of its products."""

    sizes: Sizes
    chunk: int

    @property
    def x(self) -> float:
        """Also of z and y."""
        return BF16 * self.sizes.tokens * self.sizes.inner

    @property
    def B(self) -> float:
        return BF16 * self.sizes.tokens * self.sizes.groups * self.sizes.state

    @property
    def xbc(self) -> float:
        return self.x + 2 * self.B

    @property
    def raw(self) -> float:
        """dt before softplus."""
        return BF16 * self.sizes.tokens * self.sizes.heads

    @property
    def vector(self) -> float:
        """fp32, one number for every token and head."""
        return FP32 * self.sizes.tokens * self.sizes.heads

    @property
    def states(self) -> float:
        """In fp32, one for every chunk and head."""
        return FP32 * self.sizes.tokens // self.chunk * self.sizes.inner * self.sizes.state

    @property
    def state(self) -> float:
        """In fp32, one for every head."""
        return FP32 * self.sizes.inner * self.sizes.state

    @property
    def scores(self) -> float:
        """C B^T in fp32, whole squares."""
        return FP32 * self.sizes.tokens * self.chunk * self.sizes.groups

    @property
    def seen(self) -> float:
        """The share of a square that a causal loop over tiles of it touches."""
        tiles = max(1, self.chunk // TILE)
        return (tiles + 1) / (2 * tiles)

    @property
    def splits(self) -> int:
        """Partial sums over the heads of a group."""
        heads = self.sizes.heads // self.sizes.groups
        each = min(-(-(self.sizes.tokens // self.chunk * self.sizes.heads) // PROCESSORS), heads)
        return -(-heads // max(each, 1))

    @property
    def state_product(self) -> float:
        """FLOPs between tokens and states of all heads."""
        return 2.0 * self.sizes.tokens * self.sizes.inner * self.sizes.state

    @property
    def token_product(self) -> float:
        """FLOPs between the tokens of all chunks, in all heads."""
        return 2.0 * self.sizes.tokens * self.sizes.inner * self.chunk

    @property
    def score_product(self) -> float:
        return 2.0 * self.sizes.tokens * self.sizes.groups * self.sizes.state * self.chunk


def mamba_ssm(sizes: Sizes, chunk: int) -> Count:
    """The kernels of mamba_split_conv1d_scan_combined, in the order of mamba-ssm 2.3.2, with causal-conv1d's."""
    t = Tensors(sizes, chunk)
    return Count(_forward(t), _backward(t))


def _conv(t: Tensors) -> Kernel:
    return Kernel("causal_conv1d_fwd", 2 * t.xbc)


def _cumsum(t: Tensors) -> Kernel:
    return Kernel("chunk_cumsum_fwd", t.raw + 2 * t.vector)


def _chunk_state(t: Tensors) -> Kernel:
    return Kernel("chunk_state_fwd", t.x + t.B + 2 * t.vector + t.states, t.state_product)


def _scores(t: Tensors) -> Kernel:
    return Kernel("bmm_chunk_fwd", 2 * t.B + t.scores, t.score_product)


def _forward(t: Tensors) -> list[Kernel]:
    scan = t.seen * t.scores + 2 * t.x + 2 * t.vector + t.B + t.states / 2
    return [
        _conv(t),
        _cumsum(t),
        _chunk_state(t),
        Kernel("state_passing_fwd", 1.5 * t.states + t.state),  # fp32 in, bf16 out, the last one in fp32
        _scores(t),
        Kernel("chunk_scan_fwd", scan, t.state_product + t.seen * t.token_product),
        Kernel("layer_norm_fwd", 3 * t.x),
    ]


def _backward(t: Tensors) -> list[Kernel]:
    return [
        _conv(t),
        Kernel("layer_norm_bwd", 5 * t.x),
        Kernel("copy of dt", 2 * t.raw),
        _cumsum(t),
        _scores(t),
        _chunk_state(t),
        Kernel("state_passing_fwd", 2 * t.states + t.state),  # fp32 out
        Kernel("chunk_scan_bwd_dstates", t.B + t.x + t.vector + t.states, t.state_product),
        Kernel("state_passing_bwd", 3 * t.states - t.state),  # two in fp32, but for one state, two out in bf16
        Kernel(
            "chunk_scan_chunk_state_bwd_dx",
            3 * t.x + t.seen * t.scores + t.B + t.states / 2 + 3 * t.vector,
            t.state_product + t.seen * t.token_product,
        ),
        *_of_groups(t),
        *_of_decays(t),
        Kernel("causal_conv1d_bwd", 3 * t.xbc),
    ]


def _of_groups(t: Tensors) -> list[Kernel]:
    """Gradients of B, C and C B^T: partial sums in fp32, which torch adds up even where there is one."""
    own = t.x + t.states / 2 + t.B + 2 * t.splits * t.B  # x or dy, states, B or C, its gradient
    add = 2 * (t.splits + 1) * t.B
    return [
        Kernel("chunk_state_bwd_db", own + 3 * t.vector, t.state_product),
        Kernel("sum of dB", add),
        Kernel("chunk_scan_bwd_dC", own + 2 * t.vector, t.state_product),
        Kernel("sum of dC", add),
        Kernel("chunk_scan_bwd_dcb", 2 * t.x + 2 * t.vector + t.splits * t.scores, t.seen * t.token_product),
        Kernel("sum of dcb", (t.splits + 1) * t.scores),
        *(Kernel("bmm_chunk_bwd", t.scores + t.B + 2 * t.B + t.B, t.score_product) for _ in range(2)),
    ]


def _of_decays(t: Tensors) -> list[Kernel]:
    """Each tile of tokens leaves a row; what other kernels left is flipped, summed, flipped back and added."""
    parts = max(1, t.chunk // TILE)
    bytes_moved = 2 * t.x + t.seen * t.scores + (2 + parts) * t.vector
    return [
        Kernel("chunk_scan_bwd_ddAcs_stable", bytes_moved, t.seen * t.token_product),
        Kernel("sum of its rows", (parts + 1) * t.vector),
        Kernel("zeros for what is added to", 3 * t.vector),
        Kernel("sums of decays", 14 * t.vector),
        Kernel("chunk_cumsum_bwd", 2 * t.vector + 2 * t.raw),
    ]


def minimum(sizes: Sizes, chunk: int = 128) -> Count:
    """Inputs read once, results written once, y kept for the backward pass; and each product of the chunked form once."""
    t = Tensors(sizes, chunk)
    row = 2 * t.x + 2 * t.B + t.raw
    forward = t.score_product + 2 * t.state_product + t.token_product
    backward = 3 * t.score_product + 5 * t.state_product + 2 * t.token_product  # the decays' gradients need none
    return Count([Kernel("all at once", row + t.x, forward)], [Kernel("all at once", 2 * row + 2 * t.x, backward)])

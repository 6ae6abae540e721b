"""Bytes and FLOPs of a launch of our kernels, counted from its arguments.

Bytes are those of every element once that the kernel reads, and once that it writes, however many programs read it: what
reaches memory if caches hold the rest. FLOPs are those of the matrix products, a multiply-add counting two, with the padding
of tiles and the masked halves of chunks where a kernel multiplies them; other arithmetic is not counted.
tests/scripts/test_kernel_counts.py compares both with what Triton's interpreter does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemohybrid_kernels.calls import Case
from nemohybrid_kernels.launching import Launch

FP32 = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Kernel:
    """One launch, or what else runs in its place."""

    name: str
    bytes: float
    flops: float = 0.0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """What it takes at least."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclass(frozen=True)
class Count:
    """Kernels in their order, of the forward and of the backward pass."""

    forward: Sequence[Kernel]
    backward: Sequence[Kernel]

    @property
    def both(self) -> Sequence[Kernel]:
        return [*self.forward, *self.backward]


def of_launch(launch: Launch) -> Kernel:
    """A launch of ours, recorded or run. Rows of visits that an `end` in memory excludes are counted: it cannot be known."""
    name = launch.kernel.__name__
    more, products = MORE_BYTES.get(name), PRODUCTS.get(name)
    moved = launch.tensor_bytes + (more(launch.arguments, launch.config.tiles) if more else 0)
    return Kernel(name, moved, products(launch) if products else 0.0)


def of_mixer(case: Case, architecture: int = 90) -> Count:
    """What a case of the mixer launches on sm_`architecture`. Its last operator is the first of the backward pass."""
    launches = case.launches(architecture)
    turn = [launch.kernel.__name__ for launch in launches].index("norm_backward")
    backward = [kernel for launch in launches[turn:] for kernel in (of_launch(launch), *sum_of_shares(launch))]
    return Count([of_launch(launch) for launch in launches[:turn]], backward)


def sum_of_shares(launch: Launch) -> list[Kernel]:
    """What torch adds up behind a kernel whose programs leave shares of a weight's gradient."""
    shares = launch.arguments.get("partial")
    return [] if shares is None else [Kernel(f"sum of shares of {launch.kernel.__name__}", shares.numel() * FP32)]


# --- bytes: more or less than every tensor once ------------------------------------------------------------------------

Arguments = Mapping[str, Any]


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _rewritten(given: Arguments, tiles: Arguments) -> int:
    """With weights `dout` is read, and written over."""
    return 0 if given["weights"] is None else size(given["dout"])


def _padding_unread(given: Arguments, tiles: Arguments) -> int:
    return -_padding(given["logits"], given["V"])


def _logits_rewritten(given: Arguments, tiles: Arguments) -> int:
    """Read, and written with their padding."""
    return size(given["logits"]) - _padding(given["logits"], given["V"])


def _padding(logits: Tensor, columns: int) -> int:
    return len(logits) * (logits.shape[1] - columns) * logits.element_size()


def _pairs_above(given: Arguments, tiles: Arguments) -> int:
    """Nothing is gained or lost between a tile of tokens and a later one."""
    return -_above(given, tiles["ROWS"])


def _parts_above(given: Arguments, tiles: Arguments) -> int:
    """The same is not read; nor what D would need, where there is none."""
    unread = size(given["product"]) if given["dD_out"] is None else 0
    return -_above(given, given["tile"]) - unread


def _above(given: Arguments, rows: int) -> int:
    parts = given["CHUNK"] // rows
    return (size(given["gained"]) + size(given["lost"])) * (parts - 1) // (2 * parts)


MORE_BYTES: dict[str, Callable[[Arguments, Arguments], int]] = {
    "relu2_backward": _rewritten,
    "cross_entropy_rows": _padding_unread,
    "cross_entropy_gradient": _logits_rewritten,
    "ssd_pair_gradients": _pairs_above,
    "ssd_decays_backward": _parts_above,
}
"""Kernel -> bytes that a launch moves beyond all of its tensors once. What is not here reads or writes each once, and whole."""


# --- FLOPs -------------------------------------------------------------------------------------------------------------


def _states(launch: Launch) -> float:
    f = _Facts.of(launch)
    return f.between(f["CHUNK"], _blocks(f["N"], f["BLOCK_N"]), _blocks(f["P"], f["BLOCK_P"]))


def _scan(launch: Launch) -> float:
    """Scores once for each block of heads; what the state gives, and what the tokens of the chunk do."""
    f = _Facts.of(launch)
    scores = f.in_groups(f["CHUNK"], f["CHUNK"], f["PADDED_N"]) * -(-f["R"] // f["HEADS"])
    return scores + f.between(f["CHUNK"], f["PADDED_P"], f["PADDED_N"] + f["CHUNK"])


def _pairs(launch: Launch) -> float:
    """Scores for all pairs of tiles, products of the heads for those that are causal."""
    f = _Facts.of(launch)
    tiles, rows = f["CHUNK"] // f["ROWS"], f["ROWS"]
    scores = f.in_groups(f["CHUNK"], f["CHUNK"], f["PADDED_N"]) * -(-f["R"] // f["HEADS"])
    return scores + f.between(rows, rows, f["PADDED_P"]) * (tiles * (tiles + 1) // 2)


def _groups(launch: Launch) -> float:
    f = _Facts.of(launch)
    states = _blocks(f["N"], f["BLOCK_N"])
    of_states = f.between(f["CHUNK"], f["PADDED_P"], states)
    return of_states + f.in_groups(f["CHUNK"], f["CHUNK"], states) * f["BLOCKS"]


def _blocks(width: int, block: int) -> int:
    """The columns of all tiles."""
    return -(-width // block) * block


class _Facts(dict[str, Any]):
    """Arguments and tiles of a launch of the scan."""

    @classmethod
    def of(cls, launch: Launch) -> "_Facts":
        return cls(launch.arguments | dict(launch.config.tiles))

    def between(self, m: int, n: int, k: int) -> float:
        """Of a product [m, k] [k, n] for every chunk and head."""
        return 2.0 * self["x"].shape[0] * self["chunks"] * self["H"] * m * n * k

    def in_groups(self, m: int, n: int, k: int) -> float:
        """The same for every chunk and group."""
        return self.between(m, n, k) / self["R"]


PRODUCTS: dict[str, Callable[[Launch], float]] = {
    "ssd_states": _states,
    "ssd_scan": _scan,
    "ssd_pair_gradients": _pairs,
    "ssd_group_gradients": _groups,
}
"""Kernel -> the FLOPs of a launch. Others have no matrix products."""

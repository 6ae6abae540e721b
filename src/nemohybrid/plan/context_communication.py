"""What ranks that share the tokens of a row send each other: the part of context ranks in `plan.communication`.

In a layer these are all-to-alls, of which a rank sends away what is not its own, and a step round a ring is one of them:

           forward                                        backward
  heads    q, k, v (of Mamba-2 x, B, C, dt) to the        the same
           ranks of their heads; what these made, back
  ring     q, k, v to halves that are balanced; k and v   the same; and fp32 gradients of k and v, c times
           c - 1 times; what was attended, back
  states   inputs of the convolution, log2(c) states      the same, to the left
           with their decays, and a state, to the right

Recomputation sends again what goes forward: all of it is there before the last product of the layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemohybrid.config.context import attention_heads, attention_way, mamba_heads, mamba_way, own_length
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan.sends import FP32, INT32, INT64, Send

Passes = tuple[list[Send], list[Send]]
"""Forward and backward."""


def middle(ranks: int) -> int:
    """The number of a rank that has neighbours on both sides, as far as there are any: none sends more."""
    return (ranks - 1) // 2


@dataclass(frozen=True)
class Share:
    """What context rank number `part` has of the tokens of `rows` sequences."""

    config: RunConfig
    rows: int
    part: int

    @property
    def ranks(self) -> int:
        """That share them."""
        return self.config.parallel.context

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * own_length(self.config)

    @property
    def model(self) -> ModelConfig:
        """Its sizes."""
        return self.config.model

    @property
    def width(self) -> int:
        """Bytes of a number in the model's dtype."""
        return 2 if self.model.dtype == "bfloat16" else FP32

    @property
    def documents(self) -> bool:
        """Whether a row may hold several."""
        return self.config.data.reset_documents

    def way(self, symbol: str) -> str | None:
        """In which its layers look across tokens; None: they do not."""
        ways = {"*": attention_way, "M": mamba_way}
        return ways[symbol](self.config) if symbol in ways else None

    def to_all(self, numbers: int) -> Send:
        """For every token so many numbers to each rank."""
        return Send("all_to_all", (self.ranks - 1) * self.tokens * numbers * self.width)

    def to_next(self, by: int, size: int) -> Send:
        """So many bytes to the rank `by` places to the right, which may not be there."""
        return Send("all_to_all", size if 0 <= self.part + by < self.ranks else 0)

    def to_balance(self, size: int) -> Send:
        """Bytes of a token: with its half of the rank's tokens to the rank that attends with it. Of 2 c halves rank r attends
        with r and 2 c - 1 - r."""
        own = 2 * self.part, 2 * self.part + 1
        leaving = sum(half not in (self.part, 2 * self.ranks - 1 - self.part) for half in own)
        return Send("all_to_all", leaving * self.tokens // 2 * size)


def layer_sends(symbol: str, share: Share, recompute: bool = False) -> Iterator[Send]:
    """Forward and backward pass of one layer. Of symbols other than ours nothing is known, and nothing counted."""
    if way := share.way(symbol):
        forward, backward = WAYS[symbol, way](share)
        yield from forward * (1 + recompute)
        yield from backward


def attention_by_heads(share: Share) -> Passes:
    """Key/value heads that are fewer than the ranks go to several."""
    heads, groups = (max(1, n // share.ranks) for n in attention_heads(share.model, share.config.parallel.tensor))
    size = share.model.head_dim or 0
    both = [share.to_all((heads + 2 * groups) * size), share.to_all(heads * size)]
    return both, both


def attention_by_ring(share: Share) -> Passes:
    """The numbers of documents go with the tokens, but take no gradients."""
    heads, groups = attention_heads(share.model, share.config.parallel.tensor)
    size, turns = (share.model.head_dim or 0) * share.width, share.ranks - 1
    there, back = share.to_balance((heads + 2 * groups) * size), share.to_balance(heads * size)
    numbers = share.tokens * 2 * groups * (share.model.head_dim or 0)
    around = [Send("all_to_all", numbers * share.width, turns)]
    around += [Send("all_to_all", share.tokens * INT32, turns)] if share.documents else []
    borders = [share.to_balance(INT32)] if share.documents else []
    return [there, *borders, *around, back], [back, *around, Send("all_to_all", numbers * FP32, share.ranks), there]


def mamba_by_heads(share: Share) -> Passes:
    """Groups that are fewer than the ranks go to several. The gate stays where it is."""
    heads, groups = (max(1, n // share.ranks) for n in mamba_heads(share.model, share.config.parallel.tensor))
    inner = heads * (share.model.mamba_head_dim or 0)
    both = [share.to_all(inner + 2 * groups * share.model.ssm_state_size + heads), share.to_all(inner)]
    return both, both


def mamba_by_states(share: Share) -> Passes:
    """The first and the last rank send in one pass alone."""
    m, (heads, groups) = share.model, mamba_heads(share.model, share.config.parallel.tensor)
    inner = heads * (m.mamba_head_dim or 0)
    taps = share.rows * (m.conv_kernel - 1) * (inner + 2 * groups * m.ssm_state_size) * share.width
    state, decays = share.rows * inner * m.ssm_state_size * FP32, share.rows * heads * FP32
    steps = [2**n for n in range((share.ranks - 1).bit_length())]

    def passing(way: int) -> list[Send]:
        doubling = [share.to_next(by * way, state + decays) for by in steps]
        return [share.to_next(way, taps), *doubling, share.to_next(way, state)]

    return passing(1), passing(-1)


WAYS: dict[tuple[str, str], Callable[[Share], Passes]] = {
    ("*", "heads"): attention_by_heads,
    ("*", "ring"): attention_by_ring,
    ("M", "heads"): mamba_by_heads,
    ("M", "states"): mamba_by_states,
}
"""Symbol and way -> what its layer sends."""


def documents(share: Share, symbols: set[str]) -> Iterator[Send]:
    """Once a microbatch: the borders of documents; and the document of every token, where heads have whole rows."""
    ways = {share.way(symbol) for symbol in symbols} - {None}
    if share.documents and ways:
        yield Send("all_gather", share.ranks * share.rows * 4 * INT64)
    if share.documents and "heads" in ways:
        yield Send("all_gather", share.ranks * share.tokens * INT32)


def draft_tokens(share: Share, depths: int) -> Iterator[Send]:
    """The tokens that each MTP depth reads: as many of the next rank as it looks ahead."""
    yield from (_ahead(share, by, INT64) for by in range(1, depths + 1))


def draft_targets(share: Share, depths: int) -> Iterator[Send]:
    """The document of the next token; for each depth which tokens have one in their own, labels, and their mask."""
    if depths and share.documents:
        yield _ahead(share, 1, INT64)
    for by in range(1, depths + 1):
        yield from (_ahead(share, by, size) for size in (INT64, INT64, FP32))


def _ahead(share: Share, by: int, size: int) -> Send:
    """What stands `by` places further right, on the next rank: every rank gathers the beginnings of all."""
    return Send("all_gather", share.ranks * share.rows * by * size)

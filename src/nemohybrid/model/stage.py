"""Which layers of a model run in one go, where a pipeline cuts it."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemohybrid.config.model import ModelConfig
from nemohybrid.pattern import Segment
from nemohybrid.symbols import parse_pattern


@dataclass(frozen=True)
class Stage:
    """Number `number` of the `count` pieces of a model, with `symbols` from layer `first_layer` on; perhaps no layer.

    The first one embeds the tokens; the last one has the final norm, the output projection and the MTP blocks.
    """

    symbols: str
    first_layer: int = 0
    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it starts from tokens, and from nothing that another stage sends."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with losses."""
        return self.number == self.count - 1

    @property
    def layers(self) -> dict[int, str]:
        """Number of a layer, from 0 through the whole model -> its symbol."""
        return dict(enumerate(self.symbols, self.first_layer))


def all_of(config: ModelConfig) -> tuple[Stage, ...]:
    """One stage with everything."""
    return (Stage(parse_pattern(config.pattern).main),)


def of_rank(segments: Sequence[Sequence[Segment]], rank: int) -> tuple[Stage, ...]:
    """The stages of a pipeline rank, given the segments of every rank in the order in which a microbatch visits them."""
    ranks, count = len(segments), sum(map(len, segments))
    own = enumerate(segments[rank])
    return tuple(Stage(cut.symbols, cut.first_layer, turn * ranks + rank, count) for turn, cut in own)

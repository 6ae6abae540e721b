"""A layer symbol is a mixer; here is the contract, and the registry that maps one to the other."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.symbols import parse_pattern, register_symbol


class Mixer(nn.Module):
    """What a layer does to the normalised residual stream; it knows nothing of its neighbours.

    Built as `mixer(config, context)` on the meta device: create parameters with `Linear` or `parallel.layout.parameter`
    only, so that they have a layout and first values.

    `shares_tokens`: under sequence parallelism `forward` takes this rank's tokens of x alone, and gathers (`seq.enter`)
    what it needs. Where it is False, every tensor rank is given all tokens and computes the same.

    `shares_rows`: where ranks share the rows (context parallelism), `forward` is given this rank's tokens, and itself sees to
    what these need of others (`seq.context`). A mixer that does not say so is refused there.
    """

    shares_tokens = False
    shares_rows = False

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden], in x's dtype. Never lets documents in `seq` see each other."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


M = TypeVar("M", bound=Mixer)

_mixers: dict[str, type[Mixer]] = {}


def mixer(symbol: str, description: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: `@mixer("M", "Mamba-2")` makes the class what a pattern means by the symbol."""

    def register(cls: type[M]) -> type[M]:
        register_symbol(symbol, description)
        _mixers[symbol] = cls
        return cls

    return register


def build_mixer(symbol: str, config: ModelConfig, context: ParallelContext) -> Mixer:
    """A new mixer for a layer symbol. Raises ConfigError for a symbol without an implementation, or for one that cannot
    work on rows that ranks share."""
    if symbol not in _mixers:
        raise ConfigError(f"no mixer is registered for the layer symbol {symbol!r}; there are {' '.join(_mixers)}")
    if context.context.size > 1 and not _mixers[symbol].shares_rows:
        raise ConfigError(
            f"the mixer {_mixers[symbol].__name__} of {symbol!r} does not know rows that ranks share (shares_rows). "
            "Legal: parallel.context=1"
        )
    return _mixers[symbol](config, context)


def residual_std(config: ModelConfig) -> float:
    """Initial std of projections into the residual stream: init_std / sqrt(layers), as Megatron-LM does for hybrids."""
    layers = parse_pattern(config.pattern).num_layers
    return config.init_std / (layers**0.5 if config.rescale_output_init else 1.0)

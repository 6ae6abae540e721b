"""What stands between two points of the residual stream."""

from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.mixer import build_mixer
from nemohybrid.model.norm import normed, optional_norm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext


class Layer(nn.Module):
    """x + mixer(norm(x)), and nothing else; with options x + output_norm(mixer(x)) or both norms."""

    def __init__(self, symbol: str, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.norm_epsilon
        self.norm = optional_norm(symbol not in config.no_input_norm, width, epsilon)
        self.mixer = build_mixer(symbol, config, context)
        self.output_norm = optional_norm(symbol in config.output_norm, width, epsilon)

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return x + normed(self.mixer(normed(x, self.norm), seq), self.output_norm)

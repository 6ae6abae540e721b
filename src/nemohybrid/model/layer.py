"""What stands between two points of the residual stream."""

from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.mixer import build_mixer
from nemohybrid.model.norm import RMSNorm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext


class Layer(nn.Module):
    """x + mixer(norm(x)), and nothing else."""

    def __init__(self, symbol: str, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer = build_mixer(symbol, config, context)

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return x + self.mixer(self.norm(x), seq)

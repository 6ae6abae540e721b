"""Multi-token prediction: what comes after the next token, from the hidden states of the model (DeepSeek-V3; Nemotron 3)."""

import torch
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.layer import Layer
from nemohybrid.model.linear import Linear
from nemohybrid.model.norm import RMSNorm
from nemohybrid.parallel.context import ParallelContext

# B batch, L length, T tokens = B*L, D hidden


class MTPBlock(nn.Module):
    """One draft depth: eh_proj([enorm(embedding); hnorm(hidden)]), the layers of the pattern's MTP part, a final norm.

    The wiring of Megatron-LM (multi_token_prediction.py): the embedding comes first, embedding and output projection are
    those of the model. At depth k = 0, 1, ..., position t takes the hidden state of depth k - 1 (the model's, after its final
    norm, for k = 0) and the embedding of token t + k + 1; its output predicts token t + k + 2.
    """

    def __init__(self, symbols: str, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.norm_epsilon
        self.enorm, self.hnorm = RMSNorm(hidden, epsilon), RMSNorm(hidden, epsilon)
        self.eh_proj = Linear(2 * hidden, hidden, role="eh_proj", std=config.init_std)
        self.layers = nn.ModuleList(Layer(symbol, config, context) for symbol in symbols)
        self.final_norm = RMSNorm(hidden, epsilon)

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Embeddings and hidden states [T, D] -> what the first layer reads, [T, D]."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


def build_mtp(symbols: str, depth: int, config: ModelConfig, context: ParallelContext) -> nn.ModuleList:
    """The blocks that are stored: one to be run `depth` times, or one for each depth; none without MTP."""
    stored = min(depth, 1) if config.mtp.repeat_block else depth
    return nn.ModuleList(MTPBlock(symbols, config, context) for _ in range(stored))

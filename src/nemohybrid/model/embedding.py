"""Token ids in, logits out. Both have rows for padding ids, which no token uses and no logit shows."""

import torch.nn.functional as F
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.init import normal, padded
from nemohybrid.model.linear import COLUMN
from nemohybrid.parallel.layout import Piece, parameter
from nemohybrid.precision.gemm import Gemm, plain_gemm


def padded_vocabulary(config: ModelConfig) -> int:
    """`vocab_size` rounded up to `vocab_multiple`."""
    return -(-(config.vocab_size or 0) // config.vocab_multiple) * config.vocab_multiple


class VocabularyMatrix(nn.Module):
    """[padded vocabulary, D], used as an embedding, as an output projection, or as both when they are tied.

    Each use, and with MTP there are several a token, multiplies by a cast of its own, and takes its gradient back to fp32
    before it is added to that of the others. One cast for all of them would add the gradients in bf16, where those of MTP,
    a twentieth of the main one, get lost: Nemotron 3 Ultra diverged of that.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size or 0
        self.role = "vocabulary"
        self.gemm: Gemm = plain_gemm
        shape = (padded_vocabulary(config), config.hidden_size)
        init = padded(normal(config.init_std), self.vocab_size)
        self.weight = parameter(Piece("", shape, init), shard=COLUMN)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D] in fp32."""
        return F.embedding(ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., vocab_size] in x's dtype."""
        return self.gemm(x, self.weight, None)[..., : self.vocab_size]

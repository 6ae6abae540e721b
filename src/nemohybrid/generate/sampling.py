"""How the next token is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid.errors import ConfigError

# B batch, V vocabulary


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Raises ConfigError when out of range."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature} is negative; 0 is greedy")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps every token")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [B, V] -> token ids [B]. Ties in greedy choice go to the lowest id."""
        if self.temperature == 0:
            return logits.float().argmax(dim=-1)
        probabilities = self.probabilities(logits)
        return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(logits.device)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, [B, V] fp32: tempered first, then cut to top-k, then to top-p."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        return _nucleus(scores.softmax(dim=-1), self.top_p)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens that together hold at least `top_p` (Holtzman et al. 2019), renormalised."""
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    result = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return result / result.sum(dim=-1, keepdim=True)

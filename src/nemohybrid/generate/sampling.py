"""How the next token is chosen."""

import math
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
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} is not a number from 0 on; 0 is greedy")
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
        """What tokens are drawn with, [B, V] fp32: tempered first, then cut to top-k, then to top-p.

        Of equally likely tokens, frequent among bf16 logits, the lowest ids are kept, so that top-k is exactly k.
        The temperature must not be 0.
        """
        scores = logits.float()
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature  # <= 0: none overflows
        probabilities = scores.softmax(dim=-1)
        if self.top_k == 0 and self.top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = _nucleus(_top(ordered, self.top_k), self.top_p)
        return torch.zeros_like(probabilities).scatter(-1, order, kept)


def _top(ordered: Tensor, k: int) -> Tensor:
    """The first `k` of descending probabilities, renormalised; 0 keeps all."""
    if k == 0:
        return ordered
    kept = ordered.clone()
    kept[:, k:] = 0.0
    return kept / kept.sum(dim=-1, keepdim=True)


def _nucleus(ordered: Tensor, top_p: float) -> Tensor:
    """The fewest of descending probabilities that hold at least `top_p` (Holtzman et al. 2019), renormalised."""
    if top_p == 1:
        return ordered
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)

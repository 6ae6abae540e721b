"""Drafts from the MTP blocks: one guess a depth, each from a memory of its own."""

import torch
from torch import Tensor

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.sequence import DecodeCache, SequenceContext

# T positions, D hidden


class DraftDepth:
    """One MTP depth k = 0, 1, ... while generating, fed as it was trained.

    Position s reads the hidden state of the depth before at s and the embedding of token s + k + 1, and predicts token
    s + k + 2. The last k positions of what is known so far thus read drafts. Once the model has judged these, the
    positions that read a wrong one, or came after it, are taken back and fed again with what is true.
    """

    def __init__(self, model: HybridModel, depth: int) -> None:
        self.model, self.depth = model, depth
        self.cache = DecodeCache(rewindable=True)
        none = model.embedding.weight.new_empty(0, model.config.hidden_size, dtype=model.dtype)
        self.hidden = none  # [T, D] what came out of the last positions

    def feed(self, hidden: Tensor, tokens: list[int]) -> Tensor:
        """Hidden states [T, D] of the depth before for the last positions, and all tokens with the drafts so far.

        Goes on from where it is to the last position; returns [T, D] of the new positions, one earlier one before them.
        """
        following = torch.tensor([tokens[self.cache.length + self.depth + 1 :]], device=hidden.device)
        seq = SequenceContext(1, following.shape[1], cache=self.cache)
        new = self.model.mtp_step(self.depth, hidden[-seq.length :], following, seq)
        seq.advance()
        self.cache.check_rewindable()
        self.hidden = torch.cat([self.hidden[-1:], new])
        return self.hidden

    def rewind(self, accepted: int) -> None:
        """Take back what rests on drafts after the first `accepted` ones of this round, or was made of such."""
        stale = min(max(self.depth - accepted, 0), self.cache.length)
        self.cache.rewind(stale)
        self.hidden = self.hidden[: len(self.hidden) - stale]


class Drafter:
    """Guesses what comes next, one token a depth."""

    def __init__(self, model: HybridModel, depths: int) -> None:
        self.model = model
        self.depths = [DraftDepth(model, depth) for depth in range(depths)]
        self.used: list[DraftDepth] = []

    def draft(self, hidden: Tensor, tokens: list[int], count: int) -> list[int]:
        """The model's hidden states [T, D] since the last call, which end before the last of `tokens` -> drafts.

        `count` may become smaller from call to call, not larger.
        """
        tokens, self.used = list(tokens), self.depths[:count]
        for depth in self.used:
            hidden = depth.feed(hidden, tokens)
            tokens.append(int(self.model.output.logits(hidden[-1]).argmax()))
        return tokens[len(tokens) - len(self.used) :]

    def rewind(self, accepted: int) -> None:
        """The model has taken the first `accepted` drafts of the last call, and no more."""
        for depth in self.used:
            depth.rewind(accepted)

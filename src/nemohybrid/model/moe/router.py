"""Which experts a token visits, and with what weight. In fp32, whatever the dtype of the model."""

import torch
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.linear import Linear
from nemohybrid.model.moe.balance import RouterLosses
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext

# T tokens, D hidden, E experts, K experts a token visits


class Router(nn.Module):
    """Top-k selection by score + bias; weights come from the scores alone (DeepSeek-V3; Nemotron 3).

    `expert_bias` [E] fp32 balances load without a loss term; it takes no gradient, and the trainer moves it. With groups, a
    token first keeps the `top_groups` groups whose two best experts score highest.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext.single()
        self.options, self.top_k, self.experts = config.router, config.moe_top_k, config.num_experts
        std = config.init_std
        self.gate = Linear(config.hidden_size, config.num_experts, role="router", std=std, casts_weights=False)
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router.expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.losses = RouterLosses(config.router, config.moe_top_k, context)

    def forward(self, x: Tensor, seq: SequenceContext | None = None) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] int64 and weights [T, K] fp32, differentiable in x and the gate.

        In a training step, where `seq.share` is known, the backward pass of the weights also sends the gradients of the
        balancing loss and the z-loss, and counts the loads.
        """
        logits = self.logits(x)
        scores = self.scores(logits)
        ids = self._choose(scores, seq.numbers(len(scores), x.device) if seq is not None else None)
        weights = self._weigh(scores, ids)
        if seq is not None and seq.share is not None:
            weights = self.losses.attach(weights, logits, scores, ids, seq)
        return ids, weights

    def logits(self, x: Tensor) -> Tensor:
        """Products with the gate, [T, E], at least fp32."""
        return self.gate(x.to(torch.promote_types(x.dtype, torch.float32)))

    def scores(self, logits: Tensor) -> Tensor:
        """Affinity of every token to every expert, [T, E]."""
        return logits.sigmoid() if self.options.score == "sigmoid" else logits.softmax(dim=-1)

    @torch.no_grad()
    def _choose(self, scores: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Expert ids [T, K]; different ones for each token. numbers [T]: of the tokens among those of all ranks."""
        if self.options.force_balance:
            numbers = torch.arange(len(scores), device=scores.device) if numbers is None else numbers
            visits = numbers[:, None] * self.top_k + torch.arange(self.top_k, device=scores.device)
            return visits % self.experts
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        return self._within_best_groups(choice).topk(self.top_k, dim=-1).indices

    def _weigh(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Weights [T, K] of the chosen experts."""
        weights = scores.gather(1, ids)
        if self.options.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.options.scaling_factor

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        if self.options.groups == 1:
            return choice
        grouped = choice.unflatten(-1, (self.options.groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(self.options.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)

    def _apply(self, fn, recurse=True):
        """The bias stays fp32 under `.to(bfloat16)`: beside a bias of 0.5, a step of 1e-3 is nothing in bf16."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

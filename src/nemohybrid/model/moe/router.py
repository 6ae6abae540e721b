"""Which experts a token visits, and with what weight. All in fp32."""

import torch
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.linear import Linear

# T tokens, D hidden, E experts, K experts a token visits


class Router(nn.Module):
    """Top-k selection by score + bias; weights come from the scores alone (DeepSeek-V3; Nemotron 3).

    `expert_bias` [E] balances load without a loss term; it takes no gradient. With groups, a token first keeps the
    `top_groups` groups whose two best experts score highest.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.options, self.top_k = config.router, config.moe_top_k
        self.gate = Linear(config.hidden_size, config.num_experts, role="router", std=config.init_std)
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router.expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert ids [T, K] int64 and weights [T, K] fp32, differentiable in x and the gate."""
        scores = self.scores(x)
        with torch.no_grad():
            choice = scores if self.expert_bias is None else scores + self.expert_bias
            ids = self._within_best_groups(choice).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.options.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, weights * self.options.scaling_factor

    def scores(self, x: Tensor) -> Tensor:
        """Affinity of every token to every expert, [T, E] fp32."""
        logits = self.gate(x.float())
        return logits.sigmoid() if self.options.score == "sigmoid" else logits.softmax(dim=-1)

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        if self.options.groups == 1:
            return choice
        grouped = choice.unflatten(-1, (self.options.groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(self.options.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)

"""What a router is trained on beside the loss of the model, and the count of who visited whom.

The losses are never added to anything. Their gradients join the backward pass where the gradient of the router's weights
arrives; so a layer needs no second output, and the loss of the model stays what it is (the idea of Megatron-LM's
MoEAuxLossAutoScaler). Values and loads are counted at the same moment. It comes once for every token of a training step:
not in an evaluation, and not a second time when a layer is computed again for its gradients.
"""

from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nemohybrid.config.model import RouterConfig
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.tensor import TensorRanks
from nemohybrid_kernels.opaque import opaque

# T tokens of this rank, E experts, K experts a token visits, R rows over which a load is taken: sequences, or 1 for all


@dataclass
class Tally:
    """What one router of one rank has counted since the step began, fp64: sums of integers stay exact."""

    loads: Tensor  # [E] visits of each expert
    choices: Tensor  # [E] visits by scores alone, without bias and groups: what the balancing loss looks at
    losses: Tensor  # [3] balancing loss, z-loss, and the share of the global batch that they are the sums of

    @classmethod
    def empty(cls, experts: int, device: torch.device) -> "Tally":
        """Nothing counted yet."""
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for n in (experts, experts, 3)))


_NUMBERS = count()
_LOSSES = WeakValueDictionary[int, "RouterLosses"]()
"""All that live. A graph of torch.compile knows losses by their number, and finds them here when it runs."""


class RouterLosses:
    """Balancing loss and z-loss of one router, and its tally. The trainer reads the tally and sets it to None every step."""

    def __init__(self, options: RouterConfig, top_k: int, context: ParallelContext) -> None:
        self.options, self.top_k, self.context = options, top_k, context
        self.aux_weight = options.aux_loss_weight if options.aux_loss != "none" else 0.0
        self.tally: Tally | None = None
        self.number = next(_NUMBERS)
        _LOSSES[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterLosses":
        """Those of a copied router, which has counted nothing."""
        return RouterLosses(self.options, self.top_k, self.context)

    def attach(self, weights: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, seq: SequenceContext) -> Tensor:
        """The weights [T, K], from whose gradient on the losses reach logits and scores [T, E].

        Both losses are also measured where their weight is 0; then nothing is kept for their gradients. With sequence
        parallelism these are some of the tokens, and what is said of a row is this rank's summand.
        """
        rows = Rows(seq.batch if self.options.aux_loss == "sequence" else 1, seq.tokens, seq.ranks)
        length = rows.length * seq.context.size
        scores = scores if self.aux_weight else scores.detach()
        logits = logits if self.options.z_loss_weight else logits.detach()
        probabilities = rows.sums(scores / (scores.sum(-1, keepdim=True) + 1e-20)) / length
        with torch.no_grad():
            loads = _visited(ids, scores.shape[1]).sum(0)
            choices = rows.sums(_visited(scores.topk(self.top_k, dim=-1).indices, scores.shape[1]))
        own_share = (seq.share or 0.0) * len(scores) / (seq.tokens * seq.context.size)
        counted = loads, choices, seq.share, own_share, rows.ranks.cut
        return _Attached.apply(weights, probabilities, z_loss(logits), self, *counted)  # pyright: ignore[reportReturnType]

    def arrived(self, probabilities: Tensor, z: Tensor, counted: "Counted") -> Tensor:
        """Count a microbatch; returns the gradient of the balancing loss in `probabilities`. Collective where ranks share
        the tokens of a row, or with `global`: then the loads are those of all ranks and of this step's microbatches so far.
        """
        loads, choices, (share, own_share), ranks = counted
        tally = self.tally = self.tally or Tally.empty(loads.shape[0], loads.device)
        tally.loads += loads
        tally.choices += choices.sum(0)
        if self.options.aux_loss == "global":
            seen = sum_over(tally.choices.clone(), self.context.tokens)[None]
        else:
            seen = sum_over(choices.clone(), ranks.group) if ranks.cut else choices
            seen = sum_over(seen.clone(), self.context.context) if self.context.context.size > 1 else seen
        slope = balance_slope(seen, probabilities)
        tally.losses += torch.stack(
            [share * (slope * probabilities).sum(), own_share * z, own_share * torch.ones_like(z)]
        )
        return self.aux_weight * share * slope


Counted = tuple[Tensor, Tensor, tuple[float, float], TensorRanks]
"""Loads [E], choices [R, E]; what part of the global batch the microbatch is, and this rank's tokens of it; who has others."""


@dataclass(frozen=True)
class Rows:
    """`count` equal rows of `tokens` tokens, of which this rank holds an equal run where they are cut. Of rows that context
    ranks share, these are the tokens of one of them."""

    count: int
    tokens: int
    ranks: TensorRanks

    @property
    def length(self) -> int:
        """Tokens of a row, on all tensor ranks."""
        return self.tokens // self.count

    def sums(self, values: Tensor) -> Tensor:
        """values [T, E] of this rank's tokens -> their sums in each row, [R, E]."""
        if not self.ranks.cut:
            return values.unflatten(0, (self.count, -1)).sum(1)
        if self.count == 1:
            return values.sum(0, keepdim=True)
        tokens = torch.arange(len(values), device=values.device) + self.ranks.group.rank * len(values)
        belongs = tokens // self.length == torch.arange(self.count, device=values.device)[:, None]
        floats = values if values.is_floating_point() else values.float()  # counts stay exact below 2^24 tokens
        return belongs.to(floats.dtype) @ floats


def balance_slope(visits: Tensor, probabilities: Tensor) -> Tensor:
    """d loss / d probabilities [R, E] of the load-balancing loss E * sum_i f_i P_i, averaged over rows R.

    f = `visits` [R, E] as a share of the row's, P = `probabilities` [R, E], the mean of scores that sum to one. Loads take no
    gradient, so the loss is linear: its value is (slope * P).sum(), 1 where balanced. Switch Transformer (arXiv 2101.03961),
    equation 4; equal to Megatron-LM's switch_load_balancing_loss_func.
    """
    rows, experts = probabilities.shape
    shares = visits / visits.sum(-1, keepdim=True)
    return (shares * (experts / rows)).to(probabilities.dtype)


def z_loss(logits: Tensor) -> Tensor:
    """Mean of the squared logsumexp of logits [T, E], which keeps them small (ST-MoE, arXiv 2202.08906)."""
    return logits.logsumexp(dim=-1).square().mean()


def _visited(ids: Tensor, experts: int) -> Tensor:
    """ids [T, K] -> [T, E] True where a token visits. A mask, since counting by atomics has no fixed order."""
    visited = torch.zeros(ids.shape[0], experts, dtype=torch.bool, device=ids.device)
    return visited.scatter_(1, ids, True)


def _like(
    number: int, gradient: Tensor, probabilities: Tensor, z: Tensor, *counted: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gradient), torch.empty_like(probabilities), torch.empty_like(z)


@opaque("router_losses_arrived", like=_like, tags=(torch.Tag.cudagraph_unsafe,))
def _arrived(
    number: int,
    gradient: Tensor,
    probabilities: Tensor,
    z: Tensor,
    loads: Tensor,
    choices: Tensor,
    share: float,
    own_share: float,
    cut: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weights, probabilities and z. That of the weights passes through: a graph drops what makes nothing that
    it needs, and the losses may have no weight."""
    losses = _LOSSES[number]
    counted = loads, choices, (share, own_share), TensorRanks(losses.context.tensor, cut)
    slope = losses.arrived(probabilities, z, counted)
    return gradient.clone(), slope, torch.full_like(z, losses.options.z_loss_weight * own_share)


class _Attached(torch.autograd.Function):
    """Identity on the weights; when their gradient arrives, so do those of the losses."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, probabilities: Tensor, z: Tensor, losses: RouterLosses, *counted: Any
    ) -> Tensor:
        loads, choices, *ctx.rest = counted
        ctx.losses = losses
        ctx.save_for_backward(probabilities, z, loads, choices)
        return weights.view_as(weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        arrived = _arrived(ctx.losses.number, *gradients, *ctx.saved_tensors, *ctx.rest)
        return *arrived, *(None,) * 6

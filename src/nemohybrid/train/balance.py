"""The balance of expert load over a step: what all routers counted, the numbers that say it, and the bias that mends it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.model.moe.balance import Tally
from nemohybrid.model.moe.router import Router
from nemohybrid.parallel.collectives import gather_json, sum_over
from nemohybrid.parallel.context import ParallelContext

# R routers, E experts


class LoadBalance:
    """All routers of a model, in the order of its layers, those of MTP last.

    `names` are the paths of those layers. `loads` [R, E] fp64 are the visits of the last step, over all data ranks. A block
    that runs at several MTP depths has one router, which counts them all. Without `E` layers nothing happens anywhere.

    A pipeline rank knows the numbers of all routers and has some of them, `routers`, in these `rows`. Made collectively.
    """

    def __init__(self, model: nn.Module, context: ParallelContext) -> None:
        own = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        experts = max((router.experts for router in own.values()), default=0)
        found = gather_json([list(own), experts], context.pipeline, context.device)
        everyone = sorted((name for names, _ in found for name in names), key=_in_order)
        self.names = [name.removesuffix(".mixer.router") for name in everyone]
        self.routers, self.rows = list(own.values()), [everyone.index(name) for name in own]
        self.context = context
        self.loads = torch.zeros(len(everyone), max(number for _, number in found), dtype=torch.float64)

    def collect(self) -> Tensor:
        """Empty the tallies of all ranks into `loads`; returns numbers for `metrics`, on the device. Collective, one call.

        They are not fetched here: the step waits for its device once, for everything.
        """
        if not self.names:
            return torch.zeros(0, device=self.context.device)
        rows, experts = self.loads.shape
        counted = torch.zeros(rows, experts + 3, dtype=torch.float64, device=self.context.device)
        for row, router in zip(self.rows, self.routers, strict=True):
            counted[row] = self._take(router)
        sum_over(sum_over(counted, self.context.tokens), self.context.pipeline)
        self.loads, losses = counted.split([counted.shape[1] - 3, 3], dim=1)
        means = losses[:, :2] / losses[:, 2:].clamp(min=1e-30)  # a block that ran twice: of its runs
        return torch.cat([_violation(self.loads), means], dim=1).flatten()

    def _take(self, router: Router) -> Tensor:
        tally = router.losses.tally or Tally.empty(router.experts, self.context.device)
        router.losses.tally = None
        return torch.cat([tally.loads, tally.losses])

    @torch.no_grad()
    def update_bias(self) -> None:
        """bias += rate * sign(mean load - load), from `loads` (arXiv 2408.15664). Once a step, after the weights changed."""
        for row, router in zip(self.rows, self.routers, strict=True):
            if router.expert_bias is not None:
                loads = self.loads[row]
                direction = (loads.mean() - loads).sign().to(router.expert_bias.dtype)
                router.expert_bias.add_(direction, alpha=router.options.bias_update_rate)

    def metrics(self, numbers: list[float]) -> dict[str, Any]:
        """What `collect` returned, fetched -> a list with an entry a router of each kind, and single numbers for trackers.

        moe_max_violation: largest load / mean - 1. moe_entropy: of the load, 1 when equal. moe_dead: experts nobody visited.
        """
        if not self.names:
            return {}
        violation, entropy, dead, aux, z = (numbers[i::5] for i in range(5))
        return {
            "moe_max_violation": [round(value, 3) for value in violation],
            "moe_entropy": [round(value, 4) for value in entropy],
            "moe_dead": [round(value) for value in dead],
            "moe_max_violation_worst": max(violation),
            "moe_entropy_worst": min(entropy),
            "moe_dead_total": round(sum(dead)),
            "moe_aux_loss": sum(aux) / len(aux),
            "moe_z_loss": sum(z) / len(z),
        }


def _violation(loads: Tensor) -> Tensor:
    """[R, E] -> [R, 3]: MaxVio, entropy as a share of the largest possible, experts without a visit."""
    mean = loads.mean(1).clamp(min=1e-30)
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1e-30)
    entropy = torch.special.entr(shares).sum(1) / (math.log(loads.shape[1]) or 1.0)
    return torch.stack([loads.amax(1) / mean - 1, entropy, (loads == 0).sum(1)], dim=1)


def _in_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts `layers.2` before `layers.10`, and both before `mtp.0.layers.1`."""
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split("."))

"""AdamW on fp32 master weights, its moments under logical names."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.config.training import OptimSection
from nemohybrid.parallel.layout import Parts, layout_of, logical_parts

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State tensors shaped like their parameter, by the same names in torch, apex and Transformer Engine."""


def build_optimizer(parameters: Iterable[nn.Parameter], options: OptimSection) -> torch.optim.Optimizer:
    """Two groups: what decays (matrices, by their global shape) and what does not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if layout_of(p).decays], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if not layout_of(p).decays], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
    filled = [g for g in groups if g["params"]] or [{"params": [nn.Parameter(torch.empty(0))]}]  # an empty stage
    return _optimizer_class(options.name)(filled, **settings)


def _optimizer_class(name: str) -> Any:
    if name == "apex_adamw":
        from apex.optimizers import FusedAdam

        return FusedAdam
    if name == "te_adamw":
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam
    return lambda groups, **settings: torch.optim.AdamW(groups, fused=True, **settings)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | Parts]:
    """`optimizer.exp_avg.<logical name>` -> what this rank holds of the moment. Call `start_state` first."""
    result: dict[str, Tensor | Parts] = {}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            held = logical_parts(name, parameter, optimizer.state[parameter][moment])
            result |= {f"optimizer.{moment}.{logical}": part for logical, part in held.items()}
    return result


def start_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Create the moments where the first step has not made them yet, and set the step count that corrects their bias."""
    for group in optimizer.param_groups:
        if "step" in group or not isinstance(optimizer, torch.optim.AdamW):
            group["step"] = step  # apex and Transformer Engine count per group
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(parameter, dtype=torch.float32))
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the coming step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr

"""Parameters of a model as it is really built, part by part, on the meta device: no memory, any size."""

from collections import Counter

import torch

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.symbols import parse_pattern


def built_parameters(config: ModelConfig) -> dict[str, int]:
    """Part (layer symbol, `embedding`, `output`) -> parameters, all layers of a kind together; `mtp` what is stored of it.

    The parts are those of `config.accounting.costs_by_part`. Raises ConfigError for what this version cannot build.
    """
    with torch.device("meta"):
        model = HybridModel(config)
    parts = Counter({"embedding": _size(model.embedding), "output": _size(model.final_norm)})
    if model.output is not model.embedding:
        parts["output"] += _size(model.output)
    for symbol, layer in zip(parse_pattern(config.pattern).main, model.layers, strict=True):
        parts[symbol] += _size(layer)
    if len(model.mtp):
        parts["mtp"] = _size(model.mtp)
    return dict(parts)


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

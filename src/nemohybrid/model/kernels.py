"""Which backend runs each operator of a model: decided once, before the first step, with a reason for the log."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.errors import ConfigError
from nemohybrid.model.attention import Attention
from nemohybrid.model.embedding import VocabularyMatrix
from nemohybrid.model.mamba2 import CausalConv, Mamba2
from nemohybrid.model.mlp import MLP
from nemohybrid.model.moe.layer import Experts
from nemohybrid.model.norm import GatedRMSNorm, RMSNorm
from nemohybrid_kernels import activation, attention, conv1d, cross_entropy, mixer, moe, norm, ssd
from nemohybrid_kernels.activation import is_squared_relu
from nemohybrid_kernels.backend import Backend, Choice, decide
from nemohybrid_kernels.errors import BackendError


@dataclass(frozen=True)
class Calls:
    """How the operators will be called: in what type, where, and whether rows hold several documents."""

    dtype: torch.dtype
    device: torch.device
    packed: bool


@dataclass(frozen=True)
class Slot:
    """What a module leaves open: an operator, the key that chooses, what there is to choose from, and where it is kept."""

    operator: str
    key: str
    backends: Mapping[str, Backend]
    attribute: str = "backend"
    note: str = ""  # the end of a refusal
    knows_few: bool = False  # of what the key names: "auto" is taken for the others


def bind_kernels(
    model: nn.Module, section: KernelsSection, device: torch.device, dtype: torch.dtype, packed: bool
) -> list[Choice]:
    """Set the backends of every module that calls an operator. Returns the choices, each once, for the log.

    dtype: what the model computes in; packed: whether its rows hold several documents. Raises ConfigError where what is
    asked for cannot run here, saying what to install.
    """
    calls, choices = Calls(dtype, device, packed), dict[str, Choice]()
    for module in model.modules():
        for slot in slots_of(module, calls):
            choice = _decided(slot, getattr(section, slot.key), device)
            setattr(module, slot.attribute, choice.backend)
            choices.setdefault(str(choice), choice)
    for module in model.modules():  # now that its parts are decided
        if isinstance(module, Mamba2):
            choice = _bind_mixer(module, section, calls)
            choices.setdefault(str(choice), choice)
    return sorted(choices.values(), key=lambda choice: choice.operator)


def slot_of(module: nn.Module, calls: Calls) -> Slot | None:
    """What this module's `backend` is about; None where it calls no operator that has backends."""
    return next(slots_of(module, calls), None)


def slots_of(module: nn.Module, calls: Calls) -> Iterator[Slot]:
    """All that this module leaves open."""
    match module:
        case Mamba2():
            yield Slot("ssd_scan", "ssd_backend", ssd.backends(calls.dtype, *_scan_sizes(module)))
        case CausalConv():
            yield Slot("causal_conv1d", "conv1d_backend", conv1d.backends(calls.dtype, module.weight.shape[1]))
        case RMSNorm():
            yield Slot("rms_norm", "norm_backend", norm.backends(calls.dtype, module.width))
        case GatedRMSNorm():
            yield Slot("gated_rms_norm", "norm_backend", norm.gated_backends(calls.dtype, module.group_size))
        case Attention():
            case_ = attention.Case(calls.dtype, module.head_dim, calls.packed, capped=module.softcap is not None)
            yield Slot("attention", "attention_backend", attention.backends(case_))
            if module.rings:
                possible = attention.parts.backends(case_)
                yield Slot("ring_attention", "attention_backend", possible, "ring_backend", knows_few=True)
        case Experts():
            widths = module.up.shape[2], module.up.shape[1], module.down.shape[2]
            given = module.takes_products
            possible = moe.backends(calls.dtype, *widths, given=given)
            yield Slot("expert_mlp", "moe_backend", possible, note=" where experts have a recipe" * given)
            if is_squared_relu(module.activation):
                yield _activation(calls, "activation_backend")
        case MLP() if is_squared_relu(module.activation):
            yield _activation(calls, "backend")
        case VocabularyMatrix():
            yield Slot("cross_entropy", "cross_entropy_backend", cross_entropy.backends(calls.dtype))


def _activation(calls: Calls, attribute: str) -> Slot:
    return Slot("squared_relu", "activation_backend", activation.backends(calls.dtype), attribute)


def _scan_sizes(layer: Mamba2) -> tuple[int, int]:
    """Head dimension and state."""
    return layer.inner // layer.heads, layer.in_proj.widths[2] // layer.groups


def _decided(slot: Slot, wanted: str, device: torch.device) -> Choice:
    if slot.knows_few and wanted not in slot.backends:
        wanted = "auto"
    try:
        return decide(slot.operator, wanted, slot.backends, device)
    except BackendError as error:
        raise ConfigError(f"kernels.{slot.key}={wanted}: {error}{slot.note}") from error


def _bind_mixer(layer: Mamba2, section: KernelsSection, calls: Calls) -> Choice:
    """The layer itself says whether all its parts may be one operator."""
    layer.mixer_backend, layer.mixer_recompute = section.mixer_backend, section.mixer_recompute
    wanted = section.mixer_backend
    backends = mixer.backends(calls.dtype, *_scan_sizes(layer), layer.norm.group_size)
    if wanted == "separate":
        return Choice("mamba2_mixer", wanted, layer.forward, "asked for")
    possible = _decided(Slot("mamba2_mixer", "mixer_backend", backends), wanted, calls.device)
    if layer.is_fused(torch.empty(0, dtype=calls.dtype, device=calls.device)):
        return possible
    reason = possible.why
    if possible.backend != "torch":
        reason = f"auto; not {possible.backend}: a part of it is another's, or has a norm"
    return Choice("mamba2_mixer", "separate", layer.forward, reason)

"""Who computes the layers of a model: our kernels, mamba-ssm's operator for a whole mixer, plain PyTorch, or transformers.

A side but transformers is bound to a model of ours, whose weights stay; it returns in words what computes from then on.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cases import Sizes
from parts import peer_chunks
from peer import Peer, PeerMissing, load
from torch import Tensor, nn

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.interop.hf.config_out import config_json
from nemohybrid.interop.hf.names import disk_tensors
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.model.mamba2 import Mamba2
from nemohybrid.model.precision import sites
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.precision.binding import Binding
from nemohybrid.precision.policy import Policy
from nemohybrid.precision.recipe import RECIPES

Side = Callable[[HybridModel, torch.device, torch.dtype], list[str]]
NO_PEER = "mamba-ssm"
"""Name of the side that stands for those of mamba-ssm where it is missing."""

OF_MIXER = ("mamba2_mixer", "causal_conv1d", "ssd_scan", "gated_rms_norm")
"""Operators in whose place that of mamba-ssm stands."""


class Missing(Exception):
    """Why a side is not there."""


def sides(peer: Peer | None, tokens: int) -> dict[str, Side]:
    """Name -> side, for models with `M` layers whose rows have so many tokens; ours first."""
    theirs: dict[str, Side] = {NO_PEER: _missing_peer}
    if peer is not None:
        theirs = {f"mamba-ssm, chunk {chunk}": of_peer(peer, chunk) for chunk in peer_chunks(Sizes(tokens=tokens))}
    return {"ours": ours} | theirs | {"torch": plain}


def find_peer() -> tuple[Peer | None, str]:
    """mamba-ssm, and what to say of it. Comes before the first import of transformers, which looks for it then."""
    try:
        peer = load()
    except PeerMissing as error:
        return None, str(error)
    return peer, f"mamba-ssm {peer.version}, with the convolution of {peer.conv}"


def ours(model: HybridModel, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What nemohybrid takes by itself here."""
    return _bound(model, KernelsSection(), device, dtype)


def plain(model: HybridModel, device: torch.device, dtype: torch.dtype) -> list[str]:
    """PyTorch in the place of our kernels; attention and experts stay what they are."""
    torch_only = KernelsSection(
        mixer_backend="separate",
        ssd_backend="torch",
        conv1d_backend="torch",
        norm_backend="torch",
        activation_backend="torch",
    )
    return _bound(model, torch_only, device, dtype)


def in_recipe(name: str) -> Side:
    """Ours, with every product that may be quantized by a recipe of `precision`, carried out by whoever can here."""

    def bind(model: HybridModel, device: torch.device, dtype: torch.dtype) -> list[str]:
        words = ours(model, device, dtype)
        model.precision = Binding(sites(model), Policy(RECIPES[name]), "auto", device)
        return [*words, *map(str, model.precision.choices)]

    return bind


def of_peer(peer: Peer, chunk: int) -> Side:
    """What users of mamba-ssm train with: all between the two projections in its one operator. The rest stays ours."""

    def bind(model: HybridModel, device: torch.device, dtype: torch.dtype) -> list[str]:
        words = ours(model, device, dtype)
        for layer in _mamba_layers(model):
            layer.is_fused = lambda like: True  # pyright: ignore[reportAttributeAccessIssue]
            layer._all_at_once = partial(_split, peer, chunk, layer)  # pyright: ignore[reportAttributeAccessIssue]
        return [f"mamba2_mixer: mamba-ssm {peer.version}", *(word for word in words if not word.startswith(OF_MIXER))]

    return bind


def _missing_peer(model: HybridModel, device: torch.device, dtype: torch.dtype) -> list[str]:
    raise Missing("mamba-ssm is not here")


def _bound(model: HybridModel, section: KernelsSection, device: torch.device, dtype: torch.dtype) -> list[str]:
    for layer in _mamba_layers(model):
        for given in ("is_fused", "_all_at_once"):
            vars(layer).pop(given, None)
    if model.precision is not None:  # of a side before
        model.precision = Binding(sites(model), Policy(), "auto", device)
    return [str(choice) for choice in bind_kernels(model, section, device, dtype, packed=False)]


def _mamba_layers(model: nn.Module) -> Iterator[Mamba2]:
    return (module for module in model.modules() if isinstance(module, Mamba2))


def _split(peer: Peer, chunk: int, layer: Mamba2, zxbcdt: Tensor, ids: Tensor | None) -> Tensor:
    assert layer.conv.bias is not None, "mamba-ssm's operator wants a bias"
    conv = layer.conv.weight.to(zxbcdt.dtype), layer.conv.bias.to(zxbcdt.dtype)
    rates = layer.dt_bias, -torch.exp(layer.A_log.float()), layer.D.float()
    norm = {"rmsnorm_weight": layer.norm.weight, "rmsnorm_eps": layer.norm.epsilon, "norm_before_gate": False}
    shape = {"headdim": layer.inner // layer.heads, "ngroups": layer.groups, "seq_idx": ids}
    return peer.split(zxbcdt, *conv, *rates, chunk, **norm, **shape)


# --- transformers ----------------------------------------------------------------------------------------------------


def hf_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Its NemotronH of our configuration with weights of its own, in training. Raises Missing without transformers."""
    try:
        from transformers import NemotronHConfig, NemotronHForCausalLM
    except Exception as error:  # not installed, or without something it needs
        raise Missing(f"transformers cannot be imported: {first_line(error)}") from error
    settings = {key: value for key, value in config_json(config, dtype).items() if key != "torch_dtype"}
    with device:
        model: Any = NemotronHForCausalLM(NemotronHConfig(**settings))
    return model.to(dtype).train()


@torch.no_grad()
def copy_weights(model: HybridModel, theirs: nn.Module) -> None:
    """Give a model of transformers the weights of ours."""
    values = logical_parameters(model) | dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for disk in disk_tensors(model).values():
        name = disk.name.replace("backbone.", "model.")
        tensor = disk.gather(values.__getitem__)
        if disk.expert is None:
            found[name] = tensor
        else:  # a folder has a tensor for each, the module one of all
            experts.setdefault(re.sub(r"experts\.\d+\.(\w+)\.weight", r"experts.\1", name), []).append(tensor)
    theirs.load_state_dict(found | {name: torch.stack(of_all) for name, of_all in experts.items()})


def first_line(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, Missing):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "it does not fit into the memory of this GPU"
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0][:300]

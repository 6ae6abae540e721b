"""Kernels of a model on the meta device that keep what those of a device would: the operators say it by their fake forms."""

import torch

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.kernels import Calls, slot_of
from nemohybrid.model.mamba2 import Mamba2
from nemohybrid.model.moe.layer import Experts
from nemohybrid_kernels import launching, mixer
from nemohybrid_kernels.backend import Backend

META = torch.device("meta")
OF_GPUS = ("auto", "triton", "mamba_ssm", "causal_conv1d")
"""What is taken to keep as much as our kernels. Packages do; "auto" is they wherever they can run."""
WITHOUT_MASKS = ("auto", "flash2", "flash3", "flash4", "flex")
"""Backends of attention that, on a GPU, know documents without a mask of all pairs of tokens."""


def bind_as_on(model: HybridModel, section: KernelsSection, device: str) -> None:
    """Choose the backends of a meta model for a `device` of this type. On a CPU nothing changes: what PyTorch keeps is the
    most. Nor where Triton is missing."""
    if device != "cuda" or launching.obstacle(META) is not None:
        return
    calls = Calls(model.dtype, META, packed=False)
    for module in model.modules():
        slot = slot_of(module, calls)
        if slot is not None and "triton" in slot.backends:
            chosen = _on_gpu(getattr(section, slot.key), slot.backends["triton"])
            loop = isinstance(module, Experts) and chosen == "torch"  # it reads how many visits there are
            module.backend = "grouped" if loop else chosen  # pyright: ignore[reportArgumentType]
        if isinstance(module, Mamba2):
            width = module.inner // module.heads
            fused = mixer.backends(model.dtype, width, module.state, module.norm.group_size)["triton"]
            module.mixer_backend = _on_gpu(section.mixer_backend, fused)
            module.mixer_recompute = section.mixer_recompute


def _on_gpu(wanted: str, triton: Backend) -> str:
    if wanted not in OF_GPUS:
        return wanted
    return "triton" if triton.obstacle(META) is None else "auto"


def masks_documents(section: KernelsSection, device: str) -> bool:
    """Whether attention over documents makes a mask of all pairs of tokens."""
    return device != "cuda" or section.attention_backend not in WITHOUT_MASKS

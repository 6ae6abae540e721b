"""Where a product with a trained weight is in a model, and how large: all that a policy looks at. Knows no torch."""

from dataclasses import dataclass

ROLES = ("in_proj", "out_proj", "qkv", "o_proj", "fc1", "fc2", "latent", "expert")
"""Products that a policy may quantize."""
NEVER = {
    "router": "a small error sends a token to another expert",
    "eh_proj": "what MTP begins with stays exact",
    "vocabulary": "embedding and output projection stay exact",
    "embedding": "it multiplies nothing",
    "head": "the output projection stays exact",
    "conv": "the convolution of Mamba-2 is no product of matrices",
    "ssd": "the scan of Mamba-2 stays exact",
    "dt": "time steps are fp32",
    "norm": "norms are fp32",
    "softmax": "scores of attention stay exact",
}
"""What can never be quantized, and why: NVIDIA 2025 (arXiv 2509.25149) keeps the same in BF16 or FP32."""


@dataclass(frozen=True)
class Place:
    """A product with a trained weight.

    name: of the layer's module, as in a checkpoint; role: one of ROLES; layer: its number in the whole model, from 0, of
    `layers`; kind: the symbol of its mixer. outputs, inputs: of its matrix on one rank; experts: how many matrices are
    stacked. mtp: whether it belongs to multi-token prediction; its layers count on after those of the model.
    """

    name: str
    role: str = "fc1"
    layer: int = 0
    layers: int = 1
    kind: str = "-"
    outputs: int = 0
    inputs: int = 0
    experts: int = 0
    mtp: bool = False

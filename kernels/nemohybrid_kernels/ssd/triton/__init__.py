"""The scan of Mamba-2 in Triton, forward and backward."""

from nemohybrid_kernels.ssd.triton.launch import Call, Gradients, Into, backward, forward

__all__ = ["Call", "Gradients", "Into", "backward", "forward"]

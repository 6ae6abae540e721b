"""Root-mean-square norms: the plain one before every layer, and the gated one of Mamba-2."""

from nemohybrid_kernels.norm.reference import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]

"""RMSNorm, plain and gated. fp32 maths, output in the input's dtype."""

from torch import Tensor, nn

from nemohybrid.model.init import constant
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Partial, Piece, Shard, parameter
from nemohybrid_kernels.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis. `partial`: as in `ParamLayout`, "always" for a norm of single heads."""

    def __init__(self, width: int, epsilon: float, partial: Partial = "tokens") -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon
        self.backend = "auto"
        self.weight = parameter(Piece("", (width,), constant(1.0)), partial=partial)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return rms_norm(x, self.weight, self.epsilon, backend=self.backend)


def optional_norm(wanted: bool, width: int, epsilon: float, partial: Partial = "tokens") -> RMSNorm | None:
    """A norm that a configuration may switch off."""
    return RMSNorm(width, epsilon, partial) if wanted else None


def normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    """norm(x), or x where the norm is switched off."""
    return x if norm is None else norm(x)


class GatedRMSNorm(nn.Module):
    """RMSNorm of `x * silu(z)` within groups of channels (Mamba-2: the gate comes before the norm).

    `width` and `groups` count those of all tensor ranks; each has whole groups, so that nothing is sent.
    """

    def __init__(self, width: int, groups: int, epsilon: float, context: ParallelContext | None = None) -> None:
        super().__init__()
        self.epsilon, self.group_size = epsilon, width // groups
        self.backend = "auto"
        self.weight = parameter(Piece("", (width,), constant(1.0)), shard=Shard(axis=0), context=context)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z [..., width] -> the same shape."""
        return gated_rms_norm(x, z, self.weight, group_size=self.group_size, eps=self.epsilon, backend=self.backend)

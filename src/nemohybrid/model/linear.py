"""`Linear`: every matrix multiply with a trained weight.

How it is sharded and how it multiplies are two values on it, so that parallelism and precision never meet in an `if`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from nemohybrid.model.init import constant, normal
from nemohybrid.parallel.layout import Piece, Shard, parameter
from nemohybrid.precision.gemm import Gemm, plain_gemm

COLUMN = Shard(axis=0, over="tensor")
"""Output features are cut: the input is whole, the output a part."""
ROW = Shard(axis=1, over="tensor")
"""Input features are cut: each rank has a summand of the output."""
REPLICATED = None
"""Every rank multiplies by the whole matrix."""


class Linear(nn.Module):
    """y = x W^T + b, with W in fp32 [out, in].

    `outputs` is the number of output features, or an ordered mapping name -> features for projections that are computed
    together (`{"q": 512, "k": 128, "v": 128}`); each name is a logical tensor of its own in checkpoints.
    `role` names the slot for the precision policy (in_proj, out_proj, qkv, fc1, ...).
    """

    def __init__(
        self,
        in_features: int,
        outputs: int | Mapping[str, int],
        *,
        role: str,
        std: float,
        bias: bool = False,
        shard: Shard | None = REPLICATED,
    ) -> None:
        super().__init__()
        named = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.role = role
        self.widths = list(named.values())
        self.gemm: Gemm = plain_gemm
        self.weight = parameter(*(Piece(n, (w, in_features), normal(std)) for n, w in named.items()), shard=shard)
        bias_shard = shard if shard is not None and shard.axis == 0 else REPLICATED
        self.bias = (
            parameter(*(Piece(n, (w,), constant(0.0)) for n, w in named.items()), shard=bias_shard) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        return self.gemm(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.shape[1]} -> {' + '.join(map(str, self.widths))}, role={self.role}"

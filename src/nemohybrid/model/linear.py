"""`Linear`: every matrix multiply with a trained weight.

How it is sharded and how it multiplies are two values on it, so that parallelism and precision never meet in an `if`.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from nemohybrid.model.init import constant, normal
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Piece, Shard, layout_of, parameter
from nemohybrid.precision.gemm import Gemm, plain_gemm

COLUMN = Shard(axis=0)
"""Output features are cut: the input has entered (`SequenceContext.enter`), the output is a part of the features."""
ROW = Shard(axis=1)
"""Input features are cut: the output is a summand and must leave (`SequenceContext.leave`)."""
REPLICATED = None
"""Every rank multiplies by the whole matrix."""
NO_PARTS: Mapping[str, int] = {}


class Linear(nn.Module):
    """y = x W^T + b, with W in fp32 [out, in].

    `outputs` is the number of output features, or an ordered mapping name -> features for projections that are computed
    together (`{"q": 512, "k": 128, "v": 128}`); each name is a logical tensor of its own in checkpoints.
    `role` names the slot for the precision policy (in_proj, out_proj, qkv, fc1, ...).

    `in_features` and `outputs` count what all tensor ranks hold together; with a `shard` and a `context` this is one
    rank's part, and `widths` are its own outputs. `parts` says of which outputs there are fewer parts than there may be
    ranks. Where inputs are cut, the bias is a matter of the first rank, whose summand carries it. `casts_weights`: whether
    inputs come in the dtype of the model, so that the weights may be sent in it too.
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
        context: ParallelContext | None = None,
        parts: Mapping[str, int] = NO_PARTS,
        casts_weights: bool = True,
    ) -> None:
        super().__init__()
        named = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.role = role
        self.casts_weights = casts_weights
        self.gemm: Gemm = plain_gemm
        pieces = (Piece(n, (w, in_features), normal(std), parts.get(n)) for n, w in named.items())
        self.weight = parameter(*pieces, shard=shard, context=context)
        self.widths = layout_of(self.weight).widths()
        self.bias = self._bias(named, shard, context, parts) if bias else None
        self.carries_bias = not (shard == ROW and context and context.tensor.rank > 0)

    def _bias(
        self, named: Mapping[str, int], shard: Shard | None, context: ParallelContext | None, parts: Mapping[str, int]
    ) -> nn.Parameter:
        pieces = (Piece(n, (w,), constant(0.0), parts.get(n)) for n, w in named.items())
        if shard == ROW:
            return parameter(*pieces, partial="always")
        return parameter(*pieces, shard=shard, context=context)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        return self.gemm(x, self.weight, self.bias if self.carries_bias else None)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.shape[1]} -> {' + '.join(map(str, self.widths))}, role={self.role}"


def casting_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Those inside `module` that use their own weights only as a cast to the dtype of what they multiply."""
    return (part for part in module.modules() if getattr(part, "casts_weights", False))

"""`-`: the feed-forward layer."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.linear import COLUMN, ROW, Linear
from nemohybrid.model.mixer import Mixer, mixer, residual_std
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid_kernels.activation import squared_relu, swiglu

ACTIVATIONS = {"squared_relu": squared_relu, "swiglu": swiglu}
"""Name in the configuration -> function of what fc1 returns."""


def computed_by(activation: Callable[..., Tensor], backend: str) -> Callable[[Tensor], Tensor]:
    """The activation, by a backend if there is a choice of them."""
    return partial(activation, backend=backend) if activation is squared_relu else activation


def fc1_outputs(activation: str, width: int) -> dict[str, int]:
    """The logical outputs of the first projection: a gated activation needs two."""
    return {"gate": width, "up": width} if activation == "swiglu" else {"": width}


@mixer("-", "MLP")
class MLP(Mixer):
    """fc2(activation(fc1(x))), the inner width shared by the tensor ranks."""

    shares_tokens = shares_rows = True

    def __init__(self, config: ModelConfig, context: ParallelContext, width: int | None = None) -> None:
        super().__init__(config, context)
        width = width or config.ffn_hidden_size or 0
        hidden, bias = config.hidden_size, config.linear_bias
        outputs = fc1_outputs(config.activation, width)
        self.activation, self.backend = ACTIVATIONS[config.activation], "auto"
        self.fc1 = Linear(hidden, outputs, role="fc1", std=config.init_std, bias=bias, shard=COLUMN, context=context)
        self.fc2 = Linear(width, hidden, role="fc2", std=residual_std(config), bias=bias, shard=ROW, context=context)

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return seq.leave(self.summand(seq.enter(x)))

    def summand(self, x: Tensor) -> Tensor:
        """All tokens [T, D] -> this rank's share of the result, [T, D]."""
        return self.fc2(computed_by(self.activation, self.backend)(self.fc1(x)))

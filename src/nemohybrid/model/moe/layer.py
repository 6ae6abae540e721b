"""The `E` mixer: dropless top-k experts and a shared expert."""

from functools import partial

from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.init import normal
from nemohybrid.model.linear import Linear
from nemohybrid.model.mixer import Mixer, mixer, residual_std
from nemohybrid.model.mlp import ACTIVATIONS, MLP, computed_by, fc1_outputs
from nemohybrid.model.moe.router import Router
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.expert import Dispatcher, Placement, choose
from nemohybrid.parallel.layout import Piece, Shard, expert_parameter
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.moe.products import Pair, Products, products_for

# T tokens, D hidden, E experts, F expert width


class Experts(nn.Module):
    """The weights of all experts, stacked: `up` [E, F (2F when gated), D] and `down` [E, D, F]; tensor ranks share F.

    `is_folded`: they lie on a grid of ranks of their own, where expert ranks share E too.
    """

    casts_weights = True

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        experts, width = config.num_experts, config.moe_ffn_hidden_size or 0
        hidden = config.moe_latent_size or config.hidden_size
        halves = fc1_outputs(config.activation, width)
        up = Piece("", (experts, sum(halves.values()), hidden), normal(config.init_std))
        down = Piece("", (experts, hidden, width), normal(residual_std(config)))
        self.activation, self.activation_backend = ACTIVATIONS[config.activation], "auto"
        self.backend = "auto"
        self.products: dict[str, Products] | None = None  # of "up" and "down", where a recipe has filled them
        self.takes_products = False  # whether one will, now or later
        self.is_folded = context.experts is not None
        self.up = expert_parameter(up, Shard(axis=1, blocks=len(halves)), context)
        self.down = expert_parameter(down, Shard(axis=2), context)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, absent: bool = False) -> Tensor:
        """x [T, D], expert ids and weights [T, K] -> [T, D]: the weighted sum of the chosen experts, or this rank's
        summand of it. Ids count the experts of this rank; where some may be `absent`, one past the last is nobody's."""
        activation = computed_by(self.activation, self.activation_backend)
        how = {"activation": activation, "absent": absent, "backend": self.backend, "multiply": self._multiply(x)}
        return expert_mlp(x, ids, weights, self.up, self.down, **how)

    def _multiply(self, x: Tensor) -> Pair | None:
        """The products that a recipe has filled; those of a matrix that it has not are plain."""
        if self.products is None and not self.takes_products:
            return None
        plain, given = (
            products_for(x.dtype, (x.shape[1], self.up.shape[1], self.down.shape[2]), x.device),
            self.products or {},
        )
        return Pair(given.get("up", plain), given.get("down", plain))


@mixer("E", "MoE")
class MoE(Mixer):
    """No token is dropped. The shared expert, an MLP that every token visits, is added unweighted.

    LatentMoE (arXiv 2601.18089): with `moe_latent_size` the experts work between one down and one up projection of the
    layer; router and shared expert see the full width.

    Tensor ranks share the inner width of every expert. Router and latent projections, which all hold, work on the tokens of
    the stream; what the experts need of all tokens is sent at the latent width.

    Folded experts are visited: each rank sends its tokens to where their experts are, and gets back what these made of them,
    while it computes the shared expert.
    """

    shares_tokens = shares_rows = True

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        hidden, latent, width = config.hidden_size, config.moe_latent_size, config.shared_expert_ffn_hidden_size
        self.router = Router(config, context)
        self.experts = Experts(config, context)
        self.dispatcher = self.exact = None
        if context.experts is not None:
            placement = Placement(config.num_experts, context.experts.block, context.experts.tensor.size)
            self.dispatcher = choose(placement, context.experts.dispatcher, context.experts.room)
            self.exact = choose(placement, "all_to_all", 0.0)
        self.latent_down = Linear(hidden, latent, role="latent", std=config.init_std) if latent else None
        self.latent_up = Linear(latent, hidden, role="latent", std=residual_std(config)) if latent else None
        self.shared_expert = MLP(config, context, width) if width else None

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        ids, weights = self.router(x, seq)
        dispatcher = self.exact if seq.share is None else self.dispatcher  # a step can be repeated where room is short
        if dispatcher is not None:
            return self._visit(dispatcher, x, ids, weights, seq)
        ids, weights = seq.ranks.whole(ids), seq.enter(weights)
        everyone = seq.enter(x) if self.shared_expert or not self.latent_down else None  # sent once, for both
        shared = self.shared_expert.summand(everyone) if self.shared_expert and everyone is not None else None
        if self.latent_down is None or self.latent_up is None:
            assert everyone is not None
            out = self.experts(everyone, ids, weights)
            return seq.leave(out if shared is None else out + shared)
        out = self.latent_up(seq.leave(self.experts(seq.enter(self.latent_down(x)), ids, weights)))
        return out if shared is None else out + seq.leave(shared)

    def _visit(self, dispatcher: Dispatcher, x: Tensor, ids: Tensor, weights: Tensor, seq: SequenceContext) -> Tensor:
        """`forward` for folded experts: every rank has tokens of its own, and dispatches those."""
        sent = self.latent_down(x) if self.latent_down is not None else x
        compute = partial(self.experts, absent=dispatcher.absent)
        out, shared = dispatcher.run(sent, ids, weights, compute, lambda: self._shared(x, seq))
        out = self.latent_up(out) if self.latent_up is not None else out
        return out if shared is None else out + shared

    def _shared(self, x: Tensor, seq: SequenceContext) -> Tensor | None:
        return self.shared_expert(x, seq) if self.shared_expert is not None else None

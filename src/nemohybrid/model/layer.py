"""What stands between two points of the residual stream."""

from dataclasses import replace

from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.mixer import build_mixer
from nemohybrid.model.norm import normed, optional_norm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import attach, layout_of


class Layer(nn.Module):
    """x + mixer(norm(x)), and nothing else; with options x + output_norm(mixer(x)) or both norms."""

    def __init__(self, symbol: str, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.norm_epsilon
        self.norm = optional_norm(symbol not in config.no_input_norm, width, epsilon)
        self.mixer = build_mixer(symbol, config, context)
        self.output_norm = optional_norm(symbol in config.output_norm, width, epsilon)
        if not self.mixer.shares_tokens:
            _mark_whole(self.mixer)

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]; with sequence parallelism this rank's tokens."""
        return x + normed(self._mixed(normed(x, self.norm), seq), self.output_norm)

    def _mixed(self, x: Tensor, seq: SequenceContext) -> Tensor:
        if self.mixer.shares_tokens:
            return self.mixer(x, seq)
        return seq.ranks.own(self.mixer(seq.ranks.whole(x), seq.uncut()))


def _mark_whole(mixer: nn.Module) -> None:
    """What sees all tokens on every rank gets the same gradient on each, also where the stream is cut."""
    for tensor in mixer.parameters():
        if layout_of(tensor).partial == "tokens":
            attach(tensor, replace(layout_of(tensor), partial="never"))

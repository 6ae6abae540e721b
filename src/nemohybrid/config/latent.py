"""LatentMoE at equal cost: how many narrow experts a token may visit for the weights of the full-width ones.

LatentMoE (arXiv 2601.18089) lets experts work at a latent size l instead of the hidden size d, and makes up for it with
alpha = d / l times as many experts, of which a token visits alpha times as many. The two projections around them cost
2 d l weights, which alpha K forgets: with experts of two matrices of width m, a token meets no more weights than before
only up to K' <= alpha K - d / m. So Nemotron 3 Super has 22 of 512, and not 24.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import ConfigError


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of an `E` layer that tokens choose from; `latent` None where they work at the hidden size."""

    experts: int
    top_k: int
    hidden: int
    width: int
    matrices: int = 2  # of an expert; 3 when gated
    latent: int | None = None

    @property
    def alpha(self) -> Fraction:
        """How many times narrower than the model the experts' input is."""
        return Fraction(self.hidden, self.latent or self.hidden)

    @property
    def active_weights(self) -> int:
        """Weights of one layer that a token meets: its experts, and the projections around them."""
        expert = self.matrices * (self.latent or self.hidden) * self.width
        return self.top_k * expert + 2 * self.hidden * (self.latent or 0)


def routed_experts(model: ModelConfig) -> RoutedExperts:
    """Those of a configuration whose sizes are filled in."""
    matrices = 3 if model.activation == "swiglu" else 2
    width = model.moe_ffn_hidden_size or 0
    return RoutedExperts(model.num_experts, model.moe_top_k, model.hidden_size, width, matrices, model.moe_latent_size)


def latent_of_equal_cost(standard: RoutedExperts, latent: int) -> RoutedExperts:
    """The LatentMoE of this latent size with alpha times the experts, of which a token visits as many as cost no more.

    Raises ConfigError where the projections alone cost what all visits did.
    """
    assert standard.latent is None, "this is a LatentMoE already"
    if not 0 < latent < standard.hidden:
        raise ConfigError(f"a latent size of {latent}: legal are 1 to {standard.hidden - 1}, less than the hidden size")
    wider = replace(standard, latent=latent)
    top_k = _floor(wider.alpha * standard.top_k - _visits_of_projections(standard))
    if top_k < 1:
        raise ConfigError(
            f"experts of width {standard.width} are too narrow for a latent size of {latent}: the projections cost as much "
            f"as {float(_visits_of_projections(standard)):.1f} visits, {standard.top_k} visits before are "
            f"{float(wider.alpha * standard.top_k):.1f} now"
        )
    return replace(wider, experts=_floor(wider.alpha * standard.experts), top_k=top_k)


def standard_of_equal_cost(latent: RoutedExperts) -> RoutedExperts:
    """The experts of full width that a LatentMoE stands for: the fewest visits that cost no less."""
    top_k = -_floor(-(latent.top_k + _visits_of_projections(latent)) / latent.alpha)
    return replace(latent, experts=_floor(latent.experts / latent.alpha), top_k=top_k, latent=None)


def _visits_of_projections(routed: RoutedExperts) -> Fraction:
    """2 d l weights in units of one visit, `matrices` l m; d / m for experts of two matrices."""
    return Fraction(2 * routed.hidden, routed.matrices * routed.width)


def _floor(value: Fraction) -> int:
    return value.numerator // value.denominator

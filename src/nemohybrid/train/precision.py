"""What a run says of its precision: a table at its start, and a file beside its configuration."""

import json

import torch

from nemohybrid.config.precision import policy_of
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.precision import sites
from nemohybrid.precision.backends import choose
from nemohybrid.precision.policy import idle_rules
from nemohybrid.precision.table import as_json, table


class Resolved:
    """The policy of a run, for every product of the whole model, also of layers that other ranks hold.

    Raises ConfigError for a rule that fits nothing, and where `logging.precision_every` would see nothing.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.policy = policy_of(config.precision)
        with torch.device("meta"):
            places = [site.slot for site in sites(HybridModel(config.model))]
        for rules in (self.policy.rules, self.policy.late.rules if self.policy.late else ()):
            for number, why in idle_rules(rules, places).items():
                raise ConfigError(f"rule {number} of precision fits nothing: {why}")
        self.chosen = [self.policy.of(place) for place in places]
        asked = {(recipe, bool(row.place.experts)) for row in self.chosen for recipe in row.recipes}
        self.choices = {
            f"{recipe.name}{' of experts' * experts}": choose(recipe, config.precision.backend, device, experts=experts)
            for recipe, experts in sorted(asked, key=lambda pair: (pair[0].name, pair[1]))
            if recipe.is_quantized
        }
        unseen = [what for what, choice in self.choices.items() if choice.name == "transformer_engine"]
        if config.logging.precision_every and unseen:
            raise ConfigError(
                f"logging.precision_every={config.logging.precision_every} sees nothing of what transformer_engine quantizes, "
                f"which precision.backend=auto takes here for {', '.join(unseen)}. Legal: precision.backend=emulated or "
                "torch_native, or logging.precision_every=0"
            )

    @property
    def lines(self) -> list[str]:
        """Nothing where nothing is quantized."""
        who = [f"{what}: {choice.name} ({choice.why})" for what, choice in self.choices.items()]
        return [*table(self.policy, self.chosen), *who] if who else []

    @property
    def json(self) -> str:
        """Of `precision.json`."""
        backends = {what: {"backend": choice.name, "why": choice.why} for what, choice in self.choices.items()}
        return json.dumps(as_json(self.policy, self.chosen) | {"backends": backends}, indent=1) + "\n"

"""Every rule that ties two keys together: one function a rule, one file a subject.

A rule looks at a typed, derived `RunConfig` and returns what is wrong, with the nearest values that would be right.
Nothing here imports torch or megatron: a wrong configuration is known within a second, before any process group.
"""

from collections.abc import Collection

from nemohybrid.config.rules import (  # noqa: F401 - they register their rules
    context,
    experts,
    kernels,
    layout,
    lengths,
    model,
    pipeline,
    precision,
    stability,
    surroundings,
    tensor,
    training,
)
from nemohybrid.config.rules.rule import MODEL_RULES, RUN_RULES, Situation
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation
from nemohybrid.errors import ConfigError
from nemohybrid.symbols import parse_pattern

__all__ = ["MODEL_RULES", "RUN_RULES", "violated_rules"]


def violated_rules(
    config: RunConfig, world_size: int = 1, *, model_only: bool = False, unseen: Collection[str] = ()
) -> list[Violation]:
    """All violations, in the order the rules are written. `model_only` leaves out what only a training run needs."""
    violations: list[Violation] = []
    pattern = None
    try:
        pattern = parse_pattern(config.model.pattern)
    except ConfigError as error:
        violations.append(Violation("model.pattern", str(error)))
    now = Situation(config, world_size, pattern, unseen)
    rules = MODEL_RULES if model_only else MODEL_RULES + RUN_RULES
    return violations + [found for check in rules if (found := check(now))]

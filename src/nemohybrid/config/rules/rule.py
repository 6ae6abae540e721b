"""What a rule is: a function of the situation, registered by a decorator, and the arithmetic of legal values."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps

from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation
from nemohybrid.pattern import Pattern


@dataclass(frozen=True)
class Situation:
    """What a rule may look at: the configuration, the number of ranks, and the parsed pattern (None when it is faulty).

    unseen: "files", "packages", where only the nodes of the run have them. Rules do not look for those here.
    """

    config: RunConfig
    world_size: int
    pattern: Pattern | None
    unseen: Collection[str] = ()

    def has(self, symbol: str) -> bool:
        """Whether a layer of this symbol is built."""
        return symbol in (self.config.model.pattern if self.pattern is None else self.pattern.main + self.pattern.mtp)


Rule = Callable[[Situation], Violation | None]
MODEL_RULES: list[Rule] = []
RUN_RULES: list[Rule] = []


def rule(registry: list[Rule], symbol: str = "") -> Callable[[Rule], Rule]:
    """Register a rule; with `symbol`, it holds only where the pattern has such a layer."""

    def register(check: Rule) -> Rule:
        @wraps(check)
        def checked(now: Situation) -> Violation | None:
            return None if symbol and not now.has(symbol) else check(now)

        registry.append(checked)
        return checked

    return register


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def multiples_near(value: int, step: int) -> list[int]:
    """The multiples of `step` on both sides of `value`."""
    below = value // step * step
    return [m for m in (below, below + step) if m > 0]


def divides(key: str, value: int, other_key: str, other: int, sentence: str) -> Violation | None:
    if value % other == 0:
        return None
    legal = {key: multiples_near(value, other), other_key: divisors(value)}
    return Violation(f"{key}={value}", sentence, legal)

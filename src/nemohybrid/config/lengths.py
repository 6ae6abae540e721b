"""Sequence lengths that take turns: which one a step has is a pure function of the step.

Every step reads equally many tokens: where its sequences are shorter there are more of them. So shares of steps are shares of
tokens, a schedule knows nothing of lengths, and neither does the memory that a microbatch takes.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from nemohybrid.config.environment import DataSection


@dataclass(frozen=True)
class LengthPlan:
    """lengths: tokens of a sequence -> the share of the steps, the rarest first; together 1."""

    lengths: tuple[tuple[int, Fraction], ...]

    @classmethod
    def of(cls, data: DataSection) -> "LengthPlan":
        """Of a configuration; one length where it names no others."""
        shares = {int(length): Fraction(str(share)) for length, share in (data.lengths or {}).items()} or {
            data.sequence_length: 1
        }
        total = sum(shares.values())
        pairs = sorted((Fraction(share) / total, length) for length, share in shares.items())
        return cls(tuple((length, share) for share, length in pairs))

    def at(self, step: int) -> int:
        """The length of step 1, 2, ..."""
        before, after = self._counts(step - 1), self._counts(step)
        return next(length for (length, _), a, b in zip(self.lengths, before, after, strict=True) if a != b)

    def steps_before(self, step: int, length: int) -> int:
        """How many of the steps before `step` have this length."""
        counts = self._counts(step - 1)
        return next(count for (own, _), count in zip(self.lengths, counts, strict=True) if own == length)

    def _counts(self, steps: int) -> list[int]:
        """Of the first `steps` steps, those of each length: never more than one from its share, of two lengths."""
        counts, left, share_left = list[int](), steps, Fraction(1)
        for _, share in self.lengths[:-1]:
            counts.append(floor(left * share / share_left))
            left, share_left = left - counts[-1], share_left - share
        return [*counts, left]

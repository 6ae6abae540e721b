"""Rules of sequence lengths that take turns."""

from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, rule
from nemohybrid.config.violation import Violation


@rule(RUN_RULES)
def lengths_make_the_longest(now: Situation) -> Violation | None:
    """A step of shorter sequences has more of them, and as many tokens."""
    lengths, longest = now.config.data.lengths or {}, now.config.data.sequence_length
    if not lengths:
        return None
    if max(lengths) != longest:
        where = f"data.sequence_length={longest}"
        return Violation(where, "is not the longest of data.lengths", {"data.sequence_length": str(max(lengths))})
    odd = [length for length in lengths if longest % length]
    if not odd:
        return None
    near = sorted(divisors(longest), key=lambda length: abs(length - odd[0]))[:2]
    legal = {"data.lengths": [f"a length of {length}" for length in sorted(near)]}
    return Violation(
        f"data.lengths={{{odd[0]}: ...}}", f"{longest} tokens are no whole number of such sequences", legal
    )


@rule(RUN_RULES)
def lengths_over_ranks(now: Situation) -> Violation | None:
    """Every length is shared by the context ranks, and long enough for what looks ahead and back."""
    ranks, has_mamba = now.config.parallel.context, now.has("M")
    drafts = now.pattern.mtp_depth if now.pattern else 0
    needed = max(now.config.model.conv_kernel - 1 if has_mamba and ranks > 1 else 0, drafts + (ranks == 1))
    for length in now.config.data.lengths or {}:
        if ranks > 1 and length % (2 * ranks):
            message = f"sequences of {length} tokens do not cut into 2 x {ranks} pieces"
            return Violation("data.lengths", message, {"data.lengths": f"multiples of {2 * ranks}"})
        if length // ranks < needed:
            message = f"sequences of {length} tokens are too short: a rank needs {needed} of each"
            return Violation("data.lengths", message, {"data.lengths": f"{needed * ranks} or more"})
    return None


@rule(RUN_RULES)
def lengths_without_a_ramp(now: Situation) -> Violation | None:
    """What a batch that grows has read of each length is not a function of the step alone."""
    if len(now.config.data.lengths or {}) < 2 or now.config.train.batch_ramp.start is None:
        return None
    legal = {"train.batch_ramp.start": "null", "data.lengths": "null"}
    return Violation("data.lengths", "lengths do not take turns while the batch grows", legal)


@rule(RUN_RULES)
def positions_need_an_evaluation(now: Situation) -> Violation | None:
    """Else nothing would be drawn."""
    train = now.config.train
    if not train.evaluate_positions or train.evaluate_every:
        return None
    where, legal = (
        "train.evaluate_positions=true",
        {"train.evaluate_every": "1 or more", "train.evaluate_positions": "false"},
    )
    return Violation(where, "nothing is evaluated with train.evaluate_every=0", legal)

"""Rules of a pipeline: stages for every rank, an order that can run the microbatches, and what a part of a model cannot do."""

import math

from nemohybrid.config.batch_plan import batch_sizes
from nemohybrid.config.ranks import data_ranks, microbatch, schedule
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, rule
from nemohybrid.config.violation import Violation


def _stages(now: Situation) -> int:
    """Of all ranks together: what the `|` of the pattern make, else virtual stages of each."""
    cut = len(now.pattern.segments) if now.pattern else 1
    return cut if cut > 1 else now.config.parallel.pipeline * (now.config.parallel.virtual_pipeline or 1)


@rule(RUN_RULES)
def virtual_stages(now: Situation) -> Violation | None:
    """Where the pattern has `|`, it says how many stages a rank has; else every stage needs a layer."""
    parallel, pattern = now.config.parallel, now.pattern
    virtual, ranks = parallel.virtual_pipeline, parallel.pipeline
    if virtual is None or pattern is None or ranks not in pattern.legal_stage_counts:
        return None
    where = f"parallel.virtual_pipeline={virtual}"
    if ranks == 1:
        legal = {"parallel.virtual_pipeline": "null", "parallel.pipeline": "2 or more"}
        return Violation(where, "one rank has no pipeline to be interleaved in", legal) if virtual > 1 else None
    if len(pattern.segments) > 1:
        own = len(pattern.segments) // ranks
        message = f"the pattern has {len(pattern.segments)} segments for {ranks} ranks"
        return Violation(where, message, {"parallel.virtual_pipeline": [own]}) if virtual != own else None
    most = pattern.num_layers // ranks
    if virtual <= most:
        return None
    message = f"{ranks} x {virtual} stages are more than the {pattern.num_layers} layers"
    return Violation(where, message, {"parallel.virtual_pipeline": f"1 to {most}, or cut the pattern with '|'"})


@rule(RUN_RULES)
def schedule_of_stages(now: Situation) -> Violation | None:
    """1f1b knows one stage a rank, interleaved several."""
    parallel = now.config.parallel
    if parallel.pipeline == 1 and parallel.schedule != "auto":
        legal = {"parallel.schedule": "auto", "parallel.pipeline": "2 or more"}
        return Violation(f"parallel.schedule={parallel.schedule}", "changes nothing on one rank", legal)
    several = _stages(now) > parallel.pipeline > 1
    if parallel.schedule not in ("1f1b", "interleaved") or several == (parallel.schedule == "interleaved"):
        return None
    other = ["auto", "gpipe", "interleaved" if several else "1f1b"]
    message = "runs one stage a rank, here are more" if several else "needs several stages a rank"
    legal = {"parallel.schedule": other}
    if not several:
        legal["parallel.virtual_pipeline"] = ["2 or more"]
    return Violation(f"parallel.schedule={parallel.schedule}", message, legal)


@rule(RUN_RULES)
def rounds_of_microbatches(now: Situation) -> Violation | None:
    """The interleaved schedule works in rounds of equally many microbatches, as many as there are ranks or some more."""
    train, ranks, parallel = now.config.train, data_ranks(now.config, now.world_size), now.config.parallel
    if parallel.pipeline == 1 or schedule(parallel, _stages(now)) != "interleaved":
        return None
    shares = [max(1, batch // ranks) for batch in batch_sizes(train)]
    rows = microbatch(now.config, ranks)
    bad = next((share // rows for share in shares if not _makes_rounds(share // rows, parallel.pipeline)), None)
    if bad is None:
        return None
    sizes = [
        size
        for size in divisors(math.gcd(*shares))
        if all(_fills(share // size, parallel.pipeline) for share in shares)
    ]
    message = f"the {bad} microbatches of a step do not make rounds of {parallel.pipeline} or more, equally many"
    legal = {"train.microbatch": sizes} if sizes else {}
    legal |= {"parallel.schedule": "gpipe", "parallel.virtual_pipeline": "1, and no '|' in the pattern"}
    return Violation(f"train.microbatch={rows}", message, legal)


def _makes_rounds(microbatches: int, ranks: int) -> bool:
    return microbatches % max(1, microbatches // ranks) == 0


def _fills(microbatches: int, ranks: int) -> bool:
    """Whether it makes rounds in which every rank has something to do."""
    return microbatches >= ranks and _makes_rounds(microbatches, ranks)


@rule(RUN_RULES)
def parts_do_not_write(now: Situation) -> Violation | None:
    """A pipeline rank has some of the layers, and text is written token by token."""
    if now.config.parallel.pipeline == 1 or not now.config.sample.prompts:
        return None
    message = (
        "a model whose layers are shared by ranks does not generate; `nemohybrid generate` does, from a checkpoint"
    )
    return Violation("sample.prompts", message, {"sample.prompts": "[]", "parallel.pipeline": "1"})


@rule(RUN_RULES)
def output_norms_of_all_layers(now: Situation) -> Violation | None:
    """A pipeline rank sees the outputs of its own layers alone."""
    every, ranks = now.config.logging.output_norms, now.config.parallel.pipeline
    if not every or ranks == 1:
        return None
    message = f"outputs of layers that {ranks} pipeline ranks share are not measured yet"
    return Violation(f"logging.output_norms={every}", message, {"logging.output_norms": "0", "parallel.pipeline": "1"})

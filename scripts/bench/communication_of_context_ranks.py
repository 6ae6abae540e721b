"""The section on context ranks of docs/benchmarks/communication.md; communication_table.py writes it."""

import math
from dataclasses import replace
from functools import cache

from markdown_table import table

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.context import attention_heads, heads_divide, mamba_heads
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan import context_communication as context

KB, MB = 1e3, 1e6
TEXT = ["data=shakespeare", "data.tokenizer=byte"]
SHARED_ROWS = [
    (name, model, ranks, length)
    for name, model in (("Nemotron 3 Super", "nemotron3_super"), ("Nemotron 3 Nano 30B", "nemotron3_nano_30b"))
    for ranks in (8, 64)
    for length in (8192, 65536, 1048576)
]
"""Context ranks of a model without tensor ranks, and tokens of a row."""
EVENS = [
    ("Nemotron 3 Super", "nemotron3_super", 1),
    ("Nemotron 3 Super", "nemotron3_super", 8),
    ("Nemotron 3 Nano 30B", "nemotron3_nano_30b", 1),
    ("Nemotron-H 8B", "nemotron_h_8b", 1),
]
"""Models on tensor ranks."""
EVEN_RANKS = [2, 4, 8, 16, 32, 64]


def section() -> str:
    """All of it."""
    return TEMPLATE.format(
        shared_rows=table(SHARED_HEAD, (shared_line(*row) for row in SHARED_ROWS)),
        evens=table(EVEN_HEAD, (even_line(*layer) for layer in EVENS)),
        few=kilobytes(per_token(shared("nemotron3_super", 8, 65536), "M", "heads")),
        many=kilobytes(per_token(shared("nemotron3_super", 64, 65536), "M", "heads")),
        with_gate=kilobytes(with_gate()),
        gathered=round(state_bytes() / with_gate()),
    )


SHARED_HEAD = [
    "one layer of",
    "context ranks",
    "tokens of a row",
    "of a rank",
    "`*` by heads, kB a token",
    "by the ring",
    "`M` by heads, kB a token",
    "by states",
    "together, MB a rank",
    "`auto`",
]


def shared_line(name: str, model: str, ranks: int, length: int) -> list[str]:
    """A row's way through an attention and a Mamba-2 layer in every way; together in those that `auto` takes."""
    share = shared(model, ranks, length)
    costs = [per_token(share, *way) for way in (("*", "heads"), ("*", "ring"), ("M", "heads"), ("M", "states"))]
    together = sum(send.sent(ranks) for symbol in "*M" for send in context.layer_sends(symbol, share))
    return [
        name,
        str(ranks),
        f"{length:,}",
        f"{share.tokens:,}",
        *map(kilobytes, costs),
        f"{together / MB:,.1f}",
        f"{share.way('*')}, {share.way('M')}",
    ]


def shared(model: str, ranks: int, length: int, tensor: int = 1) -> context.Share:
    """One row on a context rank in the middle."""
    config = sizes(model)
    parallel = replace(config.parallel, context=ranks, tensor=tensor)
    config = replace(config, parallel=parallel, data=replace(config.data, sequence_length=length))
    return context.Share(config, rows=1, part=context.middle(ranks))


@cache
def sizes(model: str) -> RunConfig:
    """Of a model, with defaults for all else."""
    return load_model_config([*TEXT, f"model={model}"])


def kilobytes(size: float) -> str:
    """A cell."""
    return f"{size / KB:.1f}" if math.isfinite(size) else "-"


def per_token(share: context.Share, symbol: str, way: str) -> float:
    """Bytes that a layer sends forward and backward, over the tokens of the rank; infinite where heads do not divide."""
    heads = (attention_heads if symbol == "*" else mamba_heads)(share.model, share.config.parallel.tensor)
    if way == "heads" and not heads_divide(*heads, share.ranks):
        return math.inf
    forward, backward = context.WAYS[symbol, way](share)
    return sum(send.sent(share.ranks) for send in forward + backward) / share.tokens


WIDE = "nemotron_h_8b"


def with_gate() -> float:
    """Bytes of a token in a Mamba-2 layer by heads, one way, if the gate travelled too and nothing stayed."""
    m = sizes(WIDE).model
    heads, groups = mamba_heads(m, 1)
    inner = heads * (m.mamba_head_dim or 0)
    return 2 * (3 * inner + 2 * groups * m.ssm_state_size + heads)


def state_bytes() -> float:
    """Of its state, in fp32."""
    m = sizes(WIDE).model
    return 4 * (m.mamba_num_heads or 0) * (m.mamba_head_dim or 0) * m.ssm_state_size


EVEN_HEAD = ["`M` of", "tensor ranks", *(f"{ranks} context ranks" for ranks in EVEN_RANKS)]


def even_line(name: str, model: str, tensor: int) -> list[str]:
    """From how many tokens of a rank on states send less, for each number of context ranks."""
    return [name, str(tensor), *(even(model, ranks, tensor) for ranks in EVEN_RANKS)]


def even(model: str, ranks: int, tensor: int) -> str:
    """For one. What states send does not depend on tokens, what heads send is as many bytes for each."""
    share = shared(model, ranks, 2 * ranks, tensor)
    by_heads, by_states = (per_token(share, "M", way) for way in ("heads", "states"))
    return f"{math.ceil(by_states * share.tokens / by_heads):,}" if math.isfinite(by_heads) else "any"


TEMPLATE = """## Context ranks

What context ranks send each other in one attention and one Mamba-2 layer, forward and backward, in bf16, over the tokens that
a rank has; of a rank in the middle of a row, since none sends more. *together*: both layers, as `auto` has them travel.

{shared_rows}

By heads every token costs the same, in short rows and in long ones. Query heads must divide, and key/value heads or groups
that are fewer than the ranks go to several of them: an `M` layer of Nemotron 3 Super, {few} kB a token on 8 ranks, takes {many}
on 64. In the ring keys and values pass all ranks, twice, and their gradients with them in fp32, so that it always sends more
than heads do, and more with every rank; halves are balanced and go home again on top, documents with them. It is for heads
that do not divide, as 32 on 64 ranks.

States are the same bytes for every row: with N > 2 ranks, log2(N) + 1 of them forward and log2(N) backward, and twice three
inputs of the convolution. So for each number of ranks there is a number of tokens from which on they are cheaper:

{evens}

*any*: heads do not divide. `parallel.context_method=auto` goes by these numbers for `M`, and takes heads for `*` where they
divide; tests hold it to the formula.

Megatron-LM (`mamba_context_parallel.py`) sends the gate along: {with_gate} kB a token and pass for a layer as wide as Nemotron-H
8B's. If every rank then gathered the states of all N, these would be cheaper from {gathered} N tokens of a rank on. Here the gate
stays where it is, and the number of states grows with the logarithm of N.

With `train.recompute=layer` all that goes forward goes once more. Beside layers, a microbatch gathers 4 bytes a token (by heads:
the documents of whole rows) and some numbers of every row. Weights and gradients are those of data ranks: context ranks count
as such."""

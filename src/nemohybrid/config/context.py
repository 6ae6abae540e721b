"""How context ranks share the work of layers that look across tokens, with `auto` resolved."""

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig

METHODS = {
    "all_to_all": ("heads", "heads"),
    "ring+states": ("ring", "states"),
    "all_to_all+states": ("heads", "states"),
    "ring+all_to_all": ("ring", "heads"),
}
"""`parallel.context_method`: the ways of attention and of Mamba-2."""


def own_length(config: RunConfig) -> int:
    """Tokens of a row that a rank has."""
    return config.data.sequence_length // config.parallel.context


def attention_way(config: RunConfig) -> str:
    """`heads` or `ring`. auto: by heads where these divide, since that sends less and any kernel computes it."""
    parallel = config.parallel
    if parallel.context_method != "auto":
        return METHODS[parallel.context_method][0]
    return "heads" if heads_divide(*attention_heads(config.model, parallel.tensor), parallel.context) else "ring"


def mamba_way(config: RunConfig) -> str:
    """`heads` or `states`. auto: what sends fewer bytes, which is passing states but for short runs of tokens."""
    parallel = config.parallel
    if parallel.context_method != "auto":
        return METHODS[parallel.context_method][1]
    return "heads" if _heads_send_less(config) else "states"


def attention_heads(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Query heads of a tensor rank, and its key/value heads."""
    return (model.num_attention_heads or 1) // tensor, max(1, (model.num_query_groups or 1) // tensor)


def mamba_heads(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Mamba-2 heads of a tensor rank, and its groups."""
    return (model.mamba_num_heads or 1) // tensor, max(1, model.mamba_num_groups // tensor)


def heads_divide(heads: int, groups: int, context: int) -> bool:
    """Whether context ranks can share heads so that none has two ranks; groups they share, or repeat."""
    return heads % context == 0 and (groups % context == 0 or context % groups == 0)


def _heads_send_less(config: RunConfig) -> bool:
    """Bytes that a rank in the middle of a row sends forward and backward, as plan/context_communication.py counts them."""
    model, ranks = config.model, config.parallel.context
    heads, groups = mamba_heads(model, config.parallel.tensor)
    if not heads_divide(heads, groups, ranks):
        return False
    width, inner = 2 if model.dtype == "bfloat16" else 4, heads * (model.mamba_head_dim or 0)
    b_and_c = 2 * groups * model.ssm_state_size
    copies = max(1, ranks // groups)  # of groups that are fewer than the ranks
    of_a_token = (2 * inner + copies * b_and_c + heads) * width
    of_a_state, of_taps = 4 * inner * model.ssm_state_size, (model.conv_kernel - 1) * (inner + b_and_c) * width
    doubling = sum(_neighbours(ranks, 2**n) for n in range((ranks - 1).bit_length()))
    by_heads = 2 * own_length(config) * of_a_token * (ranks - 1) / ranks
    return by_heads < doubling * of_a_state + _neighbours(ranks, 1) * (of_a_state + of_taps)


def _neighbours(ranks: int, by: int) -> int:
    """How many ranks are `by` places away from the one in the middle: it sends to one forward, to the other backward."""
    middle = (ranks - 1) // 2
    return (middle + by < ranks) + (middle - by >= 0)

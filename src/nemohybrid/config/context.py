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
    """Bytes of a token that travel by heads, times the tokens, against those of a state, times its exchanges."""
    model, ranks = config.model, config.parallel.context
    if not heads_divide(*mamba_heads(model, config.parallel.tensor), ranks):
        return False
    inner, heads = (model.mamba_num_heads or 0) * (model.mamba_head_dim or 0), model.mamba_num_heads or 0
    width = 2 if model.dtype == "bfloat16" else 4
    of_a_token = (2 * inner + 2 * model.mamba_num_groups * model.ssm_state_size + heads) * width
    of_a_state = 4 * inner * model.ssm_state_size * (1 + (ranks - 1).bit_length())
    return config.data.sequence_length // ranks * of_a_token < of_a_state

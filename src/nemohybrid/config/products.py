"""The products with a trained weight that a configuration describes, before any model is built: what a policy is judged by.

Names, layers, roles and widths are those of `nemohybrid.model`; a test compares them. Layers of symbols that are not ours
have products that only a built model knows.
"""

from collections.abc import Iterator
from dataclasses import replace

from nemohybrid.config.model import ModelConfig
from nemohybrid.pattern import Pattern
from nemohybrid.precision.place import Place


def products(model: ModelConfig, pattern: Pattern, tensor: int = 1, expert_tensor: int | None = None) -> list[Place]:
    """Those of the whole model, as large as one of `tensor` ranks has them; `expert_tensor` ranks share an expert."""
    sizes = model, tensor, expert_tensor or tensor
    count, main, draft = pattern.num_layers, pattern.main, pattern.mtp
    blocks = min(pattern.mtp_depth, 1) if model.mtp.repeat_block else pattern.mtp_depth
    layers = [(f"layers.{number}", number, symbol, False) for number, symbol in enumerate(main)]
    layers += [
        (f"mtp.{block}.layers.{number}", count + block * len(draft) + number, symbol, True)
        for block in range(blocks)
        for number, symbol in enumerate(draft)
    ]
    return [
        replace(place, name=f"{name}.mixer.{place.name}", layer=layer, layers=count, kind=symbol, mtp=mtp)
        for name, layer, symbol, mtp in layers
        for place in (OF_SYMBOL[symbol](*sizes) if symbol in OF_SYMBOL else ())
    ]


def _mamba(model: ModelConfig, ranks: int, _: int) -> Iterator[Place]:
    heads = model.mamba_num_heads or 0
    inner, states = heads * (model.mamba_head_dim or 0), model.mamba_num_groups * model.ssm_state_size
    outputs = (2 * inner + 2 * states + heads) // ranks  # z, x, B, C and dt
    yield Place("in_proj", "in_proj", outputs=outputs, inputs=model.hidden_size)
    yield Place("out_proj", "out_proj", outputs=model.hidden_size, inputs=inner // ranks)


def _attention(model: ModelConfig, ranks: int, _: int) -> Iterator[Place]:
    """A rank has at least one key/value head."""
    width, heads = model.head_dim or 0, (model.num_attention_heads or 0) // ranks
    key_values = max(1, (model.num_query_groups or 0) // ranks)
    yield Place("qkv", "qkv", outputs=(heads + 2 * key_values) * width, inputs=model.hidden_size)
    yield Place("out_proj", "o_proj", outputs=model.hidden_size, inputs=heads * width)


def _mlp(model: ModelConfig, ranks: int, _: int) -> Iterator[Place]:
    yield from _feed_forward(model, (model.ffn_hidden_size or 0) // ranks)


def _feed_forward(model: ModelConfig, width: int, prefix: str = "") -> Iterator[Place]:
    yield Place(f"{prefix}fc1", "fc1", outputs=_halves(model) * width, inputs=model.hidden_size)
    yield Place(f"{prefix}fc2", "fc2", outputs=model.hidden_size, inputs=width)


def _halves(model: ModelConfig) -> int:
    """A gated activation needs two."""
    return 2 if model.activation == "swiglu" else 1


def _experts(model: ModelConfig, ranks: int, expert_ranks: int) -> Iterator[Place]:
    """Every rank has the whole latent width, and some or all of the experts."""
    hidden, latent = model.hidden_size, model.moe_latent_size
    width, inner, many = (model.moe_ffn_hidden_size or 0) // expert_ranks, latent or hidden, model.num_experts
    yield Place("experts.up", "expert", outputs=_halves(model) * width, inputs=inner, experts=many)
    yield Place("experts.down", "expert", outputs=inner, inputs=width, experts=many)
    if latent:
        yield Place("latent_down", "latent", outputs=latent, inputs=hidden)
        yield Place("latent_up", "latent", outputs=hidden, inputs=latent)
    if model.shared_expert_ffn_hidden_size:
        yield from _feed_forward(model, model.shared_expert_ffn_hidden_size // ranks, "shared_expert.")


OF_SYMBOL = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}

"""Rules of the numbers that matrices multiply in."""

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.rules.rule import RUN_RULES, Situation, rule
from nemohybrid.config.rules.tensor import tensor_sizes
from nemohybrid.config.violation import Violation

MULTIPLES = {"bf16": 1, "fp8_": 16, "mxfp8": 32, "nvfp4": 16}
"""How names of recipes begin -> what both dimensions of a matrix must be multiples of (the shapes that Transformer Engine's
modules take: cuBLAS multiplies FP8 in multiples of 16; a block of MXFP8 has 32 elements, one of NVFP4 16)."""


@rule(RUN_RULES)
def widths_of_the_recipe(now: Situation) -> Violation | None:
    """What counts is what one rank multiplies: 10304 outputs may do, an eighth of them may not.

    Megatron-LM checks the whole width only (mamba_mixer.py), which Nemotron 3 Nano with 8 tensor ranks passes.
    """
    recipe, ranks, possible = now.config.precision.recipe, now.config.parallel.tensor, tensor_sizes(now)
    multiple = multiple_of(recipe)
    found = _odd_widths(now, ranks, multiple)
    if not found or ranks not in possible:
        return None  # where ranks have no equal parts, the rules of tensor parallelism speak
    fitting = [size for size in possible if not _odd_widths(now, size, multiple)]
    legal = {"parallel.tensor": fitting, "precision.recipe": ["bf16"]}
    message = f"takes multiples of {multiple}, but a rank has {' and '.join(found)}"
    return Violation(f"precision.recipe={recipe}", message, {key: values for key, values in legal.items() if values})


def multiple_of(recipe: str) -> int:
    """What every dimension of a matrix must be a multiple of, on each rank."""
    found = [multiple for start, multiple in MULTIPLES.items() if recipe.startswith(start)]
    assert found, f"nothing is known of the shapes that {recipe} takes"
    return found[0]


def _odd_widths(now: Situation, ranks: int, multiple: int) -> list[str]:
    """Widths of the layers on one of `ranks` that are no multiple, in words."""
    widths = {"hidden channels": now.config.model.hidden_size}
    for symbol, of_layer in WIDTHS.items():
        widths |= of_layer(now.config.model, ranks) if now.has(symbol) else {}
    return [f"{width} {name}" for name, width in widths.items() if width % multiple]


def mamba_widths(model: ModelConfig, ranks: int) -> dict[str, int]:
    """What one of `ranks` has of `in_proj` (z, x, B, C and dt) and of `out_proj`."""
    heads = model.mamba_num_heads or 0
    inner, states = heads * (model.mamba_head_dim or 0), model.mamba_num_groups * model.ssm_state_size
    return {
        "outputs of the Mamba in_proj": (2 * inner + 2 * states + heads) // ranks,
        "inputs of the Mamba out_proj": inner // ranks,
    }


def attention_widths(model: ModelConfig, ranks: int) -> dict[str, int]:
    """The same of `qkv` and `out_proj`; a rank has at least one key/value head."""
    width, heads = model.head_dim or 0, (model.num_attention_heads or 0) // ranks
    key_values = max(1, (model.num_query_groups or 0) // ranks)
    return {
        "outputs of the attention qkv": (heads + 2 * key_values) * width,
        "inputs of the attention out_proj": heads * width,
    }


def mlp_widths(model: ModelConfig, ranks: int) -> dict[str, int]:
    """The same of an MLP: outputs of the first matrix (a gated one has twice as many), inputs of the second."""
    return {"channels of an MLP": (model.ffn_hidden_size or 0) // ranks}


def expert_widths(model: ModelConfig, ranks: int) -> dict[str, int]:
    """The same of the experts. Every rank has the whole latent width."""
    return {
        "channels of an expert": (model.moe_ffn_hidden_size or 0) // ranks,
        "channels of the shared expert": (model.shared_expert_ffn_hidden_size or 0) // ranks,
        "latent channels": model.moe_latent_size or 0,
    }


WIDTHS = {"M": mamba_widths, "*": attention_widths, "-": mlp_widths, "E": expert_widths}
"""Symbol -> the widths of its matrices on each of so many tensor ranks, beside the hidden size."""

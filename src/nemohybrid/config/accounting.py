"""Parameters and FLOPs of a model, layer by layer, from its sizes alone: no torch, any model in a millisecond.

FLOPs are of one token's forward pass, a multiply-add counting two; training costs three times that (forward, and two
products of the same size backward). Two columns:

- `flops`: what the model needs. Causal products count half; the SSD scan counts the products of its chunked form with
  chunk Q: C B^T within a chunk (G Q N), scores times x (H Q P), chunk states and their read-out (4 H P N).
- `flops_megatron`: the formula Megatron-LM reports (training.py, hybrid_flops), which takes the Mamba inner width to be
  2 x hidden whatever the heads are, counts 7 flops an inner channel and state for the scan, and leaves out convolution
  and router. Compare published TFLOP/s with this column only.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

from nemohybrid.config.model import ModelConfig
from nemohybrid.symbols import parse_pattern

_DEFAULT_CHUNK = 128


@dataclass(frozen=True)
class Cost:
    """Of one layer, or of several: `+` adds, `*` repeats."""

    parameters: int = 0
    active: int = 0  # parameters one token meets
    flops: float = 0.0
    flops_megatron: float = 0.0
    core: float = 0.0  # of `flops`, those between tokens: of the scan, of the attention scores

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.active + other.active,
            self.flops + other.flops,
            self.flops_megatron + other.flops_megatron,
            self.core + other.core,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(
            self.parameters * times,
            self.active * times,
            self.flops * times,
            self.flops_megatron * times,
            self.core * times,
        )


def mamba_cost(m: ModelConfig) -> Cost:
    """An `M` layer with its norm."""
    h, heads, width, state, groups = (
        m.hidden_size,
        m.mamba_num_heads or 0,
        m.mamba_head_dim or 0,
        m.ssm_state_size,
        m.mamba_num_groups,
    )
    inner, shared, chunk = heads * width, groups * state, m.chunk_size or _DEFAULT_CHUNK
    projections = h * (2 * inner + 2 * shared + heads) + inner * h
    convolution = (inner + 2 * shared) * (m.conv_kernel + m.conv_bias)
    biases = (2 * inner + 2 * shared + heads + h) * m.linear_bias
    norms = inner + 2 * state * m.mamba_bc_norm + width * m.mamba_x_norm
    parameters = projections + convolution + biases + 3 * heads + norms + h
    scan = groups * chunk * state + heads * (chunk * width + 4 * width * state)
    flops = 2 * projections + 2 * m.conv_kernel * (inner + 2 * shared) + scan
    assumed = 2 * h  # Megatron's inner width
    megatron = 2 * h * (2 * assumed + 2 * shared + heads) + 7 * assumed * state + 2 * assumed * h
    return Cost(parameters, parameters, flops, megatron, scan)


def attention_cost(m: ModelConfig, sequence_length: int) -> Cost:
    """A `*` layer with its norm, at the given length."""
    h, width = m.hidden_size, m.head_dim or 0
    q, kv = (m.num_attention_heads or 0) * width, (m.num_query_groups or 0) * width
    projections = h * (q + 2 * kv) + q * h
    norms = width * (2 * m.attention.qk_norm + m.attention.v_norm)
    parameters = projections + (q + 2 * kv + h) * m.linear_bias + norms + h
    scores = 2 * sequence_length * q
    flops = 2 * projections + scores
    return Cost(parameters, parameters, flops, flops, scores)


def _mlp_weights(m: ModelConfig, inputs: int, width: int) -> int:
    return inputs * width * (3 if m.activation == "swiglu" else 2)


def mlp_cost(m: ModelConfig) -> Cost:
    """A `-` layer with its norm."""
    width = m.ffn_hidden_size or 0
    weights = _mlp_weights(m, m.hidden_size, width)
    fc1_width = width * (2 if m.activation == "swiglu" else 1)
    parameters = weights + (fc1_width + m.hidden_size) * m.linear_bias + m.hidden_size
    return Cost(parameters, parameters, 2 * weights, 2 * weights)


def expert_weights(m: ModelConfig) -> int:
    """Parameters of one routed expert."""
    return _mlp_weights(m, m.moe_latent_size or m.hidden_size, m.moe_ffn_hidden_size or 0)


def moe_cost(m: ModelConfig) -> Cost:
    """An `E` layer with its norm. The balancing bias of the router is a buffer and not counted."""
    h, latent, expert = m.hidden_size, m.moe_latent_size, expert_weights(m)
    shared_width = m.shared_expert_ffn_hidden_size or 0
    shared = _mlp_weights(m, h, shared_width)
    fc1_width = shared_width * (2 if m.activation == "swiglu" else 1)
    bias = (fc1_width + h) * m.linear_bias if shared_width else 0
    around, router = 2 * h * (latent or 0), h * m.num_experts
    always = router + shared + bias + around + h
    flops = 2 * (expert * m.moe_top_k + shared + around + router)
    return Cost(always + expert * m.num_experts, always + expert * m.moe_top_k, flops, flops - 2 * router)


def layer_cost(symbol: str, m: ModelConfig, sequence_length: int) -> Cost:
    """Any layer of the published kinds; a symbol of your own costs nothing until it is added here."""
    known = {
        "M": mamba_cost,
        "-": mlp_cost,
        "E": moe_cost,
        "*": partial(attention_cost, sequence_length=sequence_length),
    }
    if symbol not in known:
        return Cost()
    norms = m.hidden_size * ((symbol in m.output_norm) - (symbol in m.no_input_norm))  # more or less than the usual one
    return known[symbol](m) + Cost(norms, norms)


def vocabulary_weights(m: ModelConfig) -> int:
    """Parameters of the embedding, and of the output projection unless they are tied."""
    return -(-(m.vocab_size or 0) // m.vocab_multiple) * m.vocab_multiple * m.hidden_size


def costs_by_part(m: ModelConfig, sequence_length: int) -> dict[str, Cost]:
    """Part of the model (layer symbol, `embedding`, `output`, `mtp`) -> its cost, all layers of a kind together."""
    pattern, h = parse_pattern(m.pattern), m.hidden_size
    vocabulary = vocabulary_weights(m)
    head = Cost(h, h, 2 * vocabulary, 2 * vocabulary)
    tied = Cost() if m.tie_embeddings else Cost(vocabulary, vocabulary)
    parts = {"embedding": Cost(vocabulary, vocabulary)}
    parts |= {s: layer_cost(s, m, sequence_length) * n for s, n in sorted(pattern.counts.items())}
    parts["output"] = head + tied
    if pattern.mtp:
        parts["mtp"] = _mtp_cost(m, pattern.mtp, pattern.mtp_depth, sequence_length, vocabulary)
    return parts


def _mtp_cost(m: ModelConfig, symbols: str, depth: int, sequence_length: int, vocabulary: int) -> Cost:
    """`depth` runs of one stored block, or of a block each; they share embedding and output with the model."""
    h = m.hidden_size
    block = Cost(2 * h * h + 3 * h, 2 * h * h + 3 * h, 4 * h * h, 0.0)
    for symbol, count in Counter(symbols).items():
        block = block + layer_cost(symbol, m, sequence_length) * count
    run = Cost(0, 0, block.flops + 2 * vocabulary, block.flops_megatron + 2 * vocabulary, block.core) * depth
    stored = 1 if m.mtp.repeat_block else depth
    return Cost(block.parameters * stored, block.active * stored, run.flops, run.flops_megatron, run.core)


def total_cost(m: ModelConfig, sequence_length: int) -> Cost:
    """The whole model."""
    return sum(costs_by_part(m, sequence_length).values(), Cost())


TRAINING_PASSES = 3
"""Forward, and backward for inputs and for weights."""

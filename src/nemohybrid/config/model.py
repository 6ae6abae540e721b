"""`model`: what the network is. Sizes left empty follow from `hidden_size` (see `derive.py`)."""

from dataclasses import dataclass, field

from nemohybrid.config.section import Section, option


@dataclass
class AttentionConfig(Section):
    """The `*` layer beyond its sizes."""

    position_embedding: str = option(
        "none", "positions in attention; the Nemotron hybrids use none", choices=("none", "rope")
    )
    rope_theta: float = option(10000.0, "base of the rotary frequencies", minimum=1.0)
    qk_norm: bool = option(False, "RMSNorm of every query and key head")
    v_norm: bool = option(False, "RMSNorm of every value head")
    softcap: float | None = option(
        None, "scores s become cap * tanh(s / cap) before the softmax; empty: as they are", minimum=1e-3
    )


@dataclass
class RouterConfig(Section):
    """How an `E` layer chooses experts."""

    score: str = option("sigmoid", "score of an expert for a token", choices=("sigmoid", "softmax"))
    expert_bias: bool = option(True, "add a balancing bias to the scores when selecting (not when weighting)")
    normalize: bool = option(True, "make the weights of the chosen experts sum to one")
    scaling_factor: float = option(1.0, "the weights are multiplied by this", minimum=1e-3)
    groups: int = option(1, "experts are selected within the best of this many groups", minimum=1)
    top_groups: int = option(1, "how many groups may be selected from", minimum=1)
    bias_update_rate: float = option(1e-3, "the balancing bias moves by this much a step; 0: it stays", minimum=0.0)
    aux_loss: str = option(
        "sequence",
        "load-balancing loss over each sequence, each microbatch, or the global batch",
        choices=("none", "sequence", "batch", "global"),
    )
    aux_loss_weight: float = option(1e-4, "of the load-balancing loss", minimum=0.0)
    z_loss_weight: float = option(0.0, "of the mean squared logsumexp of the router logits", minimum=0.0)
    force_balance: bool = option(False, "for benchmarks only: every expert gets the same load, whatever the scores")


@dataclass
class MTPConfig(Section):
    """Multi-token prediction: the parts of the pattern after `/`, one for each depth."""

    repeat_block: bool = option(True, "one block, run at every depth; false: each depth has a block of its own")
    loss_weight: float = option(0.3, "of the MTP losses together; each depth gets an equal part", minimum=0.0)


@dataclass
class ModelConfig(Section):
    """A hybrid of Mamba-2, attention, MLP and mixture-of-experts layers."""

    name: str = option("custom", "for logs and tables")
    pattern: str = option(
        "M-M*-M-", "one symbol a layer: M Mamba-2, * attention, - MLP, E experts; see docs/pattern.md"
    )
    hidden_size: int = option(256, "width of the residual stream", minimum=1)
    vocab_size: int | None = option(None, "token ids; empty: as many as the tokenizer has", minimum=1)
    vocab_multiple: int = option(1, "embedding rows are padded to a multiple of this", minimum=1)
    tie_embeddings: bool = option(False, "use the embedding as output projection")
    norm_epsilon: float = option(1e-5, "added to the mean square in every RMSNorm", minimum=0.0)
    no_input_norm: str = option("", "layer symbols whose mixer reads the residual stream without a norm, e.g. '*'")
    output_norm: str = option("", "layer symbols whose mixer's output is normalised before it is added, e.g. '*-'")
    init_std: float = option(0.02, "standard deviation of initial weights", minimum=0.0)
    rescale_output_init: bool = option(True, "divide the init_std of projections into the residual by sqrt(layers)")
    dtype: str = option("bfloat16", "dtype of matrix products and activations", choices=("float32", "bfloat16"))

    num_attention_heads: int | None = option(None, "query heads", minimum=1)
    num_query_groups: int | None = option(None, "key/value heads shared by the query heads", minimum=1)
    head_dim: int | None = option(None, "width of an attention head", minimum=1)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    mamba_num_heads: int | None = option(None, "Mamba-2 heads; heads x head dim is the inner width", minimum=1)
    mamba_head_dim: int | None = option(None, "width of a Mamba-2 head", minimum=1)
    mamba_num_groups: int = option(2, "groups of heads that share B and C", minimum=1)
    ssm_state_size: int = option(64, "state columns of a head", minimum=1)
    conv_kernel: int = option(4, "taps of the causal convolution", minimum=1)
    conv_bias: bool = option(True, "bias of the causal convolution")
    chunk_size: int | None = option(None, "tokens in one chunk of the SSD scan; empty: best for the device", minimum=1)
    dt_min: float = option(1e-3, "smallest initial time step", minimum=0.0)
    dt_max: float = option(1e-1, "largest initial time step", minimum=0.0)
    dt_init_floor: float = option(1e-4, "initial time steps are at least this", minimum=0.0)
    dt_limit: list[float] | None = option(None, "clamp time steps to [low, high]; empty: no clamp")
    mamba_bc_norm: bool = option(False, "RMSNorm of B and C in every group, after the convolution")
    mamba_x_norm: bool = option(False, "RMSNorm of every head's input to the scan")

    ffn_hidden_size: int | None = option(None, "inner width of an MLP", minimum=1)
    activation: str = option(
        "squared_relu", "of MLPs and experts; swiglu is the gated SiLU", choices=("squared_relu", "swiglu")
    )

    num_experts: int = option(8, "experts of an E layer", minimum=1)
    moe_top_k: int = option(2, "experts a token visits", minimum=1)
    moe_ffn_hidden_size: int | None = option(None, "inner width of an expert", minimum=1)
    shared_expert_ffn_hidden_size: int | None = option(
        None, "inner width of the expert every token visits; 0: none", minimum=0
    )
    moe_latent_size: int | None = option(
        None, "experts work at this width between a down and an up projection; empty: at hidden_size", minimum=1
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    linear_bias: bool = option(False, "bias of the Mamba-2 projections, attention and MLPs")

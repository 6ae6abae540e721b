"""How long a microbatch takes in each part of a model, forward and backward: modelled from sizes, or measured.

The model is a roofline. A layer is its matrix products, at the rate of the products or of reading the weights,
whichever takes longer; what works between tokens (attention scores, the SSD scan), at a rate of its own; and what reads
and writes activations around them, at the rate of the memory. Their times add up. FLOPs are those of
config/accounting.py.

Assumed, not measured: the shares of the data sheet's rates below, the same for every device and size; experts that all
get the same load; no time for what tensor, expert and data ranks send, nor for the gaps between kernels. What a
pipeline is cut by are ratios of these times. Absolute ones are the device's at its best: `measure` finds those of the
device at hand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemohybrid.config.accounting import Cost, expert_weights, layer_cost, vocabulary_weights
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.ranks import expert_tensor
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.pattern import Segment
from nemohybrid.plan.hardware import DEVICES, Device
from nemohybrid.symbols import parse_pattern

PRODUCTS = 0.65
"""Assumed share of the peak in matrix products."""
CORE = {"*": 0.5, "M": 0.25}
"""The same between tokens: flash attention, and the chunked scan with its small products."""
CORE_BACKWARD = 2.5
"""Backward over forward between tokens: both compute the forward products again, attention five for two."""
MEMORY = 0.8
"""Assumed share of the memory's rate."""
FP32 = 4
ITEMSIZE = {"float32": 4, "bfloat16": 2}
UNKNOWN = "-"
"""A symbol of your own is taken to cost as much as this one."""


@dataclass(frozen=True)
class Time:
    """Seconds of one microbatch."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: "Time") -> "Time":
        return Time(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Time":
        return Time(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Costs:
    """Times of a microbatch: of one layer of each symbol, of embedding and head, of one MTP depth with its own head.

    transfer: seconds in which the stream of a microbatch goes from one stage to the next.
    """

    layers: Mapping[str, Time]
    embedding: Time = Time()
    head: Time = Time()
    mtp: Time = Time()
    mtp_depth: int = 0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        named = [*self.layers.items(), ("embedding", self.embedding), ("head", self.head), ("mtp", self.mtp)]
        for name, time in named:
            if not (time.forward >= 0 and time.backward >= 0):
                raise ConfigError(f"the times of {name!r} are {[time.forward, time.backward]}, and must not be below 0")

    @property
    def ends(self) -> Time:
        """What the last stage does after its layers: the head, and MTP."""
        return self.head + self.mtp * self.mtp_depth

    def of(self, segment: Segment, first: bool, last: bool) -> Time:
        """What a stage takes: its layers, the embedding on the first, head and MTP on the last."""
        layers = sum((self.layers[symbol] for symbol in segment.symbols), Time())
        return layers + (self.embedding if first else Time()) + (self.ends if last else Time())


def modelled(config: RunConfig, device: Device = DEVICES["H100"]) -> Costs:
    """The times of `config` on one of its ranks, by the roofline.

    Rows of a microbatch are `train.microbatch`, or 1 where it is empty. A pure function of configuration and device.
    """
    pattern = parse_pattern(config.model.pattern)
    roofline = Roofline.of(config, device)
    layers = {symbol: roofline.layer(symbol) for symbol in sorted(set(pattern.main + pattern.mtp))}
    return Costs(
        layers={symbol: layers[symbol] for symbol in sorted(set(pattern.main))},
        embedding=roofline.embedding(),
        head=roofline.head(again=pattern.mtp_depth > 0),
        mtp=roofline.mtp([layers[symbol] for symbol in pattern.mtp]) if pattern.mtp else Time(),
        mtp_depth=pattern.mtp_depth,
        transfer=roofline.transfer(),
    )


@dataclass(frozen=True)
class Roofline:
    """One rank's share of a microbatch of `tokens`, of which its stream has a part with sequence parallelism."""

    model: ModelConfig
    device: Device
    length: int
    tokens: int
    tensor: int
    experts: int  # ranks that share the weights of routed experts
    cut: bool  # tensor ranks share the stream
    recompute: bool

    @classmethod
    def of(cls, config: RunConfig, device: Device) -> "Roofline":
        """Of a configuration."""
        parallel, length = config.parallel, config.data.sequence_length
        return cls(
            model=config.model,
            device=device,
            length=length,
            tokens=(config.train.microbatch or 1) * length,
            tensor=parallel.tensor,
            experts=parallel.expert * expert_tensor(parallel),
            cut=parallel.sequence,
            recompute=config.train.recompute == "layer",
        )

    def layer(self, symbol: str) -> Time:
        """One layer."""
        m = self.model
        cost = layer_cost(symbol, m, self.length)
        if not cost.flops:
            symbol, cost = UNKNOWN, layer_cost(UNKNOWN, m, self.length)
        routed = m.num_experts * expert_weights(m) if symbol == "E" else 0
        weights = (cost.parameters - routed) / self.tensor + routed / self.experts
        core = cost.core * self.tokens / self.tensor / (self.device.flops * CORE.get(symbol, PRODUCTS))
        around = self.around(_activations(symbol, m) / self.tensor + 5 * self.stream)  # 5: norm and residual
        forward = self.products(cost, weights) + core + around
        backward = self.products_backward(cost, weights) + CORE_BACKWARD * core + 2 * around
        return Time(forward, backward + (forward if self.recompute else 0.0))

    def embedding(self) -> Time:
        """Rows in fp32 become the stream; their gradient is a whole matrix that is filled with zeros and added up."""
        weights = vocabulary_weights(self.model) / self.tensor
        return Time(self.around(3 * self.stream), self.around(2 * self.stream) + self.moving(3 * FP32 * weights))

    def head(self, again: bool) -> Time:
        """Final norm, output projection, loss. again: with recomputation and MTP it is computed again, too."""
        weights = vocabulary_weights(self.model)
        cost, own = Cost(flops=2 * weights), weights / self.tensor
        logits = 2 * (self.model.vocab_size or 0) / self.tensor  # read once for the loss, once for its gradient
        around = self.around(logits + 2 * self.stream)
        forward = self.products(cost, own) + around
        backward = self.products_backward(cost, own) + around
        return Time(forward, backward + (forward if self.recompute and again else 0.0))

    def mtp(self, layers: list[Time]) -> Time:
        """One depth: embeds the next tokens, combines them with hidden states, runs its layers and the head again."""
        h = self.model.hidden_size
        combine = Cost(flops=4 * h * h)
        around = self.around(8 * self.stream)  # two norms, what they make side by side, the final norm
        time = Time(self.products(combine, 2 * h * h) + around, self.products_backward(combine, 2 * h * h) + 2 * around)
        return sum(layers, time + self.embedding() + self.head(again=True))

    def transfer(self) -> float:
        """Seconds in which a rank sends its part of the stream over the network."""
        return self.tokens * self.stream * self.itemsize / self.device.network

    @property
    def stream(self) -> float:
        """Elements of the residual stream on this rank, for each token of the microbatch."""
        return self.model.hidden_size / (self.tensor if self.cut else 1)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZE[self.model.dtype]

    def products(self, cost: Cost, weights: float) -> float:
        """Seconds of the matrix products of a forward pass. weights: elements on this rank, all of which are read."""
        flops = (cost.flops - cost.core) * self.tokens / self.tensor
        return max(flops / (self.device.flops * PRODUCTS), self.moving(self.itemsize * weights))

    def products_backward(self, cost: Cost, weights: float) -> float:
        """Twice the products; weights are read, their gradient is written, and then added to a sum in fp32."""
        flops = 2 * (cost.flops - cost.core) * self.tokens / self.tensor
        reads = self.moving(2 * self.itemsize * weights)
        adds = self.moving((self.itemsize + 2 * FP32) * weights)
        return max(flops / (self.device.flops * PRODUCTS), reads) + adds

    def around(self, elements: float) -> float:
        """Seconds in which so many elements of activations a token are read or written."""
        return self.moving(self.tokens * elements * self.itemsize)

    def moving(self, size: float) -> float:
        """Seconds in which so many bytes are read or written."""
        return size / (self.device.memory * MEMORY)


def _activations(symbol: str, m: ModelConfig) -> float:
    """Elements a token that are read and written between the products of a layer's forward pass, on one tensor rank."""
    if symbol == "M":
        inner, shared = (m.mamba_num_heads or 0) * (m.mamba_head_dim or 0), m.mamba_num_groups * m.ssm_state_size
        states = inner * m.ssm_state_size / (m.chunk_size or 128)  # fp32, one a chunk: written, carried on, read
        return 2 * (inner + 2 * shared) + (2 * inner + 2 * shared) + 8 * states + 3 * inner  # convolution, scan, gate
    if symbol == "*":
        return 2 * ((m.num_attention_heads or 0) + (m.num_query_groups or 0)) * (m.head_dim or 0)
    gated = 3 if m.activation == "swiglu" else 2
    if symbol == "E":
        routed = m.moe_top_k * (4 * (m.moe_latent_size or m.hidden_size) + gated * (m.moe_ffn_hidden_size or 0))
        return routed + gated * (m.shared_expert_ffn_hidden_size or 0)  # 4: rows are sorted by expert, and brought back
    return gated * (m.ffn_hidden_size or 0)


# --- Measured costs ---------------------------------------------------------------------------------------------------


def to_json(costs: Costs) -> str:
    """What `from_json` reads: part -> [forward, backward] in seconds."""
    parts = {**costs.layers, "embedding": costs.embedding, "head": costs.head, "mtp": costs.mtp}
    return json.dumps({name: [time.forward, time.backward] for name, time in parts.items()}, indent=1) + "\n"


def from_json(file: Path, config: RunConfig) -> Costs:
    """Measured times of the pattern's symbols, of `embedding`, `head`, and with MTP `mtp` (a depth with its head).

    Raises ConfigError for what cannot be read, and for parts that are missing, of the wrong form, or unknown.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as measured costs: {error}") from None
    pattern = parse_pattern(config.model.pattern)
    wanted = [*sorted(set(pattern.main)), "embedding", "head", *(["mtp"] if pattern.mtp else [])]
    known = {*wanted, *pattern.mtp, "mtp"}
    if not isinstance(content, dict) or set(wanted) - content.keys() or content.keys() - known:
        raise ConfigError(f"{file}: measured costs must be a mapping of {', '.join(wanted)} to [forward, backward]")
    times = {name: _time(file, name, content[name]) for name in wanted}
    return Costs(
        layers={symbol: times[symbol] for symbol in sorted(set(pattern.main))},
        embedding=times["embedding"],
        head=times["head"],
        mtp=times.get("mtp", Time()),
        mtp_depth=pattern.mtp_depth,
    )


def _time(file: Path, name: str, value: object) -> Time:
    match value:
        case [int() | float() as forward, int() | float() as backward]:
            return Time(float(forward), float(backward))
    raise ConfigError(f"{file}: {name} must be [forward, backward] in seconds, not {value!r}")

"""The same few steps under a parallel layout and on one rank, on forked Gloo ranks."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from forked import run_world

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import AttentionConfig, ModelConfig, MTPConfig, RouterConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.context import ParallelContext, divide
from nemohybrid.train.parity import Difference, Observation, decoded, difference, encoded, joined, observe

SIZES = {
    "hidden_size": 24,
    "vocab_size": 61,  # which no number of ranks divides
    "init_std": 0.2,
    "dtype": "float32",
    "num_attention_heads": 8,
    "num_query_groups": 2,  # fewer than four ranks
    "head_dim": 10,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "mamba_num_groups": 4,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "ffn_hidden_size": 40,
    "num_experts": 6,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 12,
    "shared_expert_ffn_hidden_size": 16,
}


def every_option() -> ModelConfig:
    """Every symbol and a repeated MTP block, with all biases, all norms, and all losses of the router."""
    return ModelConfig(
        pattern="M*-E/*E/*E",
        linear_bias=True,
        mamba_bc_norm=True,
        mamba_x_norm=True,
        output_norm="*E",
        attention=AttentionConfig(qk_norm=True, v_norm=True, softcap=5.0),
        router=RouterConfig(aux_loss_weight=0.3, z_loss_weight=0.1, bias_update_rate=0.05),
        **SIZES,
    )


def latent() -> ModelConfig:
    """LatentMoE, gated activations, separate MTP blocks, rotary positions, a padded vocabulary."""
    return ModelConfig(
        pattern="ME*-/ME/ME",
        moe_latent_size=8,
        activation="swiglu",
        vocab_multiple=16,
        attention=AttentionConfig(position_embedding="rope"),
        router=RouterConfig(aux_loss="batch", aux_loss_weight=0.3, score="softmax"),
        mtp=MTPConfig(repeat_block=False),
        **SIZES,
    )


def tied() -> ModelConfig:
    """One vocabulary matrix for both ends; experts without a shared one, whose balance is that of the whole batch."""
    sizes = SIZES | {"shared_expert_ffn_hidden_size": 0}
    router = RouterConfig(aux_loss="global", aux_loss_weight=0.3)
    return ModelConfig(pattern="M-E*/*", tie_embeddings=True, router=router, **sizes)


MODELS = {"every_option": every_option, "latent": latent, "tied": tied}


def run_config(model: str = "every_option", rows: int = 4, **train: object) -> RunConfig:
    """A run of a tiny model: `rows` rows of 16 tokens a step, one row at a time.

    eps keeps Adam from dividing noise by noise: an element whose gradient is 1e-8 would else move by the whole rate in a
    direction that the order of a sum decides.
    """
    config = RunConfig()
    config.model = MODELS[model]()
    derive_sizes(config.model)
    config.run.seed, config.data.sequence_length = 3, 16
    config.train = replace(config.train, global_batch=rows, microbatch=1, **train)
    config.optim = replace(config.optim, lr=1e-2, eps=1e-3)
    return config


@dataclass(frozen=True)
class Layout:
    """How ranks share the work. `shard`: data ranks over which weights are cut."""

    tensor: int = 1
    data: int = 1
    shard: int = 1
    sequence: bool = False
    mode: str = "full_shard"
    every: bool = False  # gradients are summed after every microbatch

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    def of_this_rank(self) -> ParallelContext:
        """Collective."""
        return divide(torch.device("cpu"), self.tensor, self.shard, self.sequence)

    def configured(self, config: RunConfig) -> RunConfig:
        mode = self.mode if self.shard > 1 else "replicate"
        names = {"tensor": self.tensor, "sequence": self.sequence, "data_mode": mode}
        names["reduce_every_microbatch"] = self.every
        return replace(config, parallel=replace(config.parallel, **names))

    def __str__(self) -> str:
        tensor = f"TP{self.tensor}{'+SP' if self.sequence else ''}" if self.tensor > 1 else ""
        cut = f"{self.mode}{self.shard}{'-every' if self.every else ''}" if self.shard > 1 else ""
        copies = f"DP{self.data // self.shard}" if self.data > self.shard else ""
        return "-".join(filter(None, (tensor, cut, copies))) or "one"


@dataclass
class Comparison:
    """A layout against one rank: relative differences of losses and norms, and of every tensor; or why ranks failed."""

    losses: float = 0.0
    norms: float = 0.0
    tensors: dict[str, Difference] = field(default_factory=dict)
    failure: str = ""

    def faults(self, tolerance: float) -> list[str]:
        """Everything that is wrong, in plain words."""
        found = [self.failure] if self.failure else []
        for what, value in (("losses", self.losses), ("gradient norms", self.norms)):
            found += [] if value <= tolerance else [f"{what} off by {value:.1e}"]
        return found + [fault for one in self.tensors.values() if (fault := one.fault(tolerance))]


@cache
def one_rank(model: str, rows: int, steps: int, packed: bool = True) -> Observation:
    """What one rank leaves; computed once for all layouts."""
    return observe(run_config(model, rows), ParallelContext.single(), steps, packed)


def compare(
    layout: Layout,
    model: str = "every_option",
    steps: int = 3,
    recompute: str = "none",
    packed: bool = True,
    before: Callable[[], object] = lambda: None,
) -> Comparison:
    """Run both, with two or more microbatches on every data rank.

    `recompute` and `before` are of the layout alone: one can change nothing, the other can plant a fault.
    """
    rows = max(4, 2 * layout.data)
    reference = one_rank(model, rows, steps, packed)
    config = layout.configured(run_config(model, rows, recompute=recompute))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def member(rank: int) -> None:
            before()
            seen = observe(config, layout.of_this_rank(), steps, packed)
            found = {n: difference(n, seen.tensors.get(n), wanted) for n, wanted in reference.tensors.items()}
            report = {"off": against(seen, reference), "tensors": {n: encoded(d) for n, d in found.items()}}
            (folder / f"report{rank}").write_text(json.dumps(report))

        if failures := run_world(layout.ranks, member, folder):
            return Comparison(failure=f"{failures[0].name}: {failures[0].read_text()}")
        reports = [json.loads(file.read_text()) for file in sorted(folder.glob("report*"))]
    tensors = joined({n: decoded(d) for n, d in report["tensors"].items()} for report in reports)
    return Comparison(*(max(r["off"][i] for r in reports) for i in range(2)), tensors)


def against(seen: Observation, reference: Observation) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the norms."""
    losses, wanted = torch.tensor(seen.losses), torch.tensor(reference.losses)
    norms, wanted_norms = torch.tensor(seen.norms), torch.tensor(reference.norms)
    return ((losses / wanted - 1).abs().max().item(), (norms / wanted_norms - 1).abs().max().item())

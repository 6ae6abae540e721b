"""The same few steps under a parallel layout and on one rank, on forked Gloo ranks."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from forked import run_world

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import AttentionConfig, ModelConfig, MTPConfig, RouterConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.world import divide
from nemohybrid.plan.axes import axes
from nemohybrid.train.parity import Comparison, Observation, difference, encoded, observe, together

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
    "num_experts": 8,
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


def tied_by_sequence() -> ModelConfig:
    """The same with a balance that is that of each sequence, which data ranks do not change; keys have a bias."""
    return replace(tied(), router=RouterConfig(aux_loss_weight=0.3), linear_bias=True)


def forced() -> ModelConfig:
    """Experts that are visited in turns, whose number the tokens of a rank do not divide by; a vocabulary mostly of padding."""
    sizes = SIZES | {"num_experts": 5, "vocab_size": 33}
    return ModelConfig(pattern="ME", router=RouterConfig(force_balance=True), vocab_multiple=48, **sizes)


def with_empty_stages() -> ModelConfig:
    """A first stage that only embeds, a last one that only predicts and drafts, and one in between that does nothing."""
    return replace(every_option(), pattern="|M*-E||/*E")


def blocks() -> ModelConfig:
    """Widths that blocks divide on one and on two tensor ranks, also those of the parts of in_proj."""
    sizes = SIZES | {"hidden_size": 64, "mamba_num_heads": 32, "mamba_head_dim": 4, "ssm_state_size": 16}
    sizes |= {"num_query_groups": 4, "head_dim": 16, "ffn_hidden_size": 128, "num_experts": 4}
    sizes |= {"moe_ffn_hidden_size": 64, "shared_expert_ffn_hidden_size": 64, "init_std": 0.1}
    return ModelConfig(pattern="M*-E", router=RouterConfig(aux_loss_weight=0.01), **sizes)


MODELS = {
    "blocks": blocks,
    "with_empty_stages": with_empty_stages,
    "every_option": every_option,
    "latent": latent,
    "tied": tied,
    "tied_by_sequence": tied_by_sequence,
    "forced": forced,
}


def run_config(model: str = "every_option", rows: int = 4, recipe: str = "bf16", **train: object) -> RunConfig:
    """A run of a tiny model: `rows` rows of 16 tokens a step, one row at a time, its products by a `recipe`.

    eps keeps Adam from dividing noise by noise: an element whose gradient is 1e-8 would else move by the whole rate in a
    direction that the order of a sum decides.
    """
    config = RunConfig()
    config.model = MODELS[model]()
    derive_sizes(config.model)
    config.run.seed, config.data.sequence_length = 3, 16
    config.precision = replace(config.precision, recipe=recipe, backend="emulated" if recipe != "bf16" else "auto")
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
    pipeline: int = 1
    virtual: int | None = None
    schedule: str = "auto"
    expert: int = 1
    expert_tensor: int | None = None
    room: float | None = None  # of the exchange between experts
    context: int = 1
    method: str = "auto"  # of context ranks

    @property
    def folds(self) -> bool:
        return self.expert > 1 or self.expert_tensor is not None

    @property
    def ranks(self) -> int:
        return self.tensor * self.data * self.pipeline * self.context

    def of_this_rank(self, config: RunConfig | None = None) -> ParallelContext:
        """Collective."""
        return divide(torch.device("cpu"), axes(self.configured(config or RunConfig()), self.ranks))

    def configured(self, config: RunConfig) -> RunConfig:
        mode = self.mode if self.shard > 1 else "replicate"
        names = {"tensor": self.tensor, "sequence": self.sequence, "data_mode": mode, "pipeline": self.pipeline}
        names |= {"reduce_every_microbatch": self.every, "virtual_pipeline": self.virtual, "schedule": self.schedule}
        names |= {"expert": self.expert, "expert_tensor": self.expert_tensor, "expert_room": self.room}
        names |= {"context": self.context, "context_method": self.method}
        names["data_shard"] = self.shard if mode == "hybrid" else None
        return replace(config, parallel=replace(config.parallel, **names))

    def __str__(self) -> str:
        stages = f"VPP{self.virtual}x" if self.virtual else ""
        order = f"-{self.schedule}" if self.schedule != "auto" else ""
        pipeline = f"{stages}PP{self.pipeline}{order}" if self.pipeline > 1 else ""
        width = f"xETP{self.expert_tensor}" if self.expert_tensor else ""
        experts = f"EP{self.expert}{width}{f'-room{self.room:g}' if self.room else ''}" if self.folds else ""
        tensor = f"TP{self.tensor}{'+SP' if self.sequence else ''}" if self.tensor > 1 else ""
        context = f"CP{self.context}{'' if self.method == 'auto' else '-' + self.method}" if self.context > 1 else ""
        cut = f"{self.mode}{self.shard}{'-every' if self.every else ''}" if self.shard > 1 else ""
        copies = f"DP{self.data // self.shard}" if self.data > self.shard else ""
        return "-".join(filter(None, (pipeline, tensor, experts, context, cut, copies))) or "one"


@dataclass(frozen=True)
class Trial(Comparison):
    """A layout against one rank, or why ranks failed."""

    failure: str = ""

    def faults(self, tolerance: float) -> list[str]:
        """Everything that is wrong, in plain words."""
        return [self.failure] if self.failure else super().faults(tolerance)


@cache
def one_rank(model: str, rows: int, steps: int, packed: bool = True, recipe: str = "bf16") -> Observation:
    """What one rank leaves; computed once for all layouts."""
    return observe(run_config(model, rows, recipe), ParallelContext.single(), steps, packed)


def compare(
    layout: Layout,
    model: str = "every_option",
    steps: int = 3,
    recompute: str = "none",
    packed: bool = True,
    before: Callable[[], object] = lambda: None,
    recipe: str = "bf16",
) -> Trial:
    """Run both, with two or more microbatches on every data rank.

    `recompute` and `before` are of the layout alone: one can change nothing, the other can plant a fault.
    """
    rows = max(4, 2 * layout.data)
    reference = one_rank(model, rows, steps, packed, recipe)
    config = layout.configured(run_config(model, rows, recipe, recompute=recompute))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def member(rank: int) -> None:
            before()
            seen = observe(config, layout.of_this_rank(config), steps, packed)
            found = [encoded(difference(n, seen.tensors.get(n), wanted)) for n, wanted in reference.tensors.items()]
            strangers = sorted(seen.tensors.keys() - reference.tensors.keys())
            report = {"numbers": seen.numbers, "tensors": found, "strangers": strangers}
            (folder / f"report{rank}").write_text(json.dumps(report))

        if failures := run_world(layout.ranks, member, folder):
            return Trial({}, {}, [], f"{failures[0].name}: {failures[0].read_text()}")
        reports = [json.loads(file.read_text()) for file in sorted(folder.glob("report*"))]
    return Trial(**vars(together(reports, reference.numbers)))

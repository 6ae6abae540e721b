"""How much memory a rank will take, before it takes any.

Weights, gradients and optimizer state are exact. Activations are counted, not modelled: one layer of each kind and the
output run on the meta device, and what autograd keeps is added up. What a layer needs while its gradients are computed is
taken to be twice what it keeps: so measured on the CPU, where the sum then was 80 to 94 % of the real growth of three
small models. Left out: the allocator's fragments, and on a GPU the context of CUDA and its libraries (about a GiB).
"""

# B rows of a microbatch, L length, T tokens = B*L, D hidden
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from nemohybrid.config.context import attention_way, own_length
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.ranks import data_mode, microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.mlp import fc1_outputs
from nemohybrid.model.stage import of_rank
from nemohybrid.parallel.context import Axes, ParallelContext
from nemohybrid.parallel.data import Unit
from nemohybrid.parallel.layout import layout_of
from nemohybrid.parallel.schedule import in_flight
from nemohybrid.parallel.world import room_on
from nemohybrid.plan.axes import axes
from nemohybrid.plan.cut import staged
from nemohybrid.plan.kept import kept_by, kept_by_microbatch
from nemohybrid.plan.kernels import masks_documents
from nemohybrid.plan.pipeline import peak_activations, plan_pipeline
from nemohybrid.symbols import parse_pattern

GIB = 2**30
SMALLER = (
    "Take a smaller model, a device with more memory, or more ranks that share it (parallel.tensor, "
    "parallel.pipeline, or parallel.data_mode=full_shard)."
)
FP32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank by component; `fixed` ones do not depend on the microbatch."""

    fixed: dict[str, int]
    activations: dict[str, int]
    left_out: str = ""  # why there are no activations, where they could not be counted

    @property
    def total(self) -> int:
        """Everything that is counted, in bytes."""
        return sum(self.fixed.values()) + sum(self.activations.values())

    def table(self) -> str:
        """A line a component, in GiB."""
        rows = [*self.fixed.items(), *self.activations.items(), ("total", self.total)]
        width = max(34, *(len(name) for name, _ in rows))
        lines = [f"  {name:{width}}{size / GIB:>10.2f} GiB" for name, size in rows]
        return "\n".join(lines + ([f"  activations not counted: {self.left_out}"] if self.left_out else []))


def estimate(
    config: RunConfig, data_ranks: int, shard_ranks: int = 1, stage: int = 0, device: str = "cpu"
) -> MemoryEstimate:
    """What a rank of `config` keeps at the height of a step.

    data_ranks share the global batch; shard_ranks of them, and of the context ranks, cut weights, gradients and optimizer
    state among themselves; stage: which pipeline rank it is; device: its type, which decides about kernels and the room of
    exchanges between experts.
    """
    divided = replace(axes(config, data_ranks), shard=shard_ranks)
    divided = replace(divided, room=room_on(torch.device(device), divided))
    with torch.device("meta"):
        context = ParallelContext.imaginary(divided, stage)
        model = HybridModel(config.model, context, of_rank(staged(config), stage))
    rows = microbatch(config, data_ranks)
    microbatches = max(1, config.train.global_batch // data_ranks // rows)
    fixed = _whole(model) if shard_ranks == 1 else _cut(model, config, Cuts.of(divided), several=microbatches > 1)
    try:
        if config.parallel.pipeline > 1:
            return MemoryEstimate(fixed, _in_flight(model, config, microbatches, stage, device))
        return MemoryEstimate(fixed, _activations(model, config, rows, device))
    except Exception as error:  # a mixer of the user's own may do what has no meta form; that must not stop a run
        return MemoryEstimate(fixed, {}, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def estimate_of(config: RunConfig, context: ParallelContext) -> MemoryEstimate:
    """For this rank."""
    return estimate(config, context.rows.size, context.shard.size, context.pipeline.rank, context.device.type)


def _whole(model: HybridModel) -> dict[str, int]:
    weights = _weights(model)
    return {"weights, fp32": weights, "gradients, fp32": weights, "optimizer, two fp32 moments": 2 * weights}


@dataclass(frozen=True)
class Cuts:
    """Over how many ranks rows are cut: those of folded experts, and all others."""

    dense: int = 1
    experts: int = 1

    @classmethod
    def of(cls, divided: Axes) -> "Cuts":
        """Of a world that cuts weights."""
        return cls(divided.shard, max(1, divided.shard * divided.tensor // divided.block))

    def ranks(self, parameter: nn.Parameter) -> int:
        """That cut this one."""
        return self.experts if layout_of(parameter).of_experts else self.dense


def _cut(model: HybridModel, config: RunConfig, cuts: Cuts, several: bool) -> dict[str, int]:
    """With FSDP: a share of everything, what is gathered at a time, and gradients before they are summed over ranks.

    several: microbatches a step. Their gradients add up whole on every rank, unless they are summed after each.
    """
    weights, own = _weights(model), _own_weights(model, cuts)
    padded = [(_weights(unit.module, cuts), _sent(unit, model, cuts)) for unit in model.sharding_units()]
    units = [sent for _, sent in padded]
    others = _weights(model, cuts) - sum(whole for whole, _ in padded)  # gathered from first to last
    at_a_time = (
        sum(units) if data_mode(config.parallel) == "shard_grad" else sum(sorted(units)[-2:])
    )  # one is prefetched
    keeps_whole = several and not config.parallel.reduce_every_microbatch
    largest = max((whole for whole, _ in padded), default=0)
    part = f"1/{cuts.dense}" + (f", of experts 1/{cuts.experts}" if cuts.experts != cuts.dense else "")
    return {
        f"weights, fp32, {part}": own,
        f"optimizer, two fp32 moments, {part}": 2 * own,
        f"gradients, fp32, {part}": own,
        "weights gathered at a time": others + at_a_time,
        "gradients before they are summed": weights if keeps_whole else others + 2 * largest,
    }


def _own_weights(module: nn.Module, cuts: Cuts) -> int:
    """Bytes in fp32 of the largest part of a rank: 8 experts on 64 ranks are one each."""
    return FP32 * sum(-(-len(p) // cuts.ranks(p)) * p[:1].numel() for p in module.parameters())


def _weights(module: nn.Module, cuts: Cuts = Cuts()) -> int:
    """Bytes in fp32, with the padding by which rows become equal parts: 8 experts on 64 ranks are 64."""
    return FP32 * sum(-(-len(p) // cuts.ranks(p)) * cuts.ranks(p) * p[:1].numel() for p in module.parameters())


def _sent(unit: Unit, model: HybridModel, cuts: Cuts) -> int:
    """Bytes of a unit's weights when they are gathered: some as a cast."""
    experts = unit.experts if unit.experts_cast else ()
    cast = sum(_weights(part, cuts) for part in (*unit.casting, *experts))
    return _weights(unit.module, cuts) - (FP32 - model.dtype.itemsize) * cast // FP32


def _in_flight(model: HybridModel, config: RunConfig, microbatches: int, stage: int, device: str) -> dict[str, int]:
    """Activations of a pipeline rank, whose microbatches wait for their way back."""
    plan = plan_pipeline(config, microbatches)
    rows, length, own = microbatch(config, 1), own_length(config), plan.segments[stage]
    symbols = {symbol for segment in own for symbol in segment.symbols}
    symbols |= set(plan.pattern.mtp if stage == plan.ranks - 1 else "")
    room = model.context.experts.room if model.context.experts else None
    kept = kept_by_microbatch(config, rows, room, device)
    most = in_flight(plan.schedule, stage, plan.ranks, len(plan.pattern.segments), plan.microbatches)
    largest = max((kept.layers[symbol] for symbol in symbols), default=0)
    experts = _passing_experts(model, config.model, rows * length) if "E" in symbols else 0
    masked = most if "*" in symbols else 0
    found = {
        f"{most} passes in flight, {rows} x {length} tokens": peak_activations(config, plan, device)[stage],
        "backward of the largest layer": 2 * largest + experts,
        "logits, their gradient": 2 * kept.logits if stage == plan.ranks - 1 else 0,
        "document masks": masked * _mask(config, rows, device),
    }
    return {name: size for name, size in found.items() if size}


def _mask(config: RunConfig, rows: int, device: str) -> int:
    """Of one microbatch: bool, and bf16 for the kernel."""
    masked = config.data.reset_documents and masks_documents(config.kernels, device)
    by_ring = config.parallel.context > 1 and attention_way(config) == "ring"
    return 3 * rows * config.data.sequence_length**2 if masked and not by_ring else 0


def _activations(model: HybridModel, config: RunConfig, rows: int, device: str) -> dict[str, int]:
    length, parsed = own_length(config), parse_pattern(config.model.pattern)
    pattern, depths, kept = parsed.main, parsed.mtp_depth, kept_by(model, config, rows, device)
    mask = _mask(config, rows, device) if "*" in pattern + parsed.mtp else 0
    where = f"{rows} x {length} tokens"
    largest = max(kept.layers.values())
    if config.train.recompute == "layer":
        layers = {f"layer inputs, {where}": len(pattern) * kept.stream, "one layer, computed again": largest}
        block, heads = len(parsed.mtp) * kept.stream, 1  # the logits of one head at a time
    else:
        layers = {
            f"{count} {symbol} layers, {where}": count * kept.layers[symbol]
            for symbol, count in sorted(Counter(pattern).items())
        }
        block, heads = sum(kept.layers[symbol] for symbol in parsed.mtp), 1 + depths
    if depths:
        layers[f"{depths} MTP depths, {where}"] = depths * (kept.combine + block)
    experts = _passing_experts(model, config.model, rows * length) if "E" in kept.layers else 0
    others = {
        "backward of the largest layer": 2 * largest + experts,
        "logits, their gradient, the loss": heads * kept.head + kept.logits,
    }
    return layers | others | ({"document mask": mask} if mask else {})


def _passing_experts(model: HybridModel, m: ModelConfig, tokens: int) -> int:
    """What the backward pass of experts makes, who keep little (nemohybrid_kernels/moe/grouped.py): the rows of all visits
    twice at the width of the input and once within the experts; one of the stacked matrices cast, its gradient, and that
    gradient in fp32. Folded experts are taken to get the mean load, and as many empty rows as there is room for."""
    context, itemsize = model.context, model.dtype.itemsize
    ranks, share = context.tensor.size, 1
    if context.experts is not None:
        ranks, share = context.experts.tensor.size, context.experts.expert.size
        tokens = math.ceil(
            tokens * ranks * max(1.0, context.experts.room) / (context.tensor.size if context.sequence else 1)
        )
    width = m.moe_latent_size or m.hidden_size
    inner = sum(fc1_outputs(m.activation, m.moe_ffn_hidden_size or 0).values()) // ranks
    rows = tokens * m.moe_top_k * (2 * width + inner) * itemsize
    return rows + m.num_experts // share * width * inner * (2 * itemsize + FP32)


def _may_recompute(config: RunConfig) -> bool:
    kernels = config.kernels
    return "M" in config.model.pattern and kernels.mixer_backend in ("auto", "triton") and not kernels.mixer_recompute


def available_memory(device: torch.device) -> int:
    """Bytes this rank may still take: what its GPU has free, or its share of the host's, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, limit = psutil.virtual_memory().available, _container_limit()
    if limit is not None:
        free = min(free, max(0, limit - psutil.Process().memory_info().rss))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _container_limit() -> int | None:
    """The smallest memory limit of the control groups this process is in (a container's, a SLURM job's), if any."""
    files = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]  # version 1
    own = Path("/proc/self/cgroup").read_text() if Path("/proc/self/cgroup").is_file() else ""
    for line in own.splitlines():
        if line.startswith("0::"):  # version 2: each group up to the root may have a limit
            group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
            files += [folder / "memory.max" for folder in (group, *group.parents)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def check_fits(config: RunConfig, context: ParallelContext) -> list[str]:
    """Refuse what cannot fit, before anything is allocated; what might not fit is said in the notes returned.

    Raises TrainingError when weights, gradients and optimizer alone are more than the device has left.
    """
    room = available_memory(context.device)
    expected = estimate_of(config, context)
    if expected.total <= room:
        return []
    found = (
        f"{context.device} has {room / GIB:.2f} GiB left for this rank, which is expected to take\n{expected.table()}"
    )
    if sum(expected.fixed.values()) > room:
        raise TrainingError(f"the model does not fit: {found}\n{SMALLER}")
    return [f"this may run out of memory: {found}\n{advice(config, context.device.type)}"]


def advice(config: RunConfig, device: str = "cpu") -> str:
    """What to change when activations do not fit on a `device` of this type, most harmless first."""
    steps = ["kernels.mixer_recompute=true"] if device == "cuda" and _may_recompute(config) else []
    steps += [] if config.train.microbatch == 1 else ["train.microbatch=1"]
    steps += [] if config.train.recompute == "layer" else ["train.recompute=layer"]
    steps += [f"data.sequence_length={config.data.sequence_length // 2}", "a smaller model"]
    balanced_by = config.model.router.aux_loss if "E" in config.model.pattern else ""
    but = f", but for model.router.aux_loss={balanced_by}" if balanced_by in ("batch", "global") else ""
    return f"Try, in this order: {', '.join(steps)}. Microbatches and recomputation change no result{but}."

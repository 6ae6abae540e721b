"""How much memory a rank will take, before it takes any.

Weights, gradients and optimizer state are exact. Activations are counted, not modelled: one layer of each kind and the
output run on the meta device, and what autograd keeps is added up. What a layer needs while its gradients are computed is
taken to be twice what it keeps: so measured on the CPU, where the sum then was 80 to 94 % of the real growth of three
small models. Left out: the allocator's fragments, and on a GPU the context of CUDA and its libraries (about a GiB).
"""

# B rows of a microbatch, L length, T tokens = B*L, D hidden
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.mlp import fc1_outputs
from nemohybrid.model.mtp import MTPBlock
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.symbols import parse_pattern

GIB = 2**30
SMALLER = (
    "Take a smaller model, a device with more memory, or more ranks that share it (parallel.tensor, or "
    "parallel.data_mode=full_shard)."
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
        lines = [f"  {name:34}{size / GIB:>10.2f} GiB" for name, size in rows]
        return "\n".join(lines + ([f"  activations not counted: {self.left_out}"] if self.left_out else []))


def estimate(config: RunConfig, data_ranks: int, shard_ranks: int = 1) -> MemoryEstimate:
    """What a rank of `config` keeps at the height of a step.

    data_ranks share the global batch; shard_ranks of them cut weights, gradients and optimizer state among themselves.
    """
    with torch.device("meta"):
        model = HybridModel(config.model, ParallelContext.imaginary(config.parallel.tensor, config.parallel.sequence))
    share = max(1, config.train.global_batch // data_ranks)
    rows = config.train.microbatch or share
    fixed = _whole(model) if shard_ranks == 1 else _cut(model, config, shard_ranks, several=share > rows)
    try:
        return MemoryEstimate(fixed, _activations(model, config, rows))
    except Exception as error:  # a mixer of the user's own may do what has no meta form; that must not stop a run
        return MemoryEstimate(fixed, {}, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _whole(model: HybridModel) -> dict[str, int]:
    weights = _weights(model)
    return {"weights, fp32": weights, "gradients, fp32": weights, "optimizer, two fp32 moments": 2 * weights}


def _cut(model: HybridModel, config: RunConfig, ranks: int, several: bool) -> dict[str, int]:
    """With FSDP: a share of everything, what is gathered at a time, and gradients before they are summed over ranks.

    several: microbatches a step. Their gradients add up whole on every rank, unless they are summed after each.
    """
    weights, own = _weights(model), _weights(model, ranks) // ranks
    padded = [
        (_weights(module, ranks), _sent(module, casting, model, ranks)) for module, casting in model.sharding_units()
    ]
    units = [sent for _, sent in padded]
    others = _weights(model, ranks) - sum(whole for whole, _ in padded)  # gathered from first to last
    at_a_time = (
        sum(units) if config.parallel.data_mode == "shard_grad" else sum(sorted(units)[-2:])
    )  # one is prefetched
    keeps_whole = several and not config.parallel.reduce_every_microbatch
    largest = max((whole for whole, _ in padded), default=0)
    return {
        f"weights, fp32, 1/{ranks}": own,
        f"optimizer, two fp32 moments, 1/{ranks}": 2 * own,
        f"gradients, fp32, 1/{ranks}": own,
        "weights gathered at a time": others + at_a_time,
        "gradients before they are summed": weights if keeps_whole else others + 2 * largest,
    }


def _weights(module: nn.Module, ranks: int = 1) -> int:
    """Bytes in fp32, with the padding by which rows become equal parts: 8 experts on 64 ranks are 64."""
    return FP32 * sum(-(-len(p) // ranks) * ranks * p[0].numel() for p in module.parameters())


def _sent(module: nn.Module, casting: list[nn.Module], model: HybridModel, ranks: int) -> int:
    """Bytes of a unit's weights when they are gathered: some as a cast."""
    return _weights(module, ranks) - (FP32 - model.dtype.itemsize) * sum(_weights(c, ranks) for c in casting) // FP32


def _activations(model: HybridModel, config: RunConfig, rows: int) -> dict[str, int]:
    length, parsed = config.data.sequence_length, parse_pattern(config.model.pattern)
    pattern, depths, seq = parsed.main, parsed.mtp_depth, SequenceContext(rows, length)
    seq.ranks = model.tensor_ranks(seq)
    own_tokens = seq.tokens // seq.ranks.group.size if seq.ranks.cut else seq.tokens
    x = torch.empty(own_tokens, config.model.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
    stream = x.nbytes
    kinds = _one_of_each(model, pattern, parsed.mtp)
    kept = {symbol: _kept_for_backward(lambda layer=layer: layer(x, seq), model) for symbol, layer in kinds.items()}
    logits = seq.tokens * model.output.weight.shape[0] * x.element_size()
    head = _kept_for_backward(lambda: model.output.own_logits(seq.enter(model.final_norm(x))), model) + logits
    mask = (
        3 * rows * length**2 if "*" in pattern + parsed.mtp and config.data.reset_documents else 0
    )  # bool, and bf16 for the kernel
    where = f"{rows} x {length} tokens"
    largest = max(kept.values())
    if config.train.recompute == "layer":
        layers = {f"layer inputs, {where}": len(pattern) * stream, "one layer, computed again": largest}
        block, heads = len(parsed.mtp) * stream, 1  # the logits of one head at a time
    else:
        layers = {
            f"{count} {symbol} layers, {where}": count * kept[symbol]
            for symbol, count in sorted(Counter(pattern).items())
        }
        block, heads = sum(kept[symbol] for symbol in parsed.mtp), 1 + depths
    if depths:
        layers[f"{depths} MTP depths, {where}"] = depths * (_kept_by_combining(model, x) + block)
    ranks = seq.ranks.group.size
    passing = 2 * largest + (_passing_experts(config.model, seq.tokens, x.element_size(), ranks) if "E" in kinds else 0)
    others = {"backward of the largest layer": passing, "logits, their gradient, the loss": heads * head + logits}
    return layers | others | ({"document mask": mask} if mask else {})


def _one_of_each(model: HybridModel, main: str, mtp: str) -> dict[str, nn.Module]:
    """Symbol -> a layer of it, of the model or else of its MTP part."""
    layers = [*zip(main, model.layers, strict=True)]
    for block in model.mtp[:1]:
        assert isinstance(block, MTPBlock)
        layers += zip(mtp, block.layers, strict=True)
    return dict(reversed(layers))


def _kept_by_combining(model: HybridModel, x: Tensor) -> int:
    """What the entry of one MTP depth keeps: the next tokens' embeddings, and both halves of what `eh_proj` reads."""
    block = model.mtp[0]
    assert isinstance(block, MTPBlock)
    return _kept_for_backward(lambda: block.combine(torch.empty_like(x).requires_grad_(), x), model)


def _passing_experts(m: ModelConfig, tokens: int, itemsize: int, ranks: int) -> int:
    """What the backward pass of experts makes, who keep little (nemohybrid_kernels/moe/grouped.py): the rows of all visits
    twice at the width of the input and once within the experts; one of the stacked matrices cast, its gradient, and that
    gradient in fp32."""
    width, inner = (
        m.moe_latent_size or m.hidden_size,
        sum(fc1_outputs(m.activation, m.moe_ffn_hidden_size or 0).values()) // ranks,
    )
    rows = tokens * m.moe_top_k * (2 * width + inner) * itemsize
    return rows + m.num_experts * width * inner * (2 * itemsize + FP32)


def _kept_for_backward(compute: Callable[[], Tensor], model: HybridModel) -> int:
    """Bytes that autograd saves while `compute` runs, parameters left out, each storage once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too: a storage that is freed gives its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with _MetaStandIns(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(size for size, _ in kept.values())


class _MetaStandIns(TorchFunctionMode):
    """What has no meta form for every type, or one that keeps more than the real kernel: grouped products, attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        if func is F.grouped_mm:
            rows, matrices = args
            return rows.new_empty(len(rows), matrices.shape[2])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: inputs, output, and a log-sum-exp a row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


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
    expected = estimate(config, context.data.size, context.shard.size)
    if expected.total <= room:
        return []
    found = (
        f"{context.device} has {room / GIB:.2f} GiB left for this rank, which is expected to take\n{expected.table()}"
    )
    if sum(expected.fixed.values()) > room:
        raise TrainingError(f"the model does not fit: {found}\n{SMALLER}")
    return [f"this may run out of memory: {found}\n{advice(config)}"]


def advice(config: RunConfig) -> str:
    """What to change when activations do not fit, most harmless first."""
    steps = [] if config.train.microbatch == 1 else ["train.microbatch=1"]
    steps += [] if config.train.recompute == "layer" else ["train.recompute=layer"]
    steps += [f"data.sequence_length={config.data.sequence_length // 2}", "a smaller model"]
    balanced_by = config.model.router.aux_loss if "E" in config.model.pattern else ""
    but = f", but for model.router.aux_loss={balanced_by}" if balanced_by in ("batch", "global") else ""
    return f"Try, in this order: {', '.join(steps)}. Microbatches and recomputation change no result{but}."

"""What a microbatch leaves on a rank for its backward pass: counted on the meta device, not modelled."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nemohybrid.config.context import own_length
from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.mtp import MTPBlock
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.axes import axes
from nemohybrid.plan.kernels import bind_as_on
from nemohybrid.symbols import parse_pattern


@dataclass(frozen=True)
class Kept:
    """Bytes that one microbatch leaves on a rank for its backward pass, without recomputation, parameters left out.

    layers: of one layer of each symbol, of the model and of its MTP blocks; head: final norm, logits and loss; combine: the
    entry of an MTP depth; logits: those that there are at a time; stream: one tensor of it.
    """

    layers: dict[str, int]
    head: int
    combine: int
    logits: int
    stream: int


def kept_by_microbatch(config: RunConfig, rows: int, room: float | None = None, device: str = "cpu") -> Kept:
    """Counted on the meta device, for `rows` sequences. May raise whatever a mixer of the user's own does there.

    room: of exchanges between experts; None: as the configuration says, where it says something. device: the type of that
    whose kernels run.
    """
    divided = axes(config, 1)
    with torch.device("meta"):
        divided = divided if room is None else replace(divided, room=room)
        model = HybridModel(config.model, ParallelContext.imaginary(divided))
    return kept_by(model, config, rows, device)


def kept_by(model: HybridModel, config: RunConfig, rows: int, device: str = "cpu") -> Kept:
    """The same of a whole model on the meta device, whose kernels are chosen here."""
    bind_as_on(model, config.kernels, device)
    limited = model.context.experts is not None and model.context.experts.room > 0
    seq = SequenceContext(
        rows, own_length(config), share=1.0 if limited else None, context=model.context.context
    )  # rooms are of training steps
    parsed = parse_pattern(config.model.pattern)
    seq.ranks = model.tensor_ranks(seq)
    own_tokens = seq.tokens // seq.ranks.group.size if seq.ranks.cut else seq.tokens
    x = torch.empty(own_tokens, config.model.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
    kinds = _one_of_each(model, parsed.main, parsed.mtp)
    labels = torch.empty(seq.tokens, dtype=torch.int64, device="meta")
    return Kept(
        layers={s: _kept_for_backward(lambda layer=layer: layer(x, seq), model) for s, layer in kinds.items()},
        head=_kept_for_backward(lambda: model.output.cross_entropy(model.final_norm(x), labels, seq), model),
        combine=_kept_by_combining(model, x) if parsed.mtp_depth else 0,
        logits=model.output.logits_at_once(seq.tokens, x.dtype),
        stream=x.nbytes,
    )


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
        if func in (F.grouped_mm, getattr(torch, "_grouped_mm", None)):  # torch 2.13 shows a mode only the second
            rows, matrices = args[:2]
            return rows.new_empty(len(rows), matrices.shape[2])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: inputs, output, and a log-sum-exp a row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

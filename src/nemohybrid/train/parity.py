"""Does a parallel layout compute what one rank computes? Every gradient and weight, box by box.

A wrong layout mostly has a right loss: an all-reduce that is missing behind a norm changes a gradient and nothing that a
curve would show for days. So a few training steps are run twice, by the ranks of a layout and by one rank, with the very code that
trains, and what they leave is compared parameter by parameter.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.parallel.layout import Parts, logical_parts
from nemohybrid.train.balance import LoadBalance
from nemohybrid.train.batch import Batch
from nemohybrid.train.build import build_model
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.state import model_tensors
from nemohybrid.train.step import compute_gradients, update

# B sequences of the global batch, L length

EOD = 0
"""The token that ends a document in synthetic rows."""


@dataclass(frozen=True)
class Observation:
    """What some steps left on one rank.

    losses [steps][1 + MTP depths], norms [steps]; tensors: `gradient.<logical name>` of the first step, before clipping, and
    `weight.<logical name>` (buffers too) after the last.
    """

    losses: list[list[float]]
    norms: list[float]
    tensors: dict[str, Tensor | Parts]


def synthetic_batch(config: RunConfig, step: int, packed: bool = True) -> Batch:
    """Random tokens of a global batch [B, L], the same on every rank; some labels are masked.

    packed: rows hold documents of random lengths, which end in different places in every row.
    """
    rows, length, vocabulary = config.train.global_batch, config.data.sequence_length, config.model.vocab_size or 2
    generator = torch.Generator().manual_seed(config.run.seed + step)
    tokens = torch.randint(1, vocabulary, (rows, length + 1), generator=generator)
    if packed:
        tokens[torch.rand(tokens.shape, generator=generator) < 3 / length] = EOD
    mask = (torch.rand(rows, length, generator=generator) < 0.9).float()
    ends = (tokens[:, :-1] == EOD).long()
    ids = (ends.cumsum(1) - ends).int() if packed else None
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, ids, EOD if packed else None)


def share_of(batch: Batch, context: ParallelContext) -> Batch:
    """The rows of a global batch that this data rank trains on, on its device."""
    rows = batch.tokens.shape[0] // context.data.size
    return list(batch.split(rows))[context.data.rank].to(context.device)


def observe(config: RunConfig, context: ParallelContext, steps: int = 3, packed: bool = True) -> Observation:
    """Build the model, train `steps` steps on synthetic batches, and say what came out. Collective over the context."""
    model, shared = build_model(config, context)
    optimizer, balance = build_optimizer(shared.parameters.values(), config.optim), LoadBalance(model, context)
    microbatch = config.train.microbatch or config.train.global_batch // context.data.size
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batch = share_of(synthetic_batch(config, step, packed), context)
        losses.append(compute_gradients(model, batch, microbatch, context, shared).tolist())
        norm = gradient_norm(shared.parameters.values(), context)
        norms.append(norm.item())
        balance.collect()
        if step == 0:
            gradients = {
                f"gradient.{name}": _copy(part)
                for key, p in shared.parameters.items()
                if p.grad is not None
                for name, part in logical_parts(key, p, p.grad).items()
            }
        update(shared.parameters.values(), optimizer, config.optim.clip_grad_norm, norm)
        balance.update_bias()
    weights = model_tensors(model, shared.parameters)
    tensors = gradients | {f"weight.{name.removeprefix('model.')}": _copy(part) for name, part in weights.items()}
    return Observation(losses, norms, tensors)


def alone(config: RunConfig) -> RunConfig:
    """The same run on one rank."""
    parallel = replace(config.parallel, data="1", tensor=1, data_mode="replicate", data_shard=None)
    return replace(config, parallel=parallel)


def _copy(tensor: Tensor | Parts) -> Tensor | Parts:
    if isinstance(tensor, Parts):
        return Parts(tensor.shape, tuple((offsets, view.clone()) for offsets, view in tensor.boxes))
    return tensor.clone()


@dataclass(frozen=True)
class Difference:
    """How far one logical tensor is from the one-rank run: the largest error, and the largest entry of the wanted one.

    covered: the boxes (offsets, shape) that this rank compared.
    """

    name: str
    error: float
    scale: float
    shape: tuple[int, ...]
    covered: frozenset[tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def relative(self) -> float:
        """Error as a share of the largest entry; infinite where nothing should be, or a number is none."""
        if self.error == 0:
            return 0.0
        return self.error / self.scale if self.scale and math.isfinite(self.error) else math.inf

    def joined(self, other: "Difference") -> "Difference":
        """That of two ranks together."""
        return replace(self, error=max(self.error, other.error), covered=self.covered | other.covered)

    def fault(self, tolerance: float) -> str | None:
        """What is wrong with it, None where nothing is."""
        whole = math.prod(self.shape)
        elements = sum(math.prod(shape) for _, shape in self.covered)
        if elements != whole:
            return f"{self.name}: ranks hold {elements} of {whole} elements"
        if self.scale == 0 and self.name.startswith("gradient."):
            return f"{self.name}: no gradient on one rank"
        if not self.relative <= tolerance:
            return f"{self.name}: off by {self.relative:.1e} of its largest entry {self.scale:.1e}"
        return None


def difference(name: str, got: Tensor | Parts | None, wanted: Tensor) -> Difference:
    """This rank's boxes of a tensor against the whole one; None: it holds nothing of it."""
    boxes = got.boxes if isinstance(got, Parts) else () if got is None else (((0,) * wanted.ndim, got),)
    error, covered = 0.0, set()
    for offsets, view in boxes:
        place = tuple(slice(start, start + n) for start, n in zip(offsets, view.shape, strict=True))
        off = (view.double() - wanted[place].to(view.device).double()).abs().max().item()
        error = max(error, math.inf if math.isnan(off) else off)
        covered.add((tuple(offsets), tuple(view.shape)))
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    return Difference(name, error, scale, tuple(wanted.shape), frozenset(covered))


def joined(ranks: Iterable[Mapping[str, Difference]]) -> dict[str, Difference]:
    """The differences of all ranks together."""
    result: dict[str, Difference] = {}
    for found in ranks:
        for name, one in found.items():
            result[name] = result[name].joined(one) if name in result else one
    return result

"""Does a parallel layout compute what one rank computes? Every gradient and weight, box by box.

A wrong layout mostly has a right loss: an all-reduce that is missing behind a norm changes a gradient and nothing that a
curve would show for days. So a few training steps are run twice, by the ranks of a layout and by one rank, with the very
code that trains, and what they leave is compared parameter by parameter.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemohybrid.checkpoint.tiling import Ranges, uncovered, volume
from nemohybrid.config.environment import ParallelSection
from nemohybrid.config.ranks import microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.collectives import gather_json
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.parallel.layout import Parts, logical_parts
from nemohybrid.train.balance import LoadBalance
from nemohybrid.train.batch import Batch
from nemohybrid.train.build import build_model
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.state import model_tensors
from nemohybrid.train.step import compute_gradients, update, weights_changed

# B sequences of the global batch, L length

EOD = 0
"""The token that ends a document in synthetic rows."""
ZERO = 1e-7
"""Entries that are smaller than the largest of all by this factor are zero but for rounding."""


@dataclass(frozen=True)
class Observation:
    """What some steps left on one rank.

    losses [steps][1 + MTP depths], norms [steps]; tensors: `gradient.<logical name>` of the first step, before clipping, and
    `weight.<logical name>` (buffers too) after the last.
    """

    losses: list[list[float]]
    norms: list[float]
    tensors: dict[str, Tensor | Parts]

    @property
    def numbers(self) -> dict[str, float]:
        """The losses and norms of all steps, by what they are called."""
        result: dict[str, float] = {}
        for step, (losses, norm) in enumerate(zip(self.losses, self.norms, strict=True), 1):
            result |= {f"loss{_of_depth(depth)} of step {step}": loss for depth, loss in enumerate(losses)}
            result[f"gradient norm of step {step}"] = norm
        return result


def _of_depth(depth: int) -> str:
    return f" of MTP depth {depth}" if depth else ""


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
    """The rows of a global batch that this data rank trains on, or its tokens of them, on its device."""
    rows = batch.tokens.shape[0] // context.rows.size
    return list(batch.split(rows))[context.rows.rank].shared_by(context.context).to(context.device)


def observe(config: RunConfig, context: ParallelContext, steps: int = 3, packed: bool = True) -> Observation:
    """Build the model, train `steps` steps on synthetic batches, and say what came out. Collective over the context."""
    model, shared = build_model(config, context)
    optimizer, balance = build_optimizer(shared.parameters.values(), config.optim), LoadBalance(model, context)
    rows = microbatch(config, context.rows.size)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        model.clock.step = step
        batch = share_of(synthetic_batch(config, step, packed), context)
        losses.append(compute_gradients(model, batch, rows, context, shared).tolist())
        norm = gradient_norm(shared.parameters.values(), context)
        norms.append(norm.item())
        balance.collect()
        if step == 0:
            gradients = {
                f"gradient.{name}": _copy(part)
                for key, p in shared.parameters.items()
                for name, part in logical_parts(key, p, torch.zeros_like(p) if p.grad is None else p.grad).items()
            }
        update(shared.parameters.values(), optimizer, config.optim.clip_grad_norm, norm)
        weights_changed(model)
        balance.update_bias()
    weights = model_tensors(model, shared.parameters)
    tensors = gradients | {f"weight.{name.removeprefix('model.')}": _copy(part) for name, part in weights.items()}
    return Observation(losses, norms, tensors)


def alone(config: RunConfig) -> RunConfig:
    """The same run on one rank."""
    return replace(config, parallel=ParallelSection(data="1", data_mode="replicate"))


def _copy(tensor: Tensor | Parts) -> Tensor | Parts:
    """In the memory of the CPU, so that a GPU needs no more than for training."""
    if isinstance(tensor, Parts):
        return Parts(tensor.shape, tuple((offsets, view.to("cpu", copy=True)) for offsets, view in tensor.boxes))
    return tensor.to("cpu", copy=True)


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
    def kind(self) -> str:
        """`gradient` or `weight`."""
        return self.name.partition(".")[0]

    @property
    def relative(self) -> float:
        """Error as a share of the largest entry; infinite where nothing should be, or a number is none."""
        if self.error == 0:
            return 0.0
        return self.error / self.scale if self.scale and math.isfinite(self.error) else math.inf

    def joined(self, other: "Difference") -> "Difference":
        """That of two ranks together."""
        return replace(self, error=max(self.error, other.error), covered=self.covered | other.covered)

    def fault(self, tolerance: float, floor: float = 0.0) -> str | None:
        """What is wrong with it, None where nothing is. Entries below `floor` are what sums that cancel leave over."""
        boxes = {_ends(offsets, shape): 0 for offsets, shape in self.covered}
        whole, missing = math.prod(self.shape), sum(map(volume, uncovered(self.shape, boxes)))
        if missing:
            return f"{self.name}: ranks hold {whole - missing} of {whole} elements"
        if sum(map(volume, boxes)) > whole:
            return f"{self.name}: what ranks hold overlaps, and is not the same"
        if self.scale == 0 and self.name.startswith("gradient."):
            return f"{self.name}: no gradient on one rank. An expert without tokens? Take a larger data.sequence_length"
        if not self.error <= (tolerance * self.scale if self.scale >= floor else floor):
            return f"{self.name}: off by {self.relative:.1e} of its largest entry {self.scale:.1e}"
        return None


def _ends(offsets: tuple[int, ...], shape: tuple[int, ...]) -> Ranges:
    return tuple((start, start + n) for start, n in zip(offsets, shape, strict=True))


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


@dataclass(frozen=True)
class Comparison:
    """What a layout and one rank left.

    numbers: name -> (that of the rank that is farthest off, wanted), the losses and norms of all steps; strangers: tensors
    that one rank does not have.
    """

    numbers: dict[str, tuple[float, float]]
    tensors: dict[str, Difference]
    strangers: list[str]

    def faults(self, tolerance: float) -> list[str]:
        """Everything that is wrong, in plain words. Tolerance: a share of the wanted number, or of the largest entry."""
        found = [
            f"{name}: {got:.6g} and not {wanted:.6g}"
            for name, (got, wanted) in self.numbers.items()
            if not off_by(got, wanted) <= tolerance
        ]
        found += [f"{name}: one rank has no such tensor" for name in self.strangers]
        floors = self.floors()
        faults = (one.fault(tolerance, floors[one.kind]) for one in self.tensors.values())
        return found + [fault for fault in faults if fault]

    def worst(self) -> list[Difference]:
        """All tensors, the farthest off first; those that are zero but for rounding last."""
        floors = self.floors()
        return sorted(self.tensors.values(), key=lambda one: (one.scale < floors[one.kind], -one.relative))

    def floors(self) -> dict[str, float]:
        """Kind -> the largest entry of any tensor of that kind times what fp32 can tell apart.

        Some gradients are zero for a mathematician, as that of the bias of keys, which a softmax does not see. What stands
        there instead is the rounding of far larger numbers, another one in every layout.
        """
        scales: dict[str, float] = {}
        for one in self.tensors.values():
            scales[one.kind] = max(scales.get(one.kind, 0.0), one.scale)
        return {kind: ZERO * scale for kind, scale in scales.items()}


def off_by(got: float, wanted: float) -> float:
    """The difference as a share of the wanted number. Two NaN are equal: losses of which there is no target."""
    if got == wanted or (math.isnan(got) and math.isnan(wanted)):
        return 0.0
    share = abs(got - wanted) / abs(wanted) if wanted else math.inf
    return math.inf if math.isnan(share) else share


def compare(config: RunConfig, context: ParallelContext, steps: int = 3) -> Comparison:
    """Train on rank 0 alone, then under the layout; every rank gets the whole comparison. Collective over the world.

    Rank 0 must be able to train the whole model. Its tensors then reach the others one at a time.
    """
    config = _with_microbatch(config, context)
    reference = observe(alone(config), ParallelContext.single(context.device), steps) if context.is_main else None
    seen = observe(config, context, steps)
    wanted, shapes = _announce(reference, context)
    wholes = _from_first(reference.tensors if reference else {}, shapes, context)
    found = [encoded(difference(name, seen.tensors.get(name), whole)) for name, whole in wholes]
    strangers = sorted(seen.tensors.keys() - shapes.keys())
    report = {"numbers": seen.numbers, "tensors": found, "strangers": strangers}
    return together(gather_json(report, context.world, context.device), wanted)


def together(ranks: Sequence[Mapping[str, Any]], wanted: Mapping[str, float]) -> Comparison:
    """The reports of all ranks, as JSON has them, against the numbers of one rank."""
    numbers = {name: max((r["numbers"][name] for r in ranks), key=lambda n: off_by(n, wanted[name])) for name in wanted}
    return Comparison(
        {name: (got, wanted[name]) for name, got in numbers.items()},
        joined({one["name"]: decoded(one) for one in rank["tensors"]} for rank in ranks),
        sorted({name for rank in ranks for name in rank["strangers"]}),
    )


def _with_microbatch(config: RunConfig, context: ParallelContext) -> RunConfig:
    """Microbatches that are told, since one rank's share is another: what balances experts in each shall see the same."""
    return replace(config, train=replace(config.train, microbatch=microbatch(config, context.rows.size)))


def _announce(reference: Observation | None, context: ParallelContext) -> tuple[dict[str, float], dict[str, list[int]]]:
    """What rank 0 has: its losses and norms, and the shapes of its tensors, on every rank."""
    shapes = {name: list(tensor.shape) for name, tensor in reference.tensors.items()} if reference else None
    known = [reference.numbers, shapes] if reference else None
    return tuple(gather_json(known, context.world, context.device)[0])


def _from_first(
    tensors: Mapping[str, Tensor | Parts], shapes: Mapping[str, list[int]], context: ParallelContext
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of rank 0 on every rank, in fp32 and one after the other, so that only one is there at a time."""
    for name, shape in shapes.items():
        tensor = torch.empty(shape, device=context.device)
        if context.is_main:
            own = tensors[name]
            assert isinstance(own, Tensor), f"{name} is not whole on one rank"
            tensor.copy_(own)
        if context.world_size > 1:
            dist.broadcast(tensor, src=0)
        yield name, tensor.cpu()


def encoded(one: Difference) -> dict[str, Any]:
    """For JSON."""
    return asdict(one) | {"covered": sorted(one.covered)}


def decoded(values: Mapping[str, Any]) -> Difference:
    """What `encoded` made, and JSON has seen."""
    boxes = frozenset((tuple(offsets), tuple(shape)) for offsets, shape in values["covered"])
    return Difference(**{**values, "covered": boxes, "shape": tuple(values["shape"])})

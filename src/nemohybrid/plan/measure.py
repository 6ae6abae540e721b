"""Times of each part of a model as this machine takes them, to cut a pipeline by: `plan.cost.Costs`, measured."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.mtp import MTPBlock
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.cost import Costs, Time
from nemohybrid.symbols import parse_pattern

Pass = Callable[[], tuple[Tensor, Tensor | None]]
"""A forward pass: what it computes, and the gradient that comes back to it (None for a scalar)."""

# B rows of a microbatch, L length, T tokens = B*L, D hidden


def measure(config: RunConfig, device: torch.device, repeats: int = 5) -> Costs:
    """Run one layer of each kind, the ends and MTP at the widths of `config`, one after the other on `device`.

    Each time is the median of `repeats`, after one that warms up. Needs memory for these parts alone. Raises
    ConfigError with tensor or expert ranks, as one process has no others to measure with.
    """
    parallel, pattern = config.parallel, parse_pattern(config.model.pattern)
    if parallel.tensor > 1 or parallel.expert > 1:
        raise ConfigError("one process measures what one rank computes alone: parallel.tensor=1 parallel.expert=1")
    kinds = "".join(sorted(set(pattern.main)))
    small = kinds + (f"/{pattern.mtp}" if pattern.mtp else "")
    context = replace(ParallelContext.single(), device=device)
    bench = Bench(HybridModel.create(replace(config.model, pattern=small), context=context), config, device, repeats)
    recompute = config.train.recompute == "layer"
    layers = {symbol: bench.time(bench.layer(layer)) for symbol, layer in zip(kinds, bench.layers, strict=True)}
    head, mtp = bench.time(bench.head), bench.time(bench.draft) if pattern.mtp else Time()
    return Costs(
        layers={symbol: _again(t) if recompute else t for symbol, t in layers.items()},
        embedding=bench.time(bench.embedding),
        head=_again(head) if recompute and pattern.mtp else head,
        mtp=_again(mtp) if recompute else mtp,
        mtp_depth=pattern.mtp_depth,
    )


def _again(time: Time) -> Time:
    """With the forward pass repeated before the backward pass."""
    return Time(time.forward, time.backward + time.forward)


class Bench:
    """A model with one layer of each kind, and random inputs for its parts."""

    def __init__(self, model: HybridModel, config: RunConfig, device: torch.device, repeats: int) -> None:
        self.model, self.device, self.repeats = model, device, repeats
        rows, length = config.train.microbatch or 1, config.data.sequence_length
        self.seq = SequenceContext(rows, length)
        self.seq.ranks = model.tensor_ranks(self.seq)
        generator = torch.Generator().manual_seed(0)
        vocabulary = config.model.vocab_size or 1
        self.ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
        size = (self.seq.tokens, config.model.hidden_size)
        self.x = torch.randn(size, generator=generator).to(device, model.dtype).requires_grad_()

    @property
    def layers(self) -> list[nn.Module]:
        """One of each kind."""
        return list(self.model.layers.children())

    def layer(self, layer: nn.Module) -> Pass:
        """Through one layer."""
        return partial(self._through, layer)

    def _through(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        return layer(self.x, self.seq), self.x.detach()

    def embedding(self) -> tuple[Tensor, Tensor | None]:
        """Token ids to the stream."""
        assert self.model.embedding is not None
        return self.model.embedding.embed(self.ids, self.model.dtype, self.seq), self.x.detach()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Final norm, output projection, loss."""
        assert self.model.final_norm is not None
        return self._loss(self.model.final_norm(self.x)), None

    def draft(self) -> tuple[Tensor, Tensor | None]:
        """One MTP depth and its loss."""
        assert isinstance(self.model.mtp[0], MTPBlock)
        return self._loss(self.model.mtp_step(0, self.x, self.ids, self.seq)), None

    def _loss(self, hidden: Tensor) -> Tensor:
        assert self.model.output is not None
        return self.model.output.cross_entropy(hidden, self.ids.flatten(), self.seq).sum()

    def time(self, run: Pass) -> Time:
        """Medians of forward and backward. Gradients add up, as they do over microbatches."""
        times = [self._once(run) for _ in range(1 + self.repeats)][1:]
        return Time(statistics.median(t.forward for t in times), statistics.median(t.backward for t in times))

    def _once(self, run: Pass) -> Time:
        start = self._now()
        out, gradient = run()
        middle = self._now()
        out.backward(gradient)
        return Time(middle - start, self._now() - middle)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

"""Times whole layers, forward and backward: tokens/s, model FLOP/s, MFU and memory.

python scripts/bench/kernels/layers.py --out layers.json        # on a GPU
python scripts/bench/kernels/layers.py --rehearse

Layers are those of Nemotron-H-8B and 4B, and the experts of Nemotron-3-Nano: ours; for Mamba-2 also with the operator of
mamba-ssm, where it can be imported, and with plain PyTorch; and those of transformers. They take turns and have the same
weights; one that computes something else than ours has no time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Peer
from sides import Side, copy_weights, find_peer, first_line, hf_model, ours, sides
from timing import device_for, in_turns
from torch import Tensor, nn

from nemohybrid.config.accounting import TRAINING_PASSES, layer_cost
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.model import ModelConfig
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.hardware import peak_flops
from nemohybrid_kernels.machine import machine

LAYERS = (
    *(("nemotron_h_8b", symbol) for symbol in "M*-"),
    *(("nemotron_h_4b", symbol) for symbol in "M*-"),
    ("nemotron3_nano_30b", "E"),
)
"""Model, and which of its layers; the most important first."""
TINY = (*(("tiny", symbol) for symbol in "M*-"), ("tiny_moe", "E"))
USUAL_TOLERANCE = 0.05
"""Of the norm of the output and of the input's gradient, between sides."""
TOLERANCE = {"E": 0.2}
"""A token whose expert hangs on a rounding may go to another."""


@dataclass
class Result:
    """A layer computed by one side. Bytes: what forward and backward took above weights and input."""

    model: str
    layer: str
    side: str
    tokens_per_second: float | None = None
    model_flops_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    backends: list[str] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class Job:
    """A layer at a size, and where. `config` is of a model that has only this layer, and a small vocabulary."""

    symbol: str
    config: ModelConfig
    tokens: int
    device: torch.device
    rounds: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]


class Candidate:
    """A layer, its input, and a gradient of its output: the same for all sides."""

    def __init__(self, job: Job) -> None:
        generator = torch.Generator(job.device).manual_seed(1)
        shape = job.tokens, job.config.hidden_size
        x, dy = (torch.randn(shape, generator=generator, device=job.device).to(job.dtype) for _ in "xy")
        self.x, self.dy = x.requires_grad_(), dy
        self.weights: list[nn.Parameter] = []
        self.backends: list[str] = []

    def whole(self) -> Tensor:
        raise NotImplementedError

    def branch(self) -> Tensor:
        """Without the residual, which would hide what the mixer computes."""
        raise NotImplementedError

    def __call__(self) -> tuple[Tensor, ...]:
        """Output, and the gradients of the input and of all weights."""
        y = self.whole()
        return y.detach(), *torch.autograd.grad(y, [self.x, *self.weights], self.dy)

    def named(self) -> dict[str, Tensor]:
        """What is compared."""
        self()  # as it is timed: compiled, tuned, and known to fit
        y = self.branch()
        return {"output": y.detach(), "gradient of the input": torch.autograd.grad(y, [self.x], self.dy)[0]}


class OurLayer(Candidate):
    """As in our model: weights in fp32, products in its type."""

    def __init__(self, job: Job, start: HybridModel, side: Side) -> None:
        super().__init__(job)
        model = deepcopy(start)
        self.backends = side(model, job.device, job.dtype)
        self.layer: Any = model.layers.get_submodule("0")
        self.weights = [weight for weight in self.layer.parameters() if weight.requires_grad]
        self.seq = SequenceContext(1, job.tokens)

    def whole(self) -> Tensor:
        return self.layer(self.x, self.seq)

    def branch(self) -> Tensor:
        return self.layer.mixer(self.layer.norm(self.x), self.seq)


class TheirLayer(Candidate):
    """Of transformers, at its fastest: weights in the type of the products, and mamba-ssm's operator where it finds it."""

    def __init__(self, job: Job, start: HybridModel) -> None:
        super().__init__(job)
        theirs = hf_model(job.config, job.device, job.dtype)
        copy_weights(start, theirs)
        self.layer = theirs.model.layers[0]
        self.weights = [weight for weight in self.layer.parameters() if weight.requires_grad]

    def whole(self) -> Tensor:
        return self.layer(self.x[None])[0]

    def branch(self) -> Tensor:
        y = self.layer.mixer(self.layer.norm(self.x[None]))
        return (y[0] if isinstance(y, tuple) else y)[0]  # attention returns its weights too


def measure(model: str, job: Job, peer: Peer | None) -> list[Result]:
    """One layer by all sides there are here."""
    bound = sides(peer, job.tokens) if job.symbol == "M" else {"ours": ours}
    start = HybridModel.create(job.config, context=ParallelContext.single(job.device))
    makers: dict[str, Callable[[], Candidate]] = {n: partial(OurLayer, job, start, side) for n, side in bound.items()}
    makers["transformers"] = partial(TheirLayer, job, start)
    results = {side: Result(model, job.symbol, side) for side in makers}
    candidates: dict[str, Candidate] = {}
    expected: Mapping[str, Tensor] = {}
    for side, result in results.items():
        try:
            candidate = makers[side]()
            result.backends = candidate.backends
            outputs = candidate.named()
        except Exception as error:  # missing, too large, or a kernel of others that fails in its own way
            result.fault = first_line(error)
            continue
        expected = expected or outputs
        result.fault = difference(outputs, expected, TOLERANCE.get(job.symbol, USUAL_TOLERANCE))
        if result.fault is None:
            candidates[side] = candidate
    if "ours" in candidates:
        for side, taken in in_turns(candidates, job.device, job.rounds).items():
            _fill(results[side], candidates[side], job, taken.median)
    return list(results.values())


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> str | None:
    """What is wrong with it, or None."""
    errors = {name: relative_error(found[name], wanted) for name, wanted in expected.items()}
    wrong = [f"{name} is off by {error:.1e} of its norm" for name, error in errors.items() if not error <= tolerance]
    return f"wrong: {', '.join(wrong)}" if wrong else None


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _fill(result: Result, candidate: Candidate, job: Job, seconds: float) -> None:
    flops = TRAINING_PASSES * layer_cost(job.symbol, job.config, job.tokens).flops * job.tokens
    result.tokens_per_second, result.model_flops_per_second = job.tokens / seconds, flops / seconds
    if job.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
        result.mfu = flops / seconds / peak if peak else None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate()
        result.peak_bytes = torch.cuda.max_memory_allocated() - before


# --- the whole benchmark ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all layers; exits with 1 where ours has no time."""
    options = _parse(argv)
    device = device_for(options.rehearse)
    began, results, left = time.monotonic(), list[Result](), list[str]()
    peer, words = find_peer()
    facts = machine(device) | {"date": time.strftime("%Y-%m-%d"), "rehearsal": str(options.rehearse), "peer": words}
    print(*(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n", flush=True)
    for name, symbol in TINY if options.rehearse else LAYERS:
        if time.monotonic() - began > options.seconds:
            left.append(f"{symbol} of {name}")
            continue
        tokens, rounds = (32, 1) if options.rehearse else (options.tokens, 10)
        config = only(name, symbol, "float32" if options.rehearse else "bfloat16")  # the interpreter knows no bf16
        found = measure(name, Job(symbol, config, tokens, device, rounds), peer)
        results += found
        print(*map(row, found), sep="\n", flush=True)
        if options.out:
            written = {"machine": facts, "layers": [asdict(result) for result in results], "left_out": left}
            options.out.write_text(json.dumps(written, indent=1) + "\n")
    if left:
        print(f"left out for want of time: {'; '.join(left)}")
    return 1 if any(result.fault and result.side == "ours" for result in results) else 0


def only(name: str, symbol: str, dtype: str) -> ModelConfig:
    """The named model, if it had only this layer and hardly a vocabulary."""
    layer = [f'model.pattern="{symbol}"', "model.vocab_size=256", f"model.dtype={dtype}"]
    return load_model_config([f"model={name}", *layer]).model


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="in one row (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, for its code")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


HEADINGS = f"{'model':20}{'layer':7}{'side':22}{'tokens/s':>12}{'TFLOP/s':>9}{'MFU':>7}{'MiB':>8}"


def row(result: Result) -> str:
    """A line of the table."""
    start = f"{result.model:20}{result.layer:7}{result.side:22}"
    if result.tokens_per_second is None or result.model_flops_per_second is None:
        return f"{start}  {result.fault or 'not timed: ours is not there to compare with'}"
    mfu = "-" if result.mfu is None else f"{result.mfu:.0%}"
    memory = "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"
    return f"{start}{result.tokens_per_second:12,.0f}{result.model_flops_per_second / 1e12:9.2f}{mfu:>7}{memory:>8}"


if __name__ == "__main__":
    sys.exit(main())

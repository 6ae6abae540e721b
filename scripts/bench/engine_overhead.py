"""What the engine costs on one rank: a step of the trainer and of a plain loop over the same modules, in turns.

    python scripts/bench/engine_overhead.py [--pairs 40] [--output docs/benchmarks/engine_overhead.json] [OVERRIDE ...]

The plain loop is what one would write by hand: embedding, layers, norm, logits, cross-entropy, backward, clip, AdamW. It has
no layouts, no ranks, no routers' tallies, no check that numbers are finite. Both get their tokens from the same function and
train models with the same first weights; losses must agree. Times alternate in one process, and the ratio is the median of
pairs, of which every other one begins with the plain loop.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nemohybrid.config.compose import load_config
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.batch import Batch
from nemohybrid.train.process import keep_freed_memory
from nemohybrid.train.schedule import learning_rate
from nemohybrid.train.trainer import Trainer
from nemohybrid_kernels.cross_entropy import cross_entropy

WARM_UP = 3


class PlainLoop:
    """The step a person would write for these modules, and nothing around it."""

    def __init__(self, trainer: Trainer) -> None:
        self.data, self.config, self.plan, self.microbatch = (
            trainer.data,
            trainer.config,
            trainer.plan,
            trainer.microbatch,
        )
        self.model, options = trainer.model, trainer.config.optim
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (options.beta1, options.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)
        self.step = 0

    def __call__(self) -> float:
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.plan, self.step)
        batch, total = self.data.batch(self.step), torch.zeros(())
        count = batch.loss_mask.sum()
        for part in batch.split(self.microbatch):
            loss = self.loss(part) / count
            loss.backward()
            total += loss.detach()
        if self.config.optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def loss(self, part: Batch) -> torch.Tensor:
        model, seq = self.model, SequenceContext(*part.tokens.shape, document_ids=part.document_ids)
        x = torch.nn.functional.embedding(part.tokens.flatten(), model.embedding.weight).to(model.dtype)
        for layer in model.layers:
            x = layer(x, seq)
        logits = model.output.gemm(model.final_norm(x), model.output.weight, None)
        return (cross_entropy(logits, part.labels.flatten()) * part.loss_mask.flatten()).sum()


def measure(overrides: list[str], pairs: int) -> dict[str, float | int | str]:
    """Both sides in turns: medians of the seconds of a step, and of the ratio of pairs."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [f"run.dir={folder}/run", f"data.cache={folder}/cache", f"train.steps={pairs + WARM_UP}"]
        config = load_config([*overrides, *shared])
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        keep_freed_memory()
        engine = Trainer(config, ParallelContext.single(), [])
        plain = PlainLoop(Trainer(config, ParallelContext.single(), []))
        seconds: dict[str, list[float]] = {"engine": [], "plain": []}
        for number in range(pairs + WARM_UP):
            sides = [("engine", lambda: engine.train_step().loss), ("plain", plain)]
            losses = {}
            for name, step in sides if number % 2 else reversed(sides):
                started = time.perf_counter()
                losses[name] = step()
                seconds[name].append(time.perf_counter() - started)
            off = abs(losses["engine"] / losses["plain"] - 1)
            assert off < 1e-2, f"step {number + 1}: the two sides do not train the same: {losses}"
    engine_times, plain_times = (seconds[name][WARM_UP:] for name in ("engine", "plain"))
    ratios = [a / b for a, b in zip(engine_times, plain_times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "overrides": " ".join(overrides),
        "pairs": pairs,
        "engine_s": round(statistics.median(engine_times), 4),
        "plain_s": round(statistics.median(plain_times), 4),
        "ratio": round(middle, 4),
        "ratio_quartiles": f"{low:.3f} to {high:.3f}",
    }


def main() -> None:
    """Print and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", default=["experiment=quickstart"])
    args = parser.parse_intermixed_args()
    result = measure(args.overrides, args.pairs) | {"torch": torch.__version__, "machine": platform.processor()}
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Times whole training steps of hybrids: tokens/s, model FLOP/s, MFU and peak memory.

python scripts/bench/kernels/models.py --out models.json        # on a GPU: Nemotron-H-4B, and a hybrid of 1 billion parameters
python scripts/bench/kernels/models.py --rehearse

Each model trains on one GPU with nemohybrid's own trainer, fused AdamW and bf16 products: with our kernels, with the operator of
mamba-ssm where it can be imported, and with plain PyTorch, all going on from the weights that the one before left; at last with
our kernels and products in FP8. transformers trains a model of its own. Where activations do not fit, they are recomputed layer
by layer, and the model's FLOPs, which are counted as the trainer counts them, stay what they are.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peer import Peer
from sides import Side, find_peer, first_line, hf_model, in_recipe, sides
from timing import device_for

from nemohybrid.config.accounting import TRAINING_PASSES, total_cost
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import DTYPES
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.hardware import peak_flops
from nemohybrid.train.trainer import Trainer
from nemohybrid_kernels.machine import machine

BAR, AIM = 0.40, 0.55
"""MFU of our kernels."""
IN_FP8, AIM_FP8 = "ours, fp8_current", 1.3
"""The side in FP8, and how many times as fast as in bf16 it should train."""
WARM_STEPS, STEPS = 2, 4
SIDE_S = 60.0
"""After so long of a side no further step is timed, if one was: plain PyTorch may take half a minute for each."""

HYBRID_1B = (
    'model.pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-"',
    "model.name=hybrid_1b",
    "model.hidden_size=2048",
    "model.vocab_size=32768",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "model.head_dim=128",
    "model.mamba_num_heads=64",
    "model.mamba_head_dim=64",
    "model.mamba_num_groups=8",
    "model.ssm_state_size=128",
    "model.ffn_hidden_size=8192",
)
"""With the layers and proportions of Nemotron-H."""
MODELS = {
    "nemotron_h_4b": ("model=nemotron_h_4b", "train.global_batch=4", "train.microbatch=1", "data.sequence_length=8192"),
    "hybrid_1b": (*HYBRID_1B, "train.global_batch=8", "train.microbatch=4", "data.sequence_length=8192"),
}
"""The first is the harder one, so it comes first."""
TINY = {"tiny": ("model=tiny", "train.global_batch=2", "data.sequence_length=64")}
JOB = ("data=shakespeare", "data.reset_documents=false", "train.steps=1000", "model.dtype=bfloat16")


@dataclass
class Result:
    """A model by one side. Bytes: the most that torch had allocated."""

    model: str
    side: str
    parameters: int = 0
    recompute: str = "none"
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    model_flops_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    fault: str | None = None


Step = Callable[[], float]
"""The next optimizer step; returns the loss, for which it waits for the device."""


def run(result: Result, step: Step, config: RunConfig, device: torch.device) -> None:
    """Steps to warm up, in which kernels are compiled and tuned, and steps to be timed. Fills the result."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result.losses, result.seconds = [], []
    began = time.perf_counter()
    for _ in range(WARM_STEPS):
        result.losses.append(step())
    while len(result.seconds) < STEPS and not (result.seconds and time.perf_counter() - began > SIDE_S):
        started = time.perf_counter()
        result.losses.append(step())
        result.seconds.append(time.perf_counter() - started)
    tokens, length = config.train.global_batch * config.data.sequence_length, config.data.sequence_length
    rate = tokens / statistics.median(result.seconds)
    result.tokens_per_second = rate
    result.model_flops_per_second = TRAINING_PASSES * total_cost(config.model, length).flops * rate
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
        result.mfu = result.model_flops_per_second / peak if peak else None
        result.peak_bytes = torch.cuda.max_memory_allocated()


def attempts(result: Result, make_step: Callable[[str], Step], config: RunConfig, device: torch.device) -> Result:
    """With all activations kept, or where they do not fit, without."""
    for recompute in ("none", "layer"):
        clear()
        result.recompute, result.fault = recompute, None
        try:
            run(result, make_step(recompute), config, device)
            break
        except Exception as error:  # memory, something missing, or a kernel of others
            result.fault = first_line(error)
            if not isinstance(error, torch.OutOfMemoryError):
                break
    return result


def clear() -> None:
    """Give back what an attempt left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_our_trainer(config: RunConfig, device: torch.device, known: dict[str, Side], report: "Report") -> None:
    """One trainer for all kernels: its weights and optimizer stay, since drawing them takes longer than all steps."""
    trainer = Trainer(config, ParallelContext.single(device), [])
    parameters = sum(p.numel() for p in trainer.model.parameters())
    for name, side in known.items():
        if report.is_late():
            report.left.append(f"{config.model.name} with {name}")
            continue
        result = Result(config.model.name, name, parameters)

        def make_step(recompute: str, side: Side = side, result: Result = result) -> Step:
            trainer.model.zero_grad(set_to_none=True)  # of an attempt that failed
            trainer.model.recompute = recompute == "layer"
            result.backends = side(trainer.model, device, DTYPES[config.model.dtype])
            return lambda: trainer.train_step().loss

        report.add(attempts(result, make_step, config, device))


def with_transformers(config: RunConfig, device: torch.device) -> Result:
    """Its NemotronH as its users train it: fp32 weights under bf16 autocast, its own loss, fused AdamW."""
    result = Result(config.model.name, "transformers")

    def make_step(recompute: str) -> Step:
        model = hf_model(config.model, device, torch.float32)
        if recompute == "layer":
            model.gradient_checkpointing_enable()
        result.parameters = sum(p.numel() for p in model.parameters())
        return peer_step(model, config, device)

    return attempts(result, make_step, config, device)


def peer_step(model: torch.nn.Module, config: RunConfig, device: torch.device) -> Step:
    """On the same random tokens in every step: no data of its own is at hand that its tokenizer knows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    batch, length = config.train.global_batch, config.data.sequence_length
    tokens = torch.randint(config.model.vocab_size or 1, (batch, length), device=device)

    def step() -> float:
        total = torch.zeros((), device=device)
        for rows in tokens.split(config.train.microbatch or batch):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss * len(rows) / batch
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


# --- the report ------------------------------------------------------------------------------------------------------


class Report:
    """What is known so far, on the screen and in the file."""

    def __init__(self, facts: dict[str, str], file: Path | None, seconds: float) -> None:
        self.facts, self.file, self.seconds, self.began = facts, file, seconds, time.monotonic()
        self.results: list[Result] = []
        self.left: list[str] = []

    def is_late(self) -> bool:
        return time.monotonic() - self.began > self.seconds

    def add(self, result: Result) -> None:
        self.results.append(result)
        print(row(result), flush=True)
        if self.file:
            written = {"machine": self.facts, "models": [asdict(r) for r in self.results], "left_out": self.left}
            self.file.write_text(json.dumps(written, indent=1) + "\n")


HEADINGS = f"{'model':15}{'side':22}{'recompute':11}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>6}{'GiB':>7}  loss"


def row(result: Result) -> str:
    """A line of the table."""
    start = f"{result.model:15}{result.side:22}{result.recompute:11}"
    if result.tokens_per_second is None or result.model_flops_per_second is None:
        return f"{start}  {result.fault}"
    mfu = "-" if result.mfu is None else f"{result.mfu:.0%}"
    memory = "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.1f}"
    losses = f"{result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    return f"{start}{result.tokens_per_second:11,.0f}{result.model_flops_per_second / 1e12:9.2f}{mfu:>6}{memory:>7}  {losses}"


def main(argv: Sequence[str] | None = None) -> int:
    """Train all models; exits with 1 where ours cannot."""
    options = _parse(argv)
    device = device_for(options.rehearse)
    peer, words = find_peer()
    facts = machine(device) | {"date": time.strftime("%Y-%m-%d"), "rehearsal": str(options.rehearse), "peer": words}
    print(*(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n", flush=True)
    report = Report(facts, options.out, options.seconds)
    for name, overrides in (TINY if options.rehearse else MODELS).items():
        if options.rehearse or not options.only or name in options.only:
            _all_of(name, overrides, device, peer, report)
    print(*verdict(report), sep="\n")
    return 1 if any(result.fault and result.side == "ours" for result in report.results) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), help="of the models")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, for its code")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def _all_of(name: str, overrides: Sequence[str], device: torch.device, peer: Peer | None, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([*JOB, *overrides, f"run.dir={folder}/{name}", f"run.device={device.type}"])
        known = sides(peer, config.data.sequence_length)
        if len(known) > 3:  # of the peer's chunks only its default: layers.py compares them
            known.pop(next(side for side in known if side.endswith("chunk 128")))
        known[IN_FP8] = in_recipe("fp8_current")
        try:
            with_our_trainer(config, device, known, report)
        except Exception as error:  # weights and optimizer alone may be too large for this GPU
            report.add(Result(name, "ours", fault=first_line(error)))
        if report.is_late():
            report.left.append(f"{name} with transformers")
        else:
            report.add(with_transformers(config, device))
        clear()


def verdict(report: Report) -> list[str]:
    """The bar, and what is missing."""
    lines = [f"left out for want of time: {'; '.join(report.left)}"] if report.left else []
    for result in report.results:
        if result.side == "ours" and result.mfu is not None:
            judged = "above" if result.mfu >= BAR else "BELOW"
            lines.append(f"{result.model}: {result.mfu:.1%} MFU, {judged} the bar of {BAR:.0%} (aim {AIM:.0%})")
    lines += [f"{model}: {ratio:.2f} times as fast in FP8, aim {AIM_FP8}" for model, ratio in fp8_ratios(report)]
    return lines or ["no MFU: the peak of this device is not known"]


def fp8_ratios(report: Report) -> list[tuple[str, float]]:
    """Of each model on a GPU whose steps have both times."""
    rates = {(r.model, r.side): r.tokens_per_second for r in report.results if r.peak_bytes and r.tokens_per_second}
    both = [model for model, side in rates if side == IN_FP8 and (model, "ours") in rates]
    return [(model, rates[model, IN_FP8] / rates[model, "ours"]) for model in both]


if __name__ == "__main__":
    sys.exit(main())

"""Trains a small hybrid in every precision, in turns with the same data, and compares validation losses; writes the page.

    python scripts/bench/precision_study.py --output runs/precision              # all arms, 3 seeds; goes on where it stopped
    python scripts/bench/precision_study.py --output runs/precision --page       # docs/benchmarks/precision.md from the runs
    python scripts/bench/precision_study.py --output runs/precision --cost       # steps of all arms in turns, in one process
    python scripts/bench/precision_study.py --output FOLDER --arms bf16 nvfp4 --seeds 1 --steps 20 train.global_batch=2

Every arm of a seed has the same first weights and the same tokens in the same order. The gap of an arm is its validation loss
over that of bf16 with the same seed, less one; the mean over seeds stands beside their spread. The gates: 0.5 % for FP8, 2 %
for NVFP4 as it is meant. The order of ablations is reported, not gated. Beside it the bias of gradients, product by product:
the mean of 64 draws against the exact one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import wide_products

from nemohybrid.config.compose import load_config
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.precision.backends.emulated import multiply, operand_of, prepare
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.recipe import BF16, RECIPES, GemmRecipe
from nemohybrid.precision.slot import Slot
from nemohybrid.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "precision.md"
PICTURE = ROOT / "docs" / "images" / "precision_study.png"
TAIL = 'precision.rules=[{layers: "last 15%", recipe: bf16}]'
ARMS: dict[str, list[str]] = {
    "bf16": ["precision.recipe=bf16"],
    "fp8_current": ["precision.recipe=fp8_current"],
    "fp8_delayed": ["precision.recipe=fp8_delayed"],
    "fp8_block": ["precision.recipe=fp8_block"],
    "mxfp8": ["precision.recipe=mxfp8"],
    "nvfp4": ["precision.recipe=nvfp4", TAIL],
    "nvfp4, no RHT": ["precision.recipe=nvfp4_no_rht", TAIL],
    "nvfp4, no SR": ["precision.recipe=nvfp4_no_sr", TAIL],
    "nvfp4, 1D weights": ["precision.recipe=nvfp4_1d", TAIL],
    "nvfp4, no bf16 tail": ["precision.recipe=nvfp4"],
    "Super's policy": ["precision=nemotron3_super_nvfp4"],
    "mor": ["precision.recipe=mor"],
}
"""Name -> overrides. The last of the six layers is 15 %, rounded up."""
WARM_UP = 3
GATES = {"fp8_current": 0.005, "fp8_delayed": 0.005, "fp8_block": 0.005, "mxfp8": 0.005, "nvfp4": 0.02}
MODEL = [
    "model=tiny",
    "model.pattern=M-*EM-",
    "model.hidden_size=128",
    "model.mamba_num_heads=32",
    "model.mamba_head_dim=8",
    "model.ssm_state_size=32",
    "model.mamba_num_groups=2",
    "model.ffn_hidden_size=384",
    "model.num_experts=4",
    "model.moe_top_k=2",
    "model.moe_ffn_hidden_size=128",
    "model.dtype=bfloat16",
    "data=shakespeare",
    "data.sequence_length=128",
    "train.global_batch=8",
    "optim.lr=2e-3",
    "train.threads=1",
    "schedule=wsd",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, say what came out; 1 where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cost", action="store_true", help="time steps instead, --steps of each arm in turns")
    parser.add_argument("--page", action="store_true", help="write the page from the runs that are there")
    args, more = parser.parse_known_args(arguments)
    if args.cost:
        cost(args.output, args.arms, args.steps, more)
        return 0
    for seed in range(1, args.seeds + 1):
        for arm in args.arms:
            if not args.page:
                train(args.output, arm, seed, args.steps, more)
    results = found(args.output)
    text = "\n".join(table(results))
    print(text)
    if args.page:
        PAGE.write_text(page(results, cost_table(args.output)), encoding="utf-8")
        if results:
            (PAGE.parent / "precision.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            draw(results, PICTURE)
    return 1 if any(line.endswith("missed |") for line in text.splitlines()) else 0


def folder_of(output: Path, arm: str, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return output / f"{name}-{seed}"


def train(output: Path, arm: str, seed: int, steps: int, more: Sequence[str]) -> None:
    """One run as its own process, unless its result is there."""
    folder = folder_of(output, arm, seed)
    if (folder / "result.json").exists():
        return
    words = [*MODEL, f"train.steps={steps}", f"run.seed={seed}", f"run.dir={folder}", *ARMS[arm], *more]
    words += [f"train.evaluate_every={steps}", "logging.console=quiet", "run.device=cpu"]
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "wide_products.py"), "train", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arm}, seed {seed}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    result = {"arm": arm, "seed": seed, "steps": steps, "val_loss": losses[-1], "overrides": [*ARMS[arm], *more]}
    result |= {"seconds": round(time.perf_counter() - began, 1), "step_seconds": step_seconds(lines)}
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{arm}, seed {seed}: {losses[-1]:.4f} after {result['seconds']} s", flush=True)


def cost(output: Path, arms: Sequence[str], steps: int, more: Sequence[str]) -> None:
    """Medians over steps of an arm's time over that of bf16 beside it. All arms train in one process, a step each in turns."""
    output.mkdir(parents=True, exist_ok=True)
    words = [*MODEL, f"data.cache={output}/cache", f"train.steps={steps}", "run.device=cpu", *more]
    wide_products.install()
    trainers = {}
    for arm in dict.fromkeys(["bf16", *arms]):
        config = load_config([*words, *ARMS[arm], f"run.dir={folder_of(output, arm, 0)}"])
        trainers[arm] = Trainer(config, ParallelContext.single(), [])
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {arm: [] for arm in trainers}
    for number in range(steps):
        seconds = {}
        for arm in trainers if number % 2 else reversed(trainers):
            began = time.perf_counter()
            trainers[arm].train_step()
            seconds[arm] = time.perf_counter() - began
        for arm, taken in seconds.items() if number >= WARM_UP else ():
            ratios[arm].append(taken / seconds["bf16"])
    found = {arm: round(statistics.median(values), 3) for arm, values in ratios.items()}
    (output / "cost.json").write_text(json.dumps({"steps": steps - WARM_UP, "ratios": found}) + "\n", encoding="utf-8")
    print("\n".join(cost_table(output)))


def cost_table(output: Path) -> list[str]:
    """A row an arm, of what `cost` left; nothing where it has not run."""
    file = output / "cost.json"
    if not file.exists():
        return []
    ratios = json.loads(file.read_text())["ratios"]
    return ["| arm | step, of bf16's |", "|---|--:|", *(f"| {arm} | {ratio:.2f} |" for arm, ratio in ratios.items())]


def step_seconds(lines: Sequence[dict[str, Any]]) -> float | None:
    """The median of a step: noise on a machine with other work, and not on the page."""
    times = [line["seconds"] for line in lines if "seconds" in line]
    return statistics.median(times) if times else None


def found(output: Path) -> list[dict[str, Any]]:
    """Results of all runs that ended, in the order of the arms."""
    results = [json.loads(file.read_text()) for file in output.glob("*/result.json")]
    return sorted(results, key=lambda of: (list(ARMS).index(of["arm"]), of["seed"]))


def gaps(results: Sequence[dict[str, Any]], arm: str) -> list[float]:
    """Of each seed that bf16 has too."""
    plain = {of["seed"]: of["val_loss"] for of in results if of["arm"] == "bf16"}
    return [of["val_loss"] / plain[of["seed"]] - 1 for of in results if of["arm"] == arm and of["seed"] in plain]


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """A row an arm: mean loss, mean gap, lowest and highest, gate."""
    if not results:
        return ["**Not run yet:** 36 runs, each of which took one to four minutes on two busy cores."]
    lines = ["| arm | val_loss | gap | lowest | highest | seeds | gate |", "|---|--:|--:|--:|--:|--:|---|"]
    for arm in dict.fromkeys(of["arm"] for of in results):
        losses, gap = [of["val_loss"] for of in results if of["arm"] == arm], gaps(results, arm)
        if not gap:
            continue
        figures = " | ".join(f"{100 * value:+.2f} %" for value in (statistics.mean(gap), min(gap), max(gap)))
        lines.append(f"| {arm} | {statistics.mean(losses):.4f} | {figures} | {len(gap)} | {verdict(arm, gap)} |")
    return lines


def verdict(arm: str, gap: Sequence[float]) -> str:
    gate = GATES.get(arm)
    if gate is None:
        return ""
    return f"{100 * gate:g} % {'kept' if statistics.mean(gap) <= gate else 'missed'}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Each seed's gap as a dot, their mean as a bar, the gate of an arm that has one."""
    from matplotlib.figure import Figure

    arms = [arm for arm in dict.fromkeys(of["arm"] for of in results) if arm != "bf16" and gaps(results, arm)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(arms):
        gap = [100 * value for value in gaps(results, arm)]
        axes.plot([place] * len(gap), gap, "o", color="#8fb3d9", label="a seed" if place == 0 else None)
        axes.plot(
            [place - 0.25, place + 0.25],
            [statistics.mean(gap)] * 2,
            color="#1f5fa8",
            label="mean" if place == 0 else None,
        )
        if arm in GATES:
            gate = 100 * GATES[arm]
            axes.plot(
                [place - 0.4, place + 0.4], [gate, gate], "--", color="#c2410c", label="gate" if place == 0 else None
            )
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
    axes.set(ylabel="validation loss over bf16's, %", title="Less precise products, same data and first weights")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


# --- gradients of one product ------------------------------------------------------------------------------------------

DRAWS = 64


def bias_table() -> list[str]:
    """For each recipe what its rounding of dy does to dx and dW: distance of one draw from the exact one, and of their mean."""
    lines = ["| recipe | dx, one | dx, mean of 64 | dW, one | dW, mean of 64 |", "|---|--:|--:|--:|--:|"]
    for name in ("fp8_current", "fp8_block", "mxfp8", "nvfp4_no_sr", "nvfp4_no_rht", "nvfp4"):
        lines.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in biases(RECIPES[name]))} |")
    return lines


def biases(recipe: GemmRecipe) -> list[float]:
    """256 tokens, 128 inputs, 96 outputs, normal numbers, a twentieth of the tokens with gradients ten times as large.

    The other operand is quantized in both, so that what is compared is the rounding of dy alone.
    """
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=g).bfloat16() for shape in ((256, 128), (96, 128), (256, 96)))
    dy = dy * (1 + 9 * (torch.rand(256, 1, generator=g) < 0.05))
    exact = replace(
        recipe,
        dgrad=replace(recipe.dgrad, left=BF16),
        wgrad=replace(recipe.wgrad, left=replace(BF16, hadamard=recipe.wgrad.left.hadamard)),
    )
    wanted = _gradients(exact, x, w, dy, draw=0)
    draws = [_gradients(recipe, x, w, dy, draw) for draw in range(DRAWS)]
    means = [torch.stack(of_draws).mean(0) for of_draws in zip(*draws, strict=True)]
    return [_distance(got, wanted[which]) for which in (0, 1) for got in (draws[0][which], means[which])]


def _gradients(recipe: GemmRecipe, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, draw: int) -> list[torch.Tensor]:
    """dx [256, 128] and dW [96, 128] in fp32, as `EmulatedGemm` computes them before it rounds to the type of x."""
    slot, (d, g) = Slot("study", clock=Clock(step=draw)), (recipe.dgrad, recipe.wgrad)
    place, fp32 = slot.clock.place, torch.float32
    weight = prepare(w.T.to(fp32), d.right, slot, "w")
    dx = multiply(operand_of(dy.to(fp32), d.left, slot, "dy", "dgrad.dy", place), weight)
    left = operand_of(dy.T.to(fp32), g.left, slot, "dy", "wgrad.dy", place)
    return [dx, multiply(left, operand_of(x.T.to(fp32), g.right, slot, "x", "wgrad.x", place))]


def _distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


# --- the page ----------------------------------------------------------------------------------------------------------


def page(results: Sequence[dict[str, Any]], costs: Sequence[str]) -> str:
    """All of it; figures from the runs and from `bias_table`."""
    steps, seeds = {of["steps"] for of in results}, {of["seed"] for of in results}
    return TEXT.format(
        steps=" or ".join(map(str, sorted(steps))) or "200",
        seeds=len(seeds) or 3,
        raw=" [Raw results](precision.json)." if results else "",
        table="\n".join(table(results)),
        picture="\n![Gap of each arm and seed](../images/precision_study.png)\n" if results else "",
        bias="\n".join(bias_table()),
        cost="\n".join(costs) or "Not measured yet.",
        torch=torch.__version__,
    )


TEXT = """<!-- written by scripts/bench/precision_study.py --page -->
# Does a model learn as much in 8 or 4 bits?

```bash
python scripts/bench/precision_study.py --output runs/precision && \\
    python scripts/bench/precision_study.py --output runs/precision --page
```

A hybrid of six layers (`M-*EM-`, 128 channels), {steps} steps of 8 x 128 tokens of Shakespeare at a rate of 2e-3, {seeds} seeds,
emulated on a CPU with torch {torch}. Where a CPU cannot multiply bf16, its products are computed in fp32 and rounded once
(`scripts/bench/wide_products.py`). Arms of a seed begin with the same weights and read the same bytes. The gap is the
validation loss over that of bf16 with the same seed, less one.{raw}

{table}
{picture}
NVFP4 keeps the last 15 % of layers in bf16 unless it says otherwise. The gates are ours, for this size. The order of the
ablations is what came out and no more: published gaps between them appear after hundreds of times as many tokens (NVIDIA 2025,
arXiv 2509.25149), and differences as small as those between seeds say nothing. At twice the rate (4e-3) one seed of FP8 to NVFP4
lay between -0.4 and +1.5 % in no order, and the same arm 0.4 % apart on two kinds of CPU: that is noise of the trajectory.

## Gradients of one product

256 tokens, 128 inputs, 96 outputs, normal numbers, a twentieth of the tokens with gradients ten times as large. What the
rounding of dy does, the other operand being quantized in any case: distance from the product with dy as it is, in the Euclidean
norm, of one draw and of the mean of 64. What the mean keeps is bias. Rounding at random makes one draw worse and the mean better.

{bias}

## What emulating costs

A step of each arm in turns in one process on one core, over that of bf16 beside it, medians (`--cost --steps 15`). This is the
price of trying a recipe on a CPU, and says nothing about hardware that multiplies it.

{cost}
"""

if __name__ == "__main__":
    sys.exit(main())

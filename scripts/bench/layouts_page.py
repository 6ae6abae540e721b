"""Writes docs/benchmarks/layouts.md: layouts of the published models, checked by the rules and counted.

    python scripts/bench/layouts_page.py            # the page; about two minutes, on the meta device
    python scripts/bench/layouts_page.py --check    # only the rules of every layout, in seconds

Nothing here has run on so many GPUs. A row is what `nemohybrid plan layout` says.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from nemohybrid.cli.arguments import without_files
from nemohybrid.config.compose import compose_raw, finish
from nemohybrid.config.environment import ParallelSection
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan.layout import plan_layout

GIB = 2**30
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "layouts.md"
COMMON = ("train.microbatch=1", "train.recompute=layer")
BATCHES = {
    "nemotron_h_4b": (768, 8192),
    "nemotron_h_8b": (768, 8192),
    "nemotron_h_47b": (768, 8192),
    "nemotron_h_56b": (768, 8192),
    "nemotron_nano_v2_9b": (768, 8192),
    "nemotron_nano_v2_12b": (768, 8192),
    "nemotron3_nano_4b": (1024, 4096),
    "nemotron3_nano_30b": (3072, 8192),
    "nemotron3_5_lightning": (3072, 8192),
    "nemotron3_super": (3072, 8192),
    "nemotron3_ultra": (3072, 8192),
}
"""Sequences of a step, and their tokens: of the reports where they say so (Nano v2 12B, Nemotron 3), else of NVIDIA's
Megatron-Bridge."""
UNPUBLISHED = {"nemotron3_nano_30b_long": ["data.lengths={524288: 0.92, 4096: 0.08}"]}
"""What an experiment asks for."""
SHOWN = ("tensor", "context", "pipeline", "expert", "data_mode", "data_shard", "reduce_every_microbatch")


@dataclass(frozen=True)
class Layout:
    """Of a model, or of an experiment with its own batch and axes, on so many GPUs. parallel: keys that are given."""

    name: str
    gpus: int
    parallel: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def long(self) -> bool:
        """Whether it is a long-context phase."""
        return self.name not in BATCHES

    def config(self) -> RunConfig:
        """Raises ConfigError for a layout that the rules refuse."""
        composed = composed_without_layout(self.name).copy()
        composed.parallel.update(self.parallel)
        return finish(composed, self.gpus)


@cache
def composed_without_layout(name: str) -> DictConfig:
    """By Hydra, which takes most of the time."""
    if name in BATCHES:
        batch, length = BATCHES[name]
        words = [f"model={name}", f"train.global_batch={batch}", f"data.sequence_length={length}"]
    else:
        words = [f"experiment={name}", *UNPUBLISHED.get(name, [])]
    return compose_raw(without_files([*words, *COMMON]))


def axes(copies_of: int | None = None, **sizes: int) -> dict[str, int | str]:
    """Keys of `parallel`. copies_of: so many ranks cut weights, and there are copies of them."""
    hybrid = {} if copies_of is None else {"data_mode": "hybrid", "data_shard": copies_of}
    return sizes | hybrid


LAYOUTS = [
    Layout("nemotron_h_4b", 8),
    Layout("nemotron_h_4b", 256, axes(copies_of=8)),
    Layout("nemotron_h_8b", 8),
    Layout("nemotron_h_8b", 64, axes(copies_of=8)),
    Layout("nemotron_h_8b", 1024, axes(tensor=4, copies_of=2)),
    Layout("nemotron_h_47b", 32, axes(tensor=8)),
    Layout("nemotron_h_47b", 1024, axes(tensor=8, copies_of=8)),
    Layout("nemotron_h_56b", 64, axes(tensor=8)),
    Layout("nemotron_h_56b", 512, axes(tensor=8, copies_of=8)),
    Layout("nemotron_h_56b", 1024, axes(tensor=8, copies_of=8)),
    Layout("nemotron_nano_v2_9b", 8),
    Layout("nemotron_nano_v2_9b", 512, axes(tensor=2, copies_of=4)),
    Layout("nemotron_nano_v2_12b", 8, axes(tensor=2)),
    Layout("nemotron_nano_v2_12b", 64, axes(tensor=2)),
    Layout("nemotron_nano_v2_12b", 1024, axes(tensor=4, copies_of=2)),
    Layout("nemotron3_nano_4b", 8),
    Layout("nemotron3_nano_4b", 512, axes(copies_of=8)),
    Layout("nemotron3_nano_30b", 16, axes(expert=8)),
    Layout("nemotron3_nano_30b", 128, axes(expert=8, copies_of=16)),
    Layout("nemotron3_nano_30b", 1024, axes(expert=8, copies_of=16)),
    Layout("nemotron3_5_lightning", 32, axes(expert=8)),
    Layout("nemotron3_5_lightning", 512, axes(expert=8, copies_of=32)),
    Layout("nemotron3_super", 64, axes(tensor=4, expert=64)),
    Layout("nemotron3_super", 128, axes(tensor=2, expert=32)),
    Layout("nemotron3_super", 512, axes(tensor=2, expert=64)),
    Layout("nemotron3_super", 1024, axes(tensor=2, expert=64, copies_of=256)),
    Layout("nemotron3_ultra", 256, axes(tensor=8, pipeline=4, expert=64)),
    Layout("nemotron3_ultra", 512, axes(tensor=4, pipeline=4, expert=64)),
    Layout("nemotron3_ultra", 1024, axes(tensor=8, pipeline=4, expert=64)),
    Layout("nemotron_nano_v2_12b_long", 128),
    Layout("nemotron_nano_v2_12b_long", 512),
    Layout("nemotron3_nano_30b_long", 256),
    Layout("nemotron3_nano_30b_long", 256, axes(tensor=4, pipeline=1)),
    Layout("nemotron3_super_long", 128),
    Layout("nemotron3_super_long_mixed", 256),
    Layout("nemotron3_ultra_long", 512),
    Layout("nemotron3_ultra_long", 1024),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only the rules")
    only_check = parser.parse_args(arguments).check
    rows: dict[bool, list[str]] = {False: [], True: []}
    for layout in LAYOUTS:
        config = layout.config()
        print(layout.name, layout.gpus, *words(config.parallel), flush=True)
        if not only_check:
            rows[layout.long].append(row(layout, config))
    if not only_check:
        text = TEXT.format(head=HEAD, rows="\n".join(rows[False]), long_rows="\n".join(rows[True]))
        PAGE.write_text(text, encoding="utf-8")
    return 0


HEAD = """GPUs | `parallel.` | batch | rows | steps of a rank | GiB kept | GiB sent | idle |
|---|--:|---|--:|--:|--:|--:|--:|--:|"""


def row(layout: Layout, config: RunConfig) -> str:
    """Of the table."""
    plan = plan_layout(config, layout.gpus)
    kept, sent, pipeline = plan.memory.total / GIB, plan.bytes_sent, plan.pipeline
    cells = [
        f"`{layout.name}`",
        str(layout.gpus),
        f"`{' '.join(words(config.parallel))}`",
        f"{config.train.global_batch} x {config.data.sequence_length:,}",
        str(plan.rows),
        str(plan.microbatches),
        f"{kept:.0f}",
        "-" if sent is None else f"{sent / GIB:,.0f}",
        "-" if pipeline is None else f"{100 * pipeline.timeline.bubble:.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def words(parallel: ParallelSection) -> list[str]:
    """The keys of `parallel` that are not what they are where nobody says anything."""
    default = ParallelSection()
    found = {name: getattr(parallel, name) for name in SHOWN if getattr(parallel, name) != getattr(default, name)}
    return [f"{name}={value}" for name, value in found.items()] or ["tensor=1"]


TEXT = """<!-- written by scripts/bench/layouts_page.py -->
# Layouts of the published models

On 8 to 1024 GPUs: which layouts are there, what does a rank keep, send and wait for?

```bash
python scripts/bench/layouts_page.py
```

writes this page. **Nothing here has run on so many GPUs: all is counted.** Each row is a configuration that every rule accepts
on so many GPUs, with `train.recompute=layer` and one sequence at a time. `nemohybrid plan layout` says the same of any other,
and [Parallel training](../parallelism.md#an-example-from-8-to-1024-gpus) how to come to one.

- *Rows*: data ranks, which have other rows of the batch. *Steps of a rank*: microbatches that each adds up.
- *GiB kept*: by the fullest rank. An H100 has 80 GB, an H200 141, a B200 180, of which CUDA and the allocator take some.
- *GiB sent*: by a rank in a step ([Communication](communication.md)). "-" where pipelines or folded experts send too, which no
  formula counts yet. More microbatches send more.
- *Idle*: the part of a step that the ranks of a pipeline wait, by modelled times of an H100.

## Pretraining

Batch and length are those of the reports for Nano v2 12B and Nemotron 3 30B, Super and Ultra, and what NVIDIA says of Lightning.
Of the others, which were distilled or whose batch nobody published, they are those of the recipes in its Megatron-Bridge. The
layouts are ours.

| `model=` | {head}
{rows}

## Long contexts

The phases that follow, as [experiments](../recipes.md#long-context-phases). Lengths, axes and batches are the published ones, but
for the batch of Ultra, which is that of Super. Ours are the numbers of GPUs, the shares of the two lengths of Nano 30B (0.92 and
0.08), and its layout without a pipeline.

| `experiment=` | {head}
{long_rows}
"""

if __name__ == "__main__":
    sys.exit(main())

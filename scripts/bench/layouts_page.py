"""Writes docs/benchmarks/layouts.md: layouts of the published models, checked by the rules and with their memory, by count.

    python scripts/bench/layouts_page.py            # the page; a few minutes, on the meta device
    python scripts/bench/layouts_page.py --check    # only the rules of every layout, in seconds

Nothing here has run on so many GPUs: what a rank is expected to take is the estimate that a run makes before it begins.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemohybrid.config.compose import load_config
from nemohybrid.config.ranks import data_ranks, microbatch, shard_ranks
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan.memory import GIB, estimate

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "layouts.md"
COMMON = ["data=shakespeare", "data.sequence_length=8192", "train.microbatch=1", "train.recompute=layer"]
BATCHES = {"nemotron3_nano_30b": 3072, "nemotron3_super": 3072, "nemotron3_ultra": 3072}
"""Sequences of a step that were published; of the others 768."""


@dataclass(frozen=True)
class Layout:
    """Of a model, on so many GPUs; words beside those of every layout."""

    model: str
    gpus: int
    words: tuple[str, ...]

    def config(self) -> RunConfig:
        """Raises ConfigError for a layout that the rules refuse."""
        words = [f"model={self.model}", *COMMON, f"train.global_batch={BATCHES.get(self.model, 768)}", *self.words]
        return load_config(words, self.gpus)

    def gib(self) -> float:
        """Of the fullest pipeline rank."""
        config = self.config()
        sizes = data_ranks(config, self.gpus), shard_ranks(config, self.gpus)
        stages = {0, config.parallel.pipeline - 1}
        return max(estimate(config, *sizes, stage, "cuda").total for stage in stages) / GIB


LONG = ("data.sequence_length=1048576", "data.lengths={1048576: 0.92, 4096: 0.08}", "train.global_batch=16")
LAYOUTS = [
    Layout("nemotron_h_8b", 8, ()),
    Layout("nemotron_h_8b", 64, ("parallel.data_mode=hybrid", "parallel.data_shard=8")),
    Layout("nemotron_nano_v2_12b", 8, ("parallel.tensor=2",)),
    Layout("nemotron_nano_v2_12b", 256, ("parallel.tensor=4", "parallel.data_mode=hybrid", "parallel.data_shard=4")),
    Layout(
        "nemotron_nano_v2_12b",
        192,
        ("parallel.tensor=8", "parallel.context=8", "data.sequence_length=524288", "train.global_batch=12"),
    ),
    Layout("nemotron_h_56b", 64, ("parallel.tensor=8",)),
    Layout("nemotron_h_56b", 512, ("parallel.tensor=8", "parallel.data_mode=hybrid", "parallel.data_shard=8")),
    Layout("nemotron3_nano_30b", 16, ("parallel.expert=8",)),
    Layout("nemotron3_nano_30b", 128, ("parallel.expert=8", "parallel.data_mode=hybrid", "parallel.data_shard=16")),
    Layout(
        "nemotron3_nano_30b",
        256,
        (
            "parallel.tensor=4",
            "parallel.context=8",
            "parallel.expert=8",
            "data.sequence_length=524288",
            "train.global_batch=48",
        ),
    ),
    Layout("nemotron3_super", 128, ("parallel.tensor=2", "parallel.expert=32")),
    Layout("nemotron3_super", 512, ("parallel.tensor=2", "parallel.expert=64")),
    Layout("nemotron3_super", 256, ("parallel.tensor=2", "parallel.context=64", "parallel.expert=64", *LONG)),
    Layout("nemotron3_ultra", 512, ("parallel.tensor=4", "parallel.pipeline=4", "parallel.expert=64")),
    Layout("nemotron3_ultra", 1024, ("parallel.tensor=8", "parallel.pipeline=4", "parallel.expert=64")),
    Layout(
        "nemotron3_ultra",
        1024,
        ("parallel.tensor=8", "parallel.context=32", "parallel.pipeline=2", "parallel.expert=128", *LONG),
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only the rules")
    only_check = parser.parse_args(arguments).check
    rows = []
    for layout in LAYOUTS:
        config = layout.config()
        print(layout.model, layout.gpus, *layout.words, flush=True)
        rows += [] if only_check else [row(layout, config)]
    if rows:
        PAGE.write_text(TEXT.format(rows="\n".join(rows)), encoding="utf-8")
    return 0


def row(layout: Layout, config: RunConfig) -> str:
    """Of the table."""
    rows = data_ranks(config, layout.gpus)
    microbatches = config.train.global_batch // rows // microbatch(config, rows)
    words = " ".join(word for word in layout.words if word.startswith("parallel"))
    length, batch = config.data.sequence_length, config.train.global_batch
    return (
        f"| `{layout.model}` | {layout.gpus} | `{words or 'parallel.tensor=1'}` | {batch} x {length:,} | {rows} "
        f"| {microbatches} | {layout.gib():.0f} |"
    )


TEXT = """<!-- written by scripts/bench/layouts_page.py -->
# Layouts of the published models

```bash
python scripts/bench/layouts_page.py
```

Each row is a configuration that every rule accepts on so many GPUs, `train.recompute=layer` and one sequence at a time. GiB: what
the fullest pipeline rank is expected to take, **by count**; nothing here has run on so many GPUs. Rows: data ranks that have
other rows of the batch. Steps of a rank: microbatches it adds up. An H100 has 80 GB, a B200 180 GB; what is above its GPU needs
more ranks that cut weights or share matrices. Of the long-context phases (rows of 524,288 and 1,048,576 tokens), lengths are the
published ones, and so are the axes of Super (tensor 2, context 64, expert 64) and Ultra (8, 32, 128, pipeline 2); number of GPUs,
the batch of Ultra and the axes of the others are ours.

| `model=` | GPUs | layout | batch | rows | steps of a rank | GiB |
|---|--:|---|--:|--:|--:|--:|
{rows}
"""

if __name__ == "__main__":
    sys.exit(main())

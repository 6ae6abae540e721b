"""Write docs/benchmarks/communication.md: what a rank sends in one step of published recipes, by formula, none typed by hand.

python scripts/bench/communication_table.py
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemohybrid.config.compose import load_config, load_model_config
from nemohybrid.config.ranks import data_ranks, shard_ranks
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan import memory
from nemohybrid.plan.communication import ROUNDS, Row, layer_sends, step_traffic

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "communication.md"
GB, KB = 1e9, 1e3
TEXT = ["data=shakespeare", "data.tokenizer=byte"]  # whatever it is, the models have vocabularies of their own


@dataclass(frozen=True)
class Recipe:
    """A published shape, one sequence a microbatch, as NVIDIA's Megatron-Bridge has it."""

    name: str
    model: str
    gpus: int
    tensor: int
    batch: int
    length: int = 8192

    def config(self, *overrides: str) -> RunConfig:
        """With bf16 weights and our own defaults for what is not published."""
        sizes = [f"train.global_batch={self.batch}", "train.microbatch=1", f"data.sequence_length={self.length}"]
        layout = [f"model={self.model}", f"parallel.tensor={self.tensor}"]
        return load_config([*TEXT, *layout, *sizes, *overrides], world_size=self.gpus)

    @property
    def data(self) -> int:
        """Data ranks."""
        return self.gpus // self.tensor


RECIPES = [
    Recipe("Nemotron-H 4B", "nemotron_h_4b", 1, 1, 768),
    Recipe("Nemotron-H 8B", "nemotron_h_8b", 2, 2, 768),
    Recipe("Nemotron-H 47B", "nemotron_h_47b", 8, 8, 768),
    Recipe("Nemotron-H 56B", "nemotron_h_56b", 8, 8, 768),
    Recipe("Nemotron-H 56B, H100", "nemotron_h_56b", 64, 8, 192),
    Recipe("Nemotron-H 56B, B200", "nemotron_h_56b", 64, 2, 192),
    Recipe("Nemotron Nano v2 9B", "nemotron_nano_v2_9b", 2, 2, 768),
    Recipe("Nemotron Nano v2 12B", "nemotron_nano_v2_12b", 4, 4, 768),
    Recipe("Nemotron 3 Nano 4B", "nemotron3_nano_4b", 8, 1, 1024, 4096),
]
BY_MODE = RECIPES[5]
MODES = {
    "full_shard": ["parallel.data_mode=full_shard"],
    "full_shard, reduce_every_microbatch": ["parallel.data_mode=full_shard", "parallel.reduce_every_microbatch=true"],
    "shard_grad": ["parallel.data_mode=shard_grad"],
    "hybrid, data_shard=4": ["parallel.data_mode=hybrid", "parallel.data_shard=4"],
    "replicate": ["parallel.data_mode=replicate"],
}
LAYERS = [
    ("`M`, `*`, `-` of Nemotron-H 56B", "M", "nemotron_h_56b"),
    ("`E` of Nemotron 3 Nano 30B", "E", "nemotron3_nano_30b"),
    ("`E` of Nemotron 3 Super (LatentMoE)", "E", "nemotron3_super"),
]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    return TEMPLATE.format(
        recipes=table(RECIPE_HEAD, map(recipe_line, RECIPES)),
        mode_recipe=f"{BY_MODE.name}: {BY_MODE.gpus} GPUs, tensor {BY_MODE.tensor}, data {BY_MODE.data}",
        mode_microbatches=BY_MODE.batch // BY_MODE.data,
        modes=table(MODE_HEAD, (mode_line(name, overrides) for name, overrides in MODES.items())),
        layers=table(LAYER_HEAD, (layer_line(*layer) for layer in LAYERS)),
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def sent(rows: Iterable[Row], *groups: str) -> float:
    """Bytes."""
    return sum(row.sent for row in rows if row.group in groups)


def number(rows: Iterable[Row], *groups: str) -> int:
    """Collectives."""
    return sum(row.number for row in rows if row.group in groups)


RECIPE_HEAD = [
    "recipe",
    "GPUs",
    "tensor x data",
    "sequences x tokens",
    "microbatches",
    "tensor, GB",
    "tensor, collectives",
    "data, GB",
    "data, collectives",
    "kB a token",
]


def recipe_line(recipe: Recipe) -> list[str]:
    """A step of one recipe."""
    config = recipe.config()
    rows = step_traffic(config, data_ranks(config, recipe.gpus), shard_ranks(config, recipe.gpus))
    tokens = recipe.batch * recipe.length // recipe.data
    counts = [f"{number(rows, group):,}" for group in ("tensor", "data")]
    sizes = [f"{sent(rows, group) / GB:,.1f}" for group in ("tensor", "data")]
    return [
        recipe.name,
        str(recipe.gpus),
        f"{recipe.tensor} x {recipe.data}",
        f"{recipe.batch} x {recipe.length}",
        str(recipe.batch // recipe.data),
        *(cell for pair in zip(sizes, counts, strict=True) for cell in pair),
        f"{sent(rows, 'tensor', 'data', 'world') / tokens / KB:,.0f}",
    ]


MODE_HEAD = [
    "`parallel.data_mode`",
    "weights forward, GB",
    "weights backward, GB",
    "gradients, GB",
    "between copies, GB",
    "together, GB",
    "collectives",
    "kept, bytes a parameter",
]
PURPOSES = ["gather weights, forward", "gather weights, backward", "reduce gradients", "sums over copies"]


def mode_line(name: str, overrides: Sequence[str]) -> list[str]:
    """A step of one recipe with its weights cut another way."""
    config = BY_MODE.config(*overrides)
    shard = shard_ranks(config, BY_MODE.gpus)
    rows = step_traffic(config, BY_MODE.data, shard)
    purposes = [sum(row.sent for row in rows if row.what == purpose) / GB for purpose in PURPOSES]
    kept = sum(memory.estimate(config, BY_MODE.data, shard).fixed.values())
    parameters = memory.estimate(config, BY_MODE.data).fixed["weights, fp32"] / 4  # of a tensor rank
    cells = [f"{size:,.1f}" for size in (*purposes, sent(rows, "data") / GB)]
    return [name, *cells, f"{number(rows, 'data'):,}", f"{kept / parameters:.1f}"]


LAYER_HEAD = [
    "layer, tensor=8",
    "with sequence parallelism: collectives",
    "kB",
    "and recompute=layer: collectives",
    "kB",
    "without: collectives",
    "kB",
]


def layer_line(what: str, symbol: str, model: str) -> list[str]:
    """A token's way through one layer, forward and backward."""
    config, cells = load_model_config([*TEXT, f"model={model}"]).model, []
    for cut, recompute in ((True, False), (True, True), (False, False)):
        sends = list(layer_sends(symbol, config, tokens=1, cut=cut, recompute=recompute))
        size = sum(ROUNDS[send.kind] * send.size for send in sends) * 7 / 8
        cells += [str(len(sends)), f"{size / KB:.1f}"]
    return [what, *cells]


TEMPLATE = """# Communication

How much does a rank send in one optimizer step?

```bash
python scripts/bench/communication_table.py
```

writes this page. Nothing here is measured on GPUs, and nothing is a time: these are bytes and numbers of collectives, by the
formula of `nemohybrid.plan.communication`. The formula is tested: for tiny models with every symbol, LatentMoE, multi-token
prediction, recomputation and several microbatches, under tensor parallelism with and without sequence parallelism and under
all data modes, a recorder that knows nothing of it lists what torch.distributed is asked to send in a real step (forward,
backward, FSDP's own hooks), and both agree to the byte and to the collective. So there are no hidden gathers.

Bytes are those that a rank sends in a ring of n ranks, for a tensor of S bytes: (n - 1) / n x S to gather it from all, or to
sum it and leave each rank a part; twice that to sum it for all (an all-reduce). NCCL may choose another algorithm.

## Published recipes

Of NVIDIA's Megatron-Bridge, those that need tensor and data ranks alone, with one sequence a microbatch, bf16 weights, and
our defaults: sequence parallelism, `parallel.data_mode=full_shard`, no recomputation. Where they use FP8, here it is bf16.
*tensor* are the ranks that share every matrix, *data* those that share the batch; GB of a rank and step; *kB a token* is both,
over the tokens that the rank computes in a step.

{recipes}

Tensor bytes grow with tokens, layers and width, whatever the model does in a layer; data bytes with parameters and
microbatches, whatever the tokens. A larger `train.microbatch`, where it fits, sends the first in fewer pieces and the second
less often.

Left out, since the formula counts no pipelines, context ranks and folded experts: Nemotron 3 Nano 30B (expert 8), 3.5 Lightning
(expert 8, on H100 context 2), Super (expert 8 to 64, in one recipe pipeline 2) and Ultra (expert 8 to 64, in most recipes
pipeline 3 or 12).

## A layer

What a token costs a rank in one layer, forward and backward:

{layers}

A dense layer gathers its tokens once and leaves its sums once, and the same backward. Sequence parallelism sends the same bytes
as two all-reduces, in smaller pieces. Recomputation sends again what goes into a layer, but not what comes out at its end.
In an `E` layer the ids and weights of the chosen experts come on top. With LatentMoE tokens go to the experts at the latent
width; most of what is left is for the shared expert, which works at the full one.

## Data modes

{mode_recipe}, {mode_microbatches} microbatches. *kept*: weights, gradients and optimizer in bytes
a parameter of a tensor rank, at the height of a step, with what is gathered, without activations
(`nemohybrid.plan.memory`):

{modes}

With N data ranks, m microbatches and bf16 layers, in bytes a parameter, each times (N - 1) / N:

| `parallel.data_mode` | weights | gradients, fp32 | together |
|---|---|---|---|
| `full_shard` | 2 m forward, 2 m backward | 4 | 4 m + 4 |
| with `reduce_every_microbatch` | 2 m forward, 2 m backward | 4 m | 8 m |
| `shard_grad` | 2 | 4 | 6 |
| `hybrid` | as `full_shard` within `data_shard` ranks | and 8 / `data_shard` between copies | |
| `replicate` | none | 8, an all-reduce | 8 |

In fp32, since every use has a cast of its own: embedding and output, which stay from the forward to the backward pass and
so need no second gather; and MTP blocks that run at several depths, which are gathered for every run. A model in fp32 sends
all weights with 4 bytes.

`full_shard` is the default because it is the mode under which most models fit: weights, gradients and optimizer state all
become smaller with the number of data ranks. In a step of one microbatch a bf16 model sends no more under it than under
`replicate`. Each further microbatch costs two gathers of all weights, which `shard_grad` and `replicate` do not pay:

- with several microbatches, and room for all weights in bf16 (2 bytes a parameter more): `shard_grad`;
- across many nodes: `hybrid`, whose gathers stay within a node, and which sends a `data_shard`-th of the gradients between;
- with several microbatches every rank keeps whole fp32 gradients until the last one (4 bytes a parameter).
  `parallel.reduce_every_microbatch` does not, and sends them m times.

FSDP cuts rows of a matrix into equal parts and sends the padding too. For a stack of experts the rows are the experts: with
more data ranks than experts, the rest is padding.
"""

if __name__ == "__main__":
    main()

"""`nemohybrid params model=NAME`: parameters and FLOPs by layer type, without building anything."""

from nemohybrid.config.compose import load_model_config
from nemohybrid.observe.accounting import Cost, costs_by_part, total_cost
from nemohybrid.symbols import parse_pattern

USAGE = """usage: nemohybrid params model=NAME [model.hidden_size=... data.sequence_length=... any override]

Counts parameters, the parameters one token meets, and training FLOPs per token (forward + backward).
Both FLOP columns are explained in nemohybrid/observe/accounting.py."""


def main(argv: list[str]) -> int:
    """Print the table."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    config = load_model_config(argv)
    model, length = config.model, config.data.sequence_length
    pattern = parse_pattern(model.pattern)
    print(f"{model.name}: {pattern.num_layers} layers, hidden size {model.hidden_size}, sequence length {length}")
    print(f"{'part':12}{'layers':>7}{'parameters':>18}{'active':>18}{'GFLOP/token':>14}{'(Megatron)':>12}")
    for part, cost in costs_by_part(model, length).items():
        print(_row(part, pattern.counts.get(part, ""), cost))
    print(_row("total", pattern.num_layers, total_cost(model, length)))
    return 0


def _row(part: str, layers: int | str, cost: Cost) -> str:
    gflops, megatron = 3 * cost.flops / 1e9, 3 * cost.flops_megatron / 1e9
    return f"{part:12}{layers:>7}{cost.parameters:>18,}{cost.active:>18,}{gflops:>14.4f}{megatron:>12.4f}"

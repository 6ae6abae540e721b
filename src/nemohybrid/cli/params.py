"""`nemohybrid params model=NAME`: parameters and FLOPs by layer type, counted on the meta device."""

from dataclasses import replace

from nemohybrid.config.accounting import Cost, costs_by_part
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.latent import RoutedExperts, latent_of_equal_cost, routed_experts, standard_of_equal_cost
from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import ConfigError
from nemohybrid.symbols import parse_pattern

USAGE = """usage: nemohybrid params model=NAME [model.hidden_size=... data.sequence_length=... any override]

Counts parameters, the parameters one token meets, and training FLOPs per token (forward + backward). Parameters are those
of the model built on the meta device, which takes no memory. Both FLOP columns are explained in
nemohybrid/config/accounting.py. A model with experts is shown beside LatentMoE models of equal cost, and a LatentMoE beside
the experts of full width that it stands for."""


def main(argv: list[str]) -> int:
    """Print the table."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    config = load_model_config(argv)
    model, length = config.model, config.data.sequence_length
    pattern = parse_pattern(model.pattern)
    parts, how = count(model, length)
    print(f"{model.name}: {pattern.num_layers} layers, hidden size {model.hidden_size}, sequence length {length}")
    print(f"{'part':12}{'layers':>7}{'parameters':>18}{'active':>18}{'GFLOP/token':>14}{'(Megatron)':>12}")
    for part, cost in parts.items():
        print(_row(part, pattern.counts.get(part, ""), cost))
    print(_row("total", pattern.num_layers, sum(parts.values(), Cost())))
    print(how)
    if "E" in pattern.counts:
        print("\n".join(["", *latent_table(routed_experts(model))]))
    return 0


def count(model: ModelConfig, sequence_length: int) -> tuple[dict[str, Cost], str]:
    """The costs of each part, its parameters as built where it can be built, and a line that says how they were counted."""
    from nemohybrid.model.count import built_parameters  # torch takes seconds

    costs = costs_by_part(model, sequence_length)
    try:
        built = built_parameters(model)
    except ConfigError as reason:
        return costs, f"counted from the sizes alone: {reason}"
    for part, parameters in built.items():
        if costs[part].parameters == 0:  # a symbol of the user's own, of which accounting.py knows nothing
            costs[part] = replace(costs[part], parameters=parameters, active=parameters)
        assert costs[part].parameters == parameters, f"{part}: counted {costs[part].parameters:,}, built {parameters:,}"
    return costs, "counted on the model built on the meta device"


def latent_table(routed: RoutedExperts) -> list[str]:
    """The model's routed experts beside those of other widths with no more active weights: one line each."""
    if routed.latent is None:
        others = {f"model.moe_latent_size={routed.hidden // alpha}": routed.hidden // alpha for alpha in (2, 4)}
        rows = {"this model": routed} | {name: _latent(routed, size) for name, size in others.items()}
    else:
        standard = standard_of_equal_cost(routed)
        alpha_k = replace(routed, top_k=int(routed.alpha * standard.top_k))
        rows = {f"this model, latent size {routed.latent}": routed, "experts of full width": standard}
        rows["this model with alpha times their visits"] = alpha_k
    lines = ["routed experts of an E layer at equal cost (LatentMoE)     a token visits   weights it meets"]
    for name, option in rows.items():
        visits = f"{option.top_k} of {option.experts}" if option else "none: projections cost more"
        lines.append(f"  {name:44}{visits:>27}{option.active_weights if option else 0:>19,}")
    return lines


def _latent(routed: RoutedExperts, size: int) -> RoutedExperts | None:
    try:
        return latent_of_equal_cost(routed, size)
    except ConfigError:  # the projections cost more than all visits
        return None


def _row(part: str, layers: int | str, cost: Cost) -> str:
    gflops, megatron = 3 * cost.flops / 1e9, 3 * cost.flops_megatron / 1e9
    return f"{part:12}{layers:>7}{cost.parameters:>18,}{cost.active:>18,}{gflops:>14.4f}{megatron:>12.4f}"

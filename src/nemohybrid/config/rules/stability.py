"""Rules of the norms that may be added or left out around and inside a mixer."""

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.rules.rule import MODEL_RULES, Situation, rule
from nemohybrid.config.section import leaves
from nemohybrid.config.violation import Violation


@rule(MODEL_RULES)
def input_norms_are_of_layers(now: Situation) -> Violation | None:
    """A symbol that no layer has would change nothing."""
    return _only_layers(now, "no_input_norm")


@rule(MODEL_RULES)
def output_norms_are_of_layers(now: Situation) -> Violation | None:
    """The same for the norms behind the mixers."""
    return _only_layers(now, "output_norm")


OF_LAYERS = {
    "attention.qk_norm": "*",
    "attention.v_norm": "*",
    "attention.softcap": "*",
    "mamba_bc_norm": "M",
    "mamba_x_norm": "M",
    "dt_limit": "M",
}
"""Key of `model` -> the layers without which it would change nothing."""


@rule(MODEL_RULES)
def options_are_of_layers(now: Situation) -> Violation | None:
    """The same for what is done inside a mixer."""
    values = {key: value for key, _, value in leaves(now.config.model)}
    for key, symbol in OF_LAYERS.items():
        if values[key] and now.pattern is not None and not now.has(symbol):
            legal = {
                f"model.{key}": "false" if isinstance(values[key], bool) else "null",
                "model.pattern": f"with a {symbol}",
            }
            return Violation(f"model.{key}={values[key]}", f"no layer of the pattern is {symbol!r}", legal)
    return None


def _only_layers(now: Situation, key: str) -> Violation | None:
    value = getattr(now.config.model, key)
    if now.pattern is None:
        return None  # the pattern itself is at fault
    strangers = [symbol for symbol in dict.fromkeys(value) if not now.has(symbol)]
    if not strangers:
        return None
    there = "".join(dict.fromkeys(now.pattern.main + now.pattern.mtp))
    message = f"no layer of the pattern is {' or '.join(map(repr, strangers))}"
    return Violation(f"model.{key}={value}", message, {f"model.{key}": f"some of {there}, or empty"})


@rule(MODEL_RULES)
def something_is_normalised(now: Situation) -> Violation | None:
    """The residual stream grows from layer to layer: a mixer that reads it as it is must put a norm of its own on it."""
    model = now.config.model
    for symbol in dict.fromkeys(model.no_input_norm):
        if cure := _missing_norms(model, symbol):
            where = f"model.no_input_norm={model.no_input_norm}"
            return Violation(where, f"nothing that {symbol!r} computes from the stream would be normalised", cure)
    return None


def _missing_norms(model: ModelConfig, symbol: str) -> dict[str, str]:
    """What would make it legal for `symbol` to read the stream without a norm; empty where it is.

    `*`: Q and K, so that scores stay bounded, and V or the output. `M`: what enters the scan; its output is always
    normalised. Others: the output. `E` never: its router's scores would grow with the stream.
    """
    behind = {"model.output_norm": f"with {symbol!r}"}
    if symbol == "*":
        cure = {} if model.attention.qk_norm else {"model.attention.qk_norm": "true"}
        return cure | ({} if model.attention.v_norm or "*" in model.output_norm else {"model.attention.v_norm": "true"})
    if symbol == "M":
        inside = ("mamba_bc_norm", "mamba_x_norm")
        return {f"model.{key}": "true" for key in inside if not getattr(model, key)}
    if symbol == "E":
        return {"model.no_input_norm": f"without 'E', e.g. {model.no_input_norm.replace('E', '')!r}"}
    return {} if symbol in model.output_norm else behind

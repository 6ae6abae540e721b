"""What Megatron-LM calls our products, and which of our rules a glob over its names is.

A glob is not rewritten: it is asked which of the products of this model it means, and a rule of ours is found that means the
same ones.
"""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from nemohybrid.precision.place import Place

IN_A_LAYER = {
    "in_proj": "mixer.in_proj",
    "out_proj": "mixer.out_proj",
    "qkv": "self_attention.linear_qkv",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
    "experts.up": "mlp.experts.linear_fc1",
    "experts.down": "mlp.experts.linear_fc2",
    "latent_down": "mlp.fc1_latent_proj",
    "latent_up": "mlp.fc2_latent_proj",
    "shared_expert.fc1": "mlp.shared_experts.linear_fc1",
    "shared_expert.fc2": "mlp.shared_experts.linear_fc2",
}
"""Our name in a mixer -> that of Megatron-LM in a layer (core/models/hybrid/hybrid_layer_specs.py)."""


def megatron_name(place: Place) -> str:
    """`layers.3.mixer.qkv` -> `decoder.layers.3.self_attention.linear_qkv`."""
    layer, _, name = place.name.partition(".mixer.")
    theirs = "self_attention.linear_proj" if place.role == "o_proj" else IN_A_LAYER[name]
    if not place.mtp:
        return f"decoder.{layer}.{theirs}"
    block, number = re.findall(r"\d+", layer)
    return f"mtp.layers.{block}.mtp_model_layer.layers.{number}.{theirs}"


def rule_for(glob: str, places: Sequence[Place]) -> dict[str, Any] | None:
    """What a rule of ours says that means the same products of this model, without a recipe; None where there are none."""
    meant = {place.name for place in places if fnmatch.fnmatchcase(megatron_name(place), glob)}
    if not meant:
        return None
    if len(meant) == len(places):
        return {}
    for key, of in (("kind", _kind), ("role", _role), ("name", _shape)):
        values = {of(place) for place in places if place.name in meant}
        if meant == {place.name for place in places if of(place) in values} and None not in values:
            ordered = [*dict.fromkeys(of(place) for place in places if place.name in meant)]
            return {key: ordered if len(ordered) > 1 else ordered[0]}
    return {"name": [place.name for place in places if place.name in meant]}


def _kind(place: Place) -> str | None:
    """Only mtp: elsewhere a role says more."""
    return "mtp" if place.mtp else None


def _role(place: Place) -> str:
    return place.role


def _shape(place: Place) -> str:
    """Its name, with * for the number of the layer: a glob of ours."""
    return re.sub(r"(?<=layers\.)\d+", "*", place.name)

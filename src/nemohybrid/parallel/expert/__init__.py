"""Experts on several ranks: `placement.py` says where they are, and what a dispatcher does.

`all_to_all.py` is exact, `slots.py` never makes the host wait, `deepep.py` leaves the exchange to DeepEP.
"""

import torch.distributed as dist

from nemohybrid.errors import ConfigError, did_you_mean
from nemohybrid.parallel.expert.all_to_all import AllToAll
from nemohybrid.parallel.expert.deepep import DeepEP, Fastest, loadable
from nemohybrid.parallel.expert.placement import Compute, Dispatcher, Meanwhile, Placement
from nemohybrid.parallel.expert.slots import Slots

__all__ = ["KINDS", "AllToAll", "Compute", "DeepEP", "Dispatcher", "Meanwhile", "Placement", "Slots", "choose"]

KINDS = "auto", "all_to_all", "deepep"


def choose(placement: Placement, kind: str = "auto", room: float = 0.0) -> Dispatcher:
    """The dispatcher that `kind` names; "auto": DeepEP for what it can send, all-to-all for the rest.

    `room`, if above 0, is how much an all-to-all of fixed size has of an even load; DeepEP sends what there is. Raises
    ConfigError for a kind that is unknown, not installed, or cannot do it.
    """
    if kind not in KINDS:
        raise ConfigError(f"no dispatcher {kind!r}{did_you_mean(kind, KINDS)}. Legal: {', '.join(KINDS)}")
    if kind == "deepep":
        if room:
            raise ConfigError("deepep sends what there is: room is for all_to_all. Legal: no room, or all_to_all")
        return DeepEP(placement)
    exchange = Slots(placement, room) if room else AllToAll(placement)
    return Fastest(DeepEP(placement), exchange) if kind == "auto" and _may_use_deepep(placement) else exchange


def _may_use_deepep(placement: Placement) -> bool:
    handle = placement.block.handle
    return handle is not None and placement.tensor == 1 and "nccl" in dist.get_backend(handle) and loadable()

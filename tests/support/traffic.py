"""Every collective that torch.distributed is asked for, whoever asks: our own code, FSDP's hooks, a backward pass.

Bytes are what a rank sends when n ranks form a ring (Thakur et al. 2005, section 4). With S bytes of the whole tensor, which
is the larger of what goes in and what comes out:

    all_gather, reduce_scatter   (n - 1) / n * S
    all_reduce                   2 (n - 1) / n * S

Of an all_to_all it is counted what this rank gives to others.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemohybrid.parallel.context import ParallelContext

ROUNDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often the parts of a tensor go around the ring."""
ALL_TO_ALL = "all_to_all"

_SPELLINGS = {"allreduce": "all_reduce", "allgather": "all_gather", "_base": ""}
_NAMESPACES = ("_c10d_functional", "c10d")
_NOTHING_SENT = ("wait_tensor",)


@dataclass(frozen=True)
class Collective:
    """kind: all_reduce, all_gather, reduce_scatter, all_to_all, or the name of another operator; group: its role; whole: S, or
    what an all_to_all gives to others, in bytes."""

    kind: str
    group: str
    ranks: int
    whole: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends. KeyError for a kind that has no formula above."""
        return self.whole if self.kind == ALL_TO_ALL else ROUNDS[self.kind] * (self.ranks - 1) / self.ranks * self.whole


class Traffic(TorchDispatchMode):
    """While entered, lists the collectives of this rank, in their order.

    It sees operators, so that it makes no difference which Python function calls them. What an operator calls inside, as
    `_c10d_functional` does with `c10d`, is not seen again. On a CPU a backward pass, with all its hooks, runs in the thread
    that asked for it, and so within the mode; of the threads that autograd has for GPUs nothing is known here.
    """

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.roles = roles(context)
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in _NAMESPACES and name not in _NOTHING_SENT:
            name_of_group = _group_name(args)
            group, kind = dist.distributed_c10d._resolve_process_group(name_of_group), _kind(name)
            whole = _given(args, group.rank()) if kind == ALL_TO_ALL else max(_bytes(part) for part in (*args, result))
            self.collectives.append(Collective(kind, self.roles.get(name_of_group, "data"), group.size(), whole))
        return result

    def take(self) -> list[Collective]:
        """What was listed since the last call."""
        taken, self.collectives = self.collectives, []
        return taken


def roles(context: ParallelContext) -> dict[str, str]:
    """Name of a process group -> tensor, context, data or world. Others, which FSDP makes among the data ranks, are data too.

    Of several that are the whole world, and one group, the last is named."""
    groups = {"world": context.world, "context": context.context, "data": context.data, "tensor": context.tensor}
    return {g.handle.group_name: role for role, g in groups.items() if g.handle is not None}


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(group, kind, ranks) -> number of collectives, and bytes of the whole tensors."""
    number, whole = Counter(), Counter()
    for one in collectives:
        key = one.group, one.kind, one.ranks
        number[key] += 1
        whole[key] += one.whole
    return {key: (number[key], whole[key]) for key in sorted(number)}


def _kind(operator: str) -> str:
    for ours, common in _SPELLINGS.items():
        operator = operator.replace(ours, common)
    known = [kind for kind in ROUNDS if operator.strip("_").startswith(kind)]
    return known[0] if known else {"all_to_all_single": ALL_TO_ALL}.get(operator, operator.strip("_"))


def _given(args: Sequence[Any], rank: int) -> int:
    """Of the rows in an all_to_all_single(rows, received, sent, group), those that are for others."""
    rows, _, sent, *_ = args
    return sum(n for other, n in enumerate(sent) if other != rank) * rows[0].nbytes if len(rows) else 0


def _group_name(args: Iterable[Any]) -> str:
    """Functional operators take the name last, the others an object; a reduction beside it is such an object as well."""
    names = [arg for arg in args if isinstance(arg, str)]
    return names[-1] if names else next(filter(None, map(_unboxed_name, args)))


def _unboxed_name(arg: Any) -> str | None:
    if not isinstance(arg, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(arg).group_name
    except RuntimeError:  # a ReduceOp
        return None


def _bytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, Tensor))

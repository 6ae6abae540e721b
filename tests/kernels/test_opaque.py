"""What lets torch.compile trace our code: attributes without a lock, and functions that it takes as one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid_kernels.lazy import lazy
from nemohybrid_kernels.opaque import opaque


@dataclass(frozen=True)
class Pair:
    made: list[int]

    @lazy
    def total(self) -> int:
        """A sum."""
        self.made.append(0)
        return len(self.made)


def test_a_lazy_attribute_is_made_once_for_each_owner_and_only_if_asked_for():
    first, second = Pair([]), Pair([])
    assert [first.total, first.total, first.made, second.made] == [1, 1, [0], []]


def _halves(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x) // parts), x.new_empty(parts)


@opaque("test_opaque_sums", like=_halves)
def sums(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Sums over columns and rows, by way of numbers on the host, which cannot be traced."""
    rows = torch.tensor(x.tolist()).view(parts, -1)
    return rows.sum(0), rows.sum(1)


def test_an_opaque_function_is_one_step_of_a_graph():
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.arange(6.0)
    columns, rows = torch.compile(lambda x: sums(x * 2, 2), fullgraph=True, backend=backend)(x)
    assert columns.tolist() == [6, 10, 14]
    assert rows.tolist() == [6, 24]
    assert any("test_opaque_sums" in name for name in names), names
    assert all(torch.equal(*pair) for pair in zip(sums(x * 2, 2), (columns, rows), strict=True))

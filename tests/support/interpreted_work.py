"""What a Triton kernel reads, writes and multiplies while the interpreter runs it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

Addresses = dict[int, list[np.ndarray]]
"""Bytes of an element -> where such elements were touched."""


@dataclass
class Work:
    """`flops` of tl.dot, a multiply-add counting two."""

    read: Addresses = field(default_factory=lambda: defaultdict(list))
    written: Addresses = field(default_factory=lambda: defaultdict(list))
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Every element that is read, once, and every one that is written, once."""
        return sum(
            width * len(np.unique(np.concatenate(places)))
            for touched in (self.read, self.written)
            for width, places in touched.items()
        )


@contextmanager
def watched() -> Iterator[Work]:
    """Within the block kernels work as ever, and what they do is added up."""
    work = Work()
    load, store, dot = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")
    )

    def masked_load(builder: Any, places: Any, mask: Any, *rest: Any) -> Any:
        _note(work.read, places, mask)
        return load(builder, places, mask, *rest)

    def masked_store(builder: Any, places: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _note(work.written, places, mask)
        return store(builder, places, value, mask, *rest)

    def multiplied(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        work.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(builder, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        patch.setattr(InterpreterBuilder, "create_dot", multiplied)
        yield work


def _note(touched: Addresses, places: Any, mask: Any) -> None:
    width = places.get_element_ty().primitive_bitwidth // 8
    touched[width].append(np.unique(places.data[np.broadcast_to(mask.data, places.data.shape)]))

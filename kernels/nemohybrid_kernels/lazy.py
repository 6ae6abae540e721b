"""Attributes that are computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class lazy(Generic[T]):
    """`functools.cached_property` without the lock that it takes in Python 3.11, into which torch.compile cannot look."""

    def __init__(self, compute: Callable[..., T]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, owner: object, _: type) -> T:
        value = self.compute(owner)
        if not torch.compiler.is_compiling():  # a graph leaves objects alone, and makes what is the same once
            object.__setattr__(owner, self.name, value)  # found before this from now on; the owner may be frozen
        return value

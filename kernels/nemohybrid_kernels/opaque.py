"""Functions that torch.compile takes as one step, since it cannot look into them: calls of C++, counting in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch


def opaque(
    name: str, like: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of tensors, numbers and lists of them, all annotated, that returns new tensors.

    While torch.compile traces, it is the operator nemohybrid::`name`, and `like` makes results of the same shapes without
    looking at values. Else it is called as it is: an operator would cost some 0.05 ms more.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"nemohybrid::{name}", function, mutates_args=(), tags=tags)
        operator.register_fake(like)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return call

    return decorate

"""What would make the host wait for a GPU, found on a CPU: such code cannot be captured in a CUDA graph either."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


class NothingWaits(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU, or a shape depend on what is there. Looks into our operators too."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique_consecutive", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        device = (kwargs or {}).get("device")
        assert name != "_to_copy" or device in (None, args[0].device), "a copy to another device"
        indices = args[1] if name in ("index", "index_put_") else []
        assert not any(i is not None and i.dtype == torch.bool for i in indices), "a shape depends on a mask"
        ours = OPDEFS.get(f"{func.namespace}::{name}")
        if ours is not None:
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Within the block nothing may wait. Lists and NumPy read a CPU's memory without an operator, and are refused as well."""

    def refuse(tensor: Tensor, *_: Any) -> None:
        raise AssertionError("a list waits for the device")

    with mock.patch.multiple(Tensor, tolist=refuse, numpy=refuse, cpu=refuse), NothingWaits():
        yield

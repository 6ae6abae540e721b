"""Optional kernels for CPUs in C++: `python -m nemohybrid_kernels.cpp` compiles them, in five seconds.

Never built by themselves: a run neither waits for a compiler nor depends on which rank met one first, and nobody needs one
to install. What is built is found by any later run on this machine.

The library knows nothing of torch, only pointers and sizes, and is called through ctypes.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.cpp.build import COMMAND, is_trusted, library_file, openmp_file

DTYPES = (torch.bfloat16, torch.float32)


class Sizes(ctypes.Structure):
    """`struct Sizes` of ssd.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "L", "chunks", "Q", "G", "R", "P", "N", "threads")]


class View(ctypes.Structure):
    """`struct View` of ssd.cpp: strides of rows of the batch and of tokens, in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch_stride", "stride")]


_TYPES: dict[str, Any] = {
    "b": ctypes.c_int,  # is it bf16, and other flags and small counts
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "z": ctypes.POINTER(Sizes),
    "v": View,
}
_ARGUMENTS = {
    "norm_forward": "b pi pi p pp iii f b",
    "norm_backward": "b pi pi pp pi p pi p iii b",
    "conv1d_forward": "b pii ppppp iiii bb",
    "conv1d_backward": "b pii pppp pii pii ppp iiii bb",
    "softmax_forward": "b ppp iii f b",
    "softmax_backward": "b ppp iii f b",
    "squared_relu_forward": "b pp i b",
    "squared_relu_backward": "b ppp i b",
    "ssd_prepare": "b z pv pp pv pv p pppp pppp",
    "ssd_weights": "b z pppp",
    "ssd_pass_states": "b z ppppp",
    "ssd_combine": "b z ppp pv pp",
    "ssd_prepare_back": "b z pv ppppp",
    "ssd_weights_back": "b z pppppp",
    "ssd_pass_back": "b z ppppppp",
    "ssd_finish": "b z pv ppp pv pppppp pppp pv ppp pv pv",
}
"""Function -> its arguments, a letter of `_TYPES` each."""


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors like these, and what to do about it; None where they can."""
    if device.type != "cpu":
        return "it is for CPUs"
    if dtype not in DTYPES:
        return f"it computes in bf16 and fp32, not in {str(dtype).removeprefix('torch.')}"
    return None if torch.compiler.is_compiling() else _missing()  # tracing ends at a question to the file system


def reluctance(device: torch.device) -> str | None:
    """Why "auto" should not take the kernels here, or None. Who asks for them gets operators that nothing is fused with."""
    return "torch.compile cannot look into it" if torch.compiler.is_compiling() else None


@cache
def _missing() -> str | None:
    if not sys.platform.startswith("linux") or openmp_file() is None:
        return "it needs Linux and a torch with OpenMP"
    file = library_file()
    if not file.exists():
        return f"it is not built (`{COMMAND}` does that in seconds, with a C++ compiler)"
    if not is_trusted(file):
        return f"{file} is not this user's own, or others may write to it"
    return None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_file()))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in arguments if letter != " "], None
    return library


def call(name: str, like: Tensor, *arguments: Any) -> None:
    """Call a function of the library; tensors go as pointers, None as null. `like` says whether it is about bf16."""
    getattr(_library(), name)(
        like.dtype == torch.bfloat16, *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    )


def rows(x: Tensor) -> Tensor:
    """[..., D] -> [n, D] with neighbouring channels; a copy only where the strides ask for it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def threads() -> int:
    """As many as torch would take."""
    return torch.get_num_threads()

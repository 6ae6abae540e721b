"""The kernel canary: a call of an operator, forward and backward, held to its twin on the machine that is to train.

A kernel that is right on one GPU can be silently wrong on another, or under another compiler: mamba-ssm's scan on Blackwell
(github.com/state-spaces/mamba/pull/997), gradients of flash-linear-attention on Hopper from Triton 3.4 on
(github.com/fla-org/flash-linear-attention/issues/640).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 2e-3}
"""How far a kernel may be off, beside what TWIN allows. A rounding to bf16 costs up to 2e-3, and kernels round more often
than their twins or elsewhere; in fp32 some packages multiply in TF32, whose roundings cost up to 5e-4. The faults known
from GPUs were of the size of the result."""
TWIN = 4.0
"""Times what the twin is off when it computes in the same types: where sums cancel, nobody has more digits."""


class KernelMismatch(RuntimeError):
    """An operator that gave another result than its twin, or none."""


@dataclass(frozen=True)
class Case:
    """One call of `operator`, as its `backend` will be called in training.

    `sizes` says in words what the call is like: two cases of the same name are the same. `inputs()` draws the arguments on
    the CPU, the same ones in every process; `run` and `twin` take them by name and return a tensor or several. The twin also
    takes them in float64. `run` and its backward pass run within `around()`.
    """

    operator: str
    backend: str
    sizes: str
    inputs: Callable[[], Tensors]
    run: Callable[..., Any]
    twin: Callable[..., Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def name(self) -> str:
        """`ssd_scan triton: 128 heads of 64, ...`."""
        return f"{self.operator} {self.backend}: {self.sizes}"


def check(case: Case, device: torch.device) -> None:
    """Compare every output, and the gradient of every floating input, with those of the twin in float64.

    The inputs are the same numbers for both. Raises KernelMismatch, which names the tensors that are wrong and by how much.
    """
    given = {name: tensor.to(device) for name, tensor in case.inputs().items()}
    got = _results_of_kernel(case, given)
    exact = _results(case.twin, {n: t.double() if t.is_floating_point() else t for n, t in given.items()})
    rounded = _results(case.twin, given)
    allowed = ALLOWED[torch.bfloat16 if any(t.dtype == torch.bfloat16 for t in given.values()) else torch.float32]
    faults = list(_faults(got, exact, rounded, allowed))
    if faults:
        raise KernelMismatch(f"{case.name}: {'; '.join(faults)}")


def _results_of_kernel(case: Case, given: Tensors) -> Tensors:
    try:
        with case.around():
            got = _results(case.run, given)
        if any(tensor.is_cuda for tensor in given.values()):
            torch.cuda.synchronize()  # a kernel's failure shows when somebody waits for it
        return got
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = (str(error).strip() or "no message").split("\n", 1)[0]
        raise KernelMismatch(f"{case.name}: it raised {type(error).__name__}: {what}") from error


@torch.enable_grad()
def _results(run: Callable[..., Any], given: Mapping[str, Tensor]) -> Tensors:
    """Outputs, and gradients under random output gradients that every type can hold."""
    arguments = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
    leaves = {name: tensor for name, tensor in arguments.items() if tensor.requires_grad}
    returned = run(**arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    generator = torch.Generator().manual_seed(len(outputs))
    draws = [torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), draws, allow_unused=True)
    results = {"output" if len(outputs) == 1 else f"output {i}": out.detach() for i, out in enumerate(outputs)}
    reached = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return results | {f"gradient of {name}": gradient for name, gradient in reached.items()}


def _faults(got: Tensors, exact: Tensors, rounded: Tensors, allowed: float) -> Iterator[str]:
    for name, wanted in exact.items():
        if name not in got:
            yield f"no {name}"
        elif got[name].shape != wanted.shape:
            yield f"{name} has shape {list(got[name].shape)}, not {list(wanted.shape)}"
        elif bad := int((~got[name].isfinite()).sum()):
            yield f"{name} holds NaN or infinity in {bad} of {wanted.numel()} places"
        elif fault := _distance_fault(got[name], wanted, rounded[name], allowed):
            yield f"{name} {fault}"


def _distance_fault(got: Tensor, wanted: Tensor, rounded: Tensor, allowed: float) -> str | None:
    """By the largest entry, which sees one wrong tile, and as a whole, which sees many wrong entries that are small."""
    measures = {"its largest entry": torch.inf, "its norm": 2}
    for of_what, order in measures.items():
        scale = torch.linalg.vector_norm(wanted, order).clamp_min(torch.finfo(torch.float32).tiny)
        off, twin_off = (
            (torch.linalg.vector_norm(tensor.double() - wanted, order) / scale).item() for tensor in (got, rounded)
        )
        limit = allowed + TWIN * twin_off
        if off > limit:
            return f"is off by {off:.2g} of {of_what}, where {limit:.2g} is allowed"
    return None

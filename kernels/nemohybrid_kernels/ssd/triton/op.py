"""`ssd_scan` in Triton as two custom operators: torch.compile sees what they return, and not into them."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.ssd.triton.launch import Call, backward, forward, like


def ssd_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `nemohybrid_kernels.ssd.ssd_scan`; twin: `reference.ssd_chunked`.

    `chunk_size` is taken as the next power of two between 16 and 128. The states between chunks are kept in x's type, and
    carried from one to the next in fp32. For the backward pass nothing is kept but the arguments.
    """
    starts = None if document_ids is None else document_starts(document_ids)
    x, dt, B, C = (_unit_stride(t) for t in (x, dt, B, C))
    initial = None if initial_state is None else initial_state.float().contiguous()
    return _scan(x, dt.float(), A.float(), B, C, D, starts, initial, chunk_size)


def _unit_stride(t: Tensor) -> Tensor:
    """Kernels want the last dimension contiguous, and copy nothing else."""
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("nemohybrid::ssd_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    initial: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    found = forward(Call(x, dt, A, B, C, D, None, starts, initial, chunk_size=chunk_size))
    return found.y, found.final.contiguous()


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(x), x.new_empty(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32)


@torch.library.custom_op("nemohybrid::ssd_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    d_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    initial: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, dt, A, B, C, D, None, starts, initial, chunk_size=chunk_size)
    got = backward(call, _unit_stride(dy), d_final.contiguous())
    dD = A.new_empty(0) if got.D is None else got.D
    return got.x, got.dt, got.A, got.B, got.C, dD, got.initial.contiguous()


@_scan_backward.register_fake
def _(
    dy: Tensor, d_final: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    dD = A.new_empty(0) if D is None else like(D)
    return like(x), like(dt), like(A), like(B), like(C), dD, like(d_final)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    D, initial = tensors[5], tensors[7]
    *got, dD, d_initial = _scan_backward(dy, d_final, *tensors, ctx.chunk_size)
    return *got, (None if D is None else dD), None, (None if initial is None else d_initial), None


_scan.register_autograd(_gradients, setup_context=_keep)

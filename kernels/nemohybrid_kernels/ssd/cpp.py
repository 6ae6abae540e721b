"""The chunked scan with everything but its products in C++, and its gradient by hand. Twin of `reference.ssd_chunked`.

Dimensions as there, and W = R*P, the columns that the heads of a group have together. i counts the chunks of all rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.cpp import Sizes, View, call, threads
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.ssd.reference import default_chunk_size


def ssd_scan_cpp(
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
    """Arguments and results as in `nemohybrid_kernels.ssd.ssd_scan`, for bf16 and fp32 on a CPU."""
    starts = None if document_ids is None else document_starts(document_ids)
    Q = min(chunk_size or default_chunk_size(x), x.shape[1])
    B, C = B.to(x.dtype), C.to(x.dtype)
    return _Scan.apply(x, dt, A, B, C, D, starts, initial_state, Q)  # pyright: ignore[reportReturnType]


class _Scan(torch.autograd.Function):
    """Keeps the inputs, the decays, and of each chunk the operands of its products: about five times the size of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        starts: Tensor | None,
        initial: Tensor | None,
        Q: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [None if t is None else t.dtype for t in (dt, A, D, initial)]
        x, B, C = (_rows(t) for t in (x, B, C))
        dt, A = (t.float().contiguous() for t in (dt, A))
        D, initial = (None if t is None else t.float().contiguous() for t in (D, initial))
        z = _sizes(x, B, Q)
        i, G, R, P, N, W = z.batch * z.chunks, z.G, z.R, z.P, z.N, z.R * z.P

        lo = torch.empty(i, Q, dtype=torch.int32)
        a, w_in, w_out = (torch.empty(i, G * R, Q) for _ in range(3))
        u, u_out = x.new_empty(i * G * R, Q, P), x.new_empty(i * G, Q, W)
        B_iG, C_iG = x.new_empty(i * G, Q, N), x.new_empty(i * G, Q, N)
        inputs = (x, _view(x), dt, A, B, _view(B), C, _view(C), starts)
        call("ssd_prepare", x, z, *inputs, lo, a, w_in, w_out, u, u_out, B_iG, C_iG)

        CB, weights = torch.bmm(C_iG, B_iG.mT), x.new_empty(i * G * R, Q, Q)
        call("ssd_weights", x, z, a, lo, CB, weights)
        before, final = x.new_empty(i * G, N, W), torch.empty(z.batch, G * R, P, N)
        call("ssd_pass_states", x, z, torch.bmm(B_iG.mT, u_out), w_in, initial, before, final)
        carried, y = torch.bmm(C_iG, before), x.new_empty(x.shape)
        call("ssd_combine", x, z, torch.bmm(weights, u), carried, w_in, x, _view(x), D, y)

        ctx.sizes, ctx.starts_from = z, initial is not None
        ctx.save_for_backward(x, dt, A, D, lo, a, w_in, w_out, u, u_out, B_iG, C_iG, CB, weights, before, carried)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, dt, A, D, lo, a, w_in, w_out, u, u_out, B, C, CB, weights, before, carried = ctx.saved_tensors
        dy, dfinal = grads
        dy = torch.zeros_like(x) if dy is None else _rows(dy)
        dfinal, z = None if dfinal is None else dfinal.contiguous(), ctx.sizes

        dwithin, dcarried, da = torch.empty_like(u), torch.empty_like(u_out), torch.empty_like(a)
        call("ssd_prepare_back", x, z, dy, _view(dy), carried, w_in, dwithin, dcarried, da)
        dCB = torch.empty_like(CB)
        call("ssd_weights_back", x, z, torch.bmm(dwithin, u.mT), CB, a, lo, dCB, da)

        dgained, dkept = torch.empty_like(before), a.new_empty(*a.shape[:2], z.N)
        dinitial = a.new_empty(z.batch, z.G * z.R, z.P, z.N) if ctx.starts_from else None
        call("ssd_pass_back", x, z, torch.bmm(C.mT, dcarried), before, w_in, dfinal, dgained, dkept, dinitial)

        dx, ddt, dA, dD = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(A), torch.empty_like(A)
        dB, dC = (x.new_empty(z.batch, z.L, z.G, z.N) for _ in "BC")
        du = (torch.bmm(weights.mT, dwithin), torch.bmm(B, dgained))
        dB_parts = (torch.bmm(dCB.mT, C), torch.bmm(u_out, dgained.mT))
        dC_parts = (torch.bmm(dCB, B), torch.bmm(dcarried, before.mT))
        inputs = (x, _view(x), dt, A, D, dy, _view(dy), *du, w_out, lo, da, dkept, *dB_parts, *dC_parts)
        call("ssd_finish", x, z, *inputs, dx, ddt, dA, dD, dB, dC)

        ddt, dA, dD, dinitial = (
            None if t is None or dtype is None else t.to(dtype)
            for t, dtype in zip((ddt, dA, dD, dinitial), ctx.dtypes, strict=True)
        )
        return dx, ddt, dA, dB, dC, dD, None, dinitial, None


def _sizes(x: Tensor, B: Tensor, Q: int) -> Sizes:
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    return Sizes(batch, L, -(-L // Q), Q, G, H // G, P, N, threads())


def _rows(t: Tensor) -> Tensor:
    """[batch, L, n, m] where the n*m numbers of a token are neighbours."""
    n, m = t.shape[2:]
    together = (m == 1 or t.stride(3) == 1) and (n == 1 or t.stride(2) == m)
    return t if together else t.contiguous()


def _view(t: Tensor) -> View:
    return View(*t.stride()[:2])

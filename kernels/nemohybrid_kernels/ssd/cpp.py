"""The chunked scan with everything but its products in C++, and its gradient by hand. Twin of `reference.ssd_chunked`.

Dimensions as there, and W = R*P, the columns that the heads of a group have together. i counts the chunks of all rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.cpp import Sizes, View, call, threads
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.opaque import opaque
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
    """Keeps what `forward` returns for `backward`."""

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
        x, B, C = _rows(x), _rows(B), _rows(C)
        dt, A = (t.float().contiguous() for t in (dt, A))
        D, initial = (None if t is None else t.float().contiguous() for t in (D, initial))
        y, final, *made = _forward(x, dt, A, B, C, D, starts, initial, Q)
        ctx.save_for_backward(x, dt, A, B, D, *made)
        ctx.Q = Q
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, dt, A, B, D, *made = ctx.saved_tensors
        dy = torch.zeros(x.shape, dtype=x.dtype) if grads[0] is None else grads[0]
        state = ctx.dtypes[3] is not None
        dx, dB, dC, *small = _backward(dy, grads[1], x, dt, A, B, D, made, ctx.Q, state)
        ddt, dA, dD, dinitial = (
            None if dtype is None else t.to(dtype) for t, dtype in zip(small, ctx.dtypes, strict=True)
        )
        return dx, ddt, dA, dB, dC, dD, None, dinitial, None


def like(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, starts: Any, initial: Any, Q: int
) -> list[Tensor]:
    """Tensors like those of `_forward`."""
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    i = batch * -(-L // Q)
    single = [(batch, H, P, N), (i, H, Q), (i, H, Q), (i, H, Q)]
    others = [(i * H, Q, P), (i * G, Q, H // G * P), (i * G, Q, N), (i * G, Q, N), (i * G, Q, Q), (i * H, Q, Q)]
    others += [(i * G, N, H // G * P), (i * G, Q, H // G * P)]
    final, *decays = (x.new_empty(shape, dtype=torch.float32) for shape in single)
    lo = x.new_empty(i, Q, dtype=torch.int32)
    return [x.new_empty(x.shape), final, lo, *decays, *(x.new_empty(shape) for shape in others)]


@opaque("cpp_scan", like=like)
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    initial: Tensor | None,
    Q: int,
) -> list[Tensor]:
    """What `forward` returns, without its arguments."""
    y, final, (_, _, _, _, _, *made) = forward(x, dt, A, B, C, D, starts, initial, Q)
    return [y, final, *made]


def _like_gradients(
    dy: Tensor, dfinal: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, D: Any, made: Any, Q: int, state: bool
) -> tuple[Tensor, ...]:
    initial = (x.shape[0], *x.shape[2:], B.shape[-1]) if state else (0,)
    small = [torch.empty_like(dt), torch.empty_like(A), torch.empty_like(A), dt.new_empty(initial)]
    return x.new_empty(x.shape), B.new_empty(B.shape), B.new_empty(B.shape), *small


@opaque("cpp_scan_backward", like=_like_gradients)
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    made: list[Tensor],
    Q: int,
    state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d of x, B, C, dt, A, D and the initial state, of which the last is empty without one."""
    dx, dB, dC = x.new_empty(x.shape), B.new_empty(B.shape), B.new_empty(B.shape)
    *small, dinitial = backward(_rows(dy), dfinal, (x, dt, A, B, D, *made), Q, dx, dB, dC, state)
    ddt, dA, dD = small
    return dx, dB, dC, ddt, dA, dD, dt.new_empty(0) if dinitial is None else dinitial


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    initial: Tensor | None,
    Q: int,
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """y, the last state, and what `backward` wants: the inputs, the decays, and the operands of each chunk's products,
    about six times the size of x. The numbers of a token are neighbours in x, B and C; dt, A, D, initial: fp32, contiguous.
    """
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
    return y, final, (x, dt, A, B, D, lo, a, w_in, w_out, u, u_out, B_iG, C_iG, CB, weights, before, carried)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    kept: tuple[Any, ...],
    Q: int,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
    state: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """d of dt, A, D and, where there was a `state`, of the initial one, in fp32. dx, dB and dC, which may be parts of wider
    rows, are filled.
    """
    x, dt, A, B, D, lo, a, w_in, w_out, u, u_out, B_iG, C_iG, CB, weights, before, carried = kept
    z, dfinal = _sizes(x, B, Q), None if dfinal is None else dfinal.contiguous()
    dwithin, dcarried, da = torch.empty_like(u), torch.empty_like(u_out), torch.empty_like(a)
    call("ssd_prepare_back", x, z, dy, _view(dy), carried, w_in, dwithin, dcarried, da)
    dCB = torch.empty_like(CB)
    call("ssd_weights_back", x, z, torch.bmm(dwithin, u.mT), CB, a, lo, dCB, da)

    dgained, dkept = torch.empty_like(before), a.new_empty(*a.shape[:2], z.N)
    dinitial = a.new_empty(z.batch, z.G * z.R, z.P, z.N) if state else None
    call("ssd_pass_back", x, z, torch.bmm(C_iG.mT, dcarried), before, w_in, dfinal, dgained, dkept, dinitial)

    ddt, dA, dD = torch.empty_like(dt), torch.empty_like(A), torch.empty_like(A)
    du = (torch.bmm(weights.mT, dwithin), torch.bmm(B_iG, dgained))
    dB_parts = (torch.bmm(dCB.mT, C_iG), torch.bmm(u_out, dgained.mT))
    dC_parts = (torch.bmm(dCB, B_iG), torch.bmm(dcarried, before.mT))
    inputs = (x, _view(x), dt, A, D, dy, _view(dy), *du, w_out, lo, da, dkept, *dB_parts, *dC_parts)
    call("ssd_finish", x, z, *inputs, dx, _view(dx), ddt, dA, dD, dB, _view(dB), dC, _view(dC))
    return ddt, dA, dD, dinitial


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

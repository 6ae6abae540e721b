"""The scan of the package mamba-ssm (2.3), called as ours is.

What differs from ours: fp32 inputs are multiplied in TF32, gradients of decays and of D are added by atomics (so two runs
differ in their last bits, unless MAMBA_DETERMINISTIC=1), and offsets are 32-bit numbers.
"""

import torch
from torch import Tensor

from nemohybrid_kernels import packages
from nemohybrid_kernels.checks import document_runs
from nemohybrid_kernels.errors import BackendError

MODULE = "mamba_ssm.ops.triton.ssd_combined"
ADVICE = "pip install 'nemohybrid[mamba]'"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
"""Head dimension and state size: above, its backward kernels run out of shared memory."""
FARTHEST = 2**31 - 1
"""Its kernels count offsets in 32 bits and go wrong silently beyond (state-spaces/mamba, issue 1015)."""
DEFAULT_CHUNK, SMALLEST_CHUNK = 256, 16


def obstacle(device: torch.device, dtype: torch.dtype = torch.float32, P: int = 64, N: int = 128) -> str | None:
    """Why it cannot scan inputs of `dtype`, head dimension P and state N on `device`, or None."""
    if dtype not in DTYPES:
        return f"mamba-ssm takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    for what, size in {"heads": P, "states": N}.items():
        if size > WIDEST:
            return f"mamba-ssm takes {what} of up to {WIDEST}, not of {size}"
    return packages.cuda_obstacle(MODULE, ADVICE, device)


def run(
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
    """Arguments and results as of `nemohybrid_kernels.ssd.ssd_scan`. Raises BackendError where offsets do not suffice.

    The gradient of initial_state is rounded to x's type on its way.
    """
    chunk = _power_of_two(chunk_size or DEFAULT_CHUNK)
    _check_buffers(x, B, chunk)
    scan = packages.load(MODULE, ADVICE).mamba_chunk_scan_combined
    return scan(
        _within_reach("x", x),
        dt.float(),
        A.float(),
        _within_reach("B", B.to(x.dtype)),
        _within_reach("C", C.to(x.dtype)),
        chunk,
        D=None if D is None else D.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        # The first chunk is compared with document 0: numbered from there, the first document gets the initial state.
        seq_idx=None if document_ids is None else document_runs(document_ids).int(),
        dt_softplus=False,
        return_final_states=True,
    )


def _power_of_two(chunk: int) -> int:
    return max(SMALLEST_CHUNK, 1 << (chunk - 1).bit_length())


def _within_reach(name: str, tensor: Tensor) -> Tensor:
    """The tensor, copied where the rows of a wider one put its last element too far away."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach <= FARTHEST:
        return tensor
    _check_reach(name, tensor.numel())
    return tensor.contiguous()


def _check_buffers(x: Tensor, B: Tensor, chunk: int) -> None:
    """Of what the kernels allocate, the largest: states of all chunks, and C B^T within them."""
    (batch, L, H, P), (G, N) = x.shape, B.shape[-2:]
    chunks = -(-L // chunk)
    _check_reach("the states of all chunks", batch * chunks * H * P * N)
    _check_reach("C B^T of all chunks", batch * chunks * G * chunk * chunk)


def _check_reach(name: str, elements: int) -> None:
    if elements > FARTHEST:
        raise BackendError(
            f"ssd_scan: mamba-ssm counts offsets in 32 bits, but {name} has {elements} elements. "
            "Legal: backend 'triton' or 'torch', shorter or fewer rows"
        )

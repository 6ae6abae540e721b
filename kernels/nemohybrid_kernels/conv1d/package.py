"""The convolution of the package causal-conv1d (1.6), called as ours is.

The package takes document numbers, or inputs before the row, or gives the last inputs, never two of these; its channels
come in eights and its filters have 2 to 4 taps. Documents and channels are mended here, other filters are an obstacle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels import packages
from nemohybrid_kernels.checks import document_runs

MODULE = "causal_conv1d"
ADVICE = "pip install 'nemohybrid[mamba]'"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAPS = (2, 3, 4)
EIGHT = 8
"""Channels, and the steps from row to row, are multiples of it where channels lie last."""


def obstacle(device: torch.device, dtype: torch.dtype = torch.float32, taps: int = 4) -> str | None:
    """Why it cannot convolve inputs of `dtype` with so many taps on `device`, or None."""
    if dtype not in DTYPES:
        return f"causal-conv1d takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if taps not in TAPS:
        nearest = min(max(taps, TAPS[0]), TAPS[-1])
        return f"causal-conv1d takes filters of {TAPS[0]} to {TAPS[-1]} taps, not of {taps}; nearest legal: {nearest}"
    return packages.cuda_obstacle(MODULE, ADVICE, device)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `nemohybrid_kernels.conv1d.causal_conv1d`, for what `obstacle` lets pass.

    The filter is not rounded to x's type. Channels that are no multiple of 8 are padded, which copies x, and so are
    documents behind an initial state.
    """
    runs = None if document_ids is None else document_runs(document_ids)
    history = None if initial_state is None else initial_state.to(x.dtype)
    final = _last_inputs(x, runs, history, weight.shape[1] - 1)
    return _convolve(x, weight, bias, activation, runs, history), final


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, runs: Tensor | None, history: Tensor | None
) -> Tensor:
    skipped = 0
    if runs is not None and history is not None:  # not both: the history becomes tokens of the first document
        skipped = history.shape[1]
        x, runs, history = torch.cat([history, x], 1), F.pad(runs, (skipped, 0)), None
    spare = -x.shape[2] % EIGHT
    y = packages.load(MODULE, ADVICE).causal_conv1d_fn(
        _aligned(F.pad(x, (0, spare)) if spare else x).transpose(1, 2),
        F.pad(weight, (0, 0, 0, spare)).contiguous(),
        None if bias is None else F.pad(bias.to(weight.dtype), (0, spare)),
        seq_idx=None if runs is None else runs.int().contiguous(),
        initial_states=None if history is None else F.pad(history, (0, spare)).contiguous().transpose(1, 2),
        activation=activation,
    )
    return y.transpose(1, 2)[:, skipped:, : x.shape[2]]


def _aligned(x: Tensor) -> Tensor:
    """[B, L, C] with channels last and steps of whole eights, copied where a wider row has others."""
    return x if x.stride(2) == 1 and x.stride(0) % EIGHT == 0 and x.stride(1) % EIGHT == 0 else x.contiguous()


def _last_inputs(x: Tensor, runs: Tensor | None, history: Tensor | None, taps: int) -> Tensor:
    """[B, taps, C]: the last inputs of the last document, zeros for what lies outside it."""
    if history is None:
        history = x.new_zeros(len(x), taps, x.shape[2])
    last = torch.cat([history, x[:, -taps:]], 1)[:, -taps:]
    if runs is None:
        return last.clone()
    of_run = F.pad(runs[:, -taps:], (taps, 0))[:, -taps:]  # what came before the row is of document 0
    return last.masked_fill((of_run != runs[:, -1:]).unsqueeze(-1), 0.0)

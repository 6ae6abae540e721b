"""The short causal convolution in plain PyTorch.

Dimensions: B batch, L length, C channels, K taps; S slots: a row with the zeros that keep its documents apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.checks import document_runs
from nemohybrid_kernels.documents import document_starts


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `nemohybrid_kernels.conv1d.causal_conv1d`.

    Every document gets K-1 inputs in front of it, zeros or the initial state, so that one convolution without masks
    serves them all.
    """
    (B, L, C), taps = x.shape, weight.shape[1] - 1
    history = x.new_zeros(B, taps, C) if initial_state is None else initial_state.to(x.dtype)
    slots_BSC = torch.cat([history, x], dim=1)
    if document_ids is not None and torch.compiler.is_compiling():
        y, final = _tap_by_tap(slots_BSC, weight, bias, document_starts(document_ids))
    elif document_ids is None:
        y, final = _depthwise(slots_BSC, weight, bias), slots_BSC[:, L:]
    else:
        slot_BL = torch.arange(L, device=x.device) + taps * document_runs(document_ids)
        slots_BSC = _spread(slots_BSC, slot_BL, taps)
        y = _take(_depthwise(slots_BSC, weight, bias), slot_BL)
        final = _take(slots_BSC, slot_BL[:, -1:] + 1 + torch.arange(taps, device=x.device))
    return (F.silu(y) if activation == "silu" else y), final.clone()


def _tap_by_tap(inputs_BSC: Tensor, weight: Tensor, bias: Tensor | None, starts_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution and the last inputs, in sizes that do not depend on the ids, for torch.compile, which makes one pass of
    it. Taps are masked where they reach into another document, and added up in fp32."""
    (L, K), maths = (starts_BL.shape[1], weight.shape[1]), torch.promote_types(inputs_BSC.dtype, torch.float32)
    position = torch.arange(1 - K, L, device=starts_BL.device)
    y = inputs_BSC.new_zeros((), dtype=maths) if bias is None else bias.to(maths)
    for tap, w in enumerate(weight.to(inputs_BSC.dtype).to(maths).unbind(1)):
        sees = position[tap : tap + L] >= starts_BL
        y = y + w * inputs_BSC[:, tap : tap + L].to(maths).masked_fill(~sees.unsqueeze(-1), 0.0)
    outside = position[L:] < starts_BL[:, -1:]
    return y.to(inputs_BSC.dtype), inputs_BSC[:, L:].masked_fill(outside.unsqueeze(-1), 0.0)


def _spread(rows: Tensor, slot_BL: Tensor, taps: int) -> Tensor:
    """[B, taps + L, C] -> [B, S, C]: the history where it is, token t `taps` behind output slot t, zeros in between."""
    B, slots = len(rows), int(slot_BL.max()) + 1 + taps
    history = torch.arange(taps, device=rows.device).expand(B, taps)
    at = _flat(torch.cat([history, slot_BL + taps], dim=1), slots)
    return rows.new_zeros(B * slots, rows.shape[2]).index_copy(0, at, rows.flatten(0, 1)).unflatten(0, (B, slots))


def _take(rows: Tensor, at: Tensor) -> Tensor:
    """rows [B, S, C], at [B, m] -> rows[b, at[b]] [B, m, C].

    Not by indexing, whose backward is five times slower. This one adds every row to a zero of its own, so it is
    deterministic.
    """
    return rows.flatten(0, 1).index_select(0, _flat(at, rows.shape[1])).unflatten(0, at.shape)


def _flat(at: Tensor, width: int) -> Tensor:
    """Positions [B, m] within rows of `width`, as positions in the flattened rows."""
    return (at + width * torch.arange(len(at), device=at.device).unsqueeze(1)).flatten()


def _depthwise(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """One filter of K taps per channel: [B, S, C] -> [B, S - K + 1, C].

    As an image one pixel wide with its channels last, which is how x lies in memory: forward and backward, oneDNN
    needs a quarter of its time for F.conv1d. The strides of the kernel matter; other views of it lose all of that.
    """
    kernel = _as_image(weight_CK.to(x_BSC.dtype).unsqueeze(-1))  # rows of K inputs with one channel
    bias = None if bias_C is None else bias_C.to(x_BSC.dtype)
    return F.conv2d(_as_image(x_BSC), kernel, bias, groups=len(weight_CK)).squeeze(-1).transpose(1, 2)


def _as_image(rows: Tensor) -> Tensor:
    """[n, length, channels] -> [n, channels, length, 1], without moving anything in memory."""
    return rows.transpose(1, 2).unsqueeze(-1)

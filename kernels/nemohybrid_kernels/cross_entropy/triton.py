"""The chunked loss with Triton kernels on the logits of a chunk: launchers on plain tensors, and operators of all chunks.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded. T tokens, n of a chunk, D channels, W rows of the weight, V columns of logits.
"""

import torch
from torch import Tensor

from nemohybrid_kernels.cross_entropy import linear, triton_kernels
from nemohybrid_kernels.cross_entropy.linear import Passes, Rows
from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch


def statistics_of_rows(logits: Tensor, labels: Tensor, columns: int, out: Tensor) -> None:
    """As `linear.Rows.statistics` says. logits [n, W], contiguous columns; labels [n]; out [3, n] fp32, contiguous columns."""
    launch(
        triton_kernels.cross_entropy_rows,
        (len(logits),),
        _config("cross_entropy_rows", logits, columns),
        logits=logits,
        labels=labels,
        out=out,
        V=columns,
        stride=logits.stride(0),
        out_stride=out.stride(0),
    )


def gradient_of_rows(logits: Tensor, labels: Tensor, columns: int, norm: Tensor, dlosses: Tensor) -> None:
    """As `linear.Rows.gradient` says. norm [2, n] fp32, contiguous columns; dlosses [n] fp32."""
    n, width = logits.shape
    config = _config("cross_entropy_gradient", logits, width)
    blocks = -(-width // config.tiles["BLOCK"])
    launch(
        triton_kernels.cross_entropy_gradient,
        (n * blocks,),
        config,
        logits=logits,
        labels=labels,
        norm=norm,
        dlosses=dlosses,
        V=columns,
        width=width,
        blocks=blocks,
        stride=logits.stride(0),
        norm_stride=norm.stride(0),
    )


def _config(kernel: str, logits: Tensor, width: int) -> Config:
    """No more columns at a time than there are."""
    found = config_for(kernel, logits.device, dtype=dtype_fact(logits))
    block = min(found.tiles["BLOCK"], max(16, 1 << (width - 1).bit_length()))
    return Config({"BLOCK": block}, found.warps, found.stages)


_ROWS = Rows(statistics_of_rows, gradient_of_rows)


@torch.library.custom_op("nemohybrid::linear_cross_entropy", mutates_args=())
def _statistics(x: Tensor, weight: Tensor, labels: Tensor, columns: int, chunk: int) -> Tensor:
    return linear.statistics(x, weight, labels, columns, chunk, _ROWS)


@torch.library.custom_op("nemohybrid::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    norm: Tensor,
    columns: int,
    chunk: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dlosses = dlosses.contiguous()  # those of a sum are one number
    return linear.gradients(dlosses, x, weight, labels, norm, columns, chunk, needs_x, needs_weight, _ROWS)


@_statistics.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, columns: int, chunk: int) -> Tensor:
    return x.new_empty(3, x.shape[0], dtype=torch.float32)


@_gradients.register_fake
def _(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    norm: Tensor,
    columns: int,
    chunk: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    D = x.shape[1]
    return x.new_empty(x.shape if needs_x else (0, D)), weight.new_empty(weight.shape if needs_weight else (0, D))


TRITON = Passes(_statistics, _gradients)

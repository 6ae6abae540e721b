"""The calls for which kernels are shipped: every entry of every configs.json is reached by one of them.

A case runs an operator's launchers forward and backward, on tensors made by a `Maker`: on the meta device, where launches are
recorded to be compiled, or filled and on a GPU, where they are timed. Sizes are those of Nemotron-H-8B (8192 tokens, 128 heads
of 64 channels, 8 groups, state 128; arXiv 2504.03624, table 1) where not said otherwise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from nemohybrid_kernels.activation import triton as relu2
from nemohybrid_kernels.conv1d import triton as conv1d
from nemohybrid_kernels.cross_entropy import triton as cross_entropy
from nemohybrid_kernels.launching import Recording, recording
from nemohybrid_kernels.mixer import triton as mixer
from nemohybrid_kernels.moe import triton as moe
from nemohybrid_kernels.norm import triton as norm
from nemohybrid_kernels.ssd import triton as ssd

BF16, FP32 = torch.bfloat16, torch.float32
Results = list[Tensor]


class Maker(Protocol):
    """A tensor whose entries are `like` "normal" ones, "steps" (small, positive), "rates" (negative), "starts" (int32 [b, L],
    as `document_starts` gives them), an "order" (int64 [n], each number below n once) or "labels" (int64 below 131,072)."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, like: str) -> Tensor: ...


def on_meta(shape: tuple[int, ...], dtype: torch.dtype, like: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """`run` calls launchers and returns all results; `name` begins with that of the operator."""

    name: str
    run: Callable[[Maker], Results]

    def launches(self, architecture: int) -> Recording:
        """What would run on sm_`architecture`, with tensors on the meta device."""
        with recording(architecture) as found:
            self.run(on_meta)
        return found


@dataclass(frozen=True)
class Mixer:
    """Sizes of a Mamba-2 layer, or of a shard of one; `packed`: with several documents; `recompute`: as of `mamba2_mixer`."""

    tokens: int = 8192
    heads: int = 128
    width: int = 64
    state: int = 128
    groups: int = 8
    taps: int = 4
    dtype: torch.dtype = BF16
    packed: bool = False
    recompute: bool = False

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def starts(self, make: Maker) -> Tensor | None:
        return make((1, self.tokens), torch.int32, "starts") if self.packed else None


def run_mixer(sizes: Mixer, make: Maker) -> Results:
    """As in training: all parts of one row of the input projection, and of one row of its gradient."""
    heads, inner, convolved = sizes.heads, sizes.inner, sizes.convolved
    zxbcdt = make((1, sizes.tokens, inner + convolved + heads), sizes.dtype, "normal")
    weights = mixer.Weights(
        conv=make((convolved, sizes.taps), sizes.dtype, "normal"),
        conv_bias=make((convolved,), sizes.dtype, "normal"),
        dt_bias=make((heads,), FP32, "rates"),
        A=make((heads,), FP32, "rates"),
        D=make((heads,), FP32, "normal"),
        norm=make((inner,), sizes.dtype, "normal"),
        starts=sizes.starts(make),
    )
    of_mixer = mixer.Sizes(heads, sizes.groups, sizes.state, inner // sizes.groups, 1e-5, None, None)
    out, kept = mixer.forward(zxbcdt, weights, of_mixer)
    kept = kept.least if sizes.recompute else kept
    dout = make(tuple(out.shape), out.dtype, "normal")
    d_zxbcdt, named = mixer.backward(dout, zxbcdt, kept, weights, of_mixer)
    return _present([out, d_zxbcdt, *named.values()])


def run_conv(sizes: Mixer, make: Maker) -> Results:
    """By itself, with inputs of a previous rank."""
    C, taps, dtype = sizes.convolved, sizes.taps, sizes.dtype
    x = make((1, sizes.tokens, C), dtype, "normal")
    weight, bias = make((C, taps), dtype, "normal"), make((C,), dtype, "normal")
    given = x, weight, bias, sizes.starts(make), make((1, taps - 1, C), dtype, "normal"), True
    y = conv1d.forward(*given)
    return _present([y, *conv1d.backward(make(tuple(y.shape), dtype, "normal"), *given)])


def run_scan(sizes: Mixer, make: Maker) -> Results:
    """By itself, with a state of a previous rank: contiguous inputs, dt after softplus."""
    row = 1, sizes.tokens
    x = make((*row, sizes.heads, sizes.width), sizes.dtype, "normal")
    dt, A = make((*row, sizes.heads), FP32, "steps"), make((sizes.heads,), FP32, "rates")
    B, C = (make((*row, sizes.groups, sizes.state), sizes.dtype, "normal") for _ in "BC")
    initial = make((1, sizes.heads, sizes.width, sizes.state), FP32, "normal")
    call = ssd.Call(x, dt, A, B, C, make((sizes.heads,), FP32, "normal"), None, sizes.starts(make), initial)
    y, final, _ = ssd.forward(call)
    got = ssd.backward(call, make(tuple(y.shape), sizes.dtype, "normal"), make(tuple(final.shape), FP32, "normal"))
    return _present([y, final, *got])


def run_norm(size: int, dtype: torch.dtype, tokens: int, make: Maker) -> Results:
    """The plain norm of a layer's input, `size` channels."""
    x, weight = make((tokens, size), dtype, "normal"), make((size,), dtype, "normal")
    y, rstd = norm.rms_forward(x, weight, 1e-5)
    return [y, *norm.rms_backward(make((tokens, size), dtype, "normal"), x, weight, rstd)]


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture: those of Nemotron 3 Nano 30B-A3B (its config.json)."""

    tokens: int = 8192
    hidden: int = 2688
    width: int = 1856
    per_token: int = 6
    dtype: torch.dtype = BF16


def run_experts(sizes: Experts, make: Maker) -> Results:
    """What lies between the products of the experts, forward and backward."""
    n, dtype = sizes.tokens * sizes.per_token, sizes.dtype
    x, up_out = make((sizes.tokens, sizes.hidden), dtype, "normal"), make((n, sizes.width), dtype, "normal")
    order, end = make((n,), torch.int64, "order"), None
    weights = relu2.Weights(make((n,), FP32, "steps"), order, end)
    rows = moe.permute(x, order, end, sizes.per_token)
    hidden = relu2.forward(up_out, weights)
    tokens = moe.unpermute(rows, make((n,), torch.int64, "order"), end, sizes.per_token)
    dout = make((n, sizes.width), dtype, "normal")  # becomes `hidden`
    return [rows, hidden, tokens, *relu2.weighted_backward(dout, up_out, weights)]


def run_squared_relu(width: int, dtype: torch.dtype, make: Maker) -> Results:
    """Of a feed-forward layer of `width`."""
    x = make((8192, width), dtype, "normal")
    return [relu2.forward(x), relu2.backward(make((8192, width), dtype, "normal"), x)]


def run_loss(tokens: int, columns: int, dtype: torch.dtype, make: Maker) -> Results:
    """Of a chunk of logits, which become their gradient."""
    logits, labels = make((tokens, columns), dtype, "normal"), make((tokens,), torch.int64, "labels")
    out = make((3, tokens), FP32, "normal")
    cross_entropy.statistics_of_rows(logits, labels, columns, out)
    cross_entropy.gradient_of_rows(logits, labels, columns, out[:2], make((tokens,), FP32, "normal"))
    return [out, logits]


def _present(results: Iterable[Tensor | None]) -> Results:
    return [result for result in results if result is not None]


def of_mixers(operator: str, run: Callable[[Mixer, Maker], Results], **named: Mixer) -> list[Case]:
    return [Case(f"{operator} {name.replace('_', ' ')}", partial(run, sizes)) for name, sizes in named.items()]


CASES = [
    *of_mixers(
        "mixer",
        run_mixer,
        whole=Mixer(),
        recomputed=Mixer(recompute=True),
        packed=Mixer(packed=True),
        one_of_8_ranks=Mixer(heads=16, groups=1),
        one_group=Mixer(groups=1),
        state_64=Mixer(state=64),
        state_256=Mixer(state=256),
        fp32=Mixer(dtype=FP32),
        fp32_state_256=Mixer(dtype=FP32, state=256),
    ),
    *of_mixers("conv", run_conv, with_history=Mixer(packed=True), of_8_taps=Mixer(taps=8), fp32=Mixer(dtype=FP32)),
    *of_mixers("ssd", run_scan, with_initial_state=Mixer(packed=True)),
    *(Case(f"norm of {size}", partial(run_norm, size, BF16, 8192)) for size in (4096, 8192, 16384)),
    Case("norm of 4096 fp32", partial(run_norm, 4096, FP32, 8192)),
    Case("experts", partial(run_experts, Experts())),
    Case("experts fp32", partial(run_experts, Experts(dtype=FP32))),
    *(
        Case(f"squared ReLU {name}", partial(run_squared_relu, 21504, of))
        for name, of in (("bf16", BF16), ("fp32", FP32))
    ),
    *(Case(f"loss {name}", partial(run_loss, 4096, 131072, of)) for name, of in (("bf16", BF16), ("fp32", FP32))),
]
